"""The contrastive loss without its B x N matrix (csrc/core/infonce.cc on CPUs, triton_kernels/info_nce.py on GPUs)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _core, reference
from .._native import DTYPES

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@overload
def info_nce(q: Tensor, d: Tensor, *, return_lse: Literal[True], **options: Any) -> tuple[Tensor, Tensor]: ...
@overload
def info_nce(q: Tensor, d: Tensor, *, return_lse: Literal[False] = False, **options: Any) -> Tensor: ...
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
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE (van den Oord et al., arXiv 1807.03748, equation 4) of queries against documents. Replaces::

        loss = F.cross_entropy(q @ d.T / temperature, positives)          # the (B, N) matrix is never built

    with gradients computed in the forward pass (6 B N D operations in all; 8 if symmetric) and at most 24 MB of working memory on a CPU.

    Args:
        q: (B, D) queries, float32, bfloat16 or float16. float64, and devices without a kernel, run `reference.info_nce`.
        d: (N, D) documents, N >= B unless ``positives`` is given; rows beyond the positives are negatives that all queries share.
        temperature: positive; a float or a tensor of one number, which may require a gradient.
        positives: (B,) int64, each query's row of d; default 0 .. B-1. Several queries may share one.
        doc_ids: (N,) int64: a column with the id of the row's positive is no negative (several positives per query, repeated documents).
        hard: (B, K, D) each query's own negatives; hard_mask: (B, K) bool, True where one is meant.
        margin: a negative with s > s_positive + margin is dropped as probably false (s: before the division by the temperature).
        symmetric: the mean with the other direction, from each row's positive to all queries; the masks hold there too.
        normalize: scale q, d and hard to unit length first, as ``F.normalize(x, dim=-1)``.
        weight: (B,) of each row; the mean divides by its sum.
        reduction: mean, sum or none.
        return_lse: also return the detached (B,) log-sum-exp of each row's logits (its positive and kept negatives).

    Returns:
        A float32 scalar, or (B,) with reduction none. A row without any negative has loss 0, and so has the mean of no rows.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together, a positive outside d, a temperature that is not positive;
            on a CPU also NaN or infinity in the inputs.
        RuntimeError: on a second derivative.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be mean, sum or none")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, d = q.to(dtype), d.to(dtype)
        hard = None if hard is None else hard.to(dtype)
    if not isinstance(temperature, Tensor):
        if not temperature > 0 or math.isinf(temperature):
            raise ValueError(f"temperature is {temperature}; it must be a positive number")
        temperature = torch.full((), temperature, dtype=torch.float64, device=q.device)
    temperature = temperature.to(torch.float32 if _has_kernel(q) else q.dtype).reshape(())
    problem = (q, d, temperature, positives, doc_ids, hard, hard_mask, margin, symmetric, normalize)
    _check(*problem)
    if weight is not None and weight.shape != (len(q),):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be ({len(q)},), one number per row of q")
    if not _has_kernel(q):
        losses = _reference_losses(*problem)
    elif reduction == "none" or not _wants_gradient(q, d, hard, temperature, weight):
        losses = _losses(*problem)
    else:
        coefficients = torch.ones(len(q), device=q.device) if weight is None else weight.float()
        if reduction == "mean":
            coefficients = coefficients / _nonzero(coefficients.sum())
        loss, losses = _weighted_sum(coefficients, *problem)[:2]
        return (loss, _lse(losses, *problem)) if return_lse else loss
    loss = losses.mean(0)
    if weight is not None:
        loss = loss * weight
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / _nonzero(torch.full_like(loss, len(q)) if weight is None else weight.sum())
    return (loss, _lse(losses, *problem)) if return_lse else loss


def _nonzero(total: Tensor) -> Tensor:
    """total, or 1 in place of 0: the mean of nothing is 0."""
    return torch.where(total == 0, torch.ones_like(total), total)


def _wants_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _has_kernel(q: Tensor) -> bool:
    return q.dtype in KERNEL_DTYPES and q.device.type in ("cpu", "cuda")


def _lse(losses: Tensor, q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, *rest: Any) -> Tensor:
    """loss + logit of the positive."""
    with torch.no_grad():
        q, d = q.to(losses.dtype), (d[: len(q)] if positives is None else d[positives]).to(losses.dtype)
        if rest[-1]:
            q, d = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(d, dim=-1)
        return losses[0].detach() + (q * d).sum(-1) / temperature


def _check(
    q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, doc_ids: Tensor | None, hard: Tensor | None,
    hard_mask: Tensor | None, margin: float | None, symmetric: bool, normalize: bool,
) -> None:  # fmt: skip
    """What can be known without reading a value; the kernels and their fakes rely on it."""
    if q.ndim != 2 or d.ndim != 2 or q.shape[1] != d.shape[1]:
        raise ValueError(f"q has shape {tuple(q.shape)} and d {tuple(d.shape)}; they must be (B, D) and (N, D) with one D")
    B, D, N = len(q), q.shape[1], len(d)
    if positives is None and N < B:
        raise ValueError(f"d has {N} rows for {B} queries; without positives, row i of d is the positive of query i")
    if hard is None and hard_mask is not None:
        raise ValueError("hard_mask is given without hard")
    K = hard.shape[1] if hard is not None and hard.ndim == 3 else 0
    shapes = {
        "temperature": (temperature, ()), "positives": (positives, (B,)), "doc_ids": (doc_ids, (N,)), "hard": (hard, (B, K, D)),
        "hard_mask": (hard_mask, (B, K)),
    }  # fmt: skip
    for name, (value, shape) in shapes.items():
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; beside q {tuple(q.shape)} and d {tuple(d.shape)} it must be {shape}")
        if value.device != q.device:
            raise ValueError(f"{name} is on {value.device} and q on {q.device}; move them to one device")
    if d.device != q.device:
        raise ValueError(f"d is on {d.device} and q on {q.device}; move them to one device")
    integers = {"positives": (positives, torch.int64), "doc_ids": (doc_ids, torch.int64), "hard_mask": (hard_mask, torch.bool)}
    for name, (value, dtype) in integers.items():
        if value is not None and value.dtype != dtype:
            raise TypeError(f"{name} is {value.dtype}; it must be {dtype}")
    if not q.is_floating_point():
        raise TypeError(f"q is {q.dtype}; it must be a floating-point tensor")
    for name, value in (("d", d), ("hard", hard)):
        if value is not None and value.dtype != q.dtype:
            raise TypeError(f"{name} is {value.dtype} and q {q.dtype}; cast one of them, or use torch.autocast")
    if margin is not None and math.isnan(margin):
        raise ValueError("margin is NaN; it must be a number")


def _check_values(temperature: Tensor, positives: Tensor | None, columns: int) -> None:
    """What only the values can tell; read on CPUs, where that costs no synchronization."""
    if not 0 < temperature.item() < math.inf:
        raise ValueError(f"temperature is {temperature.item()}; it must be a positive number")
    if positives is not None and len(positives) > 0:
        low, high = (int(x) for x in positives.aminmax())
        if low < 0 or high >= columns:
            raise ValueError(f"positives holds {low if low < 0 else high}; it must be a row of d, 0 to {columns - 1}")


def _reference_losses(
    q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, doc_ids: Tensor | None, hard: Tensor | None,
    hard_mask: Tensor | None, margin: float | None, symmetric: bool, normalize: bool,
) -> Tensor:  # fmt: skip
    if q.device.type == "cpu":
        _check_values(temperature, positives, len(d))
    return reference.info_nce_losses(
        q, d, temperature=temperature, positives=positives, doc_ids=doc_ids, hard=hard, hard_mask=hard_mask, margin=margin,
        symmetric=symmetric, normalize=normalize,
    )  # fmt: skip


# --- CPU ------------------------------------------------------------------------------------------------------------------------------


def _run_cpu(
    g: Tensor | None, q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, doc_ids: Tensor | None, hard: Tensor | None,
    hard_mask: Tensor | None, margin: float | None, symmetric: bool, normalize: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(directions, B) losses, and the float32 gradients of sum_i g_i loss_i (none without g)."""
    _check_values(temperature, positives, len(d))
    q, d = q.contiguous(), d.contiguous()
    positives = torch.arange(len(q)) if positives is None else positives.contiguous()
    optional = [x if x is None else x.contiguous() for x in (hard, doc_ids, hard_mask, g)]
    hard, doc_ids, hard_mask, g = optional
    losses = torch.empty(2 if symmetric else 1, len(q))
    shapes = [] if g is None else [q.shape, d.shape, (0,) if hard is None else hard.shape, ()]
    grads = [torch.empty(shape) for shape in shapes]
    if len(q) == 0:
        return losses, [x.zero_() for x in grads]
    at = [0 if x is None else x.data_ptr() for x in (q, d, hard, positives, doc_ids, hard_mask, g)]
    outputs = [x.data_ptr() for x in (losses, *grads)] if grads else [losses.data_ptr(), 0, 0, 0, 0]
    _core.info_nce(  # type: ignore[call-arg]  # mypy cannot count a starred list
        *at,  # type: ignore[arg-type]
        len(q), len(d), d.shape[1], 0 if hard is None else hard.shape[1], DTYPES[q.dtype], temperature.item(),
        math.inf if margin is None else margin, symmetric, normalize, torch.get_num_threads(), *outputs,
    )  # fmt: skip
    return losses, grads


# --- the operators: two forwards, each with its backward ------------------------------------------------------------------------------


def _gpu() -> Any:
    return importlib.import_module("refine_fast.triton_kernels.info_nce")  # where triton is needed, and only there


def _problem(
    q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, doc_ids: Tensor | None, hard: Tensor | None,
    hard_mask: Tensor | None, margin: float | None, symmetric: bool, normalize: bool,
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:  # fmt: skip
    return (q, d), {
        "temperature": temperature, "positives": positives, "doc_ids": doc_ids, "hard": hard, "hard_mask": hard_mask, "margin": margin,
        "symmetric": symmetric, "normalize": normalize,
    }  # fmt: skip


def _run(g: Tensor | None, problem: tuple[Any, ...], losses: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """On the device of q. losses: what an earlier forward found, where that saves work."""
    _check(*problem)
    if problem[0].device.type == "cpu":
        return _run_cpu(g, *problem)
    tensors, options = _problem(*problem)
    if g is None:
        return _gpu().losses(*tensors, **options), []
    losses, grads = _gpu().gradients(g, *tensors, losses=losses, **options)
    return losses, [grads.q, grads.d, tensors[0].new_empty(0) if grads.hard is None else grads.hard, grads.temperature]


SCHEMA = (
    "Tensor q, Tensor d, Tensor temperature, Tensor? positives, Tensor? doc_ids, Tensor? hard, Tensor? hard_mask, float? margin, "
    "bool symmetric, bool normalize"
)


def _operator(name: str, arguments: str, returns: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    op = torch.library.custom_op(f"refine_fast::{name}", body, mutates_args=(), schema=f"({arguments}) -> {returns}")
    op.register_fake(fake)
    return op


def _fake_losses(*problem: Any) -> Tensor:
    _check(*problem)
    return problem[0].new_empty((2 if problem[8] else 1, len(problem[0])), dtype=torch.float32)


def _fake_gradients(q: Tensor, d: Tensor, hard: Tensor | None) -> tuple[Tensor, ...]:
    dtype = torch.bfloat16 if q.device.type == "cuda" and q.dtype == torch.bfloat16 else torch.float32
    shapes = q.shape, d.shape, (0,) if hard is None else hard.shape
    return *(q.new_empty(shape, dtype=dtype) for shape in shapes), q.new_empty((), dtype=torch.float32)


def _sum_body(coefficients: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    losses, grads = _run(coefficients, problem)
    return ((losses.mean(0) * coefficients).sum(), losses, *grads)


def _sum_fake(coefficients: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    losses = _fake_losses(*problem)
    return (losses.new_empty(()), losses, *_fake_gradients(problem[0], problem[1], problem[5]))


def _gradients_body(g: Tensor, losses: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    *grads, temperature = _run(g, problem, losses)[1]
    return *(x.to(problem[0].dtype) for x in grads), temperature


def _gradients_fake(g: Tensor, losses: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    _check(*problem)
    *grads, temperature = _fake_gradients(problem[0], problem[1], problem[5])
    return *(x.to(problem[0].dtype) for x in grads), temperature


def _scale_body(g: Tensor, grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """g times each gradient in ``dtype``: one rounding."""
    return [(x * g).to(dtype) for x in grads]


_losses = _operator("info_nce_losses", SCHEMA, "Tensor", lambda *problem: _run(None, problem)[0], _fake_losses)
_gradients = _operator(
    "info_nce_gradients", f"Tensor g, Tensor losses, {SCHEMA}", "(Tensor, Tensor, Tensor, Tensor)", _gradients_body, _gradients_fake
)
_weighted_sum = _operator(
    "info_nce_weighted_sum", f"Tensor coefficients, {SCHEMA}", "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _sum_body, _sum_fake
)
_scale = _operator(
    "info_nce_scale", "Tensor g, Tensor[] grads, ScalarType dtype", "Tensor[]", _scale_body,
    lambda g, grads, dtype: [torch.empty_like(x, dtype=dtype) for x in grads],
)


def _as_inputs(grads: Any, hard: bool) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the problem's arguments."""
    q, d, h, temperature = grads
    return q, d, temperature, None, None, h if hard else None, None, None, None, None


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(output, *tensors)


def _losses_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    losses, *tensors = ctx.saved_tensors
    return _as_inputs(_gradients(g.sum(0), losses, *tensors, *ctx.options), tensors[5] is not None)


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.hard = inputs[1].dtype, inputs[6] is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _sum_backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    losses, *grads, temperature = ctx.saved_tensors
    of_coefficients, of_temperature = _scale(g, [losses.mean(0), temperature], torch.float32)
    return of_coefficients, *_as_inputs((*_scale(g, grads, ctx.dtype), of_temperature), ctx.hard)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("info_nce has no second derivative; use refine_fast.reference.info_nce where one is needed")


_losses.register_autograd(_losses_backward, setup_context=_losses_context)
_weighted_sum.register_autograd(_sum_backward, setup_context=_sum_context)
_gradients.register_autograd(_refuse)
_scale.register_autograd(_refuse)
