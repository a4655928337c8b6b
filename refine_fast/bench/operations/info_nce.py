"""info_nce, forward and backward, beside what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refine_fast as rf

from ..operation import DTYPES, Contender, Operation, Shape, Work

TEMPERATURE = 0.05
CHUNK, MINI_BATCH = 256, 32
PREFIXES = (64, 128, 256, 512)
"""Widths of the loss in mode ``prefixes``, besides the full one."""

Leaves = tuple[Tensor, Tensor]


@contextmanager
def unit_rows(shape: Shape, dtype: str, device: str) -> Iterator[Leaves]:
    """q (B, D) and d (N, D), unit rows that require gradients."""
    generator = torch.Generator().manual_seed(0)
    q, d = (
        F.normalize(torch.randn(int(shape[n]), int(shape["D"]), generator=generator), dim=1)
        .to(device, DTYPES[dtype])
        .requires_grad_()
        for n in ("B", "N")
    )
    yield q, d


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Leaves], list[Tensor]]:
    """A call of the loss with its gradients, which start from None at every call."""

    def run(leaves: Leaves) -> list[Tensor]:
        found = loss(*leaves)
        found.backward()
        return [found.detach(), *taken(leaves)]

    return run


def taken(leaves: Leaves) -> list[Tensor]:
    """The gradients of the leaves, which lose them."""
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [grad for grad in grads if grad is not None]


def fused(q: Tensor, d: Tensor) -> Tensor:
    """Ours."""
    return rf.info_nce(q, d, temperature=TEMPERATURE)


def naive(q: Tensor, d: Tensor) -> Tensor:
    """The loss in plain torch, with the B x N matrix."""
    return F.cross_entropy((q @ d.T) / TEMPERATURE, torch.arange(len(q), device=q.device))


@torch.no_grad()
def chunks(leaves: Leaves) -> list[Tensor]:
    """Torch in chunks of 256 rows with the gradients in the forward: the ten lines that one would
    write, and the fair peer."""
    q, d = leaves
    own, scale = torch.arange(CHUNK, device=q.device), 1 / (TEMPERATURE * len(q))
    grad_q, grad_d = torch.empty_like(q), torch.zeros_like(d, dtype=torch.float32)
    total = torch.zeros((), device=q.device)
    for start in range(0, len(q), CHUNK):
        x = q[start : start + CHUNK]
        s = (x @ d.T).float() / TEMPERATURE
        rows, columns = own[: len(x)], start + own[: len(x)]
        lse = s.logsumexp(1)
        total += (lse - s[rows, columns]).sum()
        p = s.sub_(lse[:, None]).exp_()
        p[rows, columns] -= 1
        p = (p * scale).to(q.dtype)
        grad_q[start : start + CHUNK] = p @ d
        grad_d += p.T @ x
    return [total / len(q), grad_q, grad_d.to(d.dtype)]


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(naive, dynamic=False)


def compiled(leaves: Leaves) -> list[Tensor]:
    """``naive`` through torch.compile."""
    return with_gradients(_compiled())(leaves)


def sentence_transformers(q: Tensor, d: Tensor) -> Tensor:
    """MultipleNegativesRankingLoss on embeddings, without an encoder; of inner products, since the
    rows are unit vectors."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss: Any = MultipleNegativesRankingLoss(
        nn.Identity(),  # type: ignore[arg-type]
        scale=1 / TEMPERATURE,
        similarity_fct=dot_score,
    )
    return loss.compute_loss_from_embeddings([q, d], None)


def sentence_transformers_cached(leaves: Leaves) -> list[Tensor]:
    """CachedMultipleNegativesRankingLoss on embeddings, at its default mini-batch of 32."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )
    from sentence_transformers.util import dot_score

    loss: Any = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()),  # type: ignore[arg-type]
        scale=1 / TEMPERATURE,
        similarity_fct=dot_score,
        mini_batch_size=MINI_BATCH,
    )
    value = loss.calculate_loss([[leaves[0]], [leaves[1]]], with_backward=True)
    return [value.detach(), *taken(leaves)]


@cache
def memeff_loss(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """memeff's Triton InfoNCE with the loss and gradients of ours."""
    from memeff import MemoryEfficientQwen3Loss

    # a margin of 2 drops no negative; stable would scale the gradients
    settings = {"margin": 2.0, "normalized_inputs": True, "stable": False}
    return MemoryEfficientQwen3Loss(temperature=temperature, **settings)


def liger(q: Tensor, d: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, with the documents as the weights of the last layer."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    labels = torch.arange(len(q), device=q.device)
    return LigerFusedLinearCrossEntropyLoss()(d, q / TEMPERATURE, labels)


def work(shape: Shape, dtype: str) -> Work:
    """6 B N D: the scores and both gradients. Inputs are read and gradients written once."""
    B, N, D = (shape[n] for n in ("B", "N", "D"))
    return Work(6 * B * N * D, 2 * (B + N) * D * DTYPES[dtype].itemsize)


def all_widths(width: int) -> list[int]:
    """The prefixes that are shorter than the width, and the width."""
    return [w for w in PREFIXES if w < width] + [width]


def fused_prefixes(leaves: Leaves) -> list[Tensor]:
    """Every width in one pass."""
    q, d = leaves
    widths = all_widths(q.shape[1])
    loss = rf.info_nce(
        q, d, temperature=TEMPERATURE, widths=widths, width_weights=[1.0] * len(widths)
    )
    loss.backward()
    return [loss.detach(), *taken(leaves)]


def one_by_one(
    contender: Callable[[Leaves], list[Tensor]],
) -> Callable[[Leaves], list[Tensor]]:
    """A call of the contender for each width; the sum of what they return."""

    def run(leaves: Leaves) -> list[Tensor]:
        q, d = leaves
        total = torch.zeros((), device=q.device)
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in leaves]
        for width in all_widths(q.shape[1]):
            parts = (q.detach()[:, :width].requires_grad_(), d.detach()[:, :width].requires_grad_())
            loss, *grads = contender(parts)
            total = total + loss
            for whole, grad in zip(sums, grads, strict=True):
                whole[:, :width] += grad
        return [total, *sums]

    return run


OPERATIONS = (
    Operation(
        "info_nce",
        "fwd+bwd",
        shape={"B": 8192, "N": 8192, "D": 384},
        quick={"B": 1024, "N": 1024},
        tiny={"B": 12, "N": 20, "D": 32},
        full=(
            {"D": 768},
            {"B": 1024, "N": 1024},
            {"B": 2048, "N": 2048},
            {"B": 4096, "N": 4096},
            {"B": 2048, "N": 2048, "D": 1024},
            {"B": 2048, "N": 2048, "D": 128},
        ),
        check={"B": 1536, "N": 1536},
        check_peer="torch chunks of 256",
        dtypes=("fp32", "bf16", "fp16"),
        contenders=(
            Contender("refine_fast", with_gradients(fused), "one call, no B x N matrix"),
            Contender(
                "torch chunks of 256", chunks, "ten lines of torch, gradients in the forward"
            ),
            Contender(
                "naive cross_entropy", with_gradients(naive), "F.cross_entropy(q @ d.T / tau)"
            ),
            Contender("torch.compile", compiled, "the naive loss, compiled", slow=True),
            Contender(
                "sentence-transformers",
                with_gradients(sentence_transformers),
                "MultipleNegativesRankingLoss on embeddings",
                needs="sentence-transformers",
            ),
            Contender(
                "sentence-transformers cached",
                sentence_transformers_cached,
                "CachedMultipleNegativesRankingLoss on embeddings, mini-batches of 32",
                needs="sentence-transformers",
            ),
            Contender(
                "memeff",
                lambda leaves: with_gradients(memeff_loss(TEMPERATURE))(leaves),
                "a Triton kernel for the same loss",
                needs="memeff",
                devices=("cuda",),
            ),
            Contender(
                "liger",
                with_gradients(liger),
                "Liger's fused linear cross entropy over the documents",
                needs="liger-kernel",
                devices=("cuda",),
            ),
        ),
        peer="torch chunks of 256",
        inputs=unit_rows,
        work=work,
        square=True,
    ),
    Operation(
        "info_nce",
        "prefixes",
        shape={"B": 4096, "N": 4096, "D": 768},
        quick={"B": 1024, "N": 1024},
        tiny={"B": 12, "N": 20, "D": 96},
        dtypes=("fp32", "bf16"),
        contenders=(
            Contender("refine_fast", fused_prefixes, "all widths in one pass"),
            Contender(
                "refine_fast, a width at a time",
                one_by_one(with_gradients(fused)),
                "a call for each width",
            ),
            Contender("torch chunks of 256", one_by_one(chunks), "the chunks for each width"),
        ),
        peer="torch chunks of 256",
        inputs=unit_rows,
        work=work,
        square=True,
        by_default=False,
    ),
)
