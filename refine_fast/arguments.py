"""Arguments of the command line that take more than a line to read or to declare."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

TRAINING_FORMATS = ("triplets", "flagembedding", "tevatron", "llama_index", "beir", "parquet")
INDEX_FORMATS = ("vectors", "faiss", "lancedb", "qdrant")
MODEL_FORMATS = ("onnx", "int8", "openvino")
"""Formats of ``export``. The first ones need a run that is mined, the others an index or a product.
"""


PASSAGE_FIELDS = ("encoding", "text_column", "title_column", "chunk_tokens", "model")
"""Fields of RunConfig that decide what the passages of some documents are."""


def join_negative_values(arguments: Sequence[str]) -> list[str]:
    """``--band -1,1`` as ``--band=-1,1``: argparse takes -1,1 for an option."""
    joined: list[str] = []
    for argument in arguments:
        after_flag = joined and re.fullmatch(r"--\w[\w-]*", joined[-1])
        if after_flag and re.fullmatch(r"-\.?\d[-+.,\deE]*", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def add_llm_flags(command: argparse.ArgumentParser, help: str) -> None:
    """``--llm``, and what names its model and its key."""
    command.add_argument("--llm", metavar="URL", help=help)
    command.add_argument("--llm-model", metavar="NAME,...", help="the models to ask there")
    command.add_argument(
        "--llm-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the API key (default OPENAI_API_KEY)",
    )
    command.add_argument(
        "--llm-extra", metavar="JSON", help="further fields of each request, as for run"
    )


def passage_options(options: argparse.Namespace) -> dict[str, str]:
    """What was given of ``PASSAGE_FIELDS``."""
    return {name: value for name, value in vars(options).items() if name in PASSAGE_FIELDS}


def llm_options(options: argparse.Namespace) -> dict[str, str]:
    """What was given of ``add_llm_flags``, as fields of RunConfig."""
    names = ("llm", "llm_model", "llm_key_env", "llm_extra")
    return {name: getattr(options, name) for name in names if getattr(options, name)}


def add_prompt_flags(command: argparse.ArgumentParser) -> None:
    """Which prompt is printed, or which one is tried, on what, and with which model."""
    from .pipeline.config import RunConfig

    command.add_argument(
        "name",
        nargs="?",
        choices=["queries", "lines", "judge"],
        default="queries",
        help="which prompt (default queries); lines: the one for models with fewer than 2 billion "
        "parameters; judge: the one for --judge-prompt",
    )
    command.add_argument(
        "--try",
        dest="tried",
        type=Path,
        metavar="FILE",
        help="send a few passages through the prompt in FILE, and show what would be kept",
    )
    command.add_argument(
        "-n", type=count, default=5, metavar="N", dest="count", help="passages to try (default 5)"
    )
    command.add_argument(
        "--docs",
        type=Path,
        metavar="DOCS",
        help="documents whose passages are tried (default: Python's language reference)",
    )
    for name in PASSAGE_FIELDS:
        _add_field(command, name, RunConfig.model_fields[name])
    add_llm_flags(command, "who is asked: a URL, smollm2 or transformers (default smollm2)")


def add_trust_flag(command: argparse.ArgumentParser) -> None:
    """``--trust-remote-code``, for encoders with code of their own."""
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code in an encoder's folder",
    )


def add_export_flags(command: argparse.ArgumentParser) -> None:
    """What is exported, in which format, and where it goes."""
    command.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run")
    command.add_argument(
        "--format",
        required=True,
        choices=[*TRAINING_FORMATS, *INDEX_FORMATS, *MODEL_FORMATS],
        help="of the training set: triplets (sentence-transformers), flagembedding, tevatron, "
        "llama_index, beir (a folder, with the queries held out as its splits dev and test), "
        "parquet (ids, texts and scores, a row for each query); of the index: vectors (parquet), "
        "faiss, lancedb, qdrant; of the model: onnx, int8 (onnx with weights of 8 bits), openvino",
    )
    command.add_argument(
        "-o",
        "--out",
        metavar="PATH",
        help="where it goes; -: stdout, for triplets, flagembedding, tevatron and llama_index "
        "(default: a file or folder in RUN/export)",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export at --out"
    )
    command.add_argument(
        "--vectors",
        choices=["float32", "int8", "binary"],
        default="float32",
        help="how the format vectors stores each number; states what the smaller ones cost on the "
        "run's held-out queries (default float32)",
    )
    command.add_argument(
        "--dims",
        type=whole,
        metavar="N",
        help="how many of the first numbers of each vector the format vectors keeps; for models "
        "that were trained for it (Matryoshka)",
    )


def add_eval_flags(command: argparse.ArgumentParser) -> None:
    """Which models are scored, on what, and how."""
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folders or names; the others are compared with the first",
    )
    command.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="a retrieval set in BEIR layout"
    )
    command.add_argument(
        "--split", default="test", metavar="NAME", help="which of its qrels/ to use (default test)"
    )
    command.add_argument(
        "--systems",
        action="store_true",
        help="score each model in the systems that search offers: passage vectors, best sentence, "
        "BM25 and their blends, whose weights are chosen on the set's split dev, validation or "
        "train, else on queries that are made from its passages",
    )
    command.add_argument(
        "--precision",
        choices=["fp32", "bf16", "auto"],
        default="fp32",
        help="of the encoder; auto: bf16 where the hardware has it (default fp32)",
    )
    add_trust_flag(command)


def count(text: str) -> int:
    """An integer from 1 to 1,000."""
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 1,000 (got {text!r})")
    return int(text)


def whole(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be an integer >= 1 (got {text!r})")
    return int(text)


def weight_of_glob(text: str) -> tuple[str, float]:
    """``GLOB=W`` as (glob, weight)."""
    glob, _, weight = text.rpartition("=")
    try:
        return glob, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be GLOB=W, such as '*.embeddings.*=0'"
        ) from None


def add_run_flags(command: argparse.ArgumentParser) -> None:
    """DOCS, and one flag for each field of RunConfig. Only what is given is set: the rest is left
    to the YAML file and the defaults."""
    from .pipeline.config import RunConfig

    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file with any of the options below, such as 'queries_per_chunk: 8'",
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="do every stage on a little data, to see that the set-up works",
    )
    for name, field in RunConfig.model_fields.items():
        extra: Any = field.json_schema_extra
        if name == "docs":
            command.add_argument(
                "docs",
                nargs="?",
                default=argparse.SUPPRESS,
                metavar=extra["metavar"],
                help=f"{field.description} (default: the documents of the run at --out if it "
                "exists, else Python's documentation)",
            )
        else:
            _add_field(command, name, field)


def _add_field(command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """The flag of one field of RunConfig."""
    extra: Any = field.json_schema_extra
    help = str(field.description)
    if not field.is_required() and field.default not in (None, ()):
        help += f" (default {shown(field.default)})"
    # A switch may be given without a value: --judge, --judge yes and --judge no.
    switch: Any = {"nargs": "?", "const": "yes"} if field.annotation is bool else {}
    command.add_argument(
        f"--{name.replace('_', '-')}",
        action="append" if name == "ood" else "store",
        default=argparse.SUPPRESS,
        metavar=extra["metavar"],
        help=help.replace("%", "%%"),
        **switch,
    )


def shown(value: Any) -> str:
    """A default as its flag would be written."""
    if isinstance(value, tuple):
        return ",".join(
            f"{item[0]}={item[1]:g}" if isinstance(item, tuple) else f"{item:g}" for item in value
        )
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
