"""LoRA adapters (Hu et al., arXiv 2106.09685) in training, through peft, and as a base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RefineFastError
from ...fuse import fuse
from ...fuse.modules import modules_and_routes_of
from .layers import transformers_of

if TYPE_CHECKING:
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

ADAPTER_CONFIG = "adapter_config.json"
"""The file that describes an adapter of peft's."""


def add_lora(model: SentenceTransformer, rank: int) -> list[PeftModel]:
    """Adds LoRA factors to every linear layer of each transformer, and freezes everything else.

    Args:
        model: the encoder, changed in place.
        rank: of the factors; their product is scaled by 2, the usual ``alpha = 2 * rank``.

    Returns:
        One adapter for each transformer: ``save_pretrained`` writes it as peft does, and
        ``merge_and_unload`` adds its product to the weights of ``model`` and removes it.

    Raises:
        RefineFastError: without peft, or if the encoder has no transformer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RefineFastError("lora: needs peft; pip install 'refine-fast[lora]'.") from None
    transformers = transformers_of(model)
    if not transformers:
        raise RefineFastError(
            "lora: the encoder has no transformer whose layers could be adapted; leave out --lora."
        )
    model.requires_grad_(False)
    config: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    return [get_peft_model(transformer, LoraConfig(**config)) for transformer in transformers]


def adapter_folder(folder: Path) -> Path | None:
    """Where the adapter is if the encoder in ``folder`` is an adapter over a base; else None.

    An adapter that is not where the encoder's own weights would be, such as in a checkpoint or
    beside a complete encoder, belongs to nothing that is loaded.
    """
    for name in (".", *(module.folder for module in modules_and_routes_of(folder))):
        if ((place := folder / name) / ADAPTER_CONFIG).is_file() and not _has_weights(place):
            return place
    return None


def _has_weights(folder: Path) -> bool:
    """Whether there are weights besides an adapter's."""
    found = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return any(not file.name.startswith("adapter_") for file in found)


def base_of_adapter(adapter: Path) -> str:
    """The folder or name of the base that an adapter says it belongs to.

    Raises:
        RefineFastError: if it says nothing.
    """
    try:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return str(name["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefineFastError(
            f"model: {adapter / ADAPTER_CONFIG} names no base ({error}); merge the adapter with "
            "peft's merge_and_unload and give the merged encoder."
        ) from None


def merge_adapter(base: Path, folder: Path, adapter: Path, out: Path) -> None:
    """Writes the encoder that an adapter makes of its base.

    Args:
        base: folder of the base.
        folder: the encoder that has the adapter: its tokenizer and its modules replace the base's.
        adapter: ``folder`` or the subfolder of it that holds the adapter.
        out: folder of the result; it must not exist.

    Raises:
        RefineFastError: if the adapter is not plain LoRA or does not fit the base.
    """
    place = out / adapter.relative_to(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    # the adapter's own tokenizer and modules replace the base's below: they may differ
    fuse(base, adapter, place, 1.0, force=True)
    if (folder / "modules.json").is_file():
        (place / "modules.json").unlink(missing_ok=True)  # the base's modules are not this one's
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.startswith(("adapter_", "README")):
            target = out / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
