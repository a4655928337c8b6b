"""What band_topk accepts, and what it says of what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import refine_fast as rf
from refine_fast.mine import mine


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": -1}, ValueError, r"k must be an integer from 0 .* \(got -1\)"),
        ({"skip": -2}, ValueError, r"skip must be an integer from 0 .* \(got -2\)"),
        (
            {"band": (0.7, 0.5)},
            ValueError,
            r"band must be \(lo, hi\) with lo <= hi \(got \(0.7, 0.5\)\)",
        ),
        ({"band": (float("nan"), 0.5)}, ValueError, r"band must be .* \(got \(nan, 0.5\)\)"),
        ({"band": "auto"}, ValueError, r"band must be two numbers, lo and hi \(got 'auto'\)"),
        ({"band": 0.5}, ValueError, r"band must be two numbers, lo and hi \(got 0.5\)"),
        ({"docs": torch.zeros(9, 7)}, ValueError, "queries have 8 columns and docs 7"),
        ({"docs": torch.zeros(9)}, ValueError, "docs must have two dimensions"),
        (
            {"docs": torch.zeros(9, 8, dtype=torch.float64)},
            TypeError,
            r"docs must be float32, .* \(got torch.float64\)",
        ),
        ({"queries": np.zeros((4, 8))}, TypeError, r"queries must be float32, .* \(got float64\)"),
        ({"docs": np.zeros((9, 8), ">f4")}, TypeError, r"docs must be float32, .* \(got >f4\)"),
        ({"exclude": [[1]]}, ValueError, "one list for each of the 4 queries"),
        ({"exclude": {0: [1], 1: [], 2: [], 3: []}}, TypeError, "must be a sequence with one list"),
        ({"k": 2.5}, TypeError, r"k must be an integer \(got 2.5\)"),
        (
            {"exclude": [[], {1.7}, [], []]},
            TypeError,
            r"exclude of query 1 must hold integer document ids \(got .*1.7",
        ),
        (
            {"exclude": [[], [1, 9], [], []]},
            ValueError,
            "exclude of query 1 names document 9, but the ids are 0 to 8",
        ),
        ({"ceiling": torch.zeros(3)}, ValueError, "one value for each of the 4 queries"),
        (
            {"ceiling": torch.tensor([0, 0, float("nan"), 0])},
            ValueError,
            "ceiling of query 2 is NaN",
        ),
        ({"select": "best"}, ValueError, r"select must be .* \(got 'best'\)"),
        ({"order": "band"}, ValueError, r"order must be .* \(got 'band'\)"),
        (
            {"docs": torch.zeros(9, 8, device="meta")},
            ValueError,
            r"docs are on meta; .* pass docs.cpu\(\)",
        ),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "queries": torch.zeros(4, 8),
        "docs": torch.zeros(9, 8),
        "k": 3,
        **change,
    }
    with pytest.raises(error, match=message):
        rf.band_topk(
            arguments.pop("queries"), arguments.pop("docs"), arguments.pop("k"), **arguments
        )


def test_a_wrong_argument_is_named() -> None:
    """Which Python and torch do not."""
    queries, docs = torch.zeros(4, 8), torch.zeros(9, 8)
    for name in ("k", "skip", "seed"):
        with pytest.raises(TypeError, match=rf"^{name} must be an integer \(got 2\.0\)"):
            rf.band_topk(queries, docs, **{"k": 2, name: 2.0})
    with pytest.raises(TypeError, match=r"^id_offset must be an integer \(got '9'\)"):
        rf.band_topk_part(queries, docs, 2, id_offset="9")
    with pytest.raises(TypeError, match=r"^docs must be dense .*pass docs\.to_dense\(\)"):
        rf.band_topk(queries, docs.to_sparse(), 2)
    masked = np.ma.masked_array(docs.numpy(), docs.numpy() > 0)
    with pytest.raises(TypeError, match=r"^docs has a mask, .*pass docs\.filled\(0\)"):
        rf.band_topk(queries, masked, 2)


def test_scores_carry_no_graph() -> None:
    """A ceiling made of the embeddings of a training step would keep its graph alive."""
    queries, docs = torch.ones(2, 8, requires_grad=True), torch.ones(9, 8)
    ceiling = 0.95 * queries.sum(1)
    found = rf.band_topk(queries, docs, 3, band=(-9, 9), ceiling=ceiling)
    assert not found.scores.requires_grad
    part = rf.band_topk_part(queries, docs, 3, band=(-9, 9), ceiling=ceiling)
    assert not any(x.requires_grad for x in part if isinstance(x, torch.Tensor))


def test_changes_of_a_private_map_stay(tmp_path: Path) -> None:
    """Only mode "c" keeps what was written to the map in its pages alone."""
    np.save(tmp_path / "docs.npy", np.zeros((4096, 8), np.float32))
    for mode in ("c", "r+"):
        docs = np.load(tmp_path / "docs.npy", mmap_mode=mode)
        docs[:] = 0.5
        rf.band_topk(torch.ones(1, 8), docs, 1, band=(-9, 9))
        assert (docs == 0.5).all()


def test_bfloat16_of_numpy() -> None:
    """A type of ml_dtypes, which numpy itself does not know."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes, which onnx brings")
    rows = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    arrays = [x.float().numpy().astype(ml_dtypes.bfloat16) for x in rows]
    positives = [[i] for i in range(60)]
    gold = rf.band_topk(rows[0], rows[1], 3, band=(-9, 9))
    assert torch.equal(rf.band_topk(*arrays, 3, band=(-9, 9)).ids, gold.ids)
    mined = [mine(*given, positives, k=3, band="auto").ids for given in (arrays, rows)]
    assert torch.equal(*mined)


def test_integers_of_numpy() -> None:
    queries, docs = np.random.default_rng(0).standard_normal((2, 9, 8)).astype(np.float32)
    rule = {"band": (-9, 9), "select": "random"}
    found = rf.band_topk(queries, docs, np.int64(3), skip=np.int32(1), seed=np.int64(5), **rule)
    assert torch.equal(found.ids, rf.band_topk(queries, docs, 3, skip=1, seed=5, **rule).ids)


def test_a_container_that_became_shorter() -> None:
    class Shrunk:
        dtype, shape = np.dtype(np.float32), (2000, 8)
        rows = np.zeros((64, 8), np.float32)

        def __getitem__(self, rows: slice) -> np.ndarray:
            return self.rows[rows]

    with pytest.raises(ValueError, match=r"rows 0 to 2000 of docs have shape \(64, 8\)"):
        rf.band_topk(np.ones((3, 8), np.float32), Shrunk(), 2)
