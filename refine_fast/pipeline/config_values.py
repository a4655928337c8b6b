"""Parsers of option values: each takes a flag or a YAML value and raises ValueError with a reason and a remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .corpus.beir import is_beir
from .encoder.load import DEFAULT_ENCODER

Parse = Callable[[Any], Any]


def integer(low: int, high: int = 2**63 - 1) -> Parse:
    def parse(value: Any) -> int:
        try:
            number = int(str(value))
        except ValueError:
            raise ValueError(f"is no whole number; give one of at least {low}") from None
        if number < low:
            raise ValueError(f"is below {low}; give a whole number of at least {low}")
        if number > high:
            raise ValueError(f"is above {high}; give a whole number of at most {high}")
        return number

    return parse


def real(low: float, high: float = math.inf, *, low_included: bool = True) -> Parse:
    bounds = f"{'at least' if low_included else 'above'} {low:g}" + (
        "" if math.isinf(high) else f" and at most {high:g}"
    )

    def parse(value: Any) -> float:
        try:
            number = float(str(value))
        except ValueError:
            raise ValueError(f"is no number; give one {bounds}") from None
        if not (low < number <= high or (low_included and number == low)) or math.isinf(number):
            raise ValueError(f"is out of range; give a number {bounds}")
        return number

    return parse


def choice(*names: str) -> Parse:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"is unknown; choose one of {', '.join(names)}")
        return str(value)

    return parse


def either(word: str | None, parse: Parse) -> Parse:
    """``word`` itself (None: nothing given), or what ``parse`` makes of the value."""

    def either(value: Any) -> Any:
        if value == word:
            return word
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(
                f"{error}, or {word}" if word and word not in str(error) else str(error)
            ) from None

    return either


def path(value: Any) -> Path:
    if not str(value).strip():
        raise ValueError("is empty; give a path")  # it would be the folder where one stands
    return Path(str(value)).expanduser().resolve()


def existing_path(value: Any) -> Path:
    found = path(value)
    if not found.exists():
        raise ValueError("does not exist; give the path of an existing file or folder")
    return found


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("is no text; give a name")
    return value


def encoder(value: Any) -> str:
    """A folder's whole path, so that the run can go on from elsewhere; else a name."""
    name = text(value)
    return str(path(name)) if name != DEFAULT_ENCODER and Path(name).expanduser().exists() else name


def beir_folder(value: Any) -> Path:
    folder = existing_path(value)
    if not is_beir(folder):
        raise ValueError(
            "is no BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv, gzipped or not); give one with a test split"
        )
    return folder


def beir_folders(value: Any) -> tuple[Path, ...]:
    if value in ("none", ["none"]):
        return ()
    folders = tuple(
        dict.fromkeys(
            beir_folder(item) for item in ([value] if isinstance(value, str | Path) else value)
        )
    )
    if len({folder.name for folder in folders}) < len(folders):
        raise ValueError("names two folders alike, and a set goes by its folder's name; rename one")
    return folders


def band(value: Any) -> tuple[float, float]:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(
            "is no band; give two cosine similarities such as 0.5,0.7, or auto"
        ) from None
    if not -1 <= low < high <= 1:
        raise ValueError(
            "is no band; its two cosine similarities must satisfy -1 <= low < high <= 1, such as 0.5,0.7"
        )
    return low, high


def weights(value: Any) -> tuple[float, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        weights = {float(part) for part in parts}
    except (TypeError, ValueError):
        raise ValueError("is no list of weights; give some such as 0,0.35,1") from None
    if not all(0 <= weight <= 1 for weight in weights):
        raise ValueError("has a weight out of range; each must be at least 0 and at most 1")
    return tuple(sorted(weights | {0.0, 1.0}))  # the base and the fine-tuned model always


def names(value: Any) -> tuple[str, ...]:
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return tuple(name for part in parts if (name := str(part).strip()))


def mix(value: Any) -> tuple[tuple[str, float], ...]:
    parts = [item.split("=") for item in value.split(",")] if isinstance(value, str) else value
    try:
        return tuple((str(kind).strip(), float(share)) for kind, share in dict(parts).items())
    except (TypeError, ValueError):
        raise ValueError(
            "is no mix; give kinds and shares such as question=0.6,claim=0.4"
        ) from None


def yes_or_no(value: Any) -> bool:
    if str(value).lower() not in ("yes", "no", "true", "false"):
        raise ValueError("is neither yes nor no; choose one")
    return str(value).lower() in ("yes", "true")


def memory_size(value: Any) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)I?B?", str(value).strip().upper())
    try:
        size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError("is no amount of memory; give one such as 8GB or 512MB")
    return size
