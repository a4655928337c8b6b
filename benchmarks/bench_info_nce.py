"""info_nce, forward and backward, beside what it replaces, on one CPU thread in CPU seconds.

    python benchmarks/bench_info_nce.py [--rows 8192] [--rounds 3] [--dtype fp32 bf16] [--width 384
    768] [--memory] [--only NAME...] python benchmarks/bench_info_nce.py --prefixes 64 128 256 512
    # the loss at these widths and the full one
 Peers: naive cross_entropy; torch in chunks of 256 with the gradients in the forward (the fair one:
ten lines); sentence-transformers' MultipleNegativesRankingLoss and its cached loss at the default
mini-batch of 32, on embeddings (no encoder). With --prefixes: all widths in one pass, a call of
info_nce for each, and the torch chunks for each.
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

    MultipleNegativesRankingLoss(nn.Identity(), scale=1 / TEMPERATURE).compute_loss_from_embeddings(
        [q, d], None
    ).backward()


def sentence_transformers_cached(q: Tensor, d: Tensor) -> None:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()), scale=1 / TEMPERATURE, mini_batch_size=MINI_BATCH
    )
    loss.calculate_loss([[q], [d]], with_backward=True)


CONTESTANTS = {
    "refine_fast": fused,
    "torch chunks of 256": chunks,
    "naive cross_entropy": naive,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers cached": sentence_transformers_cached,
}


def fused_prefixes(q: Tensor, d: Tensor, prefixes: list[int]) -> None:
    rf.info_nce(
        q, d, temperature=TEMPERATURE, widths=[w for w in prefixes if w < q.shape[1]] + [q.shape[1]]
    ).backward()


def one_by_one(
    q: Tensor, d: Tensor, prefixes: list[int], contestant: Callable[[Tensor, Tensor], None]
) -> None:
    for width in [w for w in prefixes if w < q.shape[1]] + [q.shape[1]]:
        contestant(q[:, :width], d[:, :width])


def ready(
    contestant: Callable[[Tensor, Tensor], None], n: int, width: int, dtype: str
) -> Callable[[], None]:
    """Unit vectors; gradients start from None at every call. A first, tiny call takes the imports
    of a first use out of the figures.
    """
    torch.set_num_threads(1)
    contestant(*(torch.randn(4, width).to(DTYPES[dtype]).requires_grad_() for _ in range(2)))
    torch.manual_seed(0)
    leaves = [
        F.normalize(torch.randn(n, width), dim=1).to(DTYPES[dtype]).requires_grad_()
        for _ in range(2)
    ]

    def run() -> None:
        contestant(*leaves)
        for leaf in leaves:
            leaf.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--width", nargs="+", type=int, default=[384, 768])
    parser.add_argument(
        "--memory", action="store_true", help="only the growth of peak memory, gradients included"
    )
    parser.add_argument("--prefixes", nargs="+", type=int)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contestants: dict[str, Callable[[Tensor, Tensor], None]] = dict(CONTESTANTS)
    if options.prefixes:
        contestants = {
            "refine_fast": partial(fused_prefixes, prefixes=options.prefixes),
            "refine_fast, a width at a time": partial(
                one_by_one, prefixes=options.prefixes, contestant=fused
            ),
            "torch chunks of 256": partial(
                one_by_one, prefixes=options.prefixes, contestant=chunks
            ),
        }
    contestants = {
        name: run for name, run in contestants.items() if not options.only or name in options.only
    }
    for dtype in options.dtype:
        for width in options.width:
            shape = {"B": options.rows, "D": width} | (
                {"prefixes": options.prefixes} if options.prefixes else {}
            )
            common = {
                "op": "info_nce",
                "mode": "fwd+bwd",
                "dtype": dtype,
                "shape": shape,
                "peer": "torch chunks of 256",
            }
            if options.memory:
                peaks = {
                    name: [peak_mb(partial(ready, run, options.rows, width, dtype))]
                    for name, run in contestants.items()
                }
                save(rows(peaks, metric="peak_mb", **common))
                continue
            calls = {
                name: ready(run, options.rows, width, dtype) for name, run in contestants.items()
            }
            save(
                rows(
                    measure(calls, rounds=options.rounds, clock=cpu_seconds),
                    metric="cpu_seconds",
                    **common,
                )
            )


if __name__ == "__main__":
    main()
