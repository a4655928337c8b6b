"""Compares what the JSON files of two models say about the computation around the tensors.

A field that both files set to different values is refused if its name says that it defines the
architecture, by a word such as "heads", "eps" or "rope": architectures have such fields without
end, but name them with few words. Any other field is reported. So a new family of models is covered
without a list of its fields, and a note that a trainer left in config.json stops nobody. Names that
have such a word and are harmless are listed.

Libraries that save a model again add fields, drop fields and write null for a default. A field that
one file lacks is therefore reported, and refused only where its default is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .differences import Differences, differ, shown, shown_name

_PROVENANCE = re.compile(r"_.*|name_or_path|.*version")
"""Fields that say where a file comes from; not even reported."""
_ARCHITECTURE = frozenset([
    "act", "activation", "alibi", "attention", "attn", "bias", "bidirectional", "causal", "conv",
    "decoder", "eps", "epsilon", "expert", "experts", "ffn", "forward", "gate", "gated", "glu",
    "head", "heads", "hidden", "intermediate", "kernel", "kv", "layer", "layers", "layernorm",
    "mlp", "multiplier", "norm", "normalize", "pool", "pooling", "position", "positional",
    "positions", "qk", "qkv", "relative", "residual", "rms", "rope", "rotary", "scalar", "scale",
    "scaled", "scaling", "sliding", "softcap", "softcapping", "stride", "theta", "window", "yarn",
])  # fmt: skip
"""Words of names that say how tensors are used."""
_ARCHITECTURE_NAMES = frozenset(
    ["model_type", "is_encoder_decoder", "include_prompt", "do_lower_case"]
)
_HARMLESS = re.compile(
    # how numbers are stored (refused as a whole) and computed
    r"quantization_config|.*flash.*|.*attn_implementation.*|.*xformers.*|.*memory_efficient.*"
    r"|.*unpad.*|.*compile.*|fused_.*|.*cache.*|.*checkpointing|chunk_size_feed_forward"
    # training, and heads on top of the encoder
    r"|.*drop.*|.*initializer.*|init_.*|.*_init|.*loss.*|tie_.*|id2label|label2id"
    r"|classifier_.*|summary_.*|.*grad.*|.*jitter.*"
    # what a shape or the tokenizer decides
    r"|max_position_embeddings|max_trained_positions|n_positions|.*token_ids?"
    # how the model is called
    r"|output_(attentions|hidden_states|past)|.*_(kw)?args|modality_config"
    r"|prompts|.*instructions?|matryoshka.*"
)
"""Fields that a model and its fine-tune may give other values without changing what the weights
mean, in spite of their words."""
_DEFAULTS: dict[str, object] = {
    "is_decoder": False,
    "position_embedding_type": "absolute",
    "do_lower_case": False,
    "include_prompt": True,
    "similarity_fn_name": "cosine",
}
"""The value of a field that a file lacks, whatever the architecture."""
_POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""A flag of sentence-transformers before version 6 -> its name since."""


def compare_configs(
    file: str, base: Mapping[str, Any], tuned: Mapping[str, Any], *, harmless: bool = False
) -> Differences:
    """Compares one JSON file of two models.

    Args:
        file: its name, for the messages.
        base, tuned: its content.
        harmless: whether no field of the file can change what the weights mean.
    """
    ours, theirs = _flat(_settled(base)), _flat(_settled(tuned))
    found = Differences()
    for side, config in (("base", base), ("tuned", tuned)):
        if config.get("quantization_config"):
            found.refused.append(
                f"{file}: {side} has a quantization_config, whose weights are codes;"
                " dequantize the model and save it again"
            )
    alone: dict[str, list[str]] = {"base": [], "tuned": []}
    for name in sorted(ours.keys() | theirs.keys()):
        parts = name.split(".")
        default = _DEFAULTS.get(parts[-1])
        a, b = ours.get(name, default), theirs.get(name, default)
        if any(map(_PROVENANCE.fullmatch, parts)) or _equal(a, b):
            continue
        refused = not harmless and _defines_architecture(parts)
        if a is not None and b is not None:
            known = found.refused if refused else found.harmless
            known.append(differ(file, name, a, b))
            continue
        value = b if a is None else a
        if value and value != "default" and (harmless or refused):
            side = "tuned" if a is None else "base"
            alone[side].append(f"{shown_name(name)} = {shown(value)}")
    for side, fields in alone.items():
        if fields:
            found.harmless.append(f"{file}: only {side} has {', '.join(fields)}")
    return found


def _defines_architecture(parts: list[str]) -> bool:
    """Whether a field, given by its names from the outermost to its own, is one that a fine-tune
    keeps."""
    if any(map(_HARMLESS.fullmatch, parts)):
        return False
    return parts[-1] in _ARCHITECTURE_NAMES or any(
        word in _ARCHITECTURE for part in parts for word in re.split(r"[_\d]+|(?=[A-Z])", part)
    )


def _equal(a: object, b: object) -> bool:
    """Numbers may have been written in another precision."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same content in the form of one version of the libraries."""
    new = {
        name: _settled(value) if isinstance(value, dict) else value
        for name, value in config.items()
    }
    if "torch_dtype" in new:
        new.setdefault("dtype", new.pop("torch_dtype"))
    if "word_embedding_dimension" in new:
        new.setdefault("embedding_dimension", new.pop("word_embedding_dimension"))
    flags = {mode: new.pop(flag) for flag, mode in _POOLING_MODES.items() if flag in new}
    if flags:
        new.setdefault("pooling_mode", [mode for mode, active in flags.items() if active])
    if isinstance(mode := new.get("pooling_mode"), list):
        new["pooling_mode"] = mode[0] if len(mode) == 1 else sorted(map(str, mode))
    if isinstance(activation := new.get("activation_function"), str):
        new["activation_function"] = activation.rpartition(".")[2]
    if "model_type" in new:
        _settle_rope(new)
    return new


def _settle_rope(config: dict[str, Any]) -> None:
    """Rotary positions as transformers 4 writes them: rope_theta, and rope_scaling for what is
    scaled. Version 5 writes rope_parameters, one or one for each type of layer."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and any(isinstance(x, dict) for x in parameters.values()):
        return  # by type of layer
    given = parameters or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        return
    rope = dict(given)
    config.pop("rope_parameters", None)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            config[name] = rope.pop(name)
    old = rope.pop("type", None)
    kind = rope.get("rope_type") or old or "default"
    # positions of three axes, which for text are one
    config["rope_scaling"] = rope | {"rope_type": "default" if kind == "mrope" else kind}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested content as one level of dotted names, without nulls."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{name}.")
        elif inner is not None and inner != "":
            flat[prefix + name] = inner
    return flat
