"""Reads the small files of a model, treated as untrusted input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class UnreadableFileError(Exception):
    """A file that exists and does not hold what its name says; the message names it and why."""


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
        content = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise UnreadableFileError(f"{path} is not a JSON object")
    return content
