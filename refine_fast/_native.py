"""Loads the compiled extensions and turns tensors into the integers that they take."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch  # first: its libgomp must be the one that _core shares

from . import _core

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""torch dtype -> refine_fast::Dtype (csrc/kernels/types.h)."""


def isa() -> str:
    """The CPU level in use: scalar, avx2, avx512, avx512_bf16, amx or neon. The environment
    variable REFINE_FAST_ISA sets it at start.

    Raises:
        RefineFastError: REFINE_FAST_ISA names a level that is unknown or that this machine lacks.
    """
    return _core.isa()


def available_isas() -> list[str]:
    """The levels that this machine can run, slowest first."""
    return _core.available_isas()


def force_isa(name: str) -> None:
    """Runs every CPU kernel at the level ``name`` from now on.

    Raises:
        ValueError: a level that is unknown or that this machine lacks.
    """
    _core.force_isa(name)


def missing_cuda(device: torch.device, least: tuple[int, int]) -> str | None:
    """What to do before a kernel of ``refine_fast._cuda`` can run on this GPU, as a sentence; None
    where it can.

    Args:
        device: the GPU, or the CPU for an emulated one.
        least: the compute capability that the kernel needs.
    """
    if cuda_module() is None:
        return _load_cuda()[1]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < least:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, least))
        return f"use a GPU of compute capability {needed} or newer ({name} is older)"
    return None


def cuda_module() -> ModuleType | None:
    """``refine_fast._cuda``, or None if it was not built or does not load."""
    return _load_cuda()[0]


@cache
def _load_cuda() -> tuple[ModuleType | None, str]:
    """``refine_fast._cuda`` if it loads, and what to do if not."""
    again = "install refine_fast again with nvcc of CUDA 12 or newer on the PATH"
    try:
        return importlib.import_module("refine_fast._cuda"), again
    except ImportError as error:
        built = not isinstance(error, ModuleNotFoundError)
        return None, f"{again} (refine_fast._cuda does not load: {error})" if built else again
