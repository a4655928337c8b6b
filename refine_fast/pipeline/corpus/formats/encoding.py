"""Bytes of a text file to characters."""

from __future__ import annotations

import codecs
import re
import warnings
from pathlib import Path

from ....errors import RefineFastWarning
from .content import Unreadable

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with the same bytes
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_SUPERSETS = {
    "ascii": "windows-1252",
    "iso8859-1": "windows-1252",
    "iso8859-9": "windows-1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
"""Encoding -> the one that files so labelled are written in (WHATWG, Encoding Standard)."""

_DECLARED = re.compile(
    rb"""<meta[^>]+charset=["']?([\w-]+)|<\?xml[^>]+encoding=["']([\w-]+)""", re.IGNORECASE
)
_REMEDY = "if that is wrong, name its encoding with --encoding"
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufffd]")


def decode(path: Path, data: bytes, encoding: str | None = None, *, declares: bool = False) -> str:
    """Decodes a text file. Line ends stay as they are.

    The encoding is, in this order: ``encoding``; the byte order mark's; UTF-8; the one that the
    file declares; the one that ``chardet`` detects; windows-1252. Bytes that are invalid in it
    become U+FFFD. A RefineFastWarning names every encoding that was detected or assumed, and the
    offset of the first invalid byte.

    Args:
        path: the file, for messages.
        data: its content.
        encoding: of Python's codecs; None: find it.
        declares: whether an HTML or XML declaration in the file counts.

    Raises:
        Unreadable: if the content is binary.
    """
    marked = marked_encoding(data)
    note = ""
    if encoding is not None:
        encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        text, note = _replacing(data, encoding)
    elif marked is not None:
        text, note = _replacing(data, marked)
    else:
        text, note = _unmarked(data, declares)
    # A binary file decodes to control characters under any encoding; text has next to none.
    if _is_binary(text):
        raise Unreadable(
            "it is binary, not text, or its encoding is unknown; name it with --encoding"
        )
    if note:
        warnings.warn(f"{path} {note}.", RefineFastWarning, stacklevel=2)
    return text


def marked_encoding(data: bytes) -> str | None:
    """The encoding whose byte order mark the data begins with, if any."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def _unmarked(data: bytes, declares: bool) -> tuple[str, str]:
    """The text, and what to tell the user about its encoding, if anything."""
    try:
        text = data.decode("utf-8")
        name = _detected(data) if _is_binary(text) else None
        if name is None or not name.startswith("utf-16"):
            return text, ""
    except UnicodeDecodeError as error:
        first = error.start
        text = data.decode("utf-8", "replace")
        bad = text.count("\ufffd")
        if sum(map(len, re.findall("[^\0-\x7f]", text))) - bad >= bad:
            return _replacing(data, "utf-8")
    else:
        text, _ = _replacing(data, name)
        return text, f"has no byte order mark and is read as {name}; {_REMEDY}"
    if declares and (declared := _DECLARED.search(data[:4096])):
        name = _known((declared[1] or declared[2]).decode())
        if name is not None and name != "utf-8":
            return _replacing(data, name)
    name = _detected(data)
    if name is None:
        name = "windows-1252"
    text, note = _replacing(data, name)
    byte = f"byte 0x{data[first]:02x} at offset {first}"
    assumed = f"is not UTF-8 ({byte}) and is read as {name}; {_REMEDY}"
    return text, f"{assumed}; it {note}" if note else assumed


def _is_binary(text: str) -> bool:
    return len(_CONTROL.findall(text)) > max(1, len(text) / 100)


def _replacing(data: bytes, encoding: str) -> tuple[str, str]:
    """The text, and where the first byte is that is invalid in ``encoding``, if one is."""
    try:
        return data.decode(encoding), ""
    except UnicodeDecodeError as error:
        text = data.decode(encoding, "replace")
        name = encoding.removesuffix("-sig").upper()
        return text, (
            f"holds bytes that are not {name}, the first at offset {error.start}; "
            f"{text.count(chr(0xFFFD))} of its characters are replaced by U+FFFD"
        )


def _detected(data: bytes) -> str | None:
    """By chardet, which named 22 of 22 short texts in legacy encodings right where
    charset-normalizer named 17: it read KOI8-R as Shift-JIS and French as Polish."""
    try:
        import chardet
    except ImportError:
        return None
    name = chardet.detect(data)["encoding"]
    return None if name is None else _known(name)


def _known(name: str) -> str | None:
    """The codec to read files with that are labelled ``name``; None if there is none."""
    try:
        codecs.lookup(name)
        bytes(4).decode(
            name
        )  # "undefined", which broken templates declare, is a codec that refuses
    except (LookupError, UnicodeError):
        return None
    return _SUPERSETS.get(codecs.lookup(name).name, name.lower())
