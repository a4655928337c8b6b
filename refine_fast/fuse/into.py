"""Interpolation into a model that is loaded already: an evaluation sweep that writes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RefineFastError
from ..ops.lerp import lerp_
from .checkpoint import Checkpoint, Component, Entry, read_checkpoint
from .names import match_names
from .plan import Weights, modules_of, some

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CHUNK = 1 << 20  # elements that pass through memory at a time


def fuse_into(
    model: nn.Module, tuned: str | Path, weight: float = 0.35, *, base: str | Path | None = None, weights: Mapping[str, float] | None = None
) -> list[str]:
    """``p += weight * (tuned - p)`` for every floating-point parameter and buffer of ``model``, in place, on the CPU or the GPU, ``tuned``
    read from its files a few MiB at a time. With ``base`` (the files that the model was loaded from) the parameters become ``base + weight
    * (tuned - base)`` whatever they were before, so that a sweep calls this once a weight: the same values as ``fuse`` followed by
    loading.

    model: a transformers model or a SentenceTransformer; tuned, base: folders or .safetensors files; weights: as in ``fuse``, globs over
    the model's parameter names. Returns the names that were reconciled. Raises RefineFastError before any parameter is changed.
    """
    notes: list[str] = []
    own_weights = Weights([weight], weights)
    tuned_files, base_files = read_checkpoint(Path(tuned)), None if base is None else read_checkpoint(Path(base))
    work: list[tuple[Tensor, Entry, Entry | None, float]] = []
    for prefix, part, relative in _parts(model, tuned_files):
        targets = {name: t for name, t in part.state_dict(keep_vars=True).items() if t.is_floating_point()}
        theirs = _partners(targets, _component(tuned_files, relative), notes)
        ours = {} if base_files is None else _partners(targets, _component(base_files, relative), [])
        seen = set()
        for name, target in targets.items():
            if name in theirs and target.data_ptr() not in seen:  # tied parameters once
                seen.add(target.data_ptr())
                work.append((target.detach(), theirs[name], ours.get(name), own_weights.of(prefix + name)[0]))
    own_weights.check_all_used()
    with torch.no_grad():
        for target, entry, base_entry, own_weight in work:
            _interpolate(target, entry, base_entry, own_weight)
    return notes


def _parts(model: nn.Module, checkpoint: Checkpoint) -> list[tuple[str, nn.Module, str]]:
    """(prefix, module, folder) of every part of the model that has weights: the modules of a SentenceTransformer, or the model."""
    folders = modules_of(checkpoint.root)
    if not isinstance(model, nn.Sequential):
        return [("", model, ".")]
    parts = [(f"{name}.", part, folder) for (name, part), folder in zip(model.named_children(), folders, strict=False)]
    return [part for part in parts if any(True for _ in part[1].parameters())]


def _component(checkpoint: Checkpoint, relative: str) -> Component:
    if relative not in checkpoint.components:
        raise RefineFastError(f"{checkpoint.root} has no weights in {relative!r}, which the model needs")
    return checkpoint.components[relative]


def _partners(targets: dict[str, Tensor], component: Component, notes: list[str]) -> dict[str, Entry]:
    entries = {entry.name: entry for entry in component.entries() if entry.dtype in _DTYPES}
    match = match_names(targets, entries)
    if match.missing:
        raise RefineFastError(f"{component.folder} lacks the tensor {some(match.missing)} of the loaded model")
    notes += match.notes
    pairs = {name: entries[theirs] for name, theirs in match.pairs.items()}
    for name, entry in pairs.items():
        if entry.shape != tuple(targets[name].shape):
            raise RefineFastError(
                f"tensor {name!r} is {list(targets[name].shape)} in the loaded model, but {list(entry.shape)} in {entry.file}"
            )
    return pairs


def _read(entry: Entry, first: int, n: int, fd: int) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    data = bytearray(n * dtype.itemsize)
    if os.preadv(fd, [data], entry.offset + first * dtype.itemsize) != len(data):
        raise RefineFastError(f"{entry.file} became shorter while it was read")
    values = torch.frombuffer(data, dtype=dtype)
    return values.float() if dtype.itemsize == 1 else values


def _interpolate(target: Tensor, tuned: Entry, base: Entry | None, weight: float) -> None:
    flat = target.view(-1) if target.is_contiguous() else target.contiguous().view(-1)
    tuned_fd = os.open(tuned.file, os.O_RDONLY)
    base_fd = -1 if base is None else os.open(base.file, os.O_RDONLY)
    try:
        for first in range(0, flat.numel(), _CHUNK):
            part = flat[first : first + _CHUNK]
            theirs = _read(tuned, first, len(part), tuned_fd)
            if base is None:
                lerp_(part, theirs.to(part.device), weight)
            else:
                part.copy_(lerp_(_read(base, first, len(part), base_fd), theirs, weight))
    finally:
        os.close(tuned_fd)
        if base is not None:
            os.close(base_fd)
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))
