"""The torch operators of info_nce: two forwards, each with its backward, on CPU and GPU.

``info_nce_losses`` returns every row's loss; its backward runs the kernels again with the upstream
gradient. ``info_nce_weighted_sum`` returns sum_i c_i loss_i and, from the same pass, its
gradients; its backward only scales them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .._native import DTYPES
from ..profiling import stage
from .info_nce_problem import Problem, assert_values, check, check_values

SCHEMA = (
    "Tensor q, Tensor d, Tensor temperature, Tensor? positives, Tensor? doc_ids, Tensor? hard, "
    "Tensor? hard_mask, float? margin, bool symmetric, bool normalize, int[] widths, "
    "float[] width_weights"
)
"""The fields of ``Problem``, flat."""
TENSORS = ("q", "d", "temperature", "positives", "doc_ids", "hard", "hard_mask")
"""The fields of ``Problem`` that autograd saves as tensors."""
NO_GRADIENTS = Problem(*[None] * len(Problem._fields))  # type: ignore[arg-type]
"""The gradients of a problem's arguments, before any is filled in."""


def by_row(losses: Tensor, problem: Problem) -> Tensor:
    """(B,): the weighted sum over the widths, and the mean over the directions, of ``losses``
    (widths, directions, B)."""
    weighted = zip(problem.all_weights(), losses.mean(1), strict=True)
    return sum((w * x for w, x in weighted), torch.zeros_like(losses[0, 0]))


def run(
    g: Tensor | None, problem: Problem, losses: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Runs the kernels of q's device.

    Args:
        g: (B,), the upstream gradient of each row's loss; None for the losses alone.
        problem: checked here, except for the values that only the device can check.
        losses: what an earlier call returned for the same problem, where that saves work.

    Returns:
        The losses (widths, directions, B) float32, and the gradients of sum_i g_i loss_i by q, d,
        hard (empty without hard negatives) and temperature; none without g.
    """
    check(problem)
    g = None if g is None else g.float()
    return (_run_cpu if problem.q.is_cpu else _run_gpu)(g, problem, losses)


def _run_cpu(
    g: Tensor | None, problem: Problem, losses: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Over csrc/core/info_nce.cc, which computes the losses anew in any case."""
    check_values(problem)
    q, d = problem.q.contiguous(), problem.d.contiguous()
    B, N, D = len(q), len(d), q.shape[1]
    positives = problem.positives
    positives = torch.arange(B, device="cpu") if positives is None else positives.contiguous()
    hard, doc_ids, hard_mask, g = (
        None if x is None else x.contiguous()
        for x in (problem.hard, problem.doc_ids, problem.hard_mask, g)
    )
    widths, margin = problem.all_widths(), problem.margin
    shapes: list[Sequence[int]] = [(len(widths), problem.directions(), B)]
    shapes += [] if g is None else [q.shape, d.shape, _shape(hard), ()]
    losses, *grads = (torch.empty(x, dtype=torch.float32, device="cpu") for x in shapes)
    if B == 0:
        return losses, [x.zero_() for x in grads]
    tensors = (q, d, hard, positives, doc_ids, hard_mask, g)
    outputs = [x.data_ptr() for x in grads] or [0, 0, 0, 0]
    _core.info_nce(  # type: ignore[call-arg]  # mypy cannot count a starred list
        *(0 if x is None else x.data_ptr() for x in tensors),  # type: ignore[arg-type]
        B,
        N,
        D,
        0 if hard is None else hard.shape[1],
        widths,
        problem.all_weights(),
        DTYPES[q.dtype],
        problem.temperature.item(),
        math.inf if margin is None else margin,
        problem.symmetric,
        problem.normalize,
        torch.get_num_threads(),
        losses.data_ptr(),
        *outputs,
    )
    return losses, grads


def _run_gpu(
    g: Tensor | None, problem: Problem, losses: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Over the Triton kernels, one width at a time, the largest first: its gradients have room
    for the others'."""
    assert_values(problem)
    # imports triton, which is needed here and nowhere else
    kernels = importlib.import_module("refine_fast.triton_kernels.info_nce")
    widths, weights = problem.all_widths(), problem.all_weights()
    found: list[Tensor] = []
    total: list[Tensor] = []
    for m in reversed(range(len(widths))):
        part = problem.of_width(widths[m])
        for name in ("q", "d", "hard"):
            part[name] = None if part[name] is None else part[name].contiguous()
        if g is None:
            found.append(kernels.losses(**part))
            continue
        known = None if losses is None else losses[m]
        one, grads = kernels.gradients(g * weights[m], losses=known, **part)
        found.append(one)
        no_hard = grads.q.new_empty(_shape(part["hard"]))
        parts = [
            grads.q,
            grads.d,
            no_hard if grads.hard is None else grads.hard,
            grads.temperature,
        ]
        if not total:
            total = parts
            continue
        *wholes, temperature = total
        for whole, prefix in zip(wholes, parts, strict=False):
            whole[..., : prefix.shape[-1]] += prefix
        total = [*wholes, temperature + grads.temperature]
    return torch.stack(found[::-1]), total


def _shape(hard: Tensor | None) -> torch.Size:
    return torch.Size([0]) if hard is None else hard.shape


def _gradient_dtype(q: Tensor) -> torch.dtype:
    """dtype of forward-pass gradients: float32, which rounds once when scaled; bfloat16 on a GPU,
    to save memory."""
    on_gpu = q.device.type == "cuda"
    return torch.bfloat16 if on_gpu and q.dtype == torch.bfloat16 else torch.float32


def _empty_gradients(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q = problem.q
    shapes = (q.shape, problem.d.shape, _shape(problem.hard))
    temperature = q.new_empty((), dtype=torch.float32)
    return *(q.new_empty(shape, dtype=dtype) for shape in shapes), temperature


def _scaled(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """(x * g).to(dtype) in the memory of x, which is as large as q or d: no second copy."""
    if x.dtype == dtype:
        return x.mul_(g)
    wide = x.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    step = 1 << 17  # both steps find it in cache
    for begin in range(0, len(wide), step):  # writes stay behind the reads
        narrow[begin : begin + step] = wide[begin : begin + step].mul_(g).to(dtype)
    return narrow.view(x.shape)


def _losses_body(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments)
    losses = run(None, problem)[0]
    return by_row(losses, problem), losses


def _losses_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*arguments)
    check(problem)
    shape = (len(problem.all_widths()), problem.directions(), len(problem.q))
    losses = problem.q.new_empty(shape, dtype=torch.float32)
    return losses[0, 0].clone(), losses


def _gradients_body(g: Tensor, losses: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    *grads, temperature = run(g, problem, losses)[1]
    return *(x.to(problem.q.dtype) for x in grads), temperature


def _gradients_fake(g: Tensor, losses: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    check(problem)
    return _empty_gradients(problem, problem.q.dtype)


def _sum_body(coefficients: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    losses, grads = run(coefficients, problem)
    total = (by_row(losses, problem) * coefficients).sum()
    return total.to(losses.dtype), losses, *grads


def _sum_fake(coefficients: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    losses = _losses_fake(*arguments)[1]
    grads = _empty_gradients(problem, _gradient_dtype(problem.q))
    return losses.new_empty(()), losses, *grads


def _operator(
    name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    op = torch.library.custom_op(f"refine_fast::{name}", body, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


losses_by_row: Any = _operator(
    "info_nce_losses", f"({SCHEMA}) -> (Tensor, Tensor)", _losses_body, _losses_fake
)
"""(*problem) -> (losses by row (B,), losses (widths, directions, B))."""
gradients: Any = _operator(
    "info_nce_gradients",
    f"(Tensor g, Tensor losses, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients_body,
    _gradients_fake,
)
"""(g, losses, *problem) -> gradients by q, d, hard and temperature."""
weighted_sum: Any = _operator(
    "info_nce_weighted_sum",
    f"(Tensor coefficients, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sum_body,
    _sum_fake,
)
"""(coefficients, *problem) -> (sum, losses (widths, directions, B), the four gradients)."""


def _save(ctx: Any, problem: Problem, *others: Tensor) -> None:
    """Keeps ``others`` and the problem for the backward."""
    ctx.settings = problem._replace(**dict.fromkeys(TENSORS))  # type: ignore[arg-type]
    ctx.save_for_backward(*others, *(getattr(problem, name) for name in TENSORS))


def _saved(ctx: Any) -> tuple[list[Tensor], Problem]:
    """What ``_save`` kept."""
    tensors = list(ctx.saved_tensors)
    first = len(tensors) - len(TENSORS)
    return tensors[:first], ctx.settings._replace(
        **dict(zip(TENSORS, tensors[first:], strict=True))
    )


def _in_order(problem: Problem, grads: Any) -> tuple[Any, ...]:
    """The gradients by q, d, hard and temperature, in the order of the problem's arguments."""
    q, d, hard, temperature = grads
    hard = None if problem.hard is None else hard
    return (*NO_GRADIENTS._replace(q=q, d=d, temperature=temperature, hard=hard),)


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, losses = output
    ctx.mark_non_differentiable(losses)
    _save(ctx, Problem(*inputs), losses)


def _losses_backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (losses,), problem = _saved(ctx)
    return _in_order(problem, gradients(g, losses, *problem))


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    coefficients, *arguments = inputs
    _, losses, *ctx.gradients = output
    ctx.mark_non_differentiable(losses, *ctx.gradients)
    ctx.set_materialize_grads(False)  # zeros for the other outputs would be as large as q and d
    _save(ctx, Problem(*arguments), losses, coefficients)


def _sum_backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (losses, coefficients), problem = _saved(ctx)
    dtype, row_losses = problem.q.dtype, by_row(losses, problem)
    # The gradients are as large as q and d: they are scaled in place and handed over. A second
    # backward (retain_graph) computes them anew, and so does one that is itself differentiated
    # (create_graph), through operators that refuse a second derivative.
    grads, ctx.gradients = ctx.gradients, None
    if torch.is_grad_enabled():
        row_losses, grads = losses_by_row(*problem)[0], None
    if grads is None:
        grads = gradients(g * coefficients, losses, *problem)
    else:
        *large, temperature = grads
        if type(g) is not Tensor:  # traced by torch.compile, which plans memory itself
            large = [(x * g).to(dtype) for x in large]
        else:
            with stage("finish"):
                large = [_scaled(x, g, dtype) for x in large]
        grads = (*large, temperature * g)
    return (g * row_losses).to(coefficients.dtype), *_in_order(problem, grads)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "info_nce has no second derivative; use refine_fast.reference.info_nce where one is needed"
    )


losses_by_row.register_autograd(_losses_backward, setup_context=_losses_context)
weighted_sum.register_autograd(_sum_backward, setup_context=_sum_context)
gradients.register_autograd(_refuse)
