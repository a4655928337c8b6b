"""What only a GPU can show: real sizes, no host synchronization, capture in a CUDA graph, streams,
bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import refine_fast as rf
from refine_fast import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def pair(B: int, N: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    q, d = (torch.randn(n, D, generator=g, device="cuda") for n in (B, N))
    q = q + d[:B]
    return tuple(F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (q, d))


def step(q: torch.Tensor, d: torch.Tensor, **options: object) -> tuple[torch.Tensor, ...]:
    loss = rf.info_nce(q, d, **options)
    return loss.detach(), *torch.autograd.grad(loss, (q, d))


# 16 bits: e, the scaled q and the result, 2^-9 each at random; float32: cuBLAS sums of up to 5,000
# terms, 72-bit logits, 2^-24 each
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 3e-5), (torch.bfloat16, 3.5e-3), (torch.float16, 3.5e-3)],
)
@pytest.mark.parametrize(
    "shape",
    [(4096, 4096, 768), (1500, 5003, 384), (129, 700, 100)],
    ids=["square", "ragged", "D no multiple of 64"],
)
@pytest.mark.parametrize("workspace", ["512", "16"])
def test_equals_float64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tolerance: float,
    workspace: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REFINE_FAST_WORKSPACE_MB", workspace)
    q, d = pair(*shape, dtype)
    doc_ids = torch.randint(0, shape[1] // 2, (shape[1],), device="cuda")
    found = step(q, d, doc_ids=doc_ids)
    leaves = [x.detach().double().requires_grad_() for x in (q, d)]
    loss = reference.info_nce(*leaves, doc_ids=doc_ids)
    loss.backward()
    for ours, wanted in zip(found, (loss.detach(), *(x.grad for x in leaves)), strict=True):
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()


def test_no_host_synchronization_and_equal_bits() -> None:
    q, d = pair(2048, 4096, 768, torch.bfloat16)
    ids = torch.arange(4096, device="cuda") // 2
    options = {
        "symmetric": True,
        "margin": 0.1,
        "doc_ids": ids,
        "positives": ids[:2048],
        "hard": d.detach()[:2048, None],
    }
    first = step(q, d, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(q, d, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


BAD_POSITIVE = """
import torch, refine_fast as rf
q = torch.randn(4, 8, device="cuda", requires_grad=True)
rf.info_nce(q, q.detach(), positives=torch.tensor([0, 1, 2, -1], device="cuda"))
torch.cuda.synchronize()
"""


def test_a_positive_outside_d_is_a_device_side_assertion() -> None:
    """In a process of its own, since the assertion ends the CUDA context."""
    done = subprocess.run([sys.executable, "-c", BAD_POSITIVE], capture_output=True, text=True)
    assert done.returncode != 0
    assert "positives must be rows of d" in done.stderr
    assert "device-side assert" in done.stderr


def test_captured_in_a_cuda_graph() -> None:
    q, d = pair(1024, 1024, 384, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = step(q, d)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(q, d)
    with torch.no_grad():
        q.copy_(q.flip(0))
    graph.replay()
    assert not torch.equal(captured[0], eager[0])
    torch.testing.assert_close(captured, step(q, d))


@pytest.mark.parametrize("megabytes", [16, 128])
def test_memory_stays_inside_the_workspace(megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak beyond inputs and gradients: the workspace, the vectors of length B and N (here 20
    float32 each), and what the allocator adds to six large tensors."""
    monkeypatch.setenv("REFINE_FAST_WORKSPACE_MB", str(megabytes))
    q, d = pair(16_384, 16_384, 384, torch.bfloat16)
    step(q, d)  # cuBLAS takes its own workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = step(q, d)
    gradients = sum(x.nbytes for x in found[1:])  # scaled in place by the upstream gradient
    assert torch.cuda.max_memory_allocated() - before - gradients <= (
        megabytes << 20
    ) + 16_384 * 2 * 20 * 4 + (6 << 20)


def clusters(rows: int, seed: int) -> torch.Tensor:
    """Unit rows of float16 in 300 clusters of cosine 0.6."""
    g = torch.Generator().manual_seed(seed)
    centers = F.normalize(torch.randn(300, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    noise = torch.randn(rows, 384, generator=g) * (0.816 / 384**0.5)
    return F.normalize(centers[torch.randint(300, (rows,), generator=g)] + noise, dim=-1).half()


@pytest.mark.parametrize("select", ["hardest", "random"])
@pytest.mark.parametrize("place", ["on the GPU", "streamed"])
def test_band_topk_is_the_cpus(place: str, select: str) -> None:
    queries, docs = clusters(3_000, 1), clusters(300_000, 2)
    rule = {"k": 100, "select": select, "exclude": [[i] for i in range(len(queries))]}
    wanted = rf.band_topk(queries, docs, **rule)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # made there, searched there
        found = rf.band_topk(
            queries.cuda(non_blocking=True), docs.cuda() if place == "on the GPU" else docs, **rule
        )
    side.synchronize()
    assert torch.equal(found.ids.cpu(), wanted.ids)
    assert torch.equal(found.in_band.cpu(), wanted.in_band)
    torch.testing.assert_close(found.scores.cpu(), wanted.scores, rtol=0, atol=0, equal_nan=True)


def test_band_topk_stays_inside_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_FAST_WORKSPACE_MB", "64")
    queries, docs = clusters(20_000, 1).cuda(), clusters(100_000, 2).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = rf.band_topk(queries, docs, 20)
    outputs = sum(x.nbytes for x in found)
    edges, rounding = 20_000 * 8, 1 << 20  # of the allocator
    assert torch.cuda.max_memory_allocated() - before - outputs <= (64 << 20) + edges + rounding
