"""LoRA adapters as PEFT writes them (Hu et al., arXiv 2106.09685): the tuned weight of a layer is ``base + scale * B @ A``.

Only the factors are held, in float32, the scale multiplied into B; the product appears a few rows at a time while the base passes by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RefineFastError
from .checkpoint import Entry, Header, parse_json, read_header
from .names import match_names

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class LowRank:
    """A (rank, columns) and B (rows, rank), float32 and contiguous: tuned = base + B @ A for a base of (rows, columns)."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Adapter:
    """``low_rank``: base tensor name -> factors; ``whole``: base tensor name -> a tensor that replaces it (modules_to_save, biases)."""

    header: Header
    low_rank: dict[str, LowRank]
    whole: dict[str, Entry]
    notes: list[str]


def is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _load(entry: Entry) -> Tensor:
    if entry.dtype not in _DTYPES:
        raise RefineFastError(f"{entry.file}: adapter tensor {entry.name!r} has dtype {entry.dtype}; F32, BF16, F16 or F64 is needed")
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.nbytes))
    if not data:
        return torch.empty(entry.shape, dtype=torch.float32)
    return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape).float()


def _by_pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: a key is a regular expression for the end of the module's name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter(path: Path, base: dict[str, Entry]) -> Adapter:
    """The adapter in a folder, matched to the tensors of the base. Raises RefineFastError on anything that is not plain LoRA."""
    try:
        config = parse_json((path / "adapter_config.json").read_bytes())
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefineFastError(f"{path / 'adapter_config.json'} is no LoRA configuration: {error}") from error
    if kind != "LORA" or config.get("use_dora"):
        raise RefineFastError(
            f"{path} is a {'DoRA' if config.get('use_dora') else kind} adapter: merge it with PEFT's merge_and_unload first"
        )
    header = read_header(path / "adapter_model.safetensors")
    factors: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for entry in header.entries:
        name = entry.name.removeprefix("base_model.model.").replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?", name)
        if found:
            factors.setdefault(found[1], {})[found[2]] = entry
        elif "lora_" in name:
            raise RefineFastError(
                f"{header.path}: adapter tensor {entry.name!r} is not plain LoRA: merge the adapter with PEFT's merge_and_unload first"
            )
        else:
            whole[name] = entry
    targets = {module: module + ".weight" for module in factors}
    match = match_names([*base], [*targets.values(), *whole])
    if match.extra:
        raise RefineFastError(f"{header.path}: the adapter changes {match.extra[0]}, which the base does not have")
    base_name = {tuned: name for name, tuned in match.pairs.items()}
    low_rank = {}
    for module, pair in factors.items():
        name = base_name.get(targets[module], "")
        embedding = "lora_embedding_A" in pair
        kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if not name or set(pair) != set(kinds):
            raise RefineFastError(f"{header.path}: module {module!r} lacks one of {kinds[0]} and {kinds[1]}, or the base lacks its weight")
        a, b = _load(pair[kinds[0]]), _load(pair[kinds[1]])
        r = _by_pattern(config.get("rank_pattern") or {}, module, rank)
        scale = _by_pattern(config.get("alpha_pattern") or {}, module, alpha) / (r**0.5 if config.get("use_rslora") else r)
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(a) != r:
            raise RefineFastError(
                f"{header.path}: module {module!r} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)} at rank {r}"
            )
        if embedding or config.get("fan_in_fan_out"):  # the base holds the transposed weight
            a, b = b.T, a.T
        if base[name].shape != (len(b), a.shape[1]):
            raise RefineFastError(
                f"{header.path}: module {module!r} is {len(b)} x {a.shape[1]}, but {name} in the base has the shape {base[name].shape}"
            )
        low_rank[name] = LowRank(a.contiguous(), (b * scale).contiguous())
    notes = [f"adapter of rank {rank} over {len(low_rank)} tensors", *(note for note in match.notes if "prefix" in note)]
    return Adapter(header, low_rank, {base_name[name]: entry for name, entry in whole.items() if name in base_name}, notes)
