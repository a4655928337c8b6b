"""Reads checkpoints: safetensors headers and model folders, treated as untrusted input.

Nothing in a header is trusted: its length, its JSON, each dtype, shape and offset is checked before
a byte of data is read, by the rules of the safetensors reference implementation
(``SafeTensorError``) and one more, that no key occurs twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, NoReturn

from ..errors import RefineFastError

DTYPES: dict[str, tuple[int, int | None]] = {
    "F32": (32, 0),
    "BF16": (16, 1),
    "F16": (16, 2),
    "F64": (64, 3),
    "F8_E4M3": (8, 4),
    "F8_E5M2": (8, 5),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], (8, None)),
    **dict.fromkeys(["U16", "I16"], (16, None)),
    **dict.fromkeys(["U32", "I32"], (32, None)),
    **dict.fromkeys(["U64", "I64", "C64"], (64, None)),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], (6, None)),
    "F4": (4, None),
}
"""safetensors dtype -> (bits of an element, refine_fast::Storage or None for a copy)."""
RAW = 6
"""refine_fast::Storage::raw."""
MAX_HEADER = 100_000_000
"""Bytes of a header that the format allows."""
WEIGHT_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".tflite",
    ".xml",
    ".mlmodel",
)
"""Weight files that fuse does not read."""

_JSON_SPACE = b" \t\n\r"  # writers may pad a header with it, on either side
_UNUSED_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def storage(self) -> int | None:
        """refine_fast::Storage, or None where the tensor is copied."""
        return DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Header:
    """One safetensors file: ``raw`` is everything before the data, ``entries`` the tensors in the
    order of their bytes."""

    path: Path
    raw: bytes
    entries: list[Entry]
    metadata: dict[str, str]
    size: int


@dataclass(frozen=True)
class Component:
    """The weights of one folder of a model: one safetensors file, or the shards of an index."""

    folder: Path
    shards: list[Header]
    index: Path | None = None

    def entries(self) -> Iterator[Entry]:
        """Every tensor, shard by shard."""
        return (entry for shard in self.shards for entry in shard.entries)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, or one file.

    ``components``: by path relative to ``root``; ``others``: the files to copy; ``left_out``:
    weights that fuse does not write, in another format or duplicates.
    """

    root: Path
    components: dict[str, Component]
    others: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def files(self) -> list[Path]:
        """Every safetensors file that is read."""
        return [shard.path for component in self.components.values() for shard in component.shards]


def _reject(path: Path, why: str) -> NoReturn:
    raise RefineFastError(
        f"{path} is not a valid safetensors file: {why}; download it or save it again"
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice"
        )
    return keys


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if digits == "-0":  # a float to the reference implementation
        raise ValueError("-0 is not an integer")
    finite(digits)
    return int(digits)


def finite(digits: str) -> float:
    """The number in a JSON file; ValueError where a float cannot hold it."""
    if math.isinf(value := float(digits)):
        raise ValueError(f"the number {digits[:20]}... is out of range")
    return value


def parse_json(text: bytes) -> Any:
    """Parses strict JSON.

    Raises:
        ValueError: a key that occurs twice, a number out of range, NaN, an unpaired surrogate, or
            nesting that is too deep.
    """
    hooks: dict[str, Any] = {
        "parse_int": _integer,
        "parse_float": finite,
        "parse_constant": _no_constant,
    }
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, **hooks)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_entry(path: Path, name: str, info: object, data_start: int) -> Entry:
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        _reject(path, f"tensor {name!r} lacks one of dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _reject(path, f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if (
        not isinstance(shape, list)
        or not all(map(_is_size, shape))
        or not all(map(_is_size, accumulate(shape, mul)))
    ):
        _reject(path, f"tensor {name!r} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _reject(path, f"tensor {name!r} has the data_offsets {str(offsets)[:80]}")
    bits, nbytes = math.prod(shape) * DTYPES[dtype][0], offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        _reject(
            path,
            f"tensor {name!r} of dtype {dtype} and shape {shape} takes {bits / 8:.12g} bytes, but"
            f" its data_offsets span {nbytes}",
        )
    return Entry(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def read_header(path: Path) -> Header:
    """Reads and fully validates the header of a safetensors file.

    Raises:
        RefineFastError: a file that cannot be read or breaks a rule of the format.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            n = int.from_bytes(length, "little")
            if size < 8:
                _reject(path, f"it has {size} bytes, less than the 8 that give the header's length")
            if n > MAX_HEADER:
                _reject(
                    path,
                    f"its header claims {n} bytes, more than the {MAX_HEADER} that the format"
                    " allows",
                )
            if 8 + n > size:
                _reject(path, f"its header claims {n} bytes, but the file ends after {size}")
            text = file.read(n)
    except OSError as error:
        raise RefineFastError(f"cannot read {path}: {error.strerror}") from error
    if not text.lstrip(_JSON_SPACE).startswith(b"{"):
        _reject(path, "its header does not start with '{'")
    try:
        header = parse_json(text)
    except ValueError as error:
        _reject(path, f"its header is malformed ({str(error)[:200]})")
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    texts = isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())
    if not texts:
        _reject(path, "its __metadata__ is not a map from strings to strings")
    entries = sorted(
        (_parse_entry(path, name, info, 8 + n) for name, info in header.items()),
        key=lambda e: (e.offset, e.nbytes),
    )
    end = 8 + n
    for entry in entries:
        if entry.offset != end:
            _reject(
                path,
                f"tensor {entry.name!r} starts at byte {entry.offset}, but the data before it ends"
                f" at {end}",
            )
        end += entry.nbytes
    if end != size:
        _reject(path, f"its tensors end at byte {end}, but the file at {size}")
    return Header(path, length + text, entries, metadata, size)


def check_inside(folder: Path, path: Path) -> None:
    """Requires a model's file to be in its folder, or where the Hugging Face cache keeps the
    folder's files: snapshots/<rev>/x -> ../../blobs/<hash>."""
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise RefineFastError(
            f"{path} is a link that leaves the model's folder: put the file itself there"
        )


def _read_index(index: Path, root: Path) -> Component:
    try:
        content = parse_json(index.read_bytes())
    except (ValueError, OSError) as error:
        raise RefineFastError(f"{index} is not a valid index: {str(error)[:200]}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise RefineFastError(f"{index} has no weight_map from tensor names to file names")
    if not isinstance(content.get("metadata") or {}, dict):
        raise RefineFastError(f"{index} has metadata that is not a map from names to values")
    shards = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise RefineFastError(
                f"{index} points outside its folder, at {file!r}: only plain file names are"
                " accepted"
            )
        if not os.path.isfile(path):
            raise RefineFastError(
                f"{index} names the shard {file!r}, which is missing: download the model again"
            )
        check_inside(root, path)
        shards[file] = read_header(path)
    where: dict[str, str] = {}
    for file, shard in shards.items():
        for entry in shard.entries:
            if where.setdefault(entry.name, file) != file:
                raise RefineFastError(
                    f"{index.parent}: tensor {entry.name!r} is in two shards,"
                    f" {where[entry.name]!r} and {file!r}"
                )
    for name, file in weight_map.items():
        if where.get(name) != file:
            found = f"it is in {where[name]!r}" if name in where else "no shard has it"
            raise RefineFastError(f"{index} places tensor {name!r} in {file!r}, but {found}")
    return Component(index.parent, list(shards.values()), index)


def _read_component(
    folder: Path, names: list[str], root: Path
) -> tuple[Component | None, set[str]]:
    """The weights of one folder and the names of the files that they are read from."""
    files = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    # transformers also prefers one file to an index
    if "model.safetensors" in files or (len(files) == 1 and not indexes):
        name = "model.safetensors" if "model.safetensors" in files else files[0]
        check_inside(root, folder / name)
        return Component(folder, [read_header(folder / name)]), {name}
    if len(indexes) == 1:
        component = _read_index(folder / indexes[0], root)
        return component, {indexes[0], *(shard.path.name for shard in component.shards)}
    if files or indexes:
        raise RefineFastError(
            f"{folder} has {len(files)} safetensors files and {len(indexes)} indexes; it must have"
            " one model.safetensors or one index"
        )
    return None, set()


def read_component(root: Path, folder: str) -> Component | None:
    """The weights in one folder of a model, without the folders below it.

    Args:
        root: the model's folder.
        folder: relative to it.

    Raises:
        RefineFastError: weights that are ambiguous or malformed.
    """
    place = root / folder
    names = [path.name for path in place.iterdir()] if place.is_dir() else []
    return _read_component(place, names, root)[0]


def _unreadable(error: OSError) -> NoReturn:
    raise RefineFastError(f"cannot read {error.filename}: {error.strerror}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a model folder or one .safetensors file, and validates every header.

    Raises:
        RefineFastError: a path that cannot be read, or weights that are missing, ambiguous or
            malformed.
    """
    if os.path.isfile(path):
        if path.suffix in WEIGHT_SUFFIXES:
            raise RefineFastError(
                f"{path} is not a safetensors file: save the model again with"
                " model.save_pretrained(folder), which writes safetensors"
            )
        return Checkpoint(path.parent, {".": Component(path.parent, [read_header(path)])})
    if not os.path.isdir(path):
        raise RefineFastError(
            f"{path} does not exist or cannot be read: give a model folder or a .safetensors file"
            " (`hf download NAME --local-dir FOLDER` fetches one)"
        )
    components, others, left_out = {}, [], []
    for current, folders, names in os.walk(path, onerror=_unreadable):
        folder = Path(current)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (folder / name).is_symlink():
                raise RefineFastError(
                    f"{folder / name} is a link to a folder: put the folder itself there"
                )
        component, used = _read_component(folder, names, path)
        relative = folder.relative_to(path)
        if component is not None:
            components[str(relative)] = component
        for name in sorted(set(names) - used):
            if name.endswith((*WEIGHT_SUFFIXES, *_UNUSED_WEIGHTS)):
                left_out.append(str(relative / name))
            else:
                others.append(str(relative / name))
    if not components:
        if any(name.endswith(WEIGHT_SUFFIXES) for name in left_out):
            raise RefineFastError(
                f"{path} has no safetensors weights, only {left_out[0]}: convert them with"
                f" AutoModel.from_pretrained({str(path)!r}).save_pretrained(FOLDER)"
            )
        raise RefineFastError(f"{path} has no weights: it has no *.safetensors file")
    return Checkpoint(path, components, others, left_out)
