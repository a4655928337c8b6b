"""What only band_topk's CUDA kernels can get wrong, against the float64 sort of reference.py: on a
GPU where there is one, else emulated on CPU tensors (cuda_path in tests/conftest.py).
tests/test_band_topk.py runs its cases over them too."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import Backend
from banded import assert_same, check, interrupts, search, unit_rows

import refine_fast as rf
from refine_fast import reference, workspace
from refine_fast.ops import band_inputs, band_topk_cuda
from refine_fast.ops import band_topk as operator

SM_80, SM_86 = 163 << 10, 99 << 10  # bytes of shared memory, on which the tile depends


@pytest.mark.parametrize("shared", [SM_80, SM_86], ids=["sm_80", "sm_86"])
@pytest.mark.parametrize("width", [64, 130, 384], ids=["one step", "three steps", "six steps"])
def test_every_tile_in_any_order_of_threads(shared: int, width: int, cuda_path: Backend) -> None:
    """A persistent block passes over several tiles; threads and blocks run in order, and
    shuffled."""
    queries, docs = unit_rows(140, width, 0), unit_rows(1100, width, 1)
    gold = reference.band_topk(queries, docs, 7, band=(0.0, 0.1), skip=2)
    for processors, order in [(1, -1), (3, 1), (2, 2)]:
        cuda_path.emulate(processors, shared, order)
        assert_same(search(cuda_path, queries, docs, 7, band=(0.0, 0.1), skip=2), gold)


def test_same_scores_as_the_cpu(monkeypatch: pytest.MonkeyPatch, cuda_path: Backend) -> None:
    """Values off the grid: the float64 sums round, in the same order. Clustered, so that the band
    is populated."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(9, 200, generator=generator)
    queries = centers[torch.arange(40) % 9] + torch.randn(40, 200, generator=generator)
    docs = centers[torch.arange(3000) % 9] + torch.randn(3000, 200, generator=generator)
    for normalize in (False, True):
        band = (0.45, 0.55) if normalize else (90.0, 130.0)
        ours = [
            search(cuda_path, queries, docs, 50, band=band, normalize=normalize, select=select)
            for select in ("hardest", "random")
        ]
        monkeypatch.undo()
        for found, select in zip(ours, ("hardest", "random"), strict=True):
            assert_same(
                found,
                rf.band_topk(queries, docs, 50, band=band, normalize=normalize, select=select),
            )
        if not torch.cuda.is_available():
            monkeypatch.setattr(operator, "_search", band_topk_cuda.search)
    assert (ours[0].in_band > 100).float().mean() > 0.9


@pytest.mark.parametrize("select", ["hardest", "random"])
def test_too_many_candidates_are_searched_again(select: str, cuda_path: Backend) -> None:
    """Every other document beats all before it, the rest is in the band and not chosen: a range of
    2,048 documents overflows for one query, with 1,024 of them counted that must not be counted
    twice."""
    docs = (torch.arange(4000) * 2.0**-13)[:, None] * torch.tensor([[1.0, 0.0]])
    docs[1::2] *= 2.0**-6
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    for order in (-1, 5):
        cuda_path.emulate(2, SM_80, order)
        check(cuda_path, queries, docs, 20, band=(-1.0, 0.45), select=select)


def test_one_candidate_too_many(cuda_path: Backend) -> None:
    """The second range brings the first query 513 candidates, one more than there is room for;
    behind them lie the other query's."""
    first, better, below = (
        torch.arange(1.0, 513.0),
        torch.arange(1000.0, 1513.0),
        torch.full((511,), -1500.0),
    )
    check(
        cuda_path,
        torch.tensor([[1.0], [-1.0]]),
        torch.cat([first, better, below])[:, None] * 2.0**-12,
        20,
        band=(0.0, 0.9),
    )


def test_k_beyond_2048(cuda_path: Backend) -> None:
    check(cuda_path, unit_rows(2, 16, 0), unit_rows(5000, 16, 1), 4000, band=(-1.0, 1.0), skip=7)
    check(
        cuda_path,
        unit_rows(2, 16, 0),
        unit_rows(3000, 16, 1),
        2100,
        band=(-1.0, 1.0),
        skip=7,
        select="random",
    )


def test_sizes_that_float16_does_not_hold(cuda_path: Backend) -> None:
    """Rows of norm 2^-30 to 2^40, one of 2^14 times its panel, and one of 2^-100, whose squares are
    no float32 beside its panel: scaled into float16's range, the rest is the margin's."""
    queries, docs = unit_rows(30, 64, 0), unit_rows(900, 64, 1)
    outlier = docs.clone()
    outlier[450] *= 2**14
    check(cuda_path, queries, outlier, 10, band=(0.1, 0.3))
    small = queries.clone()
    small[7] *= 2.0**-100
    check(cuda_path, small, docs, 10, band=(-1.0, 1.0))
    for size in (2.0**40, 2.0**-30):
        check(cuda_path, queries * size, docs * size, 10, band=(0.1 * size**2, 0.3 * size**2))
    scale = 2.0 ** torch.arange(900).remainder(40).sub(20)[:, None]
    check(cuda_path, queries * 8, docs * scale, 12, band=(0.05, 0.3), normalize=True)
    check(cuda_path, queries, docs * scale, 12, band=(0.05, 0.3))
    docs[17] = 0
    assert (
        search(cuda_path, queries, docs, 1, band=(0.0, 0.0), skip=0, normalize=True)
        .ids.eq(17)
        .all()
    )


@pytest.mark.parametrize("steps", [0.49, 0.51], ids=["rounded down", "rounded up"])
def test_edges_within_the_rounding_of_a_query(steps: float, cuda_path: Backend) -> None:
    """All elements of a query are rounded to float16 the same way and documents are exact: the
    errors add up to the margin's first term."""
    queries = torch.full((3, 40), 1 + steps * 2**-10)
    docs = torch.randint(1, 64, (300, 40), generator=torch.Generator().manual_seed(8)) / 64
    for score in (queries[:1].double() @ docs.double().T)[0, :8].tolist():
        check(cuda_path, queries, docs, 300, band=(score, 1e3), skip=0)
        check(cuda_path, queries, docs, 300, band=(0.0, score), skip=0)


def test_edges_within_the_error_of_a_sum(cuda_path: Backend) -> None:
    """float16 rows pack exactly: what is left of the margin is the tensor core's float32 sum, which
    the emulation cuts."""
    generator = torch.Generator().manual_seed(6)
    queries, docs = (
        torch.rand(1, 384, generator=generator).half(),
        torch.rand(300, 384, generator=generator).half(),
    )
    for score in (queries.double() @ docs.double().T)[0, :8].tolist():
        check(cuda_path, queries, docs, 300, band=(score - 1e-9, 1e4), skip=0)
        check(cuda_path, queries, docs, 300, band=(0.0, score + 1e-9), skip=0)


def test_streamed_documents_and_blocks_of_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_path: Backend
) -> None:
    """Documents that do not lie on the device, in several blocks, and queries that do not fit one
    workspace."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    queries, docs = unit_rows(300, 48, 0), unit_rows(1900, 48, 1)
    gold = reference.band_topk(queries, docs, 8, band=(0.1, 0.5))
    np.save(tmp_path / "docs.npy", docs.numpy())
    save_file({"docs": docs.bfloat16()}, tmp_path / "x.safetensors")
    monkeypatch.setattr(workspace, "workspace_bytes", lambda: 1_000_000)
    monkeypatch.setattr(band_topk_cuda, "STREAMED", 600 * 48 * 4)
    seen: list[tuple[int, int]] = []
    for source in (
        docs.numpy(),
        np.load(tmp_path / "docs.npy", mmap_mode="r"),
        docs.numpy()[::-1][::-1],
    ):
        assert_same(
            search(
                cuda_path,
                queries,
                source,
                8,
                band=(0.1, 0.5),
                progress=lambda done, total: seen.append((done, total)),
            ),
            gold,
        )
    assert_same(
        search(
            cuda_path,
            queries,
            docs,
            8,
            band=(0.1, 0.5),
            progress=lambda done, total: seen.append((done, total)),
        ),
        gold,
    )
    assert len({done for done, _ in seen}) > 4
    assert seen[-1] == (300 * 1900, 300 * 1900)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert_same(
            search(cuda_path, queries, file.get_slice("docs"), 8, band=(0.1, 0.5)),
            reference.band_topk(queries, docs.bfloat16(), 8, band=(0.1, 0.5)),
        )


def test_ctrl_c_between_blocks(monkeypatch: pytest.MonkeyPatch, cuda_path: Backend) -> None:
    """Blocks of 256 documents, of minutes of work in all where it is emulated."""
    monkeypatch.setattr(workspace, "workspace_bytes", lambda: 1_000_000)
    queries, docs = torch.randn(600, 16), torch.randn(1_000_000, 16)
    with interrupts():
        search(cuda_path, queries, docs.numpy(), 3)


def test_out_of_memory_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, cuda_path: Backend
) -> None:
    def none_left(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(band_inputs, "outputs", none_left)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"no room for 512 MB of workspace .* lower REFINE_FAST_WORKSPACE_MB",
    ):
        search(cuda_path, unit_rows(3, 8, 0), unit_rows(9, 8, 1), 3)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a device that cannot take the launch is emulated"
)
def test_cuda_errors_are_raised(cuda_path: Backend) -> None:
    cuda_path.emulate(1, 48 << 10, -1)
    with pytest.raises(RuntimeError, match="CUDA error: invalid argument"):
        search(cuda_path, unit_rows(3, 8, 0), unit_rows(9, 8, 1), 3)


def test_wrong_dtypes(cuda_path: Backend) -> None:
    with pytest.raises(TypeError, match=r"docs must be float32, .* \(got torch\.float64\)"):
        search(cuda_path, torch.zeros(4, 8), torch.zeros(9, 8, dtype=torch.float64), 3)
    with pytest.raises(TypeError, match=r"queries must be float32, .* \(got torch\.float64\)"):
        search(cuda_path, torch.zeros(4, 8, dtype=torch.float64), torch.zeros(9, 8), 3)


def test_edges_are_all_seen(cuda_path: Backend) -> None:
    """Every pair of a query and a document of ragged tiles is screened once: one document in the
    band at a time."""
    rows, count = 130, 520
    queries, docs = torch.zeros(rows, 8), torch.zeros(count, 8)
    for row, doc in itertools.product(
        (0, 63, 64, 127, 128, 129), (0, 7, 8, 255, 256, 511, 512, 519)
    ):
        queries.zero_(), docs.zero_()
        queries[row, 3] = docs[doc, 3] = 1
        found = search(cuda_path, queries, docs, 1, band=(0.5, 1.0), skip=0)
        assert found.ids[row, 0] == doc, (row, doc)
        assert found.in_band.sum() == 1
