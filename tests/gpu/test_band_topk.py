"""band_topk's CUDA kernels against the float64 sort of reference.py: on a GPU where there is one, else on CPU tensors over the emulation
that ``-C cmake.define.REFINE_FAST_EMULATE_CUDA=ON`` builds (tests/cuda_emulation). The same cases either way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banded import assert_same, hears_ctrl_c, near_an_edge, searches, tied, unit_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import refine_fast as rf
from refine_fast import reference, workspace
from refine_fast._native import cuda_module
from refine_fast.ops import band_topk as operator
from refine_fast.ops import band_topk_cuda

pytestmark = pytest.mark.usefixtures("poisoned")
SM_80, SM_86 = 163 << 10, 99 << 10  # bytes of shared memory, on which the tile depends


@pytest.fixture(autouse=True)
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Without a GPU, CPU tensors take its path; yields what sets the emulated processors, shared memory and order of threads."""
    if torch.cuda.is_available():
        yield lambda *_: None
        return
    cuda = cuda_module()
    if not hasattr(cuda, "emulate"):
        pytest.skip("no GPU, and _cuda is not the emulated one: pip install -e . -C cmake.define.REFINE_FAST_EMULATE_CUDA=ON")
    monkeypatch.setattr(operator, "_search", band_topk_cuda.search)
    yield cuda.emulate
    cuda.emulate(3, SM_80, -1)


def search(queries: Tensor, docs: Any, k: int, **rule: Any) -> rf.BandTopK:
    """On the device: documents too, if they are a tensor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    docs = docs.to(device) if isinstance(docs, Tensor) else docs
    return rf.BandTopK(*(x.cpu() for x in rf.band_topk(queries.to(device), docs, k, **rule)))


def check(queries: Tensor, docs: Tensor, k: int, **rule: Any) -> rf.BandTopK:
    ours = search(queries, docs, k, **rule)
    assert_same(ours, reference.band_topk(queries, docs, k, **rule))
    return ours


# One row, one column; ragged against 128 queries, 256 documents, 64 columns; six steps of the pipeline; no documents, no queries
SHAPES = [(1, 1, 1), (33, 333, 33), (131, 520, 70), (5, 97, 384), (3, 0, 8), (0, 5, 8)]


@pytest.mark.parametrize("select", ["hardest", "random"])
@pytest.mark.parametrize("order", ["skip_then_band", "band_then_skip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_sort(shape: tuple[int, int, int], order: str, select: str) -> None:
    queries, docs, exclude = tied(*shape)
    ceiling = torch.rand(len(queries), generator=torch.Generator().manual_seed(3))
    rules: list[tuple[int, dict[str, Any]]] = [
        (10, {"band": (-0.2, 0.4), "skip": 5}),
        (10, {"band": (0.1, 0.3), "skip": 5, "exclude": exclude, "ceiling": ceiling}),
        (400, {"band": (-2.0, 2.0), "skip": 600, "exclude": exclude}),
        (1, {"band": (-float("inf"), float("inf")), "skip": 0}),
        (0, {"band": (0.0, 0.2), "skip": 0, "ceiling": ceiling}),
    ]
    for k, rule in rules:
        check(queries, docs, k, order=order, select=select, seed=7, **rule)


@pytest.mark.parametrize("shared", [SM_80, SM_86], ids=["sm_80", "sm_86"])
@pytest.mark.parametrize("width", [64, 130, 384], ids=["one step", "three steps", "six steps"])
def test_every_tile_in_any_order_of_threads(shared: int, width: int, emulation: Any) -> None:
    """A persistent block passes over several tiles; threads and blocks run in order, and shuffled."""
    queries, docs = unit_rows(140, width, 0), unit_rows(1100, width, 1)
    gold = reference.band_topk(queries, docs, 7, band=(0.0, 0.1), skip=2)
    for processors, order in [(1, -1), (3, 1), (2, 2)]:
        emulation(processors, shared, order)
        assert_same(search(queries, docs, 7, band=(0.0, 0.1), skip=2), gold)


def test_same_scores_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values off the grid: the float64 sums round, in the same order. Clustered, so that the band is populated."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(9, 200, generator=generator)
    queries = centers[torch.arange(40) % 9] + torch.randn(40, 200, generator=generator)
    docs = centers[torch.arange(3000) % 9] + torch.randn(3000, 200, generator=generator)
    for normalize in (False, True):
        band = (0.45, 0.55) if normalize else (90.0, 130.0)
        ours = [search(queries, docs, 50, band=band, normalize=normalize, select=select) for select in ("hardest", "random")]
        monkeypatch.undo()
        for found, select in zip(ours, ("hardest", "random"), strict=True):
            assert_same(found, rf.band_topk(queries, docs, 50, band=band, normalize=normalize, select=select))
        if not torch.cuda.is_available():
            monkeypatch.setattr(operator, "_search", band_topk_cuda.search)
    assert (ours[0].in_band > 100).float().mean() > 0.9


@pytest.mark.parametrize("select", ["hardest", "random"])
def test_too_many_candidates_are_searched_again(select: str, emulation: Any) -> None:
    """Every other document beats all before it, the rest is in the band and not chosen: a range of 2,048 documents overflows for one query,
    with 1,024 of them counted that must not be counted twice."""
    docs = (torch.arange(4000) * 2.0**-13)[:, None] * torch.tensor([[1.0, 0.0]])
    docs[1::2] *= 2.0**-6
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    for order in (-1, 5):
        emulation(2, SM_80, order)
        check(queries, docs, 20, band=(-1.0, 0.45), select=select)


def test_one_candidate_too_many() -> None:
    """The second range brings the first query 513 candidates, one more than there is room for; behind them lie the other query's."""
    first, better, below = torch.arange(1.0, 513.0), torch.arange(1000.0, 1513.0), torch.full((511,), -1500.0)
    check(torch.tensor([[1.0], [-1.0]]), torch.cat([first, better, below])[:, None] * 2.0**-12, 20, band=(0.0, 0.9))


def test_k_beyond_2048() -> None:
    check(unit_rows(2, 16, 0), unit_rows(5000, 16, 1), 4000, band=(-1.0, 1.0), skip=7)
    check(unit_rows(2, 16, 0), unit_rows(3000, 16, 1), 2100, band=(-1.0, 1.0), skip=7, select="random")


@pytest.mark.parametrize("k", [100, 2_048, 1_000_000])
def test_what_is_kept_fits_whatever_k(k: int) -> None:
    """A hit takes 16 bytes a query and a candidate 4. Where a panel of queries has no room, a few are searched at a time."""
    budget = 64 << 20 if k > 10_000 else workspace.LEAST
    band = cuda_module().BandSearch(16, k, 5, 0.0, False, 0, False, False, 4_096)
    step = band_topk_cuda._queries(band, 100_000, budget)
    assert budget * 0.6 < band.bytes(step) <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    queries, docs = unit_rows(20, 65, 0, bits=8).to(dtype), unit_rows(700, 65, 1, bits=8).to(dtype)
    check(queries, docs, 10, band=(0.05, 0.3))
    check(queries.float(), docs, 10, band=(0.05, 0.3))
    check(queries, docs.T.contiguous().T, 10, band=(0.05, 0.3))  # columns far apart
    check(queries, torch.cat([docs, docs], 1)[:, :65], 10, band=(0.05, 0.3))  # rows far apart


def test_sizes_that_float16_does_not_hold() -> None:
    """Rows of norm 2^-30 to 2^40, one of 2^14 times its panel, and one of 2^-100, whose squares are no float32 beside its panel: scaled
    into float16's range, the rest is the margin's."""
    queries, docs = unit_rows(30, 64, 0), unit_rows(900, 64, 1)
    outlier = docs.clone()
    outlier[450] *= 2**14
    check(queries, outlier, 10, band=(0.1, 0.3))
    small = queries.clone()
    small[7] *= 2.0**-100
    check(small, docs, 10, band=(-1.0, 1.0))
    for size in (2.0**40, 2.0**-30):
        check(queries * size, docs * size, 10, band=(0.1 * size**2, 0.3 * size**2))
    scale = 2.0 ** torch.arange(900).remainder(40).sub(20)[:, None]
    check(queries * 8, docs * scale, 12, band=(0.05, 0.3), normalize=True)
    check(queries, docs * scale, 12, band=(0.05, 0.3))
    docs[17] = 0
    assert search(queries, docs, 1, band=(0.0, 0.0), skip=0, normalize=True).ids.eq(17).all()


@pytest.mark.parametrize("edge", [0.5, 0.7])
def test_edges_to_the_last_bit(edge: float) -> None:
    queries, docs, bands = near_an_edge(edge, 600)
    for band, order in itertools.product(bands, ("skip_then_band", "band_then_skip")):
        check(queries, docs, 30, band=band, order=order)
    better = torch.zeros(600, docs.shape[1])
    better[:, 0] = 1.5
    check(queries, torch.cat([better, docs]), 5, band=bands[0])  # those at the edge are counted, and not chosen


@pytest.mark.parametrize("steps", [0.49, 0.51], ids=["rounded down", "rounded up"])
def test_edges_within_the_rounding_of_a_query(steps: float) -> None:
    """All elements of a query are rounded to float16 the same way and documents are exact: the errors add up to the margin's first term."""
    queries = torch.full((3, 40), 1 + steps * 2**-10)
    docs = torch.randint(1, 64, (300, 40), generator=torch.Generator().manual_seed(8)) / 64
    for score in (queries[:1].double() @ docs.double().T)[0, :8].tolist():
        check(queries, docs, 300, band=(score, 1e3), skip=0)
        check(queries, docs, 300, band=(0.0, score), skip=0)


def test_edges_within_the_error_of_a_sum() -> None:
    """float16 rows pack exactly: what is left of the margin is the tensor core's float32 sum, which the emulation cuts."""
    generator = torch.Generator().manual_seed(6)
    queries, docs = torch.rand(1, 384, generator=generator).half(), torch.rand(300, 384, generator=generator).half()
    for score in (queries.double() @ docs.double().T)[0, :8].tolist():
        check(queries, docs, 300, band=(score - 1e-9, 1e4), skip=0)
        check(queries, docs, 300, band=(0.0, score + 1e-9), skip=0)


def test_streamed_documents_and_blocks_of_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that do not lie on the device, in several blocks, and queries that do not fit one workspace."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    queries, docs = unit_rows(300, 48, 0), unit_rows(1900, 48, 1)
    gold = reference.band_topk(queries, docs, 8, band=(0.1, 0.5))
    np.save(tmp_path / "docs.npy", docs.numpy())
    save_file({"docs": docs.bfloat16()}, tmp_path / "x.safetensors")
    monkeypatch.setattr(workspace, "workspace_bytes", lambda: 1_000_000)
    monkeypatch.setattr(band_topk_cuda, "STREAMED", 600 * 48 * 4)
    seen: list[tuple[int, int]] = []
    for source in (docs.numpy(), np.load(tmp_path / "docs.npy", mmap_mode="r"), docs.numpy()[::-1][::-1]):
        assert_same(search(queries, source, 8, band=(0.1, 0.5), progress=lambda done, total: seen.append((done, total))), gold)
    assert_same(search(queries, docs, 8, band=(0.1, 0.5), progress=lambda done, total: seen.append((done, total))), gold)
    assert len({done for done, _ in seen}) > 4
    assert seen[-1] == (300 * 1900, 300 * 1900)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert_same(
            search(queries, file.get_slice("docs"), 8, band=(0.1, 0.5)), reference.band_topk(queries, docs.bfloat16(), 8, band=(0.1, 0.5))
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e19])
def test_bad_rows_are_named(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, docs = unit_rows(300, 24, 0), unit_rows(1500, 24, 1)
    what = "a norm above 1e18" if value == 1e19 else "NaN or Inf"
    docs[1321, 23] = docs[1499, 0] = value
    monkeypatch.setattr(band_topk_cuda, "STREAMED", 600 * 24 * 4)
    for source in (docs, docs.numpy()):
        with pytest.raises(ValueError, match=f"row 1321 of docs .*{what}"):
            search(queries, source, 3)
    monkeypatch.setattr(workspace, "workspace_bytes", lambda: 1_000_000)
    queries[266, 5] = value
    with pytest.raises(ValueError, match=f"row 266 of queries .*{what}"):
        search(queries, docs[:1000], 3)


def test_ctrl_c_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 documents, of minutes of work in all where it is emulated."""
    monkeypatch.setattr(workspace, "workspace_bytes", lambda: 1_000_000)
    queries, docs = torch.randn(600, 16), torch.randn(1_000_000, 16)
    with hears_ctrl_c():
        search(queries, docs.numpy(), 3)


def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(band_topk_cuda, "outputs", none_left)
    with pytest.raises(torch.OutOfMemoryError, match=r"no room for 512 MB of workspace .* lower REFINE_FAST_WORKSPACE_MB"):
        search(unit_rows(3, 8, 0), unit_rows(9, 8, 1), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that cannot take the launch is emulated")
def test_cuda_errors_are_raised(emulation: Any) -> None:
    emulation(1, 48 << 10, -1)
    with pytest.raises(RuntimeError, match="CUDA error: invalid argument"):
        search(unit_rows(3, 8, 0), unit_rows(9, 8, 1), 3)


def test_wrong_dtypes() -> None:
    with pytest.raises(TypeError, match=r"docs are torch\.float64"):
        search(torch.zeros(4, 8), torch.zeros(9, 8, dtype=torch.float64), 3)
    with pytest.raises(TypeError, match=r"queries are torch\.float64"):
        search(torch.zeros(4, 8, dtype=torch.float64), torch.zeros(9, 8), 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=searches(), processors=st.integers(1, 3), shared=st.sampled_from([SM_80, SM_86]), order=st.integers(-1, 2**16))
def test_any_rule(asked: tuple[Tensor, Tensor, int, dict[str, Any]], processors: int, shared: int, order: int, emulation: Any) -> None:
    queries, docs, k, rule = asked
    emulation(processors, shared, order)
    check(queries, docs, k, **rule)


def test_edges_are_all_seen() -> None:
    """Every pair of a query and a document of ragged tiles is screened once: one document in the band at a time."""
    rows, count = 130, 520
    queries, docs = torch.zeros(rows, 8), torch.zeros(count, 8)
    for row, doc in itertools.product((0, 63, 64, 127, 128, 129), (0, 7, 8, 255, 256, 511, 512, 519)):
        queries.zero_(), docs.zero_()
        queries[row, 3] = docs[doc, 3] = 1
        found = search(queries, docs, 1, band=(0.5, 1.0), skip=0)
        assert found.ids[row, 0] == doc, (row, doc)
        assert found.in_band.sum() == 1
