"""Types of option values: each reads a flag's text or a YAML value, or says what it must be."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from ..errors import RefineFastError
from ..files import name_of, real_path
from .corpus.beir import is_beir
from .corpus.nanobeir import folder_name, is_nanobeir, sets_of
from .encoder.load import DEFAULT_ENCODER
from .queries.query import MADE_KINDS

LLM_TEACHER = "llm"
"""The teacher that is the language model of ``--llm``."""


class OptionError(RefineFastError):
    """Options that cannot be used; their names are ``options``."""

    def __init__(self, message: str, *options: str) -> None:
        super().__init__(message)
        self.options = options


def requirement(schema: dict[str, Any]) -> str:
    """What a value must be, in words, by its JSON schema: "an integer >= 0"."""
    if "anyOf" in schema:
        return ", or ".join(requirement(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        *names, last = schema["enum"]
        return f"{', '.join(names)} or {last}"
    kinds = {"integer": "an integer", "number": "a number", "boolean": "yes or no"}
    kind = kinds.get(schema["type"], "a non-empty string" if "minLength" in schema else "text")
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
    bounds = [f"{sign} {schema[name]:.10g}" for name, sign in signs.items() if name in schema]
    return " ".join([kind, " and ".join(bounds)]).rstrip()


def is_windows_path(text: str) -> bool:
    """Whether a path starts with a drive, on a system without drives."""
    return os.name == "posix" and re.match(r"[A-Za-z]:[\\/]", text) is not None


def _path(value: Any) -> Path:
    text = "" if value is None else str(value)
    if not text.strip():
        raise ValueError("must be a path")  # "" would be the current folder
    if is_windows_path(text):
        raise ValueError("is a Windows path; give a path on this machine")
    if "\\" in text and not os.path.lexists(text):  # of a file that was written on Windows
        text = text.replace("\\", "/")
    return real_path(Path(os.path.expanduser(text)))


def _existing(path: Path | None) -> Path | None:
    if path is not None and not path.exists():
        raise ValueError("does not exist; give the path of an existing file or folder")
    return path


def _encoding(name: str) -> str:
    try:
        codecs.lookup(name)
    except (LookupError, ValueError):
        raise ValueError("must be an encoding that Python knows, such as windows-1251") from None
    return name


def _engine(name: str) -> str:
    if name not in ("local", "ray") and not re.fullmatch(r"ray://[^/\s]+:\d+", name):
        raise ValueError("must be local, ray or ray://HOST:PORT")
    return name


def _shards(place: str) -> str:
    """A URL, or a path made absolute."""
    protocol, separator, rest = place.partition("://")
    if not separator:
        return str(_path(place))
    if not protocol or not rest.strip("/") or protocol == "memory":
        raise ValueError("must be a path or a URL such as s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    return place.rstrip("/")


def _encoder(name: str) -> str:
    """A folder's absolute path, so that a run can be resumed from elsewhere; else the name."""
    is_folder = name != DEFAULT_ENCODER and Path(os.path.expanduser(name)).exists()
    return str(_path(name)) if is_folder else name


def _teacher(name: str) -> str:
    return name if name == LLM_TEACHER else _encoder(name)


def _beir_sets(value: Any) -> tuple[Path | str, ...] | None:
    """Folders, and names of NanoBEIR's sets."""
    if value is None or value in ("none", ["none"]):
        return None if value is None else ()
    items = value if isinstance(value, list | tuple) else [value]
    named = [str(item) for item in items if is_nanobeir(str(item), Path.cwd())]
    names = dict.fromkeys(name for item in named for name in sets_of(item))
    folders = dict.fromkeys(_path(item) for item in items if str(item) not in named)
    for folder in folders:
        _existing(folder)
        if not is_beir(folder):
            raise ValueError(
                "must be a BEIR folder with a test split "
                "(corpus.jsonl, queries.jsonl, qrels/test.tsv; gzipped or not)"
            )
    taken = {*(name_of(folder.name) for folder in folders), *map(folder_name, names)}
    if len(taken) < len(folders) + len(names):
        raise ValueError("have the same folder name; rename one")
    return (*folders, *names)


def _numbers(value: Any) -> list[float]:
    parts = value.split(",") if isinstance(value, str) else value
    return [float(part) for part in parts]


def _band(value: Any) -> tuple[float, float] | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        low, high = _numbers(value)
    except (TypeError, ValueError):
        low, high = 1.0, -1.0
    if not -1 <= low < high <= 1:
        raise ValueError(
            "must be auto, or two cosine similarities LOW,HIGH with -1 <= LOW < HIGH <= 1, "
            "such as 0.5,0.7"
        )
    return low, high


def _weights(value: Any) -> tuple[float, ...]:
    """Ascending; with 0 and 1, the base and the fine-tuned encoder."""
    try:
        weights = _numbers(value)
    except (TypeError, ValueError):
        weights = [-1.0]
    if not all(0 <= weight <= 1 for weight in weights):
        raise ValueError("must be fusion weights >= 0 and <= 1, such as 0,0.35,1")
    return tuple(sorted({*weights, 0.0, 1.0}))


def _names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return tuple(name for part in parts if (name := str(part).strip()))


def _mix(value: Any) -> tuple[tuple[str, float], ...]:
    parts = [item.split("=") for item in value.split(",")] if isinstance(value, str) else value
    try:
        mix = tuple((str(kind).strip(), float(share)) for kind, share in dict(parts).items())
    except (TypeError, ValueError):
        mix = None
    if mix is None or not all(math.isfinite(share) for _, share in mix):
        raise ValueError("must be kinds and shares, such as question=0.6,claim=0.4")
    # a mapping has no order, so that another one is no other mix
    return tuple(sorted(mix, key=lambda part: (-part[1], part[0])))


NO_KINDS = ("none",)
"""``--query-kinds none``: queries of the language model or the user alone."""


def _query_kinds(value: Any) -> tuple[str, ...]:
    kinds = _names(value)
    if kinds != NO_KINDS and set(kinds) - set(MADE_KINDS):
        raise ValueError(f"must be kinds of query, of {', '.join(MADE_KINDS)}")
    return kinds


def _json_object(value: Any) -> dict[str, Any]:
    try:
        fields = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError("must be a JSON object, such as '{\"top_p\": 0.9}'")
    return fields


def _memory(value: Any) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)I?B?", str(value).strip().upper())
    try:
        size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError("must be an amount of memory, such as 8GB or 512MB")
    return size


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=0)]
PerChunk = Annotated[int, Field(ge=1, le=10_000)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
AnyPath = Annotated[Path, BeforeValidator(_path, json_schema_input_type=Path)]
ExistingPath = Annotated[AnyPath, AfterValidator(_existing)]
Encoding = Annotated[Name, AfterValidator(_encoding)]
Encoder = Annotated[Name, AfterValidator(_encoder)]
Teacher = Annotated[Name, AfterValidator(_teacher)]
Engine = Annotated[Name, AfterValidator(_engine)]
ShardPlace = Annotated[Name, AfterValidator(_shards)]
BeirSets = Annotated[
    tuple[Path | str, ...] | None,
    BeforeValidator(_beir_sets, json_schema_input_type=str | list[str] | None),
]
Band = Annotated[
    tuple[float, float] | Literal["auto"],
    BeforeValidator(_band, json_schema_input_type=str | list[float]),
]
Weights = Annotated[
    tuple[float, ...], BeforeValidator(_weights, json_schema_input_type=str | list[float])
]
QueryKinds = Annotated[
    tuple[str, ...], BeforeValidator(_query_kinds, json_schema_input_type=str | list[str])
]
Names = Annotated[tuple[str, ...], BeforeValidator(_names, json_schema_input_type=str | list[str])]
JsonObject = Annotated[
    dict[str, Any],
    BeforeValidator(_json_object, json_schema_input_type=str | dict[str, Any]),
]
Mix = Annotated[
    tuple[tuple[str, float], ...],
    BeforeValidator(_mix, json_schema_input_type=str | dict[str, float]),
]
Memory = Annotated[int | None, BeforeValidator(_memory, json_schema_input_type=int | str | None)]
