"""Interpolation into a model that is loaded already: an evaluation sweep that writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RefineFastError
from ..ops.lerp import lerp_
from .checkpoint import Checkpoint, Entry, read_checkpoint
from .modules import folder_of_prefix
from .names import first_and_count, match_names
from .plan import Weights
from .quantized import check_not_quantized
from .stream_to_device import BUFFER_BYTES, stream_to_device

_Memory = tuple[int, torch.Size, tuple[int, ...]]


def fuse_into(
    model: nn.Module,
    tuned: str | Path,
    weight: float = 0.35,
    *,
    base: str | Path | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[str]:
    """``p += weight * (tuned - p)`` for every floating-point parameter and buffer of a model, in
    place, on the CPU or the GPU. ``tuned`` is read from its files a few MiB at a time. Complex and
    integer ones stay as they are.

    With ``base`` the parameters become ``base + weight * (tuned - base)`` whatever they were
    before, so that a sweep calls this once per weight: the same values as ``fuse`` followed by
    loading.

    Args:
        model: a transformers model or a SentenceTransformer.
        tuned: a model folder or a .safetensors file.
        weight: the share of tuned.
        base: the folder or file that the model was loaded from.
        weights: as in ``fuse``, globs over the model's parameter names.

    Returns:
        Notes on the names that were reconciled, and on tensors that stay as they are: complex ones,
        and those that are not in base.

    Raises:
        RefineFastError: files that do not fit the model or hold quantized weights, before any
            parameter is changed; a file that is truncated while it is read.
    """
    state = model.state_dict(keep_vars=True)
    notes = [f"{name} is complex: left alone" for name, own in state.items() if own.is_complex()]
    own_weights = Weights([weight], weights)
    targets = _targets(model)
    theirs = _partners(model, targets, read_checkpoint(Path(tuned)), notes)
    ours: dict[_Memory, Entry] | None = None
    if base is not None:  # its files may hold a tied parameter under another of its names
        found = _partners(model, targets, read_checkpoint(Path(base)), [])
        ours = {_memory(targets[name]): entry for name, entry in found.items()}
    pieces: list[tuple[Tensor, tuple[Entry, ...], float]] = []
    seen: dict[int, Tensor] = {}
    for name, target in targets.items():
        if name in theirs and (tied := seen.setdefault(target.data_ptr(), target)) is not target:
            if target.numel() and (tied.shape, tied.stride()) != (target.shape, target.stride()):
                raise RefineFastError(
                    f"{name!r} of the model shares its memory with another tensor in part; give"
                    " each memory of its own before the merge"
                )
        elif name in theirs:  # tied parameters once
            sources = [theirs[name]]
            if ours is not None and (own := ours.get(_memory(target))) is not None:
                sources.append(own)
            elif ours is not None:  # as fuse does; every call would move it further
                notes.append(f"{name} is in tuned only: left alone")
                continue
            pieces.append((target.detach(), tuple(sources), own_weights.of(name)[0]))
    own_weights.check_all_used()
    flats = [target.contiguous().view(-1) for target, _, _ in pieces]
    for device in {flat.device for flat in flats}:
        here = (
            (flat, sources, share)
            for flat, (_, sources, share) in zip(flats, pieces, strict=True)
            if flat.device == device
        )
        chunks = (chunk for tensor in here for chunk in _chunks(*tensor))
        stream_to_device(chunks, device)
    for flat, (target, _, _) in zip(flats, pieces, strict=True):
        if flat.data_ptr() != target.data_ptr():  # a strided parameter was updated in a copy
            target.copy_(flat.view(target.shape))
    return notes


def check_fuse_into(model: nn.Module, tuned: str | Path) -> list[str]:
    """Raises what ``fuse_into`` would raise for these files; reads headers only.

    Args:
        model: a transformers model or a SentenceTransformer.
        tuned: a model folder or a .safetensors file.

    Returns:
        The names of tied parameters that the files hold more than once.

    Raises:
        RefineFastError: files that do not fit the model.
    """
    targets = _targets(model)
    pairs = _partners(model, targets, read_checkpoint(Path(tuned)), [])
    first: dict[int, Entry] = {}
    return [
        name
        for name, entry in pairs.items()
        if first.setdefault(targets[name].data_ptr(), entry) is not entry
    ]


def _memory(tensor: Tensor) -> _Memory:
    """Equal for two names of one parameter."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Every floating-point parameter and buffer that a checkpoint holds."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def _partners(
    model: nn.Module, targets: dict[str, Tensor], checkpoint: Checkpoint, notes: list[str]
) -> dict[str, Entry]:
    """The tensor in the files for each of the model's, by its name in the model. Each module of a
    SentenceTransformer has its own folder."""
    parts = folder_of_prefix(model, checkpoint.root)
    pairs: dict[str, Entry] = {}
    for prefix, folder in parts.items():
        own = {name.removeprefix(prefix): name for name in targets if name.startswith(prefix)}
        if not own:
            continue
        if folder not in checkpoint.components:
            raise RefineFastError(
                f"{checkpoint.root} has no weights in {folder!r}, which the loaded model needs"
            )
        check_not_quantized(checkpoint.components[folder])
        entries = {
            entry.name: entry
            for entry in checkpoint.components[folder].entries()
            if entry.storage is not None
        }
        match = match_names(own, entries)
        stored = {targets[own[name]].data_ptr() for name in match.pairs}
        missing = [name for name in match.missing if targets[own[name]].data_ptr() not in stored]
        if missing:  # not only under the name of a tied parameter
            raise RefineFastError(
                f"{checkpoint.root / folder} lacks the tensor {first_and_count(missing)} of the"
                " loaded model"
            )
        if match.extra:
            raise RefineFastError(
                f"the loaded model lacks the tensor {first_and_count(match.extra)} of"
                f" {checkpoint.root / folder}"
            )
        notes += match.notes
        for name, partner in match.pairs.items():
            target, entry = targets[own[name]], entries[partner]
            if entry.shape != tuple(target.shape):
                raise RefineFastError(
                    f"tensor {own[name]!r} is {list(target.shape)} in the loaded model, but"
                    f" {list(entry.shape)} in {entry.file}"
                )
            pairs[own[name]] = entry
    beyond = [name for name in targets if not name.startswith(tuple(parts))]
    if beyond:
        raise RefineFastError(
            f"{checkpoint.root} has no module for the tensor {first_and_count(beyond)} of the"
            " loaded model"
        )
    return pairs


@dataclass(frozen=True)
class _Chunk:
    """Elements [first, first + len(target)) of a flat parameter and the files that hold their
    values: tuned's and, if given, base's."""

    target: Tensor
    first: int
    sources: tuple[Entry, ...]
    weight: float

    def _parts(self, buffer: Tensor) -> list[Tensor]:
        """Each source's place in the buffer, 16-byte aligned, as its dtype."""
        parts, at = [], 0
        for source in self.sources:
            dtype = source.torch_dtype
            nbytes = len(self.target) * dtype.itemsize
            parts.append(buffer[at : at + nbytes].view(dtype))
            at += -(-nbytes // 16) * 16
        return parts

    def read(self, buffer: Tensor) -> int:
        """As ``Chunk.read``."""
        end = 0
        for source, part in zip(self.sources, self._parts(buffer), strict=True):
            data = part.view(torch.uint8)
            with source.file.open("rb", buffering=0) as file:
                file.seek(source.offset + self.first * part.itemsize)
                if file.readinto(data.numpy().data) != len(data):
                    raise RefineFastError(f"{source.file} was truncated while it was read")
            end = int(data.storage_offset()) + len(data)
        return end

    def apply(self, buffer: Tensor) -> None:
        """As ``Chunk.apply``: interpolates the target."""
        parts = self._parts(buffer)
        tuned, *base = (part.float() if part.itemsize == 1 else part for part in parts)
        if self.target.itemsize == 1 and not base:
            base = [self.target.float()]
        if base:
            stored = self.sources[1].torch_dtype if len(self.sources) > 1 else self.target.dtype
            self.target.copy_(lerp_(base[0], tuned, self.weight).to(stored))
        else:
            lerp_(self.target, tuned, self.weight)


def _chunks(flat: Tensor, sources: tuple[Entry, ...], weight: float) -> Iterator[_Chunk]:
    step = BUFFER_BYTES // sum(source.torch_dtype.itemsize for source in sources) // 16 * 16
    return (
        _Chunk(flat[first : first + step], first, sources, weight)
        for first in range(0, flat.numel(), step)
    )
