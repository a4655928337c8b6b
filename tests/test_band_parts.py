"""band_topk in shards: the merge equals one search, bit for bit, over every backend."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from banded import assert_same, near_an_edge, searches, tied, unit_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import refine_fast as rf
from refine_fast import reference
from refine_fast.ops import band_parts

pytestmark = pytest.mark.usefixtures("one_thread")


def parts_of(
    backend: Backend, queries: Tensor, docs: Tensor, k: int, edges: list[int], **rule: Any
) -> list[rf.BandPart]:
    """A part for each pair of neighbouring edges."""
    queries, docs = queries.to(backend.device), docs.to(backend.device)
    return [
        rf.band_topk_part(queries, docs[begin:end], k, id_offset=begin, **rule)
        for begin, end in itertools.pairwise(edges)
    ]


def assert_same_part(ours: rf.BandPart, gold: rf.BandPart) -> None:
    assert (ours.rule, ours.spans) == (gold.rule, gold.spans)
    for name, x, y in zip(ours._fields[2:], ours[2:], gold[2:], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


def on_cpu(found: rf.BandTopK) -> rf.BandTopK:
    return rf.BandTopK(*(x.cpu() for x in found))


@pytest.mark.parametrize("select", ["hardest", "random"])
@pytest.mark.parametrize("order", ["skip_then_band", "band_then_skip"])
def test_equals_one_search(band_backend: Backend, order: str, select: str) -> None:
    """Shards of one document, of none, and with equal documents in several; skip above, below and
    at the number of documents above the band; skip and k beyond a shard, and beyond all."""
    queries, docs, exclude = tied(33, 333, 33)
    edges = [0, 0, 1, 2, 12, 12, 150, 332, 333]
    ceiling = torch.rand(33, generator=torch.Generator().manual_seed(3))
    counts = [(10, 5), (1, 0), (0, 5), (400, 600), (7, 60), (1, 2**31 - 1)]
    bands = [(-0.2, 0.2), (0.1, 0.3), (-2.0, 2.0), (0.99, 1.0)]
    if band_backend.name == "cuda":  # emulated, seconds each
        counts, bands = counts[::3], bands[:2]
    for (k, skip), band, both in itertools.product(counts, bands, (False, True)):
        rule: dict[str, Any] = {"band": band, "skip": skip, "order": order, "select": select}
        if both:
            rule |= {"exclude": exclude, "ceiling": ceiling}
        parts = parts_of(band_backend, queries, docs, k, edges, seed=7, **rule)
        gold = reference.band_topk(queries, docs, k, seed=7, **rule)
        assert_same(on_cpu(rf.merge_band_topk(parts)), gold)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    asked=searches(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    normalize=st.booleans(),
    data=st.data(),
)
def test_any_rule_any_shards_any_tree(
    asked: tuple[Tensor, Tensor, int, dict[str, Any]],
    dtype: torch.dtype,
    normalize: bool,
    data: st.DataObject,
) -> None:
    """Also against band_topk itself, where values off the grid round: the merge in any order and as
    any tree, the parts through a file, and a few queries merged at a time."""
    queries, docs, k, rule = asked
    queries, docs = queries.to(dtype), docs.to(dtype)
    rule["normalize"] = normalize
    cuts = data.draw(st.lists(st.integers(0, len(docs)), max_size=9))
    edges = [0, *sorted(cuts), len(docs)]
    backend = Backend("this machine's level", torch.device("cpu"))
    parts = parts_of(backend, queries, docs, k, edges, **rule)
    gold = rf.band_topk(queries, docs, k, **rule)
    assert_same(rf.merge_band_topk(parts), gold)

    whole = rf.band_topk_part(queries, docs, k, **rule)
    shuffled = data.draw(st.permutations(parts))
    before, band_parts.MERGED = band_parts.MERGED, data.draw(st.integers(1, 300))
    try:
        while len(shuffled) > 1:
            at = data.draw(st.integers(0, len(shuffled) - 2))
            shuffled[at : at + 2] = [rf.merge_band_parts(shuffled[at : at + 2])]
    finally:
        band_parts.MERGED = before
    assert_same_part(shuffled[0], whole)
    assert_same(rf.merge_band_topk(iter(shuffled)), gold)


@pytest.mark.parametrize("edge", [0.5, 0.7])
def test_edges_to_the_last_bit(band_backend: Backend, edge: float) -> None:
    """Scores closer than float32 tells apart, in different shards."""
    queries, docs, bands = near_an_edge(edge, 600)
    for band, order in itertools.product(bands, ("skip_then_band", "band_then_skip")):
        parts = parts_of(
            band_backend, queries, docs, 30, [0, 100, 300, 600], band=band, order=order
        )
        gold = reference.band_topk(queries, docs, 30, band=band, order=order)
        assert_same(on_cpu(rf.merge_band_topk(parts)), gold)


def test_zeros_of_both_signs_tie() -> None:
    docs = torch.tensor([[-0.0, 1.0], [0.0, 1.0], [-0.0, -1.0]])
    queries, rule = torch.tensor([[1.0, -0.0], [-1.0, 0.0]]), {"band": (0.0, 0.0), "skip": 0}
    backend = Backend("cpu", torch.device("cpu"))
    for edges in ([0, 1, 2, 3], [0, 2, 3]):
        parts = parts_of(backend, queries, docs, 2, edges, **rule)
        for order in itertools.permutations(parts):
            found = rf.merge_band_topk(order)
            assert_same(found, rf.band_topk(queries, docs, 2, **rule))


def test_containers_and_files(tmp_path: Path) -> None:
    """Memory-mapped shards of two dtypes; a part survives its file, and a file without one is
    named."""
    queries, docs = unit_rows(20, 48, 0, bits=8), unit_rows(2000, 48, 1, bits=8)
    np.save(tmp_path / "a.npy", docs[:700].numpy().astype(np.float16))
    np.save(tmp_path / "b.npy", docs[700:].numpy())
    for select in ("hardest", "random"):
        rule: dict[str, Any] = {"band": (0.1, 0.5), "select": select, "seed": 2**64 - 2}
        for name, begin in (("a", 0), ("b", 700)):
            shard = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
            part = rf.band_topk_part(queries.numpy(), shard, 8, id_offset=begin, **rule)
            part.save(tmp_path / f"{name}.part")
            assert_same_part(rf.BandPart.load(tmp_path / f"{name}.part"), part)
        parts = (rf.BandPart.load(tmp_path / f"{name}.part") for name in "ba")
        assert_same(rf.merge_band_topk(parts), rf.band_topk(queries, docs, 8, **rule))
    from safetensors.torch import save_file

    save_file({"x": docs}, tmp_path / "other")
    (tmp_path / "cut").write_bytes((tmp_path / "a.part").read_bytes()[:-1])
    (tmp_path / "empty").touch()
    for name in ("other", "cut", "empty"):
        with pytest.raises(ValueError, match=rf"{name} holds no part; .* BandPart\.save wrote"):
            rf.BandPart.load(tmp_path / name)


def test_negated_views() -> None:
    """Whose memory holds the negative of their values."""
    queries, docs = unit_rows(3, 8, 0), unit_rows(40, 8, 1)
    for q, d in [(torch._neg_view(queries), docs), (queries, torch._neg_view(docs))]:
        gold = rf.band_topk(-queries, docs, 5, band=(-1, 1))
        found = rf.merge_band_topk([rf.band_topk_part(q, d, 5, band=(-1, 1))])
        assert torch.equal(found.ids, gold.ids)
        assert torch.equal(rf.band_topk(q, d, 5, band=(-1, 1)).ids, gold.ids)


def test_progress_and_bad_rows_count_from_the_first_document() -> None:
    seen: list[tuple[int, int]] = []
    queries, docs = unit_rows(3, 8, 0), unit_rows(40, 8, 1)
    rf.band_topk_part(
        queries, docs, 3, id_offset=1000, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (120, 120)
    docs[7, 3] = float("nan")
    with pytest.raises(ValueError, match="row 1007 of docs holds NaN or Inf"):
        rf.band_topk_part(queries, docs, 3, id_offset=1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id_offset": -1}, r"id_offset must be an integer from 0 to .* \(got -1\)"),
        (
            {"id_offset": 2**63 - 9},
            r"from 0 to 9223372036854775798, so .* \(got 9223372036854775799",
        ),
        ({"k": -1}, r"k must be an integer from 0 .* \(got -1\)"),
        ({"skip": 2**31}, r"skip must be an integer from 0 .* \(got 2147483648\)"),
        (
            {"exclude": [[], [2, -1]]},
            "exclude of query 1 names document -1, but the ids start at 0",
        ),
        ({"exclude": [[]]}, "exclude must have one list for each of the 2 queries"),
        ({"order": "band"}, "order must be"),
    ],
    ids=str,
)
def test_errors_of_a_shard(change: dict[str, Any], message: str) -> None:
    arguments = {"k": 3, **change}
    with pytest.raises(ValueError, match=message):
        rf.band_topk_part(torch.zeros(2, 8), torch.zeros(9, 8), arguments.pop("k"), **arguments)


def test_a_flag_of_numpy_can_be_saved(tmp_path: Path) -> None:
    part = rf.band_topk_part(torch.ones(2, 8), torch.ones(9, 8), 3, normalize=np.True_)
    part.save(tmp_path / "part.safetensors")
    assert rf.BandPart.load(tmp_path / "part.safetensors").rule == part.rule


def test_parts_that_do_not_fit_are_named() -> None:
    queries, docs = unit_rows(4, 8, 0), unit_rows(40, 8, 1)
    first = rf.band_topk_part(queries, docs[:20], 3)
    second = rf.band_topk_part(queries, docs[20:], 3, id_offset=20)
    for parts, message in [
        ([], "parts is empty; give at least one part"),
        ([first, first], "document 0 is in two parts; give each shard its id_offset"),
        ([first, second._replace(rule=second.rule._replace(k=4))], "differ in k: 3 and 4"),
        (
            [first, second._replace(rule=second.rule._replace(band=(0.1, 0.2)))],
            r"differ in band: \(0.5, 0.7\) and \(0.1, 0.2\)",
        ),
        ([first, rf.band_topk_part(queries[:3], docs[20:], 3, id_offset=20)], "of 4 and of 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            rf.merge_band_topk(parts)
    assert rf.merge_band_parts([second, first]).spans == ((0, 40),)
