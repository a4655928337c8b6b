"""The contrastive loss without its B x N matrix (csrc/core/info_nce.cc on CPUs, triton_kernels/info_nce.py on GPUs)."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
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
    widths: Sequence[int] | None = None,
    width_weights: Sequence[float] | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE (van den Oord et al., arXiv 1807.03748, equation 4) of queries against documents. Replaces::

        loss = F.cross_entropy(q @ d.T / temperature, positives)          # the (B, N) matrix is never built

    with gradients computed in the forward pass (6 B N D operations in all; 8 if symmetric) and, on a CPU, 32 MB of memory
    beyond the gradients in float32, whatever B.

    After fork() the CPU kernel runs on one thread in the child. torch's own parallel operations hang there if the parent has used
    them, unless the child calls ``torch.set_num_threads(1)`` first, as the workers of a DataLoader do.

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
        widths: ascending, the last D: the sum over them of width_weights (default 1) times the loss of ``q[:, :w]``, ``d[:, :w]`` and
            ``hard[..., :w]``, normalize scaling each prefix by itself (Matryoshka representation learning, Kusupati et al., arXiv
            2205.13147). On a CPU all widths share one product of the full width.
        weight: (B,) of each row; the mean divides by its sum.
        reduction: mean, sum or none.
        return_lse: also return the detached (B,) log-sum-exp of each row's logits (its positive and kept negatives) at the full
            width.

    Returns:
        A float32 scalar, or (B,) with reduction none. A row without any negative has loss 0, and so has the mean of no rows.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together, a positive outside d, a temperature that is not positive;
            on a CPU also NaN or infinity in q, d or the hard negatives that are meant.
        RuntimeError: on a second derivative.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be mean, sum or none")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, d = q.to(dtype), d.to(dtype)
        hard = None if hard is None else hard.to(dtype)
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:  # comparisons here and below: torch.compile traces no math.isinf of a float that varies
            raise ValueError(f"temperature is {temperature}; it must be a positive number")
        temperature = torch.full((), temperature, dtype=torch.float64, device=q.device)
    temperature = temperature.to(torch.float32 if _has_kernel(q) else q.dtype)
    temperature = temperature.reshape(()) if temperature.numel() == 1 else temperature
    widths, width_weights = _check_widths(widths, width_weights, q)
    problem = (q, d, temperature, positives, doc_ids, hard, hard_mask, margin, symmetric, normalize, widths, width_weights)
    _check(*problem)
    if weight is not None and weight.shape != (len(q),):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be ({len(q)},), one number per row of q")
    if not _has_kernel(q):
        loss, losses = _reference_losses(*problem)
    elif reduction == "none" or not _wants_gradient(q, d, hard, temperature, weight):
        loss, losses = _losses(*problem)
    else:
        # float64: 1 / B in float32 would be the same error in every row, which no sum evens out
        coefficients = torch.ones(len(q), dtype=torch.float64, device=q.device) if weight is None else weight.double()
        if reduction == "mean":
            coefficients = coefficients / _nonzero(coefficients.sum())
        loss, losses = _weighted_sum(coefficients, *problem)[:2]
        return (loss, _lse(losses, *problem)) if return_lse else loss
    if weight is not None:
        weight = weight.to(loss.dtype)
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


def _by_row(losses: Tensor, width_weights: Sequence[float]) -> Tensor:
    """(B,) of (widths, directions, B)."""
    return sum((w * x for w, x in zip(width_weights or [1.0], losses.mean(1), strict=True)), torch.zeros_like(losses[0, 0]))


def _lse(losses: Tensor, q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, *rest: Any) -> Tensor:
    """loss + logit of the positive."""
    with torch.no_grad():
        q, d = q.to(losses.dtype), (d[: len(q)] if positives is None else d[positives]).to(losses.dtype)
        if rest[5]:  # normalize
            q, d = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(d, dim=-1)
        return losses[-1, 0].detach() + (q * d).sum(-1) / temperature


def _check_widths(widths: Sequence[int] | None, width_weights: Sequence[float] | None, q: Tensor) -> tuple[list[int], list[float]]:
    """Both empty for the full width alone."""
    if widths is None:
        if width_weights is not None:
            raise ValueError("width_weights is given without widths")
        return [], []
    widths = list(widths)
    if not widths or widths[0] < 1 or widths[-1] != q.shape[-1] or any(a >= b for a, b in itertools.pairwise(widths)):
        raise ValueError(f"widths is {widths}; it must ascend from at least 1 to the {q.shape[-1]} columns of q")
    weights = [1.0] * len(widths) if width_weights is None else [float(w) for w in width_weights]
    if len(weights) != len(widths) or not all(-math.inf < w < math.inf for w in weights):
        raise ValueError(f"width_weights is {weights}; it must hold one finite number for each of the widths {widths}")
    return widths, weights


def _check(
    q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, doc_ids: Tensor | None, hard: Tensor | None,
    hard_mask: Tensor | None, margin: float | None, symmetric: bool, normalize: bool, widths: list[int], width_weights: list[float],
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
    if margin is not None and not margin <= math.inf:
        raise ValueError("margin is NaN; it must be a number")


def _check_values(temperature: Tensor, positives: Tensor | None, columns: int) -> None:
    """What only the values can tell; read on CPUs, where that costs no synchronization."""
    if not 0 < temperature.item() < math.inf:
        raise ValueError(f"temperature is {temperature.item()}; it must be a positive number")
    if positives is not None and len(positives) > 0:
        low, high = (int(x) for x in positives.aminmax())
        if low < 0 or high >= columns:
            raise ValueError(f"positives holds {low if low < 0 else high}; it must be a row of d, 0 to {columns - 1}")


def _reference_losses(*problem: Any) -> tuple[Tensor, Tensor]:
    (q, d), options = _problem(*problem)
    if q.device.type == "cpu":
        _check_values(options["temperature"], options["positives"], len(d))
    found = []
    for width in problem[-2] or [q.shape[1]]:
        hard = None if options["hard"] is None else options["hard"][..., :width]
        found.append(reference.info_nce_losses(q[:, :width], d[:, :width], **{**options, "hard": hard}))
    losses = torch.stack(found)
    return _by_row(losses, problem[-1]), losses


# --- CPU ------------------------------------------------------------------------------------------------------------------------------


def _run_cpu(
    g: Tensor | None, q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, doc_ids: Tensor | None, hard: Tensor | None,
    hard_mask: Tensor | None, margin: float | None, symmetric: bool, normalize: bool, widths: list[int], width_weights: list[float],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(widths, directions, B) losses, and the gradients of sum_i g_i loss_i (none without g)."""
    _check_values(temperature, positives, len(d))
    q, d = q.contiguous(), d.contiguous()
    positives = torch.arange(len(q)) if positives is None else positives.contiguous()
    optional = [x if x is None else x.contiguous() for x in (hard, doc_ids, hard_mask, g)]
    hard, doc_ids, hard_mask, g = optional
    widths, width_weights = widths or [q.shape[1]], width_weights or [1.0]
    losses = torch.empty(len(widths), 2 if symmetric else 1, len(q))
    grads = [] if g is None else [torch.empty(shape) for shape in (q.shape, d.shape, _shape(hard), ())]
    if len(q) == 0:
        grads = [x.zero_() for x in grads]
    else:
        at = [0 if x is None else x.data_ptr() for x in (q, d, hard, positives, doc_ids, hard_mask, g)]
        outputs = [x.data_ptr() for x in (losses, *grads)] if grads else [losses.data_ptr(), 0, 0, 0, 0]
        _core.info_nce(  # type: ignore[call-arg]  # mypy cannot count a starred list
            *at,  # type: ignore[arg-type]
            len(q), len(d), d.shape[1], 0 if hard is None else hard.shape[1], widths, width_weights, DTYPES[q.dtype], temperature.item(),
            math.inf if margin is None else margin, symmetric, normalize, torch.get_num_threads(), *outputs,
        )  # fmt: skip
    return losses, grads


# --- the operators: two forwards, each with its backward ------------------------------------------------------------------------------


def _gpu() -> Any:
    return importlib.import_module("refine_fast.triton_kernels.info_nce")  # where triton is needed, and only there


def _problem(
    q: Tensor, d: Tensor, temperature: Tensor, positives: Tensor | None, doc_ids: Tensor | None, hard: Tensor | None,
    hard_mask: Tensor | None, margin: float | None, symmetric: bool, normalize: bool, widths: list[int], width_weights: list[float],
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:  # fmt: skip
    """Of one width."""
    return (q, d), {
        "temperature": temperature, "positives": positives, "doc_ids": doc_ids, "hard": hard, "hard_mask": hard_mask, "margin": margin,
        "symmetric": symmetric, "normalize": normalize,
    }  # fmt: skip


def _run_gpu(g: Tensor | None, problem: tuple[Any, ...], losses: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """As `_run_cpu`, one width after the other: from the largest, whose gradients take up the others'."""
    (q, d), options = _problem(*problem)
    hard, widths, width_weights = options["hard"], problem[-2] or [q.shape[1]], problem[-1] or [1.0]
    found: list[Tensor] = []
    total: list[Tensor] = []
    for m in reversed(range(len(widths))):
        x, y = q[:, : widths[m]].contiguous(), d[:, : widths[m]].contiguous()
        part = {**options, "hard": None if hard is None else hard[..., : widths[m]].contiguous()}
        if g is None:
            found.append(_gpu().losses(x, y, **part))
            continue
        one, grads = _gpu().gradients(g * width_weights[m], x, y, losses=None if losses is None else losses[m], **part)
        found.append(one)
        parts = [grads.q, grads.d, x.new_empty(0) if grads.hard is None else grads.hard, grads.temperature]
        if not total:
            total = parts
            continue
        for whole, prefix in zip(total[:3], parts[:3], strict=True):
            whole[..., : prefix.shape[-1]] += prefix
        total[3] = total[3] + parts[3]
    return torch.stack(found[::-1]), total


def _run(g: Tensor | None, problem: tuple[Any, ...], losses: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """On the device of q. losses: what an earlier forward found, where that saves work."""
    _check(*problem)
    g = None if g is None else g.float()
    return _run_cpu(g, *problem) if problem[0].device.type == "cpu" else _run_gpu(g, problem, losses)


SCHEMA = (
    "Tensor q, Tensor d, Tensor temperature, Tensor? positives, Tensor? doc_ids, Tensor? hard, Tensor? hard_mask, float? margin, "
    "bool symmetric, bool normalize, int[] widths, float[] width_weights"
)


def _operator(name: str, arguments: str, returns: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    op = torch.library.custom_op(f"refine_fast::{name}", body, mutates_args=(), schema=f"({arguments}) -> {returns}")
    op.register_fake(fake)
    return op


def _shape(hard: Tensor | None) -> Sequence[int]:
    return (0,) if hard is None else hard.shape


def _gradient_dtype(q: Tensor) -> torch.dtype:
    """Of the gradients in the forward: float32, so that scaling them rounds but once; bfloat16 on GPUs, where memory is dearer."""
    return torch.bfloat16 if q.device.type == "cuda" and q.dtype == torch.bfloat16 else torch.float32


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype) in the memory of x, which is as large as q or d: no second copy."""
    if x.dtype == dtype:
        return x
    wide = x.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    for begin in range(0, len(wide), 1 << 20):  # what is written lies before what is still to be read
        narrow[begin : begin + (1 << 20)] = wide[begin : begin + (1 << 20)].to(dtype)
    return narrow.view(x.shape)


def _losses_body(*problem: Any) -> tuple[Tensor, Tensor]:
    losses = _run(None, problem)[0]
    return _by_row(losses, problem[-1]), losses


def _losses_fake(*problem: Any) -> tuple[Tensor, Tensor]:
    _check(*problem)
    losses = problem[0].new_empty((max(1, len(problem[-2])), 2 if problem[8] else 1, len(problem[0])), dtype=torch.float32)
    return losses[0, 0].clone(), losses


def _gradients_body(g: Tensor, losses: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    *grads, temperature = _run(g, problem, losses)[1]
    return *(x.to(problem[0].dtype) for x in grads), temperature


def _gradients_fake(g: Tensor, losses: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    _check(*problem)
    return _empty_gradients(problem, problem[0].dtype)


def _sum_body(coefficients: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    losses, grads = _run(coefficients, problem)
    return ((_by_row(losses, problem[-1]) * coefficients).sum().to(losses.dtype), losses, *grads)


def _sum_fake(coefficients: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    losses = _losses_fake(*problem)[1]
    return (losses.new_empty(()), losses, *_empty_gradients(problem, _gradient_dtype(problem[0])))


def _empty_gradients(problem: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, d, hard = problem[0], problem[1], problem[5]
    return *(q.new_empty(shape, dtype=dtype) for shape in (q.shape, d.shape, _shape(hard))), q.new_empty((), dtype=torch.float32)


_losses = _operator("info_nce_losses", SCHEMA, "(Tensor, Tensor)", _losses_body, _losses_fake)
_gradients = _operator(
    "info_nce_gradients", f"Tensor g, Tensor losses, {SCHEMA}", "(Tensor, Tensor, Tensor, Tensor)", _gradients_body, _gradients_fake
)
_weighted_sum = _operator(
    "info_nce_weighted_sum", f"Tensor coefficients, {SCHEMA}", "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _sum_body, _sum_fake
)


def _as_inputs(grads: Any, hard: bool) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the problem's arguments."""
    q, d, h, temperature = grads
    return q, d, temperature, None, None, h if hard else None, *[None] * 6


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _losses_backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    losses, *tensors = ctx.saved_tensors
    return _as_inputs(_gradients(g, losses, *tensors, *ctx.options), tensors[5] is not None)


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses, *ctx.gradients = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the other outputs would be as large as q and d
    tensors, ctx.options = inputs[:8], inputs[8:]
    ctx.save_for_backward(losses, *tensors)


def _sum_backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    losses, coefficients, *tensors = ctx.saved_tensors
    dtype, by_row = tensors[0].dtype, _by_row(losses, ctx.options[-1])
    # They are as large as q and d: scaled in place and handed over. A second backward (retain_graph) and one that is to be differentiated
    # (create_graph) compute anew, by operators that know that they have no derivative.
    gradients, ctx.gradients = ctx.gradients, None
    if torch.is_grad_enabled():
        by_row, gradients = _losses(*tensors, *ctx.options)[0], None
    if gradients is None:
        gradients = _gradients(g * coefficients, losses, *tensors, *ctx.options)
    elif type(g) is not Tensor:  # traced by torch.compile, which finds its own places
        gradients = *((x * g).to(dtype) for x in gradients[:3]), gradients[3] * g
    else:
        gradients = *(_narrowed(x.mul_(g), dtype) for x in gradients[:3]), gradients[3] * g
    return (g * by_row).to(coefficients.dtype), *_as_inputs(gradients, tensors[5] is not None)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("info_nce has no second derivative; use refine_fast.reference.info_nce where one is needed")


_losses.register_autograd(_losses_backward, setup_context=_losses_context)
_weighted_sum.register_autograd(_sum_backward, setup_context=_sum_context)
_gradients.register_autograd(_refuse)
