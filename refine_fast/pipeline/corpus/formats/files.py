"""One file in, its title and its text out, by its suffix."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path

from .content import Content, Unreadable, title_of_name
from .encoding import decode
from .html import read_html
from .markdown import read_markdown
from .office import read_docx, read_pptx
from .pdf import read_pdf

MAX_FILE_BYTES = 64 << 20

_BINARY: dict[str, Callable[[Path, bytes], Content]] = {
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".pptx": read_pptx,
}


def _read_plain(path: Path, text: str) -> Content:
    return Content(title_of_name(path), text, "text")


_TEXT: dict[str, Callable[[Path, str], Content]] = {
    ".txt": _read_plain,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
}

SUFFIXES = (*_TEXT, *_BINARY)
"""Suffixes of the files that are one document each."""

EXTRACTED = (".html", ".htm", *_BINARY)
"""Those whose text takes longer to find than to read."""


def read_file(path: Path, encoding: str | None = None) -> Content:
    """The text of one file. See ``read_bytes`` and ``parse``."""
    return parse(path, read_bytes(path), encoding)


def parse(path: Path, data: bytes, encoding: str | None = None) -> Content:
    """The text of one file by its suffix, one of SUFFIXES.

    Args:
        path: the file.
        data: its content.
        encoding: of a text file; None: find it.

    Raises:
        Unreadable: if the file holds no text that can be read.
    """
    suffix = path.suffix.lower()
    if suffix in _BINARY:
        content = _BINARY[suffix](path, data)
    else:
        declares = suffix in (".html", ".htm")
        content = _TEXT[suffix](path, decode(path, data, encoding, declares=declares))
    if not re.search(r"\w", content.text):
        raise Unreadable("it holds no text")
    return content


def read_bytes(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        Unreadable: if it is not such a file, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("it is not a regular file")  # opening a pipe would wait for ever
        if status.st_size > most:
            raise Unreadable(
                f"{status.st_size >> 20} MiB is more than {most >> 20} MiB; "
                "split it, or give it as JSONL"
            )
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{error.strerror or error}; check the path and its permissions") from None
