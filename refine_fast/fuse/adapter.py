"""LoRA adapters as PEFT writes them (Hu et al., arXiv 2106.09685): the tuned weight of a layer is
``base + scale * B @ A``.

The factors are read when their layer is merged, in float32, with the scale multiplied into B; the
product is computed a few rows at a time while the base streams by.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RefineFastError
from .checkpoint import COMPUTED, Entry, Header, read_header
from .model_files import parse_json
from .modules import folders_of
from .names import first_and_count, match_names

ADAPTER_CONFIG = "adapter_config.json"
"""The file that describes an adapter of PEFT."""
_MERGE_WITH_PEFT = (
    "merge it with PEFT's merge_and_unload, save the merged model, and fuse that with the base"
)
_NAMES = {
    "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "VBLORA": "VB-LoRA",
    "FOURIERFT": "FourierFT", "LN_TUNING": "LayerNorm tuning", "XLORA": "X-LoRA",
    "RANDLORA": "RandLora", "TRAINABLE_TOKENS": "trainable tokens", "MISS": "MiSS",
    "PROMPT_TUNING": "prompt tuning", "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "PREFIX_TUNING": "prefix tuning", "P_TUNING": "P-tuning", "ADAPTION_PROMPT": "adaption prompt",
}  # fmt: skip
"""PEFT's peft_type -> its name, where that differs."""
_PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE",
)  # fmt: skip
"""Types that leave the weights as they are, and that PEFT cannot merge."""
_VARIANTS = {
    "layer_replication": "layer_replication",
    "use_dora": "DoRA",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "lora_bias": "lora_bias",
}
"""A field of a LoRA configuration with which the update is not scale * B @ A of a base tensor ->
its name."""
# initializations that change PEFT's base weights from those on the disk
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LowRank:
    """tuned = base + scale * B @ A, A (rank, columns) and B (rows, rank) in an adapter's file;
    ``transposed``: the transpose of that."""

    a: Entry
    b: Entry
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and scale * B, float32 and contiguous, whose product B @ A has the shape of the
        base."""
        a, b = _load(self.a), _load(self.b)
        if self.transposed:
            a, b = b.T, a.T
        return a.contiguous(), (b * self.scale).contiguous()


@dataclass(frozen=True)
class Adapter:
    """An adapter matched to its base. ``low_rank``: base tensor name -> factors; ``whole``: base
    tensor name -> a tensor that replaces it (modules_to_save, biases)."""

    header: Header
    low_rank: dict[str, LowRank]
    whole: dict[str, Entry]
    notes: list[str]


def find_adapter(path: Path) -> Path | None:
    """The folder of the adapter in ``path``: that folder itself, or a subfolder of one without
    weights of its own (PEFT puts a named adapter in a folder of its name, a trainer each checkpoint
    in one, older sentence-transformers in ``0_Transformer``). None for anything else.

    Raises:
        RefineFastError: if several subfolders hold one.
    """
    if not os.path.isdir(path):  # a name that is too long does not raise
        return None
    for folder in (path, path / folders_of(path)[0]):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if any(folder.glob("*.safetensors")):
        return None
    found = []
    for current, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if ADAPTER_CONFIG in names:
            found.append(Path(current))
    if len(found) > 1:
        listed = ", ".join(str(folder.relative_to(path)) for folder in found)
        raise RefineFastError(
            f"{path} holds {len(found)} adapters, in {listed}: give the folder of one of them"
        )
    return found[0] if found else None


def _load(entry: Entry) -> Tensor:
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.nbytes))
    if len(data) < entry.nbytes:
        raise RefineFastError(f"{entry.file} was truncated while it was read")
    if not data:
        return torch.empty(entry.shape)
    return torch.frombuffer(data, dtype=entry.torch_dtype).view(entry.shape).float()


def _patterns(config: dict[str, Any], name: str) -> list[tuple[re.Pattern[str], float]]:
    """PEFT's rank_pattern and alpha_pattern: a key is a regular expression for the end of a
    module's name."""
    return [
        (re.compile(rf"(.*\.)?({key})$"), float(value))
        for key, value in (config.get(name) or {}).items()
    ]


def _of(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _require_plain_lora(path: Path, config: dict[str, Any]) -> None:
    kind = str(config["peft_type"])
    if kind in _PROMPTS:
        raise RefineFastError(
            f"{path} is an adapter of the type {_NAMES.get(kind, kind)}, which changes no weights:"
            " it cannot be fused; give a fine-tuned model or a LoRA adapter"
        )
    start = str(config.get("init_lora_weights")).lower()
    variants = [name for field, name in _VARIANTS.items() if config.get(field)]
    if start.startswith(_CHANGES_BASE):
        variants.append(start)
    if kind != "LORA":
        variants = [_NAMES.get(kind, kind)]
    if variants:
        likewise = ", its layers replicated likewise" if "layer_replication" in variants else ""
        raise RefineFastError(
            f"{path} is not a plain LoRA adapter ({', '.join(variants)}):"
            f" {_MERGE_WITH_PEFT}{likewise}"
        )


def read_adapter(path: Path, base: dict[str, Entry]) -> Adapter:
    """Reads the adapter in a folder and matches it to the tensors of the base.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors.
        base: the base's tensors, by name.

    Raises:
        RefineFastError: anything that is not plain LoRA, or does not fit the base.
    """
    file = path / ADAPTER_CONFIG
    try:
        config = parse_json(file.read_bytes())
        _require_plain_lora(path, config)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError,
        re.error, OverflowError, RecursionError,  # of a pattern
    ) as error:  # fmt: skip
        raise RefineFastError(f"{file} is not a LoRA configuration: {error}") from error
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise RefineFastError(
            f"{weights} is missing: load the adapter with PEFT and save it again, which writes"
            " safetensors"
        )
    header = read_header(weights)
    factors: dict[str, dict[str, Entry]] = {}
    whole: dict[str, Entry] = {}
    for entry in header.entries:
        name = (
            entry.name.removeprefix("base_model.model.")
            .replace(".modules_to_save.", ".")
            .replace(".base_layer.", ".")
        )
        found = re.fullmatch(
            r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?", name
        )
        if found:
            factors.setdefault(found[1], {})[found[2]] = entry
        elif "lora_" in name:
            raise RefineFastError(
                f"{header.path}: adapter tensor {entry.name!r} is not plain LoRA:"
                f" {_MERGE_WITH_PEFT}"
            )
        else:
            whole[name] = entry
    targets = {module: module + ".weight" for module in factors}
    match = match_names([*base], [*targets.values(), *whole])
    if match.extra:
        raise RefineFastError(
            f"{header.path}: the adapter changes {first_and_count(match.extra)}, which the base"
            f" does not have: give the base that it was trained on, or {_MERGE_WITH_PEFT}"
        )
    base_name = {tuned: name for name, tuned in match.pairs.items()}
    low_rank = {}
    for module, pair in factors.items():
        if targets[module] not in base_name:  # a head that the base lacks: match.notes says so
            continue
        name = base_name[targets[module]]
        embedding = "lora_embedding_A" in pair
        kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if set(pair) != set(kinds):
            raise RefineFastError(
                f"{header.path}: module {module!r} lacks one of {kinds[0]} and {kinds[1]}"
            )
        a, b = pair[kinds[0]], pair[kinds[1]]
        for entry in (a, b):
            if entry.dtype not in COMPUTED:
                raise RefineFastError(
                    f"{header.path}: adapter tensor {entry.name!r} must be F32, BF16, F16 or F64"
                    f" (got {entry.dtype})"
                )
        r = _of(ranks, module, rank)
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == r > 0:
            raise RefineFastError(
                f"{header.path}: module {module!r} has factors of shapes {a.shape} and {b.shape}"
                f" at rank {r:g}"
            )
        scale = _of(alphas, module, alpha) / (r**0.5 if config.get("use_rslora") else r)
        update = LowRank(a, b, scale, embedding or bool(config.get("fan_in_fan_out")))
        if base[name].shape != update.shape:
            raise RefineFastError(
                f"{header.path}: module {module!r} changes {update.shape}, but {name} in the base"
                f" is {base[name].shape}"
            )
        if base[name].storage is None:
            raise RefineFastError(
                f"{header.path} changes {name}, which is {base[name].dtype} in {base[name].file}:"
                " dequantize the base first"
            )
        low_rank[name] = update
    whole = {base_name[name]: entry for name, entry in whole.items() if name in base_name}
    if not low_rank and not whole:
        raise RefineFastError(
            f"{header.path}: the adapter changes no tensor of the base: give the base that it was"
            " trained on"
        )
    notes = [
        f"adapter of rank {rank} over {len(low_rank)} tensors",
        *(note for note in match.notes if not note.endswith("kept")),
    ]
    return Adapter(header, low_rank, whole, notes)
