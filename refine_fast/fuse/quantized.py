"""Refuses quantized tensors: a code means nothing without its scale, and neither does a mean of
codes with different scales."""

from __future__ import annotations

import re

from ..errors import RefineFastError
from .checkpoint import DTYPES, Component

_NOT_CODES = {"F64", "F32", "F16", "BF16", "BOOL", "I64", "U64", "C64"}
_CODES = DTYPES.keys() - _NOT_CODES
_SCALES = (
    *("_scale", "_scale_inv", "_scales"),  # compressed-tensors, fine-grained FP8, MXFP4
    *(".scale", ".scales", ".absmax", ".SCB"),  # GPTQ and AWQ, bitsandbytes
)
"""Ends of the names of scales, after the name of the codes or of what holds them."""


def check_not_quantized(component: Component) -> None:
    """Raises RefineFastError if a tensor of the component has scales beside it."""
    names = {entry.name for entry in component.entries()}
    for entry in component.entries():
        if entry.dtype not in _CODES:
            continue
        # l.qweight and l.scales, x_blocks and x_scales, l.weight._data and l.weight._scale
        holder = re.sub(r"[._][^._]*$", "", entry.name)
        for scales in (name + end for name in (entry.name, holder) for end in _SCALES):
            if scales in names:
                raise RefineFastError(
                    f"tensor {entry.name!r} of {entry.file} is {entry.dtype} with scales in"
                    f" {scales!r}: dequantize the model and save it again"
                )
