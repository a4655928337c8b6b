"""info_nce, forward and backward, beside what it replaces, on one CPU thread in CPU seconds.

    python benchmarks/bench_info_nce.py [--rows 8192] [--rounds 3] [--dtype fp32 bf16] [--width 384 768] [--memory]

Peers: naive cross_entropy; torch in chunks of 256 with the gradients in the forward (the fair one: ten lines); sentence-transformers'
MultipleNegativesRankingLoss and its cached loss at the default mini-batch of 32, on embeddings (no encoder).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from record import cpu_seconds, measure, peak_mb, rows, save
from torch import Tensor, nn

import refine_fast as rf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE = 0.05
CHUNK, MINI_BATCH = 256, 32


def fused(q: Tensor, d: Tensor) -> None:
    rf.info_nce(q, d, temperature=TEMPERATURE).backward()


def naive(q: Tensor, d: Tensor) -> None:
    F.cross_entropy((q @ d.T) / TEMPERATURE, torch.arange(len(q))).backward()


@torch.no_grad()
def chunks(q: Tensor, d: Tensor) -> None:
    own, scale = torch.arange(CHUNK), 1 / (TEMPERATURE * len(q))
    grad_q, grad_d = torch.empty_like(q), torch.zeros_like(d, dtype=torch.float32)
    for start in range(0, len(q), CHUNK):
        x = q[start : start + CHUNK]
        p = torch.softmax((x @ d.T).float() / TEMPERATURE, 1)
        p[own[: len(x)], start + own[: len(x)]] -= 1
        p = (p * scale).to(q.dtype)
        grad_q[start : start + CHUNK] = p @ d
        grad_d += p.T @ x


def sentence_transformers(q: Tensor, d: Tensor) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    MultipleNegativesRankingLoss(nn.Identity(), scale=1 / TEMPERATURE).compute_loss_from_embeddings([q, d], None).backward()


def sentence_transformers_cached(q: Tensor, d: Tensor) -> None:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(nn.Sequential(nn.Identity()), scale=1 / TEMPERATURE, mini_batch_size=MINI_BATCH)
    loss.calculate_loss([[q], [d]], with_backward=True)


CONTESTANTS = {
    "refine_fast": fused, "torch chunks of 256": chunks, "naive cross_entropy": naive, "sentence-transformers": sentence_transformers,
    "sentence-transformers cached": sentence_transformers_cached,
}  # fmt: skip


def ready(contestant: Callable[[Tensor, Tensor], None], n: int, width: int, dtype: str) -> Callable[[], None]:
    """Unit vectors; gradients start from None at every call. A first, tiny call takes the imports of a first use out of the figures."""
    torch.set_num_threads(1)
    contestant(*(torch.randn(4, width).to(DTYPES[dtype]).requires_grad_() for _ in range(2)))
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(n, width), dim=1).to(DTYPES[dtype]).requires_grad_() for _ in range(2)]

    def run() -> None:
        contestant(*leaves)
        for leaf in leaves:
            leaf.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--width", nargs="+", type=int, default=[384, 768])
    parser.add_argument("--memory", action="store_true", help="also the growth of peak memory, gradients included")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in options.dtype:
        for width in options.width:
            common = {
                "op": "info_nce", "mode": "fwd+bwd", "dtype": dtype, "shape": {"B": options.rows, "D": width},
                "peer": "torch chunks of 256",
            }  # fmt: skip
            calls = {name: ready(run, options.rows, width, dtype) for name, run in CONTESTANTS.items()}
            save(rows(measure(calls, rounds=options.rounds, clock=cpu_seconds), metric="cpu_seconds", **common))
            if options.memory:
                peaks = {name: [peak_mb(partial(ready, run, options.rows, width, dtype))] for name, run in CONTESTANTS.items()}
                save(rows(peaks, metric="peak_mb", **common))


if __name__ == "__main__":
    main()
