"""Options that do not go together, each refused in one sentence."""

from __future__ import annotations

from typing import Any

from .config_values import LLM_TEACHER, NO_KINDS, OptionError

_FOR_WRITING = {"llm_mix", "prompt", "duplicates", "round_trip", "judge", "judge_prompt"}
"""Fields that mean nothing unless a language model writes the queries."""

_FOR_A_MODEL = _FOR_WRITING | {"max_calls", "max_tokens", "max_cost", "price_in", "price_out"}
"""With llm_*, the fields that mean nothing without a language model."""


def check_together(config: Any) -> None:
    """Checks what no field can tell by itself.

    Args:
        config: a ``RunConfig``, whose module imports this one.

    Raises:
        OptionError: for the first option that cannot be used beside the others.
    """
    for name, field in type(config).model_fields.items() if config.llm is None else ():
        needs_model = name.startswith("llm_") or name in _FOR_A_MODEL
        if needs_model and getattr(config, name) != field.default:
            raise OptionError(f"{name}: needs a language model; add --llm URL or omit it.", name)
    if config.fusion == "embeddings" and config.weight == "auto":
        raise OptionError(
            "weight: auto chooses the weight after training, but fusion embeddings uses it in "
            "the loss; give a number.",
            *("weight", "fusion"),
        )
    if config.fusion == "embeddings" and config.weight == 0:
        raise OptionError(
            "weight: 0 leaves the fine-tuned encoder out of fusion embeddings, so that training "
            "would change nothing; give a number above 0.",
            *("weight", "fusion"),
        )
    if config.shards is not None and config.engine == "local":
        raise OptionError(
            "shards: needs workers; add --engine ray or omit --shards.", "shards", "engine"
        )
    if config.train_workers != "auto":
        if config.engine == "local":
            raise OptionError(
                "train_workers: needs workers; add --engine ray or omit --train-workers.",
                *("train_workers", "engine"),
            )
        if config.train_workers > config.batch_size:
            raise OptionError(
                f"train_workers: {config.train_workers} processes cannot share a batch of "
                f"{config.batch_size} queries; give a larger --batch-size or fewer "
                "--train-workers.",
                *("train_workers", "batch_size"),
            )
    if config.lora is not None and config.train_layers is not None:
        raise OptionError(
            "train_layers: --lora trains adapters in every layer; give one of the two.",
            *("train_layers", "lora"),
        )
    if config.teacher is None and config.teacher_temperature != 1:
        raise OptionError(
            "teacher_temperature: needs a teacher; add --teacher or omit it.",
            "teacher_temperature",
        )
    if config.teacher == LLM_TEACHER and config.llm is None:
        raise OptionError(
            "teacher: llm is the language model of --llm; add --llm URL, or name a cross-encoder.",
            "teacher",
        )
    if config.teacher is not None and config.negatives == 0:
        raise OptionError(
            "teacher: scores mined negatives, but negatives is 0; give --negatives 1 or more.",
            *("teacher", "negatives"),
        )
    if config.query_kinds == NO_KINDS and config.llm is None and config.queries is None:
        raise OptionError(
            "query_kinds: none leaves no queries; name kinds, or add --llm or --queries.",
            "query_kinds",
        )
    if config.llm is not None and config.queries is not None:
        if config.teacher != LLM_TEACHER:
            raise OptionError(
                "llm: --queries already provides the queries; omit --llm or --queries, or have "
                "the model teach with --teacher llm.",
                *("llm", "queries", "teacher"),
            )
        for name in sorted(_FOR_WRITING):
            if getattr(config, name) != type(config).model_fields[name].default:
                raise OptionError(
                    f"{name}: is for queries that a language model writes, but --queries "
                    "already provides them; omit one of the two.",
                    *(name, "queries"),
                )
    if config.out.exists() and not config.out.is_dir():
        raise OptionError(f"out: {config.out} is a file; give a folder.", "out")
    if config.docs is not None and config.out.is_relative_to(config.docs):
        raise OptionError(
            f"out: {config.out} is inside the documents' folder, so the run would read its own "
            "files; give another folder.",
            *("out", "docs"),
        )
