"""What the processes of a distributed training exchange: rows with their gradients, and means.

Over the default process group of torch.distributed. Where none is initialized, or with one process,
each function returns what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

BUCKET = 16 << 20
"""Numbers in one message: 64 MB in float32. More would cost memory and gain no time."""


def ranks() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def row_counts(x: Tensor) -> list[int]:
    """The number of rows that each rank has, in the order of the ranks."""
    _, size = ranks()
    if size == 1:
        return [len(x)]
    own = torch.tensor([len(x)], device=x.device)
    every = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(every, own)
    return torch.cat(every).tolist()


def gather_rows(x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of every rank, in the order of the ranks; their number may differ.

    Backward, each rank gets the sum over the ranks of the gradients of its own rows, added up in
    float32 at least. Every rank must call it, and its backward, in the same order.

    Args:
        x: (n, ...) rows of this rank.
        counts: the number of rows of each rank, if it is known; otherwise the ranks exchange it.

    Returns:
        (sum of counts, ...).
    """
    if ranks()[1] == 1:
        return x
    return _GatherRows.apply(x, row_counts(x) if counts is None else list(counts))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int]) -> Tensor:  # type: ignore[no-untyped-def]
        rank, _ = ranks()
        ctx.start, ctx.rows = sum(counts[:rank]), len(x)
        padded = x.new_zeros(max(counts), *x.shape[1:])  # a message has one size
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        total = total.contiguous()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows].to(gradient.dtype), None


def mean_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks. All have one dtype and device."""
    _, size = ranks()
    if size == 1:
        return
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if i == len(tensors) - 1 or sum(x.numel() for x in bucket) >= BUCKET:
            message = torch.cat([x.flatten() for x in bucket])
            dist.all_reduce(message)
            message /= size
            for x, mean in zip(bucket, message.split([x.numel() for x in bucket]), strict=True):
                x.copy_(mean.view_as(x))
            bucket = []


def mean_gradients(parameters: Sequence[torch.nn.Parameter], loss: Tensor) -> Tensor:
    """Replaces every gradient by its mean over the ranks, and returns the mean of ``loss``.

    A parameter without a gradient on some rank counts as zero there; without one on every rank it
    stays so.
    """
    if ranks()[1] == 1:
        return loss
    has = torch.tensor([p.grad is not None for p in parameters], device=loss.device)
    facts = torch.cat([loss.detach().reshape(1), has.to(loss.dtype)])
    mean_over_ranks([facts])
    trained = [p for p, share in zip(parameters, facts[1:].tolist(), strict=True) if share]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    mean_over_ranks([p.grad for p in trained if p.grad is not None])
    return facts[0].reshape(loss.shape)


def copy_from_first_rank(parameters: Sequence[Tensor]) -> None:
    """Replaces each tensor by that of rank 0."""
    if ranks()[1] > 1:
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=0)
