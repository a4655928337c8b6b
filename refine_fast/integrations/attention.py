"""Attention of a bf16 encoder on a CPU, whose backward pass runs in float32.

torch's kernel for the backward pass on a CPU (2.13) multiplies bf16 tiles that are too small for
it: MiniLM's 12 heads of width 32, 16 sequences, one thread, CPU milliseconds (Intel Xeon with AMX):

| tokens | forward bf16, float32 | backward bf16, float32 |
|---|---|---|
| 30 | 1.3, 1.4 | 17, 1.4 |
| 150 | 7.9, 13 | 96, 22 |
| 256 | 15, 26 | 99, 53 |

So the forward pass stays in bf16, and so do the tensors that it saves; the backward pass widens
them. The gradients are no worse: nothing between its products is rounded to bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

LEAD = 1.5
"""How many times as fast float32 must be on this machine: so much that a second measurement, of a
training that resumes, decides alike."""


def wide_backward(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, ``scaled_dot_product_attention`` of bf16 tensors on a CPU has its backward pass in
    float32, where that is faster. Every other call is torch's own.

    Args:
        device: that the encoder is on; on others than a CPU, nothing changes.
    """
    return _WideBackward() if device.type == "cpu" else nullcontext()


class _WideBackward(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    def narrow(x: Tensor) -> Tensor:
        autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        return x.to(torch.get_autocast_dtype("cpu")) if autocast else x

    q, k, v = narrow(query), narrow(key), narrow(value)
    if (
        torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
        and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in (q, k, v))
        and dropout_p == 0
        and not enable_gqa
        and not (attn_mask is not None and attn_mask.requires_grad)
        and torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal, scale=scale)
        == SDPBackend.FLASH_ATTENTION.value
        and wide_is_faster(q.shape[-1])
    ):
        out: Tensor = _Attention.apply(q, k, v, attn_mask, is_causal, scale)
        return out
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        added = _added(mask, query.dtype)
        out, log_sums = _forward(query, key, value, 0.0, is_causal, attn_mask=added, scale=scale)
        ctx.save_for_backward(query, key, value, out, log_sums, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        *saved, log_sums, mask = ctx.saved_tensors
        gradients = _backward(
            *(x.float() for x in (gradient, *saved)),
            log_sums,
            0.0,
            ctx.is_causal,
            attn_mask=_added(mask, torch.float32),
            scale=ctx.scale,
        )
        return *(x.to(gradient.dtype) for x in gradients), None, None, None


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers that are added to the scores."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


@cache
def wide_is_faster(width: int) -> bool:
    """Whether the backward pass is ``LEAD`` times as fast in float32 on this machine, by trying.

    Args:
        width: of a head.
    """
    seconds = {}
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        x, gradient = torch.randn(2, 4, 12, 128, width, generator=random).to(dtype)
        out, log_sums = _forward(x, x, x)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            _backward(gradient, x, x, x, out, log_sums, 0.0, False)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] > LEAD * seconds[torch.float32]
