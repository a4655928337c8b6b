"""mine and calibrate_band: REFINE's rule with the positives left out, and a band that fits the
encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from refine_fast import reference
from refine_fast.errors import RefineFastWarning
from refine_fast.mine import _similarity, calibrate_band, mine


@pytest.fixture(scope="module")
def embeddings() -> tuple[Tensor, Tensor, list[list[int]]]:
    """60 queries around 400 documents in 40 topics; cosines to the positives near 0.8, to the topic
    near 0.5."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(40, 32, generator=generator)
    docs = topics.repeat(10, 1) + torch.randn(400, 32, generator=generator)
    positives = [[i] if i % 3 else [i, i + 40] for i in range(60)]
    queries = torch.stack([docs[rows].mean(0) for rows in positives]) + 0.5 * torch.randn(
        60, 32, generator=generator
    )
    return queries, docs, positives


def test_mine_is_the_rule_on_the_cosine(embeddings: tuple[Tensor, Tensor, list[list[int]]]) -> None:
    queries, docs, positives = embeddings
    found = mine(
        3 * queries, docs, positives, k=4, band=(0.2, 0.6), skip=2, select="random", seed=5
    )
    gold = reference.band_topk(
        queries,
        docs,
        4,
        band=(0.2, 0.6),
        skip=2,
        exclude=positives,
        select="random",
        seed=5,
        normalize=True,
    )
    assert torch.equal(found.ids, gold[0])
    assert torch.equal(found.in_band, gold[2])
    assert found.band == (0.2, 0.6)
    assert all(
        not set(ids) & set(own) for ids, own in zip(found.ids.tolist(), positives, strict=True)
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_a_relative_margin_is_a_ceiling_for_each_query(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
    normalize: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Below the least similar positive, also where that is negative; none without positives."""
    monkeypatch.setattr("refine_fast.mine.CEILINGS", 7)
    queries, docs, positives = embeddings
    queries = queries.clone()
    queries[5] = -queries[5]  # its positive has a negative similarity
    positives = [rows if i != 9 else [] for i, rows in enumerate(positives)]
    how = {"k": 40, "band": (-99.0, 99.0), "skip": 0, "normalize": normalize}
    unit = torch.nn.functional.normalize if normalize else torch.Tensor.clone
    similar = unit(queries.double()) @ unit(docs.double()).T
    found = mine(queries, docs, positives, relative_margin=0.3, **how)
    least = torch.tensor(
        [similar[i, rows].min() if rows else 1e9 for i, rows in enumerate(positives)]
    )
    limit = least - 0.3 * least.abs()
    expected = similar.clone()
    for i, rows in enumerate(positives):
        expected[i, rows] = -torch.inf
    expected[expected > limit[:, None]] = -torch.inf
    ids = expected.sort(dim=1, descending=True, stable=True).indices[:, :40]
    there = expected.gather(1, ids) > -torch.inf
    assert torch.equal(found.ids, ids.where(there, -1))
    without = mine(queries, docs, positives, **how)
    changed = (without.ids != found.ids).any(1)
    assert changed[5]
    assert 20 < changed.sum() < 60
    assert not changed[9]


def test_auto_band_covers_what_it_promises(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
) -> None:
    queries, docs, positives = embeddings
    found = mine(queries, docs, positives, k=4, band="auto", skip=2)
    lo, hi = found.band
    cosine = (
        torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(docs, dim=1).T
    )
    own = torch.cat([cosine[i, rows] for i, rows in enumerate(positives)])
    assert hi == pytest.approx(float(own.quantile(0.25)), abs=1e-6)
    full = (found.in_band >= 4).float().mean()
    assert 0.9 <= full < 0.95  # no lower than 90% asks for
    assert (found.scores[found.ids >= 0] >= lo).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_by_the_best_row(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
    normalize: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positives, band and ceiling count groups, whose similarity is that of their best row."""
    monkeypatch.setattr("refine_fast.mine.CEILINGS", 7)
    queries, rows, _ = embeddings
    groups = np.cumsum([0, *[1, 2, 5] * 50])
    positives = [[i] if i % 3 else [i, i + 40] for i in range(60)]
    found = mine(
        queries,
        rows,
        positives,
        k=4,
        band="auto",
        relative_margin=0.3,
        skip=2,
        groups=groups,
        normalize=normalize,
    )
    ends = torch.from_numpy(groups)
    unit = torch.nn.functional.normalize if normalize else torch.Tensor.clone
    best = reference.best_of_groups(unit(queries.double()), unit(rows.double()), ends)
    own = [best[i, groups] for i, groups in enumerate(positives)]
    assert found.band[1] == pytest.approx(float(torch.cat(own).quantile(0.25)), rel=1e-5)
    least = torch.stack([similar.min() for similar in own])
    gold = reference.band_topk(
        queries,
        rows,
        4,
        band=found.band,
        skip=2,
        exclude=positives,
        ceiling=least - 0.3 * least.abs(),
        groups=ends,
        normalize=normalize,
    )
    assert torch.equal(found.ids, gold[0])
    assert torch.equal(found.in_band, gold[2])
    assert (found.ids >= 0).any()


def test_calibration_reads_any_container(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
) -> None:
    queries, docs, positives = embeddings
    band = calibrate_band(queries, docs, positives, skip=2, sample=20, seed=1)
    assert (
        calibrate_band(queries.numpy(), np.asarray(docs), positives, skip=2, sample=20, seed=1)
        == band
    )
    assert calibrate_band(queries, docs, positives, skip=2, sample=20, seed=2) != band


def test_calibration_says_when_it_cannot(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
) -> None:
    queries, docs, positives = embeddings
    with pytest.raises(ValueError, match="no query has a positive"):
        calibrate_band(queries, docs, [[] for _ in positives])
    with pytest.raises(ValueError, match=r"k must be an integer >= 1 \(got 0\)"):
        calibrate_band(queries, docs, positives, k=0)
    with pytest.raises(ValueError, match=r"sample must be an integer >= 1 \(got 0\)"):
        calibrate_band(queries, docs, positives, sample=0)
    with pytest.raises(ValueError, match=r"coverage must be a share from 0 to 1 \(got 90\)"):
        calibrate_band(queries, docs, positives, coverage=90)
    for band in ("fit", 0.5, (0.1, 0.5, 0.7)):
        with pytest.raises(ValueError, match='band must be two numbers or "auto"') as raised:
            mine(queries, docs, positives, k=2, band=band)  # type: ignore[arg-type]
        assert f"(got {band!r})" in str(raised.value)
    broken = queries.clone()
    broken[17, 3] = torch.nan
    with pytest.raises(ValueError, match="row 17 of queries holds NaN or Inf"):
        calibrate_band(broken, docs, positives)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_positives_are_checked_before_they_are_read(
    embeddings: tuple[Tensor, Tensor, list[list[int]]], as_numpy: bool
) -> None:
    queries, docs, positives = embeddings
    given = (queries.numpy(), docs.numpy()) if as_numpy else (queries, docs)
    for wrong, kind, message in (
        ([[5000], *positives[1:]], ValueError, "positives of query 0 names document 5000, but"),
        ([*positives[:-1], [-1]], ValueError, "names document -1, but the ids are 0 to"),
        ([*positives, [0]], ValueError, "positives must have one list for each of the"),
        ([[0.5], *positives[1:]], TypeError, "positives of query 0 must hold integer"),
    ):
        with pytest.raises(kind, match=message):
            mine(*given, wrong, k=2, band="auto")
        with pytest.raises(kind, match=message):
            mine(*given, wrong, k=2, relative_margin=0.05)
        with pytest.raises(kind, match=message):
            calibrate_band(*given, wrong)


def test_offsets_of_groups_in_any_container(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
) -> None:
    queries, docs, positives = embeddings
    groups = np.arange(len(docs) + 1)
    ids = [
        mine(queries, docs, positives, k=2, band="auto", relative_margin=0.05, groups=given).ids
        for given in (groups, groups.tolist(), torch.from_numpy(groups))
    ]
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0], ids[2])


def test_positives_in_any_container(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
) -> None:
    queries, docs, positives = embeddings
    first = np.array([ids[0] for ids in positives])
    gold = mine(queries, docs, first[:, None].tolist(), k=2, band="auto", relative_margin=0.05)
    for given in (first, torch.from_numpy(first), first[:, None], [{i} for i in first.tolist()]):
        mined = mine(queries, docs, given, k=2, band="auto", relative_margin=0.05)
        assert mined.band == gold.band
        assert torch.equal(mined.ids, gold.ids)


def test_embeddings_in_training(embeddings: tuple[Tensor, Tensor, list[list[int]]]) -> None:
    queries, docs, positives = embeddings
    mined = mine(
        queries.clone().requires_grad_(), docs, positives, k=2, band="auto", relative_margin=0.05
    )
    assert not mined.scores.requires_grad


def test_too_few_documents_for_the_coverage(
    embeddings: tuple[Tensor, Tensor, list[list[int]]],
) -> None:
    """Whatever is below hi is mined."""
    queries, docs, positives = embeddings
    hi = calibrate_band(queries, docs, positives)[1]
    with pytest.warns(RefineFastWarning, match="only 0% of the queries have 500 documents below"):
        assert calibrate_band(queries, docs, positives, k=500) == (-1.0, hi)
    with pytest.warns(RefineFastWarning, match="below .* after skipping 0, fewer than 90%"):
        mined = mine(queries, docs, positives, k=500, band="auto", skip=0)
    assert mined.band == (-1.0, hi)
    assert (mined.in_band > 0).all()


@pytest.mark.parametrize("groups", [None, np.arange(401)])
def test_documents_elsewhere(
    embeddings: tuple[Tensor, Tensor, list[list[int]]], groups: np.ndarray | None
) -> None:
    """The documents that are compared follow the queries; the meta device stands for a GPU."""
    queries, docs, _ = embeddings
    similar = _similarity(queries.to("meta"), docs, np.arange(60), True, groups)
    assert (similar.shape, similar.device.type) == ((60,), "meta")
