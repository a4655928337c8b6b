"""Plans a merge: where the two inputs of every output tensor are, and its weight.

Everything is decided and checked before a byte is written.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path

from ..errors import RefineFastError
from .adapter import ADAPTER_CONFIG, Adapter, LowRank, find_adapter, read_adapter
from .checkpoint import (
    COMPUTED,
    DTYPES,
    RAW,
    Checkpoint,
    Component,
    Entry,
    Header,
    check_inside,
    read_checkpoint,
    read_component,
)
from .compatibility import compare_models
from .model_files import parse_json
from .modules import MODULES, folders_of, modules_and_routes_of, pair_modules
from .names import first_and_count, match_names
from .quantized import check_not_quantized

_NAMED = 3  # differences in one message
ARCHITECTURES = "give two models of the same architecture"
"""The remedy where tensors of one input are missing in the other."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the output: interpolated if ``tuned`` or ``low_rank`` is given and the type is
    a float, else copied from base."""

    name: str
    base: Entry
    tuned: Entry | None
    low_rank: LowRank | None
    weights: tuple[float, ...]  # one per output
    out_storage: int
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether the tensor is interpolated."""
        return self.base.storage is not None


@dataclass(frozen=True)
class Shard:
    """One file of the output: ``header``, then the pieces in order."""

    relative: Path
    header: bytes
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(piece.nbytes for piece in self.pieces)


@dataclass
class Plan:
    """A whole merge: the shards to write, the other files of base that change, by path, the headers
    of every input, and notes and differences around the tensors for the report."""

    base: Checkpoint
    is_folder: bool
    shards: list[Shard] = field(default_factory=list)
    changed: dict[Path, bytes] = field(default_factory=dict)
    inputs: list[Header] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The disk space of one output."""
        copied = ((self.base.root / name).stat().st_size for name in self.base.others)
        return sum(shard.nbytes for shard in self.shards) + sum(copied)


class Weights:
    """The weight of each tensor: the first glob that matches its name, else the output's own.

    Raises:
        RefineFastError: a weight that is not a finite number.
    """

    def __init__(self, own: list[float], globs: Mapping[str, float] | None) -> None:
        for value in (*own, *(globs or {}).values()):
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise RefineFastError(
                    f"weight must be a finite number, 0 for base, 1 for tuned (got {value!r})"
                )
        self._own, self._used = tuple(map(float, own)), set[str]()
        self._globs = {glob: float(weight) for glob, weight in (globs or {}).items()}

    def of(self, name: str) -> tuple[float, ...]:
        """The weight of the tensor ``name`` in each output."""
        for glob, weight in self._globs.items():
            if fnmatchcase(name, glob):
                self._used.add(glob)
                return (weight,) * len(self._own)
        return self._own

    def check_all_used(self) -> None:
        """Raises RefineFastError if ``of`` never used one of the globs."""
        for glob in self._globs:
            if glob not in self._used:
                raise RefineFastError(
                    f"weights: the pattern {glob!r} matches no tensor, or only tensors that an"
                    " earlier pattern matches"
                )


def _read_tuned(path: Path, adapter: Path | None) -> Checkpoint:
    """The tuned model; beside an adapter, the weights of the other modules of its model."""
    if adapter is None:
        return read_checkpoint(path)
    folders = [module.folder for module in modules_and_routes_of(path)]
    own = str(adapter.relative_to(path))
    components = {name: read_component(path, name) for name in folders if name != own}
    return Checkpoint(path, {name: part for name, part in components.items() if part is not None})


def _tuned_component(
    relative: str, folder: str, base: Checkpoint, tuned: Checkpoint, notes: list[str]
) -> Component:
    """The component of tuned in ``folder``, which corresponds to base's in ``relative``."""
    found = tuned.components.get(folder) or tuned.components.get(relative)
    if found is None:
        raise RefineFastError(
            f"{tuned.root} has no weights in {folder!r}, but {base.root} has some in"
            f" {relative!r}: {ARCHITECTURES}"
        )
    if found.folder != tuned.root / relative:
        notes.append(f"{base.root / relative} is {found.folder} in tuned")
    return found


def _check_pair(base: Entry, tuned: Entry) -> None:
    if base.shape != tuned.shape:
        why = ""
        if base.shape[1:] == tuned.shape[1:] and "embed" in base.name:
            why = ": the vocabularies differ; resize one model's token embeddings and save it again"
        shapes = f"{list(base.shape)} in {base.file}, but {list(tuned.shape)} in {tuned.file}"
        raise RefineFastError(
            f"tensor {base.name!r} is {shapes}{why or ': the architectures differ'}"
        )
    if (base.storage is None) != (tuned.storage is None):
        types = f"{base.dtype} in {base.file}, but {tuned.dtype} in {tuned.file}"
        raise RefineFastError(
            f"tensor {base.name!r} is {types}: dequantize the model and save it again"
        )


def _pairs(component: Component, tuned: Component, notes: list[str]) -> dict[str, Entry]:
    entries = {entry.name: entry for entry in tuned.entries()}
    match = match_names((entry.name for entry in component.entries()), entries)
    if match.missing:
        raise RefineFastError(
            f"{tuned.folder} lacks the tensor {first_and_count(match.missing)} of"
            f" {component.folder}: {ARCHITECTURES}"
        )
    if match.extra:
        raise RefineFastError(
            f"{component.folder} lacks the tensor {first_and_count(match.extra)} of"
            f" {tuned.folder}: {ARCHITECTURES}"
        )
    notes += match.notes
    return {base: entries[name] for base, name in match.pairs.items()}


def _header(header: Header, dtype: str | None) -> bytes:
    """base's header unchanged, so that offsets match; or one with every float tensor in
    ``dtype``."""
    if dtype is None:
        return header.raw
    content: dict[str, object] = {"__metadata__": header.metadata} if header.metadata else {}
    end = 0
    for entry in header.entries:
        own = entry.dtype if entry.storage is None else dtype
        start, end = end, end + math.prod(entry.shape) * DTYPES[own].bits // 8
        content[entry.name] = {
            "dtype": own,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make_plan(
    base_path: Path,
    tuned_path: Path,
    own_weights: list[float],
    globs: Mapping[str, float] | None = None,
    dtype: str | None = None,
    *,
    force: bool = False,
) -> Plan:
    """Reads and checks both checkpoints.

    Args:
        base_path: a model folder or a .safetensors file.
        tuned_path: likewise, or the folder of a LoRA adapter.
        own_weights: one per output.
        globs: weights by tensor name, as in ``fuse``.
        dtype: of the output's float tensors; default: base's.
        force: whether differences around the tensors that would be refused are only noted.

    Raises:
        RefineFastError: anything that cannot be merged.
    """
    floats = [name for name, kind in DTYPES.items() if kind.storage is not None]
    if dtype is not None and dtype not in floats:
        raise RefineFastError(f"dtype must be one of {', '.join(floats)} (got {dtype!r})")
    weights = Weights(own_weights, globs)
    base = read_checkpoint(base_path)
    if (base_path / ADAPTER_CONFIG).is_file():
        raise RefineFastError(
            f"{base_path} is an adapter, not a model: give the model that it was trained on"
        )
    for copied in (base.root / name for name in base.others):
        if not (copied.is_file() and os.access(copied, os.R_OK)):
            raise RefineFastError(
                f"{copied} cannot be read, and every file of base is copied; fix or remove it"
            )
        check_inside(base.root, copied)
    plan = Plan(base, base_path.is_dir())
    adapter_path = find_adapter(tuned_path)
    tuned = _read_tuned(tuned_path, adapter_path)
    if adapter_path is None and plan.is_folder != tuned_path.is_dir():
        raise RefineFastError(
            f"{base_path} and {tuned_path} must be two model folders or two .safetensors files"
        )
    for part in (*base.components.values(), *tuned.components.values()):
        check_not_quantized(part)
    folders = _tuned_folders(base_path, tuned_path)
    adapter: Adapter | None = None
    adapted = ""
    if adapter_path is not None:
        place = str(adapter_path.relative_to(tuned_path))
        # of a plain folder: the encoder, which is in the first folder with weights
        adapted = next((name for name in base.components if folders.get(name) == place),
                       next(iter(base.components)))  # fmt: skip
        adapter = read_adapter(
            adapter_path, {entry.name: entry for entry in base.components[adapted].entries()}
        )
        plan.inputs.append(adapter.header)
        plan.notes += adapter.notes
    used: list[Path] = []
    for relative, component in base.components.items():
        low_rank: dict[str, LowRank] = {}
        folder = folders.get(relative, relative)
        plan.inputs += component.shards
        if adapter is not None and relative == adapted:
            pairs, low_rank = adapter.whole, adapter.low_rank
        elif adapter is not None and folder not in tuned.components:
            pairs = {}  # not trained
        else:
            other = _tuned_component(relative, folder, base, tuned, plan.notes)
            used.append(other.folder)
            plan.inputs += other.shards
            pairs = _pairs(component, other, plan.notes)
        for shard in component.shards:
            header = _header(shard, dtype)
            pieces = []
            for entry in shard.entries:
                partner = pairs.get(entry.name)
                if partner is not None:
                    _check_pair(entry, partner)
                own = entry.dtype if entry.storage is None or dtype is None else dtype
                name = entry.name if relative == "." else f"{relative}/{entry.name}"
                nbytes = math.prod(entry.shape) * DTYPES[own].bits // 8
                storage = RAW if entry.storage is None else DTYPES[own].storage
                assert storage is not None
                pieces.append(
                    Piece(
                        name,
                        entry,
                        partner,
                        low_rank.get(entry.name),
                        weights.of(name) if entry.storage is not None else (0.0,),
                        storage,
                        nbytes,
                    )
                )
            plan.shards.append(Shard(shard.path.relative_to(base.root), header, pieces))
        if component.index is not None:
            plan.changed[component.index.relative_to(base.root)] = _index(
                component.index, plan, dtype
            )
        config = str((component.folder / "config.json").relative_to(base.root))
        if dtype in COMPUTED and config in base.others:
            plan.changed[Path(config)] = _config(
                base.root / config, str(DTYPES[dtype].dtype).removeprefix("torch.")
            )
    unused = [name for name, component in tuned.components.items() if component.folder not in used]
    if unused:
        raise RefineFastError(
            f"{base_path} has no weights in {unused[0]!r}, but {tuned_path} has some:"
            f" {ARCHITECTURES}"
        )
    plan.notes += [
        f"{name} of tuned is not read: it belongs to none of its modules, or another file does"
        for name in tuned.left_out
        if name.endswith(".safetensors")
    ]
    weights.check_all_used()
    plan.differences += _dtypes(plan)
    if plan.is_folder:
        whole = (tuned_path / MODULES).is_file()
        around = tuned_path if whole or adapter_path is None else adapter_path
        plan.differences += _differences(base_path, around, force)
    return plan


def _tuned_folders(base: Path, tuned: Path) -> dict[str, str]:
    """The folder of a module of base -> that of the module of tuned that corresponds to it."""
    if not (base.is_dir() and tuned.is_dir()):
        return {}
    ours, theirs = modules_and_routes_of(base), modules_and_routes_of(tuned)
    if not ours or not theirs:
        return {folders_of(base)[0]: folders_of(tuned)[0]}
    return {a.folder: b.folder for a, b in pair_modules(ours, theirs)[0]}


def _dtypes(plan: Plan) -> list[str]:
    """The types of tensors that differ."""
    counts = Counter(
        (piece.base.dtype, piece.tuned.dtype)
        for shard in plan.shards
        for piece in shard.pieces
        if piece.is_float and piece.tuned is not None and piece.base.dtype != piece.tuned.dtype
    )
    return [
        f"the dtype of {count} tensors is {base} in base and {tuned} in tuned"
        for (base, tuned), count in counts.items()
    ]


def _differences(base: Path, tuned: Path, force: bool) -> list[str]:
    """What differs around the tensors; raises if that is more than ``force`` allows."""
    found = compare_models(base, tuned)
    if found.refused and not force:
        first = "; ".join(found.refused[:_NAMED])
        more = len(found.refused) - _NAMED
        rest = f"; and {more} more differences" if more > 0 else ""
        raise RefineFastError(
            f"{tuned} does not fit {base}: {first}{rest}: give the model that tuned was trained"
            " from, or pass force=True (--force), which keeps base's files"
        )
    return found.refused + found.harmless


def _index(index: Path, plan: Plan, dtype: str | None) -> bytes:
    """base's index unchanged, except for its total_size with another dtype."""
    content = index.read_bytes()
    if dtype is None:
        return content
    parsed = parse_json(content)
    folder = index.parent.relative_to(plan.base.root)
    total = sum(
        piece.nbytes
        for shard in plan.shards
        if shard.relative.parent == folder
        for piece in shard.pieces
    )
    parsed["metadata"] = {**(parsed.get("metadata") or {}), "total_size": total}
    return json.dumps(parsed, indent=2).encode() + b"\n"


def _config(config: Path, dtype: str) -> bytes:
    """A config.json of base in which each dtype is the given one; every other byte stays."""
    dtypes = rb'("(?:torch_)?dtype"\s*:\s*)"[^"]*"'
    return re.sub(dtypes, rb'\g<1>"%b"' % dtype.encode(), config.read_bytes())
