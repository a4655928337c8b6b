"""Reads checkpoints: safetensors headers and model folders, treated as untrusted input.

Nothing in a header is trusted: its length, its JSON, each dtype, shape and offset is checked before
a byte of data is read, by the rules of the safetensors reference implementation
(``SafeTensorError``) and one more, that no key occurs twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from ..errors import RefineFastError
from .model_files import parse_json
from .modules import modules_and_routes_of


class ElementType(NamedTuple):
    """A dtype of safetensors."""

    bits: int
    storage: int | None = None
    """refine_fast::Storage, or None for a copy."""
    dtype: torch.dtype | None = None
    """torch's, of what is not copied."""


DTYPES: dict[str, ElementType] = {
    "F32": ElementType(32, 0, torch.float32),
    "BF16": ElementType(16, 1, torch.bfloat16),
    "F16": ElementType(16, 2, torch.float16),
    "F64": ElementType(64, 3, torch.float64),
    "F8_E4M3": ElementType(8, 4, torch.float8_e4m3fn),
    "F8_E5M2": ElementType(8, 5, torch.float8_e5m2),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], ElementType(8)),
    **dict.fromkeys(["U16", "I16"], ElementType(16)),
    **dict.fromkeys(["U32", "I32"], ElementType(32)),
    **dict.fromkeys(["U64", "I64", "C64"], ElementType(64)),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], ElementType(6)),
    "F4": ElementType(4),
}
"""The dtypes of safetensors by their names."""
COMPUTED = ("F32", "BF16", "F16", "F64")
"""Those in which torch computes: of a model that is loaded, and of an adapter."""
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
_INDEX = "model.safetensors.index.json"
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
        return DTYPES[self.dtype].storage

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of a tensor that is not copied."""
        found = DTYPES[self.dtype].dtype
        assert found is not None
        return found


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
    bits, nbytes = math.prod(shape) * DTYPES[dtype].bits, offsets[1] - offsets[0]
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
    # transformers also prefers one file to an index, and these names to others
    if "model.safetensors" in files or (len(files) == 1 and not indexes):
        name = "model.safetensors" if "model.safetensors" in files else files[0]
        check_inside(root, folder / name)
        return Component(folder, [read_header(folder / name)]), {name}
    if _INDEX in indexes or len(indexes) == 1:
        index = _INDEX if _INDEX in indexes else indexes[0]
        component = _read_index(folder / index, root)
        return component, {index, *(shard.path.name for shard in component.shards)}
    if files or indexes:
        raise RefineFastError(
            f"{folder} has {len(files)} safetensors files and {len(indexes)} indexes; it must have"
            f" one safetensors file, or a model.safetensors or {_INDEX} among them"
        )
    return None, set()


def read_component(root: Path, folder: str) -> Component | None:
    """The weights in one folder of a model, without the folders below it.

    Args:
        root: the model's folder.
        folder: relative to it.

    Raises:
        RefineFastError: weights that are ambiguous, malformed or only in pytorch_model.bin.
    """
    component = _read_component(root / folder, _names(root / folder), root)[0]
    if component is None:
        _check_no_pickle(root / folder)
    return component


def _names(folder: Path) -> list[str]:
    """The names of its files and folders, in order; none if there is no such folder."""
    try:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        _unreadable(error)


def _check_no_pickle(folder: Path) -> None:
    """Refuses weights of a module that fuse does not read and no safetensors replace: the output
    would lack the module."""
    for name in _names(folder):
        if name.startswith("pytorch_model") and name.endswith(".bin"):
            raise RefineFastError(
                f"{folder} has its weights only in {name}, which fuse does not read: load the whole"
                " model and save it again, which writes safetensors"
            )


def _of_the_model(root: Path, modules: list[str]) -> Callable[[str], bool]:
    """Whether a folder's weights are the model's: of a module, or below its folder, as the parts of
    an older router are. Other folders of a model, such as ``checkpoint-500`` of a trainer or
    ``original``, hold copies. Every folder is the model's where no module has weights."""
    if not any(
        name.endswith(".safetensors") for folder in modules for name in _names(root / folder)
    ):
        return lambda _: True
    below = tuple(f"{folder}/" for folder in modules if folder != ".")
    return lambda folder: folder in modules or folder.startswith(below)


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
    modules = [module.folder for module in modules_and_routes_of(path)] or ["."]
    of_the_model = _of_the_model(path, modules)
    components, others, left_out = {}, [], []
    for current, folders, names in os.walk(path, onerror=_unreadable):
        folder = Path(current)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (folder / name).is_symlink():
                raise RefineFastError(
                    f"{folder / name} is a link to a folder: put the folder itself there"
                )
        relative = folder.relative_to(path)
        component, used = None, set[str]()
        if of_the_model(str(relative)):
            component, used = _read_component(folder, names, path)
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
    for name in modules:
        if name not in components:
            _check_no_pickle(path / name)
    return Checkpoint(path, components, others, left_out)
