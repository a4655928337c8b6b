"""band_topk against the float64 sort of reference.py, over every backend: CPU levels, CUDA on a GPU
or emulated."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import CPU, Backend
from banded import (
    assert_same,
    check,
    interrupts,
    near_an_edge,
    search,
    searches,
    sorted_once,
    unit_rows,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import refine_fast as rf
from refine_fast import _core, _native, errors, reference, workspace
from refine_fast._native import cuda_module
from refine_fast.errors import RefineFastWarning
from refine_fast.ops import band_topk as module
from refine_fast.ops import band_topk_cuda

HERE = Backend("this machine's level", CPU)
SM_80, SM_86 = 163 << 10, 99 << 10  # bytes of shared memory, on which the tile depends


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# One row and one column; ragged against every tile (6, 12, 32 rows; 4, 16, 32 columns; on a GPU 128
# queries, 256 documents, 64 columns); more documents than a strip; six steps of the GPU's pipeline;
# a panel of queries beyond AMX's share of L1, with a fifth tile of documents; no documents; no
# queries.
SHAPES = [
    (1, 1, 1), (33, 333, 33), (7, 1500, 16), (13, 97, 384), (131, 520, 70), (5, 97, 384),
    (34, 150, 600), (3, 0, 8), (0, 5, 8),
]  # fmt: skip


@pytest.mark.parametrize("select", ["hardest", "random"])
@pytest.mark.parametrize("order", ["skip_then_band", "band_then_skip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_sort(
    band_backend: Backend, shape: tuple[int, int, int], order: str, select: str
) -> None:
    for asked, gold in sorted_once(shape, order, select, band_backend.name == "cuda"):
        assert_same(search(band_backend, **asked), gold)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_blocks_change_nothing(
    isa: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, docs = unit_rows(70, 24, 0), unit_rows(3000, 24, 1)
    for select in ("hardest", "random"):
        gold = reference.band_topk(queries, docs, 20, band=(0.1, 0.6), select=select, seed=3)
        torch.set_num_threads(threads)
        # all queries at once, a panel at a time
        for memory, block in [(48 << 20, 8 << 20), (1, 4 * 24 * 100), (1 << 20, 4 * 24 * 37)]:
            monkeypatch.setattr(module, "MEMORY", memory)
            monkeypatch.setattr(module, "BLOCK", block)
            assert_same(
                rf.band_topk(queries, docs[:3000], 20, band=(0.1, 0.6), select=select, seed=3), gold
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(band_backend: Backend, dtype: torch.dtype) -> None:
    """The values as given are the truth: a bf16 document is scored as its bf16 value."""
    queries = unit_rows(40, 65, 0, bits=8).to(dtype)
    docs = unit_rows(700, 65, 1, bits=8).to(dtype)
    columns_apart, rows_apart = docs.T.contiguous().T, torch.cat([docs, docs], 1)[:, :65]
    check(band_backend, queries, docs, 10, band=(0.05, 0.3))
    check(band_backend, queries.float(), docs, 10, band=(0.05, 0.3))
    check(band_backend, queries, columns_apart, 10, band=(0.05, 0.3))
    check(band_backend, queries, rows_apart, 10, band=(0.05, 0.3))


def test_containers(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    queries, docs = unit_rows(20, 48, 0), unit_rows(2000, 48, 1)
    gold = reference.band_topk(queries, docs, 8, band=(0.1, 0.5))
    np.save(tmp_path / "docs.npy", docs.numpy())
    np.save(tmp_path / "columns.npy", np.asfortranarray(docs.numpy()))
    save_file({"docs": docs, "queries": queries}, tmp_path / "x.safetensors")
    mapped, columns = (
        np.load(tmp_path / name, mmap_mode="r") for name in ("docs.npy", "columns.npy")
    )
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        slices = file.get_slice("queries"), file.get_slice("docs")
        for q, d in [
            (queries.numpy(), docs.numpy()),
            (queries, mapped),
            (queries, columns),
            slices,
            (queries, docs.requires_grad_()),
        ]:
            assert_same(rf.band_topk(q, d, 8, band=(0.1, 0.5)), gold)
    assert_same(rf.band_topk(queries, mapped[::-1][::-1], 8, band=(0.1, 0.5)), gold)
    # the map is intact after its pages were given back
    assert torch.equal(torch.from_numpy(np.array(mapped)), docs)


def test_no_page_of_a_map_stays(tmp_path: Path) -> None:
    """A map of many blocks, which would count as ours: a fault maps pages around it, those of the
    block before among them."""
    written = np.lib.format.open_memmap(tmp_path / "docs.npy", "w+", np.float32, (140_000, 96))
    written[:] = unit_rows(140_000, 96, 1)
    written.flush()  # what is not on the disk yet is not mapped around a fault
    del written
    mapped = [np.load(tmp_path / "docs.npy", mmap_mode=mode) for mode in ("r", "r+")]
    for docs in (mapped[0], mapped[0][::3], mapped[1]):
        rf.band_topk(unit_rows(4, 96, 0), docs, 8, band=(0.1, 0.5))
        maps = Path("/proc/self/smaps").read_text().split("docs.npy\n")[1:]
        # KiB: the window around the last fault
        assert sum(int(of.split("Rss:")[1].split()[0]) for of in maps) <= 64


def test_normalize(band_backend: Backend) -> None:
    """Rows times powers of two have the same cosines, bit for bit; a zero row scores 0."""
    queries, docs = unit_rows(30, 64, 0), unit_rows(900, 64, 1)
    scale = 2.0 ** torch.arange(900).remainder(40).sub(20)[:, None]
    ours = search(band_backend, queries * 8, docs * scale, 12, band=(0.05, 0.3), normalize=True)
    assert_same(
        ours, reference.band_topk(queries * 8, docs * scale, 12, band=(0.05, 0.3), normalize=True)
    )
    docs[17] = 0
    found = search(band_backend, queries, docs, 1, band=(0.0, 0.0), skip=0, normalize=True)
    assert found.ids.eq(17).all()


def test_scores_are_added_in_the_documented_order(band_backend: Backend) -> None:
    """Documents of the same numbers in other places tie but for the rounding of float64 sums, which
    decides their ranks: 32 lanes, folded in three steps, and a fourth within the last."""
    generator = torch.Generator().manual_seed(0)
    width, query = 70, float(np.float32(0.1))  # two sums of a lane or three; 48 bits a product
    values = torch.randn(width, generator=generator) ** 5
    values -= values.mean()  # the sum is smaller than its parts by far
    docs = torch.stack([values[torch.randperm(width, generator=generator)] for _ in range(300)])
    products = np.zeros((len(docs), 96))
    products[:, :width] = docs.double().numpy() * query
    first, second, third = products.reshape(-1, 3, 32).transpose(1, 0, 2)
    sums = (first + second) + third
    sums = (sums[:, :8] + sums[:, 8:16]) + (sums[:, 16:24] + sums[:, 24:])
    for half in (4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    order = np.argsort(-sums[:, 0], kind="stable")
    assert len(set(sums[:, 0])) > 5
    found = search(
        band_backend, torch.full((1, width), query), docs, 300, band=(-99.0, 99.0), skip=0
    )
    assert found.ids[0].tolist() == order.tolist()


def test_an_outlier_row_stays_exact(band_backend: Backend) -> None:
    """One row of norm 1e4 widens the margin of its whole block; the answer stays exact."""
    queries, docs = unit_rows(30, 64, 0), unit_rows(900, 64, 1)
    docs[450] *= 2**14
    check(band_backend, queries, docs, 10, band=(0.1, 0.3))


@pytest.mark.parametrize("edge", [0.5, 0.7])
def test_edges_to_the_last_bit(band_backend: Backend, edge: float) -> None:
    queries, docs, bands = near_an_edge(edge, 600 if band_backend.name == "cuda" else 1200)
    for band, order in itertools.product(bands, ("skip_then_band", "band_then_skip")):
        check(band_backend, queries, docs, 30, band=band, order=order)
    better = torch.zeros(600, docs.shape[1])
    better[:, 0] = 1.5
    docs = torch.cat([better, docs])  # those at the edge are counted, and not chosen
    check(band_backend, queries, docs, 5, band=bands[0])


def test_a_list_of_ceilings_is_not_rounded() -> None:
    # float32's 0.1 lies above
    check(HERE, torch.ones(1, 1), torch.tensor([[0.1]]), 1, band=(0.0, 1.0), skip=0, ceiling=[0.1])


# squares of what rounding takes from rows of 2^-80 underflow in float32
@pytest.mark.parametrize("exponent", [0, 80])
# the second lies midway between two bf16
@pytest.mark.parametrize("value", [1 / 16, (1 + 2**-8) / 16])
@pytest.mark.parametrize("width", [1, 33, 100, 256, 384])
def test_rounding_at_its_worst(
    band_backend: Backend, width: int, value: float, exponent: int
) -> None:
    """Rows of equal elements: the rounding of every element goes the same way, and their product is
    off by the whole margin. The edges of the band lie at the scores themselves."""
    queries = value * torch.tensor([1.0, -1.0, 0.5])[:, None].expand(3, width)
    docs = value * torch.tensor([1.0, 1 + 2**-12, 1 - 2**-12, 0.5, -1.0, 2.0])[:, None].expand(
        6, width
    )
    queries, docs = queries * 2.0**-exponent, docs * 2.0 ** min(exponent, 50)
    scores = (queries.double() @ docs.double().T).unique().tolist()
    for lo, hi in itertools.combinations_with_replacement(scores, 2):
        check(band_backend, queries, docs, 4, band=(lo, hi), skip=1)


# of the way to the next integer: all are rounded down, or all up
@pytest.mark.parametrize("beside", [0.484375, 0.515625])
@pytest.mark.parametrize("width", [64, 384])
def test_rounding_of_bytes_at_its_worst(band_backend: Backend, width: int, beside: float) -> None:
    """The same where rows are turned before they become bytes (isa/screen_int.h): turned, these are
    one 127 and else 125 and a half."""
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
        check(band_backend, queries, docs, 4, band=(lo, hi), skip=1)


@pytest.mark.parametrize("exponents", [(0, 0), (-70, 5), (45, 45), (40, -59)], ids=str)
def test_rows_that_fill_the_integers(band_backend: Backend, exponents: tuple[int, int]) -> None:
    """Parallel rows of one element, of equal ones and of alternating signs, of any length: their
    products are the largest that the screen's integers meet, and one of them must not spoil the
    others' margin."""
    width = 64
    alternating = torch.tensor([1.0, -1.0]).repeat(width // 2)
    rows = torch.cat(
        [
            torch.eye(width)[:5],
            torch.ones(1, width) / 8,
            alternating[None] / 8,
            unit_rows(20, width, 0),
        ]
    )
    scale, unit = (2.0**e for e in exponents), 2.0 ** sum(exponents)
    queries, docs = (rows * s for s in scale)
    for lo, hi in [(0.9, 1.1), (-1.1, -0.9), (-1.1, 1.1), (0.1, 1.0)]:
        check(
            band_backend, queries, torch.cat([docs, -docs]), 6, band=(lo * unit, hi * unit), skip=0
        )
    check(
        band_backend,
        queries,
        torch.cat([docs, docs / 1024, docs * 1024]),
        6,
        band=(0.9 * unit, 1.1 * unit),
        skip=2,
    )


def test_beyond_rank_5000() -> None:
    queries, docs = unit_rows(5, 16, 0), unit_rows(12_000, 16, 1)
    ours = check(HERE, queries, docs, 10, band=(-0.2, 0.02))
    ranks = (queries.double() @ docs.double().T > 0.02).sum(1)
    assert ranks.min() > 5000
    assert (ours.ids >= 0).all()


def test_k_of_ten_thousand(band_backend: Backend) -> None:
    check(
        band_backend,
        unit_rows(3, 16, 0),
        unit_rows(11_000, 16, 1),
        10_000,
        band=(-1.0, 1.0),
        skip=7,
    )


@pytest.mark.parametrize("k", [100, 2_048, 1_000_000])
def test_what_is_kept_fits_whatever_k(band_backend: Backend, k: int) -> None:
    """A hit takes 16 bytes per query, and on a GPU a candidate 4. Where a panel of queries has no
    room, a few are searched at a time."""
    if band_backend.name == "cuda":
        budget = 64 << 20 if k > 10_000 else workspace.MIN_BYTES
        band = cuda_module().BandSearch(16, k, 5, 0.0, False, 0, False, False, 4_096)
        step = band_topk_cuda._queries(band, 100_000, budget)
        assert budget * 0.6 < band.bytes(step) <= budget
    else:
        spec = _core.BandSpec(16, k, 5, 0.0, False, 0, False, False, 1)
        step = _core.BandSearch.queries_within(spec, module.MEMORY)
        assert 1 <= step <= module.MEMORY // (16 * k)
        many = _core.BandSpec(16, k, 5, 0.0, False, 0, False, False, 128)
        # of what each thread has there is more than the memory; a query at a time would be worse
        assert step / 4 - 64 <= _core.BandSearch.queries_within(many, module.MEMORY) <= step


def test_more_documents_wait_than_are_rescored_at_a_time(isa: str) -> None:
    """200 queries keep 405 of one block: on AMX they are one task, and a batch takes 32,768."""
    check(HERE, unit_rows(200, 16, 0), unit_rows(2000, 16, 1), 400, band=(-1.0, 1.0))


def test_ascending_scores_flush_the_list_often(band_backend: Backend) -> None:
    """Each document beats all before it: the worst order of arrival."""
    docs = (torch.arange(5000) * 2.0**-13)[:, None] * torch.tensor([[1.0, 0.0]])
    check(band_backend, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), docs, 20, band=(-1.0, 0.55))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    asked=searches(),
    processors=st.integers(1, 3),
    shared=st.sampled_from([SM_80, SM_86]),
    order=st.integers(-1, 2**16),
)
def test_any_rule(
    band_backend: Backend,
    asked: tuple[Tensor, Tensor, int, dict[str, Any]],
    processors: int,
    shared: int,
    order: int,
) -> None:
    """processors, shared memory and order of threads: of the emulated GPU."""
    queries, docs, k, rule = asked
    band_backend.emulate(processors, shared, order)
    check(band_backend, queries, docs, k, **rule)


def test_seeds_of_64_bits_and_sets_of_ids() -> None:
    queries, docs = unit_rows(9, 24, 0), unit_rows(300, 24, 1)
    rule: dict[str, Any] = {"band": (-1.0, 1.0), "select": "random"}
    ids = [[i, 7 * i, 299] for i in range(9)]
    gold = check(HERE, queries, docs, 5, exclude=ids, seed=-2, **rule)
    assert_same(
        rf.band_topk(queries, docs, 5, exclude=[set(row) for row in ids], seed=2**64 - 2, **rule),
        gold,
    )
    assert not torch.equal(
        rf.band_topk(queries, docs, 5, exclude=ids, seed=2**63, **rule).ids, gold.ids
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_rows_are_named(
    band_backend: Backend, value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block and in several, of documents and of queries."""
    count = 1_500 if band_backend.name == "cuda" else 5_000
    queries, docs = unit_rows(300, 24, 0).to(dtype), unit_rows(count, 24, 1).to(dtype)
    what = "a norm above 1e18" if value == 1e19 else "NaN or Inf"
    docs[count - 179, 23] = docs[count - 1, 0] = value
    monkeypatch.setattr(band_topk_cuda, "STREAMED", 600 * 24 * 4)
    for source in (docs, docs.numpy()) if dtype == torch.float32 else (docs,):
        with pytest.raises(ValueError, match=f"row {count - 179} of docs .*{what}"):
            search(band_backend, queries, source, 3)
    monkeypatch.setattr(workspace, "workspace_bytes", lambda: 1_000_000)
    monkeypatch.setattr(module, "MEMORY", 1)
    queries[266, 5] = value
    with pytest.raises(ValueError, match=f"row 266 of queries .*{what}"):
        search(band_backend, queries, docs[: count - 500], 3)


@pytest.mark.parametrize("place", ["with the queries", "elsewhere"])
def test_a_gpu_that_cannot_search_has_the_cpu_search(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without nvcc; CPU tensors stand for those on the GPU. The warning comes once."""
    monkeypatch.setattr(_native, "cuda_module", lambda: None)
    errors.warn_once.cache_clear()
    queries, docs = unit_rows(20, 48, 0), unit_rows(2000, 48, 1)
    gold = reference.band_topk(queries, docs, 8, band=(0.1, 0.5))
    rule = module.Rule(8, 0.1, 0.5, 5, None, None, None, False, 0, False, False)
    source = docs if place == "with the queries" else docs.numpy()
    monkeypatch.setattr(module, "BLOCK", 4 * 48 * 300)
    with pytest.warns(RefineFastWarning, match="on the CPU: install refine_fast again with nvcc"):
        found = module._search_on_gpu(queries, source, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RefineFastWarning)
        again = module._search_on_gpu(queries, source, rule)
    for one in (found, again):
        assert_same(rf.BandTopK(*one), gold)
    errors.warn_once.cache_clear()


def test_documents_that_require_a_gradient_are_streamed_without() -> None:
    docs = unit_rows(20, 24, 1).requires_grad_()
    for begin, end, rows in band_topk_cuda._streamed(docs, 20, 8, CPU):
        assert torch.equal(rows, docs[begin:end])
        assert not rows.requires_grad


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'refine_fast._cuda'"), r"on the PATH$"),
        (
            ImportError("libcudart.so.12: not found"),
            r"\(.*does not load: libcudart.so.12: not found",
        ),
    ],
)
def test_an_extension_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, message: str
) -> None:
    def fail(name: str) -> None:
        raise error

    _native._load_cuda.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(_native.importlib, "import_module", fail)
            missing = _native.missing_cuda(torch.device("cpu"), (8, 0))
    finally:
        _native._load_cuda.cache_clear()
    assert missing is not None
    assert re.search(message, missing)


def test_a_gpu_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_module", object)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    missing = band_topk_cuda.missing_requirement(torch.device("cuda"))
    assert missing == "use a GPU of compute capability 8.0 or newer (Tesla T4 is older)"
    assert band_topk_cuda.missing_requirement(torch.device("cpu")) is None


def test_progress_counts_documents_times_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY", 1)
    monkeypatch.setattr(module, "BLOCK", 4 * 24 * 100)
    seen: list[tuple[int, int]] = []
    rf.band_topk(
        unit_rows(70, 24, 0),
        unit_rows(950, 24, 1),
        3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (70 * 950, 70 * 950)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_ctrl_c_stops_a_search() -> None:
    """Half a minute's work at the scalar level."""
    before = rf.isa()
    rf.force_isa("scalar")
    queries, docs = torch.randn(2000, 256), torch.randn(100_000, 256)
    try:
        with interrupts():
            rf.band_topk(queries, docs, 3)
    finally:
        rf.force_isa(before)


def test_custom_op_and_compile() -> None:
    queries, docs = unit_rows(20, 24, 0), unit_rows(300, 24, 1)
    arguments = (queries, docs, 5, 0.1, 0.5, 2, None, None, None, False, 0, False, False)
    torch.library.opcheck(torch.ops.refine_fast.band_topk.default, arguments)

    def total(q: Tensor, d: Tensor) -> Tensor:
        return rf.band_topk(2 * q, d, 5, band=(0.1, 0.5), normalize=True).scores.nan_to_num().sum()

    torch.testing.assert_close(
        torch.compile(total, fullgraph=True, backend="aot_eager")(queries, docs),
        total(queries, docs),
    )
