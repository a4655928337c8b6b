"""GPU kernels in Triton. Only the modules of this package import triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def missing_requirement() -> str | None:
    """What to install before the kernels can run, as a sentence; None where nothing is missing."""
    # torch.addmm(out_dtype=) exists since 2.8, but refused a float32 sum beside bf16 factors
    if torch.__version__ < "2.11":  # torch compares versions, not strings
        return f"install torch 2.11 or newer (found {torch.__version__})"
    if find_spec("triton") is None:
        return "install triton (pip install triton)"
    return None
