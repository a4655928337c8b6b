"""Makes a base encoder fit for a run: one folder of safetensors, with everything that was asked.

Training, fusion and the product read and copy the base's files. A base that is not complete there
is written out once: pickled weights (read with ``weights_only``), a LoRA adapter, a tokenizer
without padding token, prompts or a similarity given by flag. All later steps see the copy only, so
mining, training, scores, index and product agree.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RefineFastError
from ...files import write_errors
from ...fuse.into import check_fuse_into
from ...integrations.sentence_transformers.twin import TwinEncoder
from ..cache import cache_folder, made_once
from .adapters import adapter_folder, base_of_adapter, merge_adapter
from .load import encoder_folder, load_encoder
from .options import EncoderOptions

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names under which models keep the prompt of documents; the first that is not empty is used."""

CODE = "*.py"
"""The code of an encoder that brings its own."""


def prepare_encoder(
    folder: Path,
    options: EncoderOptions | None = None,
    *,
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Returns the folder that a run works on: ``folder`` itself if it is complete, else a copy.

    Args:
        folder: local folder of the encoder.
        options: what the user set.
        cache: folder of the copies, by default ``cache_folder()``. A copy is made once.
        say: called with one line when a copy is made: why, and where.

    Raises:
        RefineFastError: if the encoder cannot be used; the message names the remedy.
    """
    if (folder / TwinEncoder.config_file_name).is_file():
        return folder  # a product of fused embeddings: complete, and never a base
    options = options or EncoderOptions()
    cache = cache_folder() if cache is None else cache
    place = cache / "encoders" / _key(folder, options)
    if (place / "as_is").is_file():
        return folder
    if place.is_dir():
        return place
    if (adapter := adapter_folder(folder)) is None:
        model, reasons = _loaded(folder, options)
        if not reasons:
            # without a cache it is only looked at again next time
            with suppress(OSError, RefineFastError), made_once(place) as content:
                (content / "as_is").touch()
            return folder
    with made_once(place) as content:
        if adapter is not None:
            merged = content.with_name("merged")
            base = prepare_encoder(encoder_folder(base_of_adapter(adapter)), cache=cache, say=say)
            merge_adapter(base, folder, adapter, merged)
            model, reasons = _loaded(merged, options)
            reasons.insert(0, "it is a LoRA adapter, now merged with its base")
        if say is not None:
            say(f"model: {'; '.join(reasons)}; using a copy in {place}")
        with write_errors(place):
            model.save_pretrained(str(content), create_model_card=False)
        copy_missing(folder, content, "README.md", "LICENSE*", CODE)
    return place


def _loaded(folder: Path, options: EncoderOptions) -> tuple[SentenceTransformer, list[str]]:
    """The encoder with what the user set, and why a copy of it is needed."""
    model = load_encoder(folder, trust_remote_code=options.trust_remote_code, dtype="auto")
    return model, [*_stored_otherwise(model, folder), *_apply(model, options)]


def copy_missing(folder: Path, copy: Path, *patterns: str) -> None:
    """Copies the files in the root that ``save_pretrained`` did not write."""
    for pattern in patterns:
        for file in folder.glob(pattern):
            if not (copy / file.name).exists():
                shutil.copy(file, copy)


def _key(folder: Path, options: EncoderOptions) -> str:
    """Of the folder's files, by name, size and time, the options and the libraries; of an adapter
    whose base is a local folder, of that one's too."""
    files = sorted(
        (str(path.relative_to(folder)), (stat := path.stat()).st_size, stat.st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    )
    libraries = [version(name) for name in ("refine-fast", "sentence-transformers", "transformers")]
    own = [str(folder), files, asdict(options), libraries]
    if (adapter := adapter_folder(folder)) is not None:
        base = Path(base_of_adapter(adapter)).expanduser()
        own += [_key(base.resolve(), EncoderOptions())] if base.is_dir() else []
    content = json.dumps(own)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _stored_otherwise(model: SentenceTransformer, folder: Path) -> list[str]:
    """Why fusion cannot read the base's files as they are."""
    reasons = []
    pickled = [
        path for path in folder.rglob("*.bin")
        if not path.with_suffix(".safetensors").exists()
        and not any(path.parent.glob("*.safetensors"))
        and (path.parent / "config.json").is_file()
    ]  # fmt: skip
    if pickled:
        reasons.append(f"{pickled[0].relative_to(folder)} is not a safetensors file")
    elif not _router_as_saved(model, folder):
        reasons.append("its routes have other folders than sentence-transformers gives them")
    else:
        try:
            if check_fuse_into(model, folder):
                reasons.append("it stores tied weights more than once")
        except RefineFastError as error:
            reasons.append(f"its files do not match the loaded model ({error})")
    return reasons


def _router_as_saved(model: SentenceTransformer, folder: Path) -> bool:
    """Whether a router's folders have the names that saving the model would give them."""
    from sentence_transformers.base.modules import Router

    for name, module in model.named_children():
        if isinstance(module, Router):
            names = {
                f"{route}_{i}_{type(part).__name__}"
                for route, parts in module.sub_modules.items()
                for i, part in enumerate(parts.children())
            }
            config = folder / _module_path(folder, name) / "router_config.json"
            if not config.is_file() or not set(json.loads(config.read_text())["types"]) <= names:
                return False
    return True


def _module_path(folder: Path, name: str) -> str:
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return next(str(module["path"]) for module in modules if module["name"] == name)


def _apply(model: SentenceTransformer, options: EncoderOptions) -> list[str]:
    """Sets what was asked; returns what differs from the base now."""
    changes = []
    own = next((model.prompts[n] for n in _DOCUMENT_PROMPTS if model.prompts.get(n)), "")
    prompts = {
        "query": model.prompts.get("query") or "",
        "document": own,
    }
    if options.query_prompt is not None:
        prompts["query"] = options.query_prompt
    if options.document_prompt is not None:
        prompts["document"] = options.document_prompt
    for role, prompt in prompts.items():
        if prompt != (model.prompts.get(role) or ""):
            model.prompts[role] = prompt
            changes.append(f"the prompt of a {role} is {prompt!r}")
    if options.similarity is not None and options.similarity != model.similarity_fn_name:
        model.similarity_fn_name = options.similarity
        changes.append(f"the similarity is {options.similarity}")
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise RefineFastError(
            f"model: it compares embeddings by {model.similarity_fn_name} distance, which is not "
            "supported; add --similarity cosine or --similarity dot."
        )
    if options.dimensions is not None and options.dimensions != model.truncate_dim:
        full = model.get_embedding_dimension()
        if full is not None and options.dimensions > full:
            raise RefineFastError(
                f"dimensions: {options.dimensions} is more than the encoder's {full}; give fewer."
            )
        model.truncate_dim = options.dimensions
        changes.append(f"embeddings have {options.dimensions} dimensions")
    return changes + _padding_tokens(model)


def _padding_tokens(model: SentenceTransformer) -> list[str]:
    """Gives a padding token to each tokenizer without one: texts of a batch differ in length."""
    from sentence_transformers.base.modules import Transformer

    changes = []
    for module in model.modules():
        if not isinstance(module, Transformer):
            continue
        tokenizer: Any = module.tokenizer
        if tokenizer.pad_token is not None:
            continue
        token = tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise RefineFastError(
                "model: the tokenizer has no padding token, and no end or unknown token to use "
                "instead; set tokenizer.pad_token and save the tokenizer again."
            )
        tokenizer.pad_token = token
        module.model.config.pad_token_id = tokenizer.pad_token_id
        changes.append(f"the tokenizer has no padding token, now {token!r}")
    return changes
