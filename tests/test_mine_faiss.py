"""faiss: the index as a file, and the approximate band with its recall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import refine_fast as rf
from refine_fast.errors import RefineFastError
from refine_fast.integrations.faiss import approximate_band_topk, build_index, write_index

faiss = pytest.importorskip("faiss", reason="needs faiss: pip install '.[pipeline]'")


@pytest.fixture(scope="module")
def clustered() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, 32, generator=generator)
    docs = torch.nn.functional.normalize(
        centres.repeat(100, 1) + torch.randn(5000, 32, generator=generator), dim=1
    )
    return torch.nn.functional.normalize(
        docs[:150] + 0.05 * torch.randn(150, 32, generator=generator), dim=1
    ), docs


def test_all_lists_are_the_exact_answer(clustered: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, docs = clustered
    index = build_index(docs, lists=40)
    exclude = [[i] for i in range(150)]
    ceiling = torch.linspace(0.5, 0.7, 150)
    rule = {"band": (0.4, 0.6), "skip": 3, "exclude": exclude, "ceiling": ceiling}
    everything = approximate_band_topk(index, queries, docs, 7, probes=40, **rule)
    sets = {**rule, "exclude": [set(ids) for ids in exclude]}
    as_sets = approximate_band_topk(index, queries, docs, 7, probes=40, **sets)
    assert torch.equal(as_sets.found.ids, everything.found.ids)
    nobody = {**rule, "exclude": [], "ceiling": ceiling[:0]}
    assert approximate_band_topk(
        index, queries[:0], docs, 7, probes=4, **nobody
    ).found.ids.shape == (0, 7)
    exact = rf.band_topk(queries, docs, 7, **rule)
    assert everything.recall == 1
    for ours, gold in zip(everything.found, exact, strict=True):
        torch.testing.assert_close(ours, gold, rtol=0, atol=0, equal_nan=True)


def test_fewer_lists_lose_recall_and_say_so(clustered: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, docs = clustered
    index = build_index(docs, lists=40)
    some = approximate_band_topk(
        index, queries, docs, 7, probes=1, band=(0.3, 0.6), skip=3, sample=150
    )
    exact = rf.band_topk(queries, docs, 7, band=(0.3, 0.6), skip=3)
    shared = sum(
        len((set(a) - {-1}) & set(b))
        for a, b in zip(exact.ids.tolist(), some.found.ids.tolist(), strict=True)
    )
    assert some.recall == pytest.approx(shared / int((exact.ids >= 0).sum()))
    assert 0.1 < some.recall < 1


@pytest.mark.parametrize("lists", [None, 20])
def test_index_file(
    clustered: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, lists: int | None
) -> None:
    docs = clustered[1]
    write_index(docs, tmp_path / "corpus.faiss", lists=lists)
    _, ids = faiss.read_index(str(tmp_path / "corpus.faiss")).search(docs[:9].numpy(), 1)
    assert ids[:, 0].tolist() == list(range(9))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.faiss"]


def test_nothing_to_find_is_no_loss(clustered: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, docs = clustered
    assert (
        approximate_band_topk(
            build_index(docs, lists=40), queries, docs, 7, probes=1, band=(2.0, 3.0)
        ).recall
        == 1
    )


def test_errors(clustered: tuple[torch.Tensor, torch.Tensor]) -> None:
    queries, docs = clustered
    with pytest.raises(
        RefineFastError, match=r"lists must be from 1 to the number of documents, 5000 \(got 0\)"
    ):
        build_index(docs, lists=0)
    # where faiss itself aborts
    with pytest.raises(
        RefineFastError, match="index is a faiss IndexHNSWFlat; give one with inverted lists"
    ):
        approximate_band_topk(
            faiss.IndexHNSWFlat(32, 8, faiss.METRIC_INNER_PRODUCT), queries, docs, 7, probes=1
        )
    index = build_index(docs, lists=40)
    for change, error, message in [
        ({"probes": 0}, RefineFastError, r"probes must be an integer >= 1 \(got 0\)"),
        (
            {"docs": docs[:4000]},
            RefineFastError,
            r"5000 vectors of 32 numbers, but docs have shape \(4000, 32\); give the index of",
        ),
        ({"docs": docs.double()}, TypeError, r"docs must be float32, .* \(got torch.float64\)"),
        ({"queries": queries[:, :8]}, ValueError, "queries have 8 columns and docs 32"),
        ({"queries": queries[0]}, ValueError, "queries must have two dimensions"),
        ({"ceiling": torch.ones(200)}, ValueError, "one value for each of the 150 queries"),
        # of queries that are not searched exactly too
        ({"exclude": [*[[]] * 149, [5000]]}, ValueError, "query 149 names document 5000"),
        (
            {"queries": torch.cat([queries[:3], queries[:1] * torch.nan])},
            ValueError,
            "row 3 of queries holds NaN",
        ),
        (
            {"index": faiss.IndexIVFFlat(faiss.IndexFlatL2(32), 32, 4)},
            RefineFastError,
            "IndexIVFFlat; give one with inverted lists by inner product",
        ),
    ]:
        given = {"index": index, "queries": queries, "docs": docs, "k": 7, "probes": 1}
        with pytest.raises(error, match=message):
            approximate_band_topk(**{**given, "sample": 1, **change})


def test_tensors_of_any_kind(clustered: tuple[torch.Tensor, torch.Tensor]) -> None:
    """In training, of 16 bits, negated views: the values as given are the truth."""
    queries, docs = (x.bfloat16() for x in clustered)
    gold = rf.band_topk(queries, docs, 7, band=(0.4, 0.6), skip=3)
    for q, d in [
        (queries, docs),
        (queries.float(), docs.float().requires_grad_()),
        (queries.float().requires_grad_(), docs),
        (torch._neg_view(-queries), torch._neg_view(-docs)),
    ]:
        index = build_index(d, lists=40)
        some = approximate_band_topk(index, q, d, 7, probes=40, band=(0.4, 0.6), skip=3)
        assert some.recall == 1
        assert torch.equal(some.found.ids, gold.ids)
        assert torch.equal(some.found.in_band, gold.in_band)
