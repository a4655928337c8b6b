"""What the issue of the GPU asks for, on the GPU at hand: the contrastive loss beside torch, and fuse_into beside the bus.

    python benchmarks/bench_gpu.py [loss] [fuse]

A fraction of the roofline is the time that 6 B N D operations (fuse: the tuned model's bytes) would take at the matrix (copy) rate measured
in the same run, over the time taken.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from record import Row, measure, rows, save
from safetensors.torch import save_file
from torch import Tensor, nn

import refine_fast as rf

SHAPES = [(16_384, 384), (16_384, 768), (16_384, 1_024), (65_536, 384), (65_536, 768), (65_536, 1_024)]
HUGE = (1 << 20, 768)
EAGER_BYTES = 60 << 30  # torch's five bf16 B x N matrices must fit in this
ROUNDS = 5


def unit_rows(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, device="cuda"), dim=-1).bfloat16().requires_grad_()


def train_step(loss: Callable[[Tensor, Tensor], Tensor], q: Tensor, d: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(q, d), (q, d))


def cross_entropy(q: Tensor, d: Tensor) -> Tensor:
    return F.cross_entropy(q @ d.T / 0.02, torch.arange(len(q), device=q.device))


def matrix_product() -> Callable[[], object]:
    """8,192^3 in bf16 on random data: the rate that a roofline is drawn from."""
    a, b = (torch.randn(8_192, 8_192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def peak_mb(run: Callable[[], object]) -> float:
    """MiB of GPU memory beyond what is held, after a warm-up."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def fraction(found: list[Row], ideal: float) -> list[Row]:
    """Rows of seconds as fractions of what the roofline allows."""
    made = []
    for row in found:
        worst, middle, best = ideal / row.p80, ideal / row.p50, ideal / row.p20
        made.append(replace(row, metric="fraction_of_roofline", unit="1", p20=worst, p50=middle, p80=best, ratio_to_peer=None, peer=""))
    return made


def bench_loss() -> None:
    for B, D in [*SHAPES, HUGE]:
        q, d = unit_rows(B, D), unit_rows(B, D)
        contestants = {"refine_fast": train_step(rf.info_nce, q, d), "torch.mm 8192": matrix_product()}
        if 10 * B * B < EAGER_BYTES:
            contestants["torch eager"] = train_step(cross_entropy, q, d)
        if B <= 16_384:
            contestants["torch.compile"] = train_step(torch.compile(cross_entropy), q, d)
        about = {"op": "info_nce", "mode": "train", "dtype": "bf16", "shape": {"B": B, "N": B, "D": D}}
        samples = measure(contestants, rounds=1 if (B, D) == HUGE else ROUNDS)
        rate = 2 * 8_192**3 / statistics.median(samples.pop("torch.mm 8192"))
        found = rows(samples, **about, metric="seconds", peer="torch eager")
        save(found + fraction(found, 6 * B * B * D / rate))
        del contestants["torch.mm 8192"]
        save(rows({name: [peak_mb(run)] for name, run in contestants.items()}, **about, metric="peak_mb", peer="torch eager"))


def bench_fuse() -> None:
    """A 4 GB bf16 model, its tuned twin in the page cache."""
    model = nn.ParameterDict({f"layer{i}": nn.Parameter(torch.randn(4_096, 8_192).bfloat16()) for i in range(64)})
    nbytes = sum(p.nbytes for p in model.values())
    pinned = torch.empty(nbytes // 8, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuned.safetensors")
        save_file({name: p.detach() for name, p in model.items()}, path)
        model.cuda()
        contestants = {
            "refine_fast": lambda: rf.fuse_into(model, path, 0.35),
            "pinned copy": lambda: [there.copy_(pinned, non_blocking=True) for _ in range(8)],
        }
        samples = measure(contestants, rounds=ROUNDS)
    found = rows(samples, op="fuse_into", mode="cached", dtype="bf16", shape={"bytes": nbytes}, metric="seconds", peer="pinned copy")
    save(found + fraction(found, next(row.p50 for row in found if row.provider == "pinned copy")))


if __name__ == "__main__":
    for part in sys.argv[1:] or ["loss", "fuse"]:
        {"loss": bench_loss, "fuse": bench_fuse}[part]()
