"""``base += weight * (tuned - base)`` on tensors, in place: what ``fuse`` does to files."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _core, reference
from .._native import DTYPES, cuda_module


@torch.no_grad()
def lerp_(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """``base.copy_(torch.where(base == tuned, base, torch.lerp(base, tuned, weight)))``, in float32 for 16-bit types; float64 where base
    is.

    base and tuned: the same shape and device, contiguous on the CPU, float16, bfloat16, float32 or float64, not necessarily the same.
    Returns base.
    """
    if base.shape != tuned.shape or base.device != tuned.device:
        raise ValueError(
            f"base {tuple(base.shape)} on {base.device} and tuned {tuple(tuned.shape)} on {tuned.device} differ in shape or device"
        )
    if base.dtype not in DTYPES or tuned.dtype not in DTYPES:
        raise TypeError(f"base is {base.dtype} and tuned {tuned.dtype}; float16, bfloat16, float32 or float64 is needed")
    if base.is_contiguous() and tuned.is_contiguous():
        arguments = (base.data_ptr(), DTYPES[base.dtype], tuned.data_ptr(), DTYPES[tuned.dtype], base.numel(), weight)
        if base.is_cpu:
            _core.lerp(*arguments)
            return base
        if base.is_cuda and (cuda := cuda_module()) is not None:
            with torch.cuda.device(base.device):
                cuda.lerp(*arguments, torch.cuda.current_stream().cuda_stream)
            return base
    return base.copy_(reference.lerp(base, tuned, weight))
