"""best_of_groups against float64, at every CPU level and in torch; on a GPU where there is one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import CPU, Backend
from banded import interrupts
from torch import Tensor

import refine_fast as rf
from refine_fast import reference, workspace
from refine_fast.ops import best_of_groups as module


@pytest.fixture(params=[*rf.available_isas(), "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Each CPU level, and the path of GPUs: on a GPU where there is one, else on CPU tensors."""
    if request.param == "torch":
        monkeypatch.setattr(workspace, "workspace_bytes", lambda: 20_000)  # a few blocks
        monkeypatch.setattr(module, "workspace_bytes", lambda: 20_000)
        monkeypatch.setattr(module, "_on_cpu", module._in_torch)
        yield Backend("torch", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    before = rf.isa()
    rf.force_isa(request.param)
    yield Backend(request.param, CPU)
    rf.force_isa(before)


def offsets_of(groups: int, largest: int, seed: int) -> np.ndarray:
    sizes = np.random.default_rng(seed).integers(1, largest + 1, groups)
    return np.concatenate([[0], np.cumsum(sizes)])


def check(backend: Backend, queries: Tensor, rows: Tensor, offsets: np.ndarray) -> None:
    """The error of a product is at most (D + 1) 2^-24 sum |q| |r| (Higham, section 3.1), that of a
    maximum at most the largest of its products."""
    found = rf.best_of_groups(queries.to(backend.device), rows.to(backend.device), offsets)
    assert found.dtype == torch.float32
    assert found.device.type == backend.device.type
    q, r, ends = queries.double(), rows.double(), torch.from_numpy(offsets)
    gold = reference.best_of_groups(q, r, ends)
    bound = reference.best_of_groups(q.abs(), r.abs(), ends) * (q.shape[1] + 1) * 2.0**-24
    right = (found.cpu().double() - gold).abs() <= bound
    wrong = (~right & ~(gold.isnan() & found.cpu().isnan())).nonzero()
    assert not len(wrong), f"query {wrong[0][0]}, group {wrong[0][1]}"


# Queries: one and a few, which take no tile; the most that take none (1, 4, 6 or 12), and one
# more; ragged against every tile (4, 6, 8, 12 rows; 4, 16, 32 columns) and against 64 columns at a
# time; more than are compared at a time.
# Rows: one; fewer than a strip of 48; several pieces (336 rows at D = 384, 1,008 at D = 1).
# Groups: of one row; of a few; larger than a strip; larger than a piece, between small ones.
SHAPES = [
    (1, 1, 1, [1]), (1, 7, 40, [3]), (8, 7, 40, [3]), (9, 7, 40, [3]), (130, 7, 40, [3]),
    (3, 384, 100, [9]), (67, 384, 100, [9]), (70, 384, 500, [1]), (10, 1, 700, [5, 1]),
    (2, 33, 3, [1500]), (6, 33, 9, [60, 2]), (12, 33, 9, [60, 2]), (13, 33, 9, [60, 2]),
    (33, 384, 5, [60, 400, 1, 900]), (20, 1, 4, [2, 3000, 5]),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_float64(
    backend: Backend,
    shape: tuple[int, int, int, list[int]],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, width, groups, sizes = shape
    generator = torch.Generator().manual_seed(count * width)
    offsets = np.cumsum([0, *itertools.islice(itertools.cycle(sizes), groups)])
    queries = torch.randn(count, width, generator=generator)
    rows = torch.randn(int(offsets[-1]), width, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    check(backend, queries, rows, offsets)
    # as many blocks as there are groups, and of queries
    monkeypatch.setattr(module, "BLOCK", 1)
    monkeypatch.setattr(module, "QUERIES", 16)
    check(backend, queries, rows, offsets)
    torch.set_num_threads(before)


def test_a_group_is_read_in_pieces(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 30 and 2 rows, at most 8 of them at a time; the NaN of a group stays in its group
    whichever of its pieces has it."""
    most = 0

    class Source(torch.Tensor):
        """Keeps the number of rows that are taken at a time."""

        def __getitem__(self, rows: Any) -> Tensor:
            nonlocal most
            most = max(most, rows.stop - rows.start)
            return self.as_subclass(torch.Tensor)[rows]

    monkeypatch.setattr(module, "BLOCK", 8 * 4 * 24)
    monkeypatch.setattr(module, "workspace_bytes", lambda: 8 * (16 * 5 + 4 * 24))
    offsets = np.cumsum([0, 30, 2, 30, 2, 30])
    rows = torch.randn(94, 24)
    rows[33, 0] = rows[93, 0] = torch.nan
    queries, source = torch.randn(5, 24), rows.as_subclass(Source)
    check(backend, queries, source, offsets)
    found = rf.best_of_groups(queries.to(backend.device), source.to(backend.device), offsets)
    assert 0 < most <= 8
    assert found.isnan().any(0).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(backend: Backend, dtype: torch.dtype, count: int) -> None:
    """The values as given are the truth."""
    offsets = offsets_of(60, 9, 0)
    queries = torch.randn(count, 65).to(dtype)
    rows = torch.randn(int(offsets[-1]), 65).to(dtype)
    check(backend, queries, rows, offsets)
    check(backend, queries.float(), rows.T.contiguous().T, offsets)
    check(backend, queries.T.contiguous().T, torch.cat([rows, rows], 1)[:, :65], offsets)
    # a view that torch negates as it is read
    check(backend, torch._neg_view(queries), torch._neg_view(rows), offsets)
    check(backend, queries, torch._neg_view(rows), offsets)


def test_autocast_leaves_it_in_float32(backend: Backend) -> None:
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        check(backend, torch.randn(7, 65), torch.randn(20, 65), offsets_of(20, 1, 0))


@pytest.mark.parametrize("count", [1, 8, 9, 70])
def test_negative_products_and_none_at_all(backend: Backend, count: int) -> None:
    """No padding of a tile, which scores 0, is taken for a row."""
    offsets = offsets_of(50, 9, 0)
    check(backend, torch.ones(count, 24), -torch.rand(int(offsets[-1]), 24) - 1, offsets)
    nothing = rf.best_of_groups(
        torch.empty(0, 24, device=backend.device), torch.ones(3, 24), [0, 3]
    )
    assert nothing.shape == (0, 1)
    empty = rf.best_of_groups(
        torch.ones(count, 24, device=backend.device),
        torch.empty(0, 24, device=backend.device),
        [0],
    )
    assert empty.shape == (count, 0)


@pytest.mark.parametrize("count", [1, 20])
def test_nan_and_infinity_stay_in_their_groups(backend: Backend, count: int) -> None:
    offsets = np.arange(0, 302, 3)
    rows = torch.rand(300, 24)
    for row, value in [(30, "nan"), (35, "nan"), (61, "inf"), (92, "-inf"), (270, "inf")]:
        rows[row, 7] = float(value)
    rows[271, 7] = float("nan")
    queries = torch.rand(count, 24)
    found = rf.best_of_groups(queries.to(backend.device), rows.to(backend.device), offsets).cpu()
    assert found[:, [10, 11, 90]].isnan().all()
    assert found[:, 20].eq(float("inf")).all()
    others = [g for g in range(100) if g not in (10, 11, 20, 90)]
    assert found[:, others].isfinite().all()


def test_containers(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    offsets = offsets_of(80, 9, 0)
    queries, rows = torch.randn(12, 24), torch.randn(int(offsets[-1]), 24)
    gold = rf.best_of_groups(queries, rows, offsets)
    np.save(tmp_path / "rows.npy", rows.numpy())
    save_file({"rows": rows, "queries": queries}, tmp_path / "x.safetensors")
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        slices = file.get_slice("queries"), file.get_slice("rows")
        for q, r in [
            (queries.numpy(), rows.numpy()),
            (queries, mapped),
            (queries, mapped[::-1][::-1]),
            slices,
            (queries, rows.requires_grad_()),
        ]:
            for ends in (offsets, offsets.tolist(), torch.from_numpy(offsets).int()):
                assert torch.equal(rf.best_of_groups(q, r, ends), gold)
    # the map is intact after its pages were given back
    assert torch.equal(torch.from_numpy(np.array(mapped)), rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.zeros(9, 7)}, ValueError, "queries have 8 columns and rows 7"),
        ({"rows": [[0.0] * 8]}, TypeError, r"rows must be .* numpy array, .* \(got list\)"),
        ({"rows": torch.zeros(9)}, ValueError, "rows must have two dimensions"),
        (
            {"rows": torch.zeros(9, 8, dtype=torch.float64)},
            TypeError,
            r"rows must be float32, .* \(got torch.float64\)",
        ),
        ({"queries": np.zeros((4, 8))}, TypeError, r"queries must be float32, .* \(got float64\)"),
        (
            {"offsets": [0, 4, 8]},
            ValueError,
            r"offsets must rise from 0 to 9, the number of rows \(got 0 to 8\)",
        ),
        ({"offsets": [1, 9]}, ValueError, r"\(got 1 to 9\)"),
        ({"offsets": [0, 4, 4, 9]}, ValueError, "those of group 1 are 4 and 4; leave out groups"),
        ({"offsets": [0, 5, 4, 9]}, ValueError, "those of group 1 are 5 and 4"),
        ({"offsets": [0.0, 9.0]}, TypeError, r"offsets must be integers \(got float64\)"),
        ({"offsets": [[0, 9]]}, ValueError, r"offsets must have one dimension .*\(1, 2\)"),
        ({"offsets": []}, ValueError, r"at least one entry \(got shape \(0,\)\)"),
        (
            {"rows": torch.zeros(9, 8, device="meta")},
            ValueError,
            r"rows are on meta; .* pass rows.cpu\(\)",
        ),
        (
            {"queries": torch.zeros(4, 8, device="meta")},
            ValueError,
            "rows are on cpu and queries on meta; move both to one device",
        ),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"queries": torch.zeros(4, 8), "rows": torch.zeros(9, 8), "offsets": [0, 4, 9]}
    with pytest.raises(error, match=message):
        rf.best_of_groups(*{**given, **change}.values())


def test_ctrl_c_stops_it() -> None:
    """Half a minute's work at the scalar level."""
    before = rf.isa()
    rf.force_isa("scalar")
    try:
        with interrupts():
            rf.best_of_groups(
                torch.randn(2000, 256), torch.randn(100_000, 256), np.arange(0, 100_001, 5)
            )
    finally:
        rf.force_isa(before)
