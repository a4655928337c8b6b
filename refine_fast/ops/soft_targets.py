"""Soft targets of info_nce: a teacher's share of each query's target distribution.

Let y be the targets of a row, s its scores and p its positive. The cross-entropy with the
distribution that gives y_t to column t and the rest to p is the InfoNCE loss of the row plus

    sum over t of y_t (s_p - s_t) / temperature
        = q . ((sum over t of y_t) d_p - sum over t of y_t d_t) / temperature.

The last sum is a weighted bag of rows of d, so neither a B x N matrix nor (B, T, D) rows exist.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .info_nce_problem import Problem

SLACK = 2**-7
"""How far above 1 the targets of a row may sum: each share of a softmax in bfloat16 is rounded by
2**-9 of it."""


def check_soft_targets(problem: Problem, columns: Tensor | None, targets: Tensor | None) -> None:
    """Checks shapes, dtypes and devices, and on a CPU the values.

    Raises:
        ValueError: one without the other, shapes or devices that do not fit ``problem``, a
            ``margin`` beside them; on a CPU also a column outside those of a row, a target that is
            negative or NaN, or targets of a row that sum to more than 1.
        TypeError: dtypes other than int64 and a floating-point type.
    """
    if columns is None or targets is None:
        if columns is not None or targets is not None:
            raise ValueError("soft_columns and soft_targets belong together; give both or neither")
        return
    B = len(problem.q)
    if columns.ndim != 2 or len(columns) != B or targets.shape != columns.shape:
        raise ValueError(
            f"soft_columns has shape {tuple(columns.shape)} and soft_targets"
            f" {tuple(targets.shape)}; with {B} rows of q, both must be ({B}, T)"
        )
    for name, value in (("soft_columns", columns), ("soft_targets", targets)):
        if value.device != problem.q.device:
            raise ValueError(
                f"{name} is on {value.device} and q on {problem.q.device}; use one device"
            )
    if columns.dtype != torch.int64:
        raise TypeError(f"soft_columns must be torch.int64 (got {columns.dtype})")
    if not targets.is_floating_point():
        raise TypeError(f"soft_targets must be a floating-point tensor (got {targets.dtype})")
    if problem.margin is not None:
        raise ValueError(
            "margin drops columns that soft_targets may name; give margin or soft_targets"
        )
    K = 0 if problem.hard is None else problem.hard.shape[1]
    last = len(problem.d) + K - 1
    inside = ((columns >= -1) & (columns <= last)).all()
    distribution = ((targets >= 0).all(1) & (targets.float().sum(1) <= 1 + SLACK)).all()
    if not columns.is_cpu:
        torch._assert_async(inside, f"info_nce: soft_columns must be -1 to {last}")
        torch._assert_async(distribution, "info_nce: soft_targets must be shares of 1")
    elif torch.compiler.is_compiling():
        return  # reading a value would break the graph
    elif not inside:
        raise ValueError(
            f"soft_columns must be columns of a row, 0 to {last}, or -1"
            f" (got {int(columns.min())} to {int(columns.max())})"
        )
    elif not distribution:
        raise ValueError("soft_targets must be at least 0, with a sum of at most 1 in each row")


def soft_target_losses(problem: Problem, columns: Tensor, targets: Tensor) -> Tensor:
    """(B,) float32 (float64 where q is), what the soft targets add to each row's InfoNCE loss.

    Computed by torch on every device, in 2 B (T + 1) D operations forward.

    Args:
        problem: the checked arguments of info_nce.
        columns: (B, T) int64, a row of d, or N + k for the row's own hard negative k; -1: unused.
        targets: (B, T), no gradient flows to them.
    """
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    shares = targets.detach().to(wide) * _kept(problem, columns)
    loss = torch.zeros(len(columns), dtype=wide, device=columns.device)
    for width, weight in zip(problem.all_widths(), problem.all_weights(), strict=True):
        term = _term(problem, width, columns, shares, wide)
        # the other direction of a symmetric loss has no soft targets and counts as much
        loss = loss + weight / problem.directions() * term
    return loss / problem.temperature.to(wide)


def _kept(problem: Problem, columns: Tensor) -> Tensor:
    """(B, T) bool: the columns that the row's softmax ranges over, without the positive."""
    N = len(problem.d)
    rows = torch.arange(len(columns), device=columns.device)
    own = rows if problem.positives is None else problem.positives
    column = columns.clamp(0, N - 1)
    if problem.doc_ids is None:
        kept = (columns >= 0) & (column != own[:, None])
    else:
        kept = (columns >= 0) & (problem.doc_ids[column] != problem.doc_ids[own][:, None])
    if problem.hard is None:
        return kept
    private = columns >= N
    if problem.hard_mask is None or problem.hard_mask.shape[1] == 0:
        return kept | private
    used = problem.hard_mask.gather(1, (columns - N).clamp(0, problem.hard_mask.shape[1] - 1))
    return torch.where(private, used, kept)


def _term(
    problem: Problem, width: int, columns: Tensor, shares: Tensor, dtype: torch.dtype
) -> Tensor:
    """(B,) sum over t of shares * (s_p - s_t) at one width."""

    def prefix(x: Tensor) -> Tensor:
        x = x[..., :width].to(dtype)
        return F.normalize(x, dim=-1) if problem.normalize else x

    q, d = prefix(problem.q), prefix(problem.d)
    N = len(d)
    own = d[: len(q)] if problem.positives is None else d[problem.positives]
    shared = shares.masked_fill(columns >= N, 0)
    bag = F.embedding_bag(columns.clamp(0, N - 1), d, per_sample_weights=shared, mode="sum")
    if (used := problem.used_hard()) is not None and used.shape[1]:
        hard = prefix(used)
        private = shares.masked_fill(columns < N, 0)
        at = (columns - N).clamp(0, hard.shape[1] - 1)
        by_hard = shares.new_zeros(hard.shape[:2]).scatter_add(1, at, private)
        bag = bag + (by_hard[..., None] * hard).sum(1)
    return (q * (shares.sum(1, keepdim=True) * own - bag)).sum(1)
