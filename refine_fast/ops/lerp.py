"""``base += weight * (tuned - base)`` on tensors, in place: what ``fuse`` does to files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _core, reference
from .._native import DTYPES, cuda_module, missing_cuda


@torch.no_grad()
def lerp_(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """Interpolates in place. Replaces::

        base.copy_(torch.where(base == tuned, base, torch.lerp(base, tuned, weight)))

    in float32 for 16-bit types and in float64 where base is. A weight of 0 or 1 gives base or tuned
    back, whatever the other holds.

    Args:
        base: float16, bfloat16, float32 or float64, on any device.
        tuned: the same shape and device; may have another of these dtypes.
        weight: the share of tuned.

    Returns:
        base. On a GPU without the CUDA extension or older than compute capability 7.5, and for
        tensors that are not contiguous or negated views, by the torch expression above.

    Raises:
        ValueError: different shapes or devices.
        TypeError: another dtype.
    """
    if base.shape != tuned.shape or base.device != tuned.device:
        raise ValueError(
            f"base and tuned must have the same shape and device (got {tuple(base.shape)} on"
            f" {base.device} and {tuple(tuned.shape)} on {tuned.device})"
        )
    if base.dtype not in DTYPES or tuned.dtype not in DTYPES:
        raise TypeError(
            "base and tuned must be float16, bfloat16, float32 or float64"
            f" (got {base.dtype} and {tuned.dtype})"
        )
    if all(x.is_contiguous() and not x.is_neg() for x in (base, tuned)):
        if not base.is_inference():  # so that autograd sees that what it has saved is another
            torch.autograd.graph.increment_version(base)
        arguments = (
            base.data_ptr(), DTYPES[base.dtype], tuned.data_ptr(), DTYPES[tuned.dtype],
            base.numel(), weight,
        )  # fmt: skip
        if base.is_cpu:
            _core.lerp(*arguments)
            return base
        if base.is_cuda and missing_cuda(base.device, (7, 5)) is None:
            cuda: Any = cuda_module()
            with torch.cuda.device(base.device):
                cuda.lerp(*arguments, torch.cuda.current_stream().cuda_stream)
            return base
    return base.copy_(reference.lerp(base, tuned, weight))
