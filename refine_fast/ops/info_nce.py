"""The contrastive loss without its B x N matrix.

Kernels: csrc/core/info_nce.cc on CPUs, triton_kernels/info_nce.py on GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .. import reference
from ..errors import warn_once
from ..triton_kernels import missing_requirement
from .info_nce_operators import by_row, losses_by_row, weighted_sum
from .info_nce_problem import (
    Problem,
    assert_values,
    check,
    check_finite,
    check_reduction,
    check_tensors,
    check_values,
    check_widths,
)
from .soft_targets import check_soft_targets, soft_target_losses

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_DEVICES = {"cpu": None, "cuda": missing_requirement()}
"""Device type -> what to install before its kernels can run; None where nothing is missing."""


@overload
def info_nce(
    q: Tensor, d: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def info_nce(
    q: Tensor, d: Tensor, *, return_lse: Literal[False] = False, **options: Any
) -> Tensor: ...
def info_nce(  # type: ignore[misc]  # the overloads name only what decides the type of the result
    q: Tensor,
    d: Tensor,
    *,
    temperature: float | Tensor = 0.02,
    positives: Tensor | None = None,
    doc_ids: Tensor | None = None,
    hard: Tensor | None = None,
    hard_mask: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    widths: Sequence[int] | None = None,
    width_weights: Sequence[float] | None = None,
    weight: Tensor | None = None,
    soft_columns: Tensor | None = None,
    soft_targets: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE (van den Oord et al., arXiv 1807.03748, equation 4) of queries against documents.

    Replaces::

        loss = F.cross_entropy(q @ d.T / temperature, positives)   # never builds the (B, N) matrix

    The forward pass also computes the gradients: 6 B N D operations in all, 8 if symmetric and 8
    in bf16 on AMX, where scores are made twice rather than stored.

    Memory on a CPU beyond the float32 gradients: 24 MB of scores, but at least m whole rows of
    them, 4 m N bytes per width, where m is the height of the level's register tile (6 with AVX2,
    12 with AVX-512, 32 with AMX); 192 rows of d per thread; and a few vectors of length B and N. In
    bf16 on AMX, unless symmetric or with widths: 26 MB of packed rows and 1.2 MB per thread
    instead of the scores. It does not grow with B D. Measured with AVX2 and one thread: 24 MB at
    B = N = 8,192, D = 384; 27 MB at N = 1 million and 107 MB at N = 4 million, B = 32, D = 8. On a
    GPU: the workspace that REFINE_FAST_WORKSPACE_MB allows, 512 MB by default.

    After fork() the CPU kernel runs on one thread in the child. torch's own parallel operations
    hang there if the parent has used them, unless the child calls ``torch.set_num_threads(1)``
    first, as the workers of a DataLoader do.

    Args:
        q: (B, D) queries, float32, bfloat16 or float16, on a CPU or a CUDA GPU. float64 and other
            devices run `reference.info_nce`. So does a GPU without triton or with torch older
            than 2.11, after a RefineFastWarning that says what to install.
        d: (N, D) documents, N >= B unless ``positives`` is given. Every query shares the rows that
            are nobody's positive as negatives.
        temperature: positive; a float or a tensor of one number, which may require a gradient.
        positives: (B,) int64, each query's row of d; default 0 .. B-1. Queries may share one.
        doc_ids: (N,) int64. A column with the same id as the row's positive is not a negative
            (several positives per query, repeated documents).
        hard: (B, K, D), each query's own negatives.
        hard_mask: (B, K) bool, True where ``hard`` is used.
        margin: drops a negative with s > s_positive + margin as probably false, where s is the
            score before the division by the temperature.
        symmetric: averages with the other direction, from each row's positive to all queries; the
            masks hold there too.
        normalize: scales q, d and hard to unit length first, as ``F.normalize(x, dim=-1)``.
        widths: ascending, the last one D. The loss is the sum over them of width_weights
            (default 1) times the loss of ``q[:, :w]``, ``d[:, :w]`` and ``hard[..., :w]``;
            normalize scales each prefix by itself (Matryoshka representation learning, Kusupati et
            al., arXiv 2205.13147). On a CPU all widths share one product of the full width.
        width_weights: one number per width.
        weight: (B,), the weight of each row; the mean divides by its sum.
        soft_columns: (B, T) int64, the columns to which a teacher gives a share of the target: a
            row of d, or N + k for the row's own hard negative k; -1: unused.
        soft_targets: (B, T) float, these shares, at least 0. What they leave of 1 goes to the
            positive, and so do shares of columns that are not in the row's softmax. The loss is
            then the cross-entropy with this distribution: with shares that sum to 1, distillation
            (Hinton et al., arXiv 1503.02531) without InfoNCE; with a * teacher, (1 - a) times
            InfoNCE plus a times distillation. Costs 4 B T D more operations and float32 copies of
            q and d; symmetric: in the direction from the queries. Not with margin.
        reduction: "mean", "sum" or "none".
        return_lse: also returns the detached (B,) log-sum-exp of each row's logits (its positive
            and the negatives that are kept) at the full width.

    Returns:
        A float32 scalar, or (B,) with reduction "none". A row without negatives has loss 0, and
        so has the mean of no rows.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; a float
            temperature that is not positive. On a CPU also a temperature tensor that is not
            positive, a positive outside d, and NaN or infinity in q, d or the hard negatives that
            are used.
        RuntimeError: a second derivative, or a forward-mode one. On a GPU a positive outside d is a
            device-side assertion, as an index out of bounds is in torch: a later CUDA call reports
            it.
    """
    check_reduction(reduction)
    check_tensors(
        q=q, d=d, positives=positives, doc_ids=doc_ids, hard=hard, hard_mask=hard_mask,
        weight=weight, soft_columns=soft_columns, soft_targets=soft_targets,
    )  # fmt: skip
    q, d = autocast(q), autocast(d)
    hard = None if hard is None else autocast(hard)
    has_kernel = _has_kernel(q)
    exact = torch.float32 if has_kernel else q.dtype
    if not isinstance(temperature, Tensor):
        # no math.isinf, here and below: torch.compile does not trace it on a float that varies
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive number (got {temperature})")
        temperature = torch.full((), temperature, dtype=exact, device=q.device)
    temperature = temperature.to(exact)
    temperature = temperature.reshape(()) if temperature.numel() == 1 else temperature
    problem = Problem(
        q, d, temperature, positives, doc_ids, hard, hard_mask, margin, symmetric, normalize,
        *check_widths(widths, width_weights, q.shape[-1]),
    )  # fmt: skip
    check(problem)
    check_soft_targets(problem, soft_columns, soft_targets)
    if weight is not None and (weight.shape, weight.device) != ((len(q),), q.device):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} on {weight.device}; it must be ({len(q)},) on"
            f" {q.device}, one number per row of q"
        )
    loss, losses = _hard_target_loss(problem, weight, reduction, has_kernel=has_kernel)
    if soft_columns is not None and soft_targets is not None and soft_columns.shape[1]:
        by_teacher = soft_target_losses(problem, soft_columns, soft_targets)
        loss = loss + _reduced(by_teacher, weight, reduction)
    return (loss, _lse(losses, problem)) if return_lse else loss


def autocast(x: Tensor) -> Tensor:
    """The tensor as torch's autocast gives it to a matrix product: one of ``KERNEL_DTYPES`` in the
    region's dtype; float64 stays."""
    place = x.device.type
    if x.dtype not in KERNEL_DTYPES or not torch.amp.is_autocast_available(place):
        return x
    return x.to(torch.get_autocast_dtype(place)) if torch.is_autocast_enabled(place) else x


def _hard_target_loss(
    problem: Problem, weight: Tensor | None, reduction: str, *, has_kernel: bool
) -> tuple[Tensor, Tensor]:
    """The loss without soft targets, and its terms (widths, directions, B)."""
    q, d, hard = problem.q, problem.d, problem.hard
    if not has_kernel:
        losses = _reference_losses(problem)
        return _reduced(by_row(losses, problem), weight, reduction), losses
    _refuse_tangents(q, d, hard, problem.temperature, weight)
    if reduction == "none" or not _wants_gradient(q, d, hard, problem.temperature, weight):
        loss, losses = losses_by_row(*problem)
        return _reduced(loss, weight, reduction), losses
    if weight is None:
        # float64: 1 / B in float32 would be the same error in every row
        coefficients = torch.ones(len(q), dtype=torch.float64, device=q.device)
    else:
        coefficients = weight.double()
    if reduction == "mean":
        coefficients = coefficients / _nonzero(coefficients.sum())
    loss, losses = weighted_sum(coefficients, *problem)[:2]
    return loss, losses


def _reduced(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The losses of the rows, (B,), by the rules of ``weight`` and ``reduction``."""
    if weight is not None:
        weight = weight.to(loss.dtype)
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = loss.new_full((), len(loss)) if weight is None else weight.sum()
    return loss.sum() / _nonzero(total)


def _has_kernel(q: Tensor) -> bool:
    """Whether a kernel takes q. Warns once where only an installation is missing."""
    if q.dtype not in KERNEL_DTYPES or q.device.type not in KERNEL_DEVICES:
        return False
    missing = KERNEL_DEVICES[q.device.type]
    if missing is not None and not torch.compiler.is_compiling():
        warn_once(
            f"info_nce runs its plain torch reference on {q.device}, which builds the B x N"
            f" matrix: {missing}"
        )
    return missing is None


def _nonzero(total: Tensor) -> Tensor:
    """total, or 1 in place of 0: the mean of nothing is 0."""
    return torch.where(total == 0, torch.ones_like(total), total)


def _wants_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _refuse_tangents(*inputs: Tensor | None) -> None:
    """The operators have no forward derivative, and torch would take it for zero."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "info_nce has no forward-mode derivative: use backward() or torch.autograd.grad, or"
            " float64 inputs, which the reference takes"
        )


def _reference_losses(problem: Problem) -> Tensor:
    """(widths, directions, B), by the reference."""
    if problem.q.is_cpu:
        check_values(problem)
        check_finite(problem)
    elif problem.q.is_cuda:
        assert_values(problem)
    widths = problem.all_widths()
    return torch.stack([reference.info_nce_losses(**problem.of_width(w)) for w in widths])


def _lse(losses: Tensor, problem: Problem) -> Tensor:
    """The loss at the full width plus the logit of the positive."""
    with torch.no_grad():
        q, d, positives = problem.q, problem.d, problem.positives
        own = d[: len(q)] if positives is None else d[positives]
        q, own = q.to(losses.dtype), own.to(losses.dtype)
        if problem.normalize:
            q = torch.nn.functional.normalize(q, dim=-1)
            own = torch.nn.functional.normalize(own, dim=-1)
        return losses[-1, 0].detach() + (q * own).sum(-1) / problem.temperature
