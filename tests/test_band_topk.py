"""band_topk against the float64 sort of reference.py, at every ISA level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banded import assert_same, hears_ctrl_c, near_an_edge, searches, tied, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import refine_fast as rf
from refine_fast import _core, reference
from refine_fast.ops import band_topk as module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(queries: Tensor, docs: Tensor, k: int, **rule: Any) -> rf.BandTopK:
    ours = rf.band_topk(queries, docs, k, **rule)
    assert_same(ours, reference.band_topk(queries, docs, k, **rule))
    return ours


# One row, one column, ragged against every tile (6, 12, 32 rows; 4, 16, 32 columns), more documents than a strip, no documents, no queries.
SHAPES = [(1, 1, 1), (33, 333, 33), (7, 1500, 16), (13, 97, 384), (3, 0, 8), (0, 5, 8)]
BANDS = [(-0.2, 0.4), (0.1, 0.3), (-2.0, 2.0), (0.99, 1.0), (-float("inf"), float("inf"))]


@pytest.mark.parametrize("select", ["hardest", "random"])
@pytest.mark.parametrize("order", ["skip_then_band", "band_then_skip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_sort(isa: str, shape: tuple[int, int, int], order: str, select: str) -> None:
    queries, docs, exclude = tied(*shape)
    generator = torch.Generator().manual_seed(3)
    for band, (k, skip) in itertools.product(BANDS, [(0, 0), (0, 5), (1, 0), (10, 5), (400, 600), (1, 2**31 - 1)]):
        rule = {"band": band, "skip": skip, "order": order, "select": select, "seed": 7}
        check(queries, docs, k, **rule)
        check(queries, docs, k, exclude=exclude, ceiling=torch.rand(len(queries), generator=generator), **rule)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_blocks_change_nothing(isa: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, docs = unit_rows(70, 24, 0), unit_rows(3000, 24, 1)
    for select in ("hardest", "random"):
        gold = reference.band_topk(queries, docs, 20, band=(0.1, 0.6), select=select, seed=3)
        torch.set_num_threads(threads)
        for memory, block in [(48 << 20, 8 << 20), (1, 4 * 24 * 100), (1 << 20, 4 * 24 * 37)]:  # all queries at once, a panel at a time
            monkeypatch.setattr(module, "MEMORY", memory)
            monkeypatch.setattr(module, "BLOCK", block)
            assert_same(rf.band_topk(queries, docs[:3000], 20, band=(0.1, 0.6), select=select, seed=3), gold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(isa: str, dtype: torch.dtype) -> None:
    """The values as given are the truth: a bf16 document is scored as its bf16 value."""
    queries, docs = unit_rows(40, 65, 0, bits=8).to(dtype), unit_rows(700, 65, 1, bits=8).to(dtype)
    check(queries, docs, 10, band=(0.05, 0.3))
    check(queries.float(), docs, 10, band=(0.05, 0.3))
    check(queries, docs.T.contiguous().T, 10, band=(0.05, 0.3))  # columns far apart
    check(queries, torch.cat([docs, docs], 1)[:, :65], 10, band=(0.05, 0.3))  # rows far apart


def test_containers(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    queries, docs = unit_rows(20, 48, 0), unit_rows(2000, 48, 1)
    gold = reference.band_topk(queries, docs, 8, band=(0.1, 0.5))
    np.save(tmp_path / "docs.npy", docs.numpy())
    np.save(tmp_path / "columns.npy", np.asfortranarray(docs.numpy()))
    save_file({"docs": docs, "queries": queries}, tmp_path / "x.safetensors")
    mapped, columns = (np.load(tmp_path / name, mmap_mode="r") for name in ("docs.npy", "columns.npy"))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        slices = file.get_slice("queries"), file.get_slice("docs")
        for q, d in [(queries.numpy(), docs.numpy()), (queries, mapped), (queries, columns), slices, (queries, docs.requires_grad_())]:
            assert_same(rf.band_topk(q, d, 8, band=(0.1, 0.5)), gold)
    assert_same(rf.band_topk(queries, mapped[::-1][::-1], 8, band=(0.1, 0.5)), gold)
    assert torch.equal(torch.from_numpy(np.array(mapped)), docs)  # the map is intact after its pages were given back


def test_no_page_of_a_map_stays(tmp_path: Path) -> None:
    """A map of many blocks, which would count as ours: a fault maps pages around it, those of the block before among them."""
    written = np.lib.format.open_memmap(tmp_path / "docs.npy", "w+", np.float32, (140_000, 96))
    written[:] = unit_rows(140_000, 96, 1)
    written.flush()  # what is not on the disk yet is not mapped around a fault
    del written
    mapped = np.load(tmp_path / "docs.npy", mmap_mode="r")
    for docs in (mapped, mapped[::3]):
        rf.band_topk(unit_rows(4, 96, 0), docs, 8, band=(0.1, 0.5))
        maps = Path("/proc/self/smaps").read_text().split("docs.npy\n")[1:]
        assert sum(int(of.split("Rss:")[1].split()[0]) for of in maps) <= 64  # KiB: the window around the last fault


def test_normalize(isa: str) -> None:
    """Rows times powers of two have the same cosines, bit for bit; a zero row scores 0."""
    queries, docs = unit_rows(30, 64, 0), unit_rows(900, 64, 1)
    scale = 2.0 ** torch.arange(900).remainder(40).sub(20)[:, None]
    ours = rf.band_topk(queries * 8, docs * scale, 12, band=(0.05, 0.3), normalize=True)
    assert_same(ours, reference.band_topk(queries * 8, docs * scale, 12, band=(0.05, 0.3), normalize=True))
    docs[17] = 0
    assert rf.band_topk(queries, docs, 1, band=(0.0, 0.0), skip=0, normalize=True).ids.eq(17).all()


def test_an_outlier_row_is_no_trap(isa: str) -> None:
    """One row of norm 1e4 widens the margin of its whole block; the answer stays exact."""
    queries, docs = unit_rows(30, 64, 0), unit_rows(900, 64, 1)
    docs[450] *= 2**14
    check(queries, docs, 10, band=(0.1, 0.3))


@pytest.mark.parametrize("edge", [0.5, 0.7])
def test_edges_to_the_last_bit(isa: str, edge: float) -> None:
    queries, docs, bands = near_an_edge(edge, 1200)
    for band, order in itertools.product(bands, ("skip_then_band", "band_then_skip")):
        check(queries, docs, 30, band=band, order=order)


def test_a_list_of_ceilings_is_not_rounded() -> None:
    check(torch.ones(1, 1), torch.tensor([[0.1]]), 1, band=(0.0, 1.0), skip=0, ceiling=[0.1])  # float32's 0.1 lies above


@pytest.mark.parametrize("exponent", [0, 80])  # squares of what rounding takes from rows of 2^-80 underflow in float32
@pytest.mark.parametrize("value", [1 / 16, (1 + 2**-8) / 16])  # the second lies midway between two bf16
@pytest.mark.parametrize("width", [1, 33, 100, 256, 384])
def test_rounding_at_its_worst(isa: str, width: int, value: float, exponent: int) -> None:
    """Rows of equal elements: the rounding of every element goes the same way, and their product is off by the whole margin.
    The edges of the band lie at the scores themselves."""
    queries = value * torch.tensor([1.0, -1.0, 0.5])[:, None].expand(3, width)
    docs = value * torch.tensor([1.0, 1 + 2**-12, 1 - 2**-12, 0.5, -1.0, 2.0])[:, None].expand(6, width)
    queries, docs = queries * 2.0**-exponent, docs * 2.0 ** min(exponent, 50)
    scores = (queries.double() @ docs.double().T).unique().tolist()
    for lo, hi in itertools.combinations_with_replacement(scores, 2):
        check(queries, docs, 4, band=(lo, hi), skip=1)


@pytest.mark.parametrize("beside", [0.484375, 0.515625])  # of the way to the next integer: all are rounded down, or all up
@pytest.mark.parametrize("width", [64, 384])
def test_rounding_of_bytes_at_its_worst(isa: str, width: int, beside: float) -> None:
    """The same where rows are turned before they become bytes (isa/screen_int.h): turned, these are one 127 and else 125 and a half."""
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    signs = torch.tensor([-1.0 if 0x9E3779B97F4A7C15 >> i & 1 else 1.0 for i in range(64)])
    turned = torch.full((width // 64, 64), 125 + beside)
    turned[:, 0] = 127
    row = (turned @ hadamard * signs).flatten() * 2.0**-14  # about a unit row, exact in float32
    queries = row * torch.tensor([1.0, -1.0, 0.5])[:, None]
    docs = row * torch.tensor([1.0, 1 + 2**-8, 1 - 2**-8, 0.5, -1.0, 2.0])[:, None]
    scores = (queries.double() @ docs.double().T).unique().tolist()
    for lo, hi in itertools.combinations_with_replacement(scores, 2):
        check(queries, docs, 4, band=(lo, hi), skip=1)


@pytest.mark.parametrize("exponents", [(0, 0), (-70, 5), (45, 45), (40, -59)], ids=str)
def test_rows_that_fill_the_integers(isa: str, exponents: tuple[int, int]) -> None:
    """Parallel rows of one element, of equal ones and of alternating signs, of any length: their products are the largest that the screen's
    integers meet, and one of them must not spoil the others' margin."""
    width = 64
    alternating = torch.tensor([1.0, -1.0]).repeat(width // 2)
    rows = torch.cat([torch.eye(width)[:5], torch.ones(1, width) / 8, alternating[None] / 8, unit_rows(20, width, 0)])
    scale, unit = (2.0**e for e in exponents), 2.0 ** sum(exponents)
    queries, docs = (rows * s for s in scale)
    for lo, hi in [(0.9, 1.1), (-1.1, -0.9), (-1.1, 1.1), (0.1, 1.0)]:
        check(queries, torch.cat([docs, -docs]), 6, band=(lo * unit, hi * unit), skip=0)
    check(queries, torch.cat([docs, docs / 1024, docs * 1024]), 6, band=(0.9 * unit, 1.1 * unit), skip=2)


def test_beyond_rank_5000() -> None:
    queries, docs = unit_rows(5, 16, 0), unit_rows(12_000, 16, 1)
    ours = check(queries, docs, 10, band=(-0.2, 0.02))
    ranks = (queries.double() @ docs.double().T > 0.02).sum(1)
    assert ranks.min() > 5000
    assert (ours.ids >= 0).all()


def test_k_of_ten_thousand(isa: str) -> None:
    check(unit_rows(3, 16, 0), unit_rows(11_000, 16, 1), 10_000, band=(-1.0, 1.0), skip=7)


def test_what_is_kept_fits_whatever_k() -> None:
    """A hit takes 16 bytes a query. Where a panel of queries has no room, a few are searched at a time."""
    spec = _core.BandSpec(16, 1_000_000, 5, 0.0, False, 0, False, False, 1)
    assert 1 <= _core.BandSearch.queries_within(spec, module.MEMORY) <= module.MEMORY // 16_000_000


def test_ascending_scores_flush_the_list_often(isa: str) -> None:
    """Each document beats all before it: the worst order of arrival."""
    docs = (torch.arange(5000) * 2.0**-13)[:, None] * torch.tensor([[1.0, 0.0]])
    check(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), docs, 20, band=(-1.0, 0.55))


@settings(max_examples=150, deadline=None)
@given(searches(), st.sampled_from(rf.available_isas()))
def test_any_rule(search: tuple[Tensor, Tensor, int, dict[str, Any]], level: str) -> None:
    queries, docs, k, rule = search
    before = rf.isa()
    rf.force_isa(level)
    try:
        check(queries, docs, k, **rule)
    finally:
        rf.force_isa(before)


def test_seeds_of_64_bits_and_sets_of_ids() -> None:
    queries, docs = unit_rows(9, 24, 0), unit_rows(300, 24, 1)
    rule: dict[str, Any] = {"band": (-1.0, 1.0), "select": "random"}
    ids = [[i, 7 * i, 299] for i in range(9)]
    gold = check(queries, docs, 5, exclude=ids, seed=-2, **rule)
    assert_same(rf.band_topk(queries, docs, 5, exclude=[set(row) for row in ids], seed=2**64 - 2, **rule), gold)
    assert not torch.equal(rf.band_topk(queries, docs, 5, exclude=ids, seed=2**63, **rule).ids, gold.ids)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": -1}, ValueError, "k must be 0 or more, not -1"),
        ({"skip": -2}, ValueError, "skip must be 0 or more, not -2"),
        ({"band": (0.7, 0.5)}, ValueError, r"the band \(0.7, 0.5\) is empty"),
        ({"band": (float("nan"), 0.5)}, ValueError, "neither is NaN"),
        ({"docs": torch.zeros(9, 7)}, ValueError, "queries have 8 columns and docs 7"),
        ({"docs": torch.zeros(9)}, ValueError, "docs must have two dimensions"),
        ({"docs": torch.zeros(9, 8, dtype=torch.float64)}, TypeError, "docs are torch.float64"),
        ({"queries": np.zeros((4, 8))}, TypeError, "queries are float64"),
        ({"exclude": [[1]]}, ValueError, "one list for each of the 4 queries"),
        ({"exclude": [[], {1.7}, [], []]}, TypeError, "exclude of query 1 holds .*1.7.*; give document ids, which are integers"),
        ({"exclude": [[], [1, 9], [], []]}, ValueError, "exclude of query 1 names document 9, but the ids are 0 to 8"),
        ({"ceiling": torch.zeros(3)}, ValueError, "one value for each of the 4 queries"),
        ({"ceiling": torch.tensor([0, 0, float("nan"), 0])}, ValueError, "ceiling of query 2 is NaN"),
        ({"select": "best"}, ValueError, "select must be"),
        ({"order": "band"}, ValueError, "order must be"),
        ({"docs": torch.zeros(9, 8, device="meta")}, ValueError, r"docs are on meta; .* pass docs.cpu\(\)"),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"queries": torch.zeros(4, 8), "docs": torch.zeros(9, 8), "k": 3, **change}
    with pytest.raises(error, match=message):
        rf.band_topk(arguments.pop("queries"), arguments.pop("docs"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_rows_are_named(isa: str, value: float, dtype: torch.dtype) -> None:
    queries, docs = unit_rows(70, 24, 0).to(dtype), unit_rows(5000, 24, 1).to(dtype)
    what = "a norm above 1e18" if value == 1e19 else "NaN or Inf"
    docs[4321, 23] = docs[4999, 0] = value
    with pytest.raises(ValueError, match=f"row 4321 of docs .*{what}"):
        rf.band_topk(queries, docs, 3)
    queries[66, 5] = value
    with pytest.raises(ValueError, match=f"row 66 of queries .*{what}"):
        rf.band_topk(queries, docs, 3)


def test_progress_counts_documents_times_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY", 1)
    monkeypatch.setattr(module, "BLOCK", 4 * 24 * 100)
    seen: list[tuple[int, int]] = []
    rf.band_topk(unit_rows(70, 24, 0), unit_rows(950, 24, 1), 3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (70 * 950, 70 * 950)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_ctrl_c_stops_a_search() -> None:
    """Half a minute's work at the scalar level."""
    before = rf.isa()
    rf.force_isa("scalar")
    queries, docs = torch.randn(2000, 256), torch.randn(100_000, 256)
    try:
        with hears_ctrl_c():
            rf.band_topk(queries, docs, 3)
    finally:
        rf.force_isa(before)


def test_custom_op_and_compile() -> None:
    queries, docs = unit_rows(20, 24, 0), unit_rows(300, 24, 1)
    arguments = (queries, docs, 5, 0.1, 0.5, 2, None, None, None, False, 0, False, False)
    torch.library.opcheck(torch.ops.refine_fast.band_topk.default, arguments)

    def total(q: Tensor, d: Tensor) -> Tensor:
        return rf.band_topk(2 * q, d, 5, band=(0.1, 0.5), normalize=True).scores.nan_to_num().sum()

    torch.testing.assert_close(torch.compile(total, fullgraph=True, backend="aot_eager")(queries, docs), total(queries, docs))
