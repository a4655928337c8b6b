"""Reads the small files of a model, treated as untrusted input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

_DEEPEST = 100
"""Objects and lists inside each other: more than a model has, and few enough for recursion."""


class UnreadableFileError(Exception):
    """A file that exists and does not hold what its name says; the message names it and why."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice"
        )
    return keys


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _strict_integer(digits: str) -> int:
    if digits == "-0":  # a float to the reference implementation
        raise ValueError("-0 is not an integer")
    _finite(digits)
    return int(digits)


def _finite(digits: str) -> float:
    """The number in a JSON file; ValueError where a float cannot hold it."""
    if math.isinf(value := float(digits)):
        raise ValueError(f"the number {digits[:20]}... is out of range")
    return value


def parse_json(text: bytes) -> Any:
    """Parses strict JSON.

    Raises:
        ValueError: a key that occurs twice, a number out of range, NaN, an unpaired surrogate, or
            nesting that is too deep.
    """
    hooks: dict[str, Any] = {
        "parse_int": _strict_integer,
        "parse_float": _finite,
        "parse_constant": _no_constant,
    }
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, **hooks)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_bytes(path: Path) -> bytes | None:
    """The content of a file, or None if there is no such file.

    Raises:
        UnreadableFileError: a file that may not be read.
    """
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str | None:
    """The text of a file, or None if there is no such file.

    Raises:
        UnreadableFileError: a file that may not be read or is not UTF-8.
    """
    content = read_bytes(path)
    try:
        return None if content is None else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path} is not UTF-8: {error.reason}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no such file. NaN and Infinity, which Python
    writes, are read as their names.

    Raises:
        UnreadableFileError: a file that may not be read or holds anything else.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        content = json.loads(text, parse_constant=str, parse_int=_integer)
        _check_depth(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise UnreadableFileError(f"{path} is not a JSON object")
    return content


def _integer(digits: str) -> int:
    """One that a float can hold, if not exactly: numbers are compared as floats."""
    _finite(digits)
    return int(digits)


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_DEEPEST):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")
