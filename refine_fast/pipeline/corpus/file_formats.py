"""One file of text in, its title and its decoded text out: plain text, Markdown, HTML and PDF."""

from __future__ import annotations

import codecs
import logging
import re
import stat
import warnings
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from ...errors import RefineFastWarning
from ...files import name_of

MAX_FILE_BYTES = 64 << 20


Markup = Literal["text", "markdown", "passage"]


class Content(NamedTuple):
    title: str
    text: str
    markup: Markup


class Unreadable(Exception):
    """Why a file is skipped, as the end of the sentence "<file> is skipped: ..."."""


def read_file(path: Path) -> Content:
    """The text of one file by its suffix (SUFFIXES). Raises Unreadable where nothing can be had from it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("it is no regular file")  # opening a pipe would wait for ever
        if status.st_size > MAX_FILE_BYTES:
            raise Unreadable(
                f"{status.st_size >> 20} MiB is more than {MAX_FILE_BYTES >> 20} MiB; cut it in parts or give it as JSONL"
            )
        content = SUFFIXES[path.suffix.lower()](path, path.read_bytes())
    except OSError as error:
        raise Unreadable(f"{error.strerror or error}; check the path and its permissions") from None
    if not re.search(r"\w", content.text):
        raise Unreadable("it holds no text")
    return content


def decode(path: Path, data: bytes, *, is_html: bool = False) -> str:
    """The characters of a text file: UTF-8, what its byte order mark or its HTML declares, or else windows-1252 with a RefineFastWarning.

    Line ends stay as they are. Detection by statistics was tried and left out: it reads French windows-1252 as windows-1250 and says
    nothing.
    """
    encoding = (
        "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    )
    try:
        text, assumed = data.decode(encoding), False
    except UnicodeDecodeError:
        declared = (
            re.search(rb"""<meta[^>]+charset=["']?([\w-]+)""", data[:4096], re.IGNORECASE)
            if is_html
            else None
        )
        try:
            text, assumed = data.decode(declared[1].decode() if declared else "", "replace"), False
        except (
            LookupError,
            UnicodeError,
        ):  # UnicodeError: charset=undefined, which a broken template writes, is a codec of Python's
            text, assumed = data.decode("windows-1252", "replace"), True
    # A binary file decodes to control characters under one encoding or another; text has next to none.
    if len(re.findall("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufffd]", text)) * 100 > len(
        text
    ):
        raise Unreadable("it is binary, not text")
    if assumed:
        message = f"{path} is not UTF-8 and is read as windows-1252; if that is wrong, convert it with `iconv -t UTF-8`."
        warnings.warn(message, RefineFastWarning, stacklevel=2)
    return text


def _plain(path: Path, data: bytes) -> Content:
    return Content(_name(path), decode(path, data), "text")


def _markdown(path: Path, data: bytes) -> Content:
    text = decode(path, data)
    return Content(
        next((title for _, title in markdown_headings(text)), _name(path)), text, "markdown"
    )


def _html(path: Path, data: bytes) -> Content:
    """The visible text, headings as Markdown's, blocks apart by a blank line, so that it is split as Markdown is."""
    parser = _VisibleText()
    try:
        parser.feed(decode(path, data, is_html=True))
        parser.close()
    except AssertionError as error:  # what html.parser makes of some broken declarations
        raise Unreadable(f"it is no HTML ({error})") from None
    text = re.sub(r"[ \t]*\n(?:[ \t]*\n)+ ?", "\n\n", "".join(parser.parts)).strip()
    title = " ".join(parser.title.split())
    return Content(
        title or next((title for _, title in markdown_headings(text)), _name(path)),
        text,
        "markdown",
    )


class _VisibleText(HTMLParser):
    """One pass without a tree: the time stays linear in pages that nest or repeat tags by the thousand."""

    _HIDDEN = ("nav", "noscript", "script", "style", "svg", "template")
    _BLOCKS = (
        "article",
        "blockquote",
        "dd",
        "div",
        "dl",
        "dt",
        "li",
        "main",
        "ol",
        "p",
        "section",
        "table",
        "ul",
    )
    _BREAKS: ClassVar = {"br": "\n", "tr": "\n"} | dict.fromkeys(_BLOCKS, "\n\n")
    # <pre> is fenced, or its comments would be headings: # in a shell, in Python
    _STARTS: ClassVar = (
        _BREAKS
        | {f"h{level}": f"\n\n{'#' * level} " for level in range(1, 7)}
        | {"pre": "\n\n```\n"}
    )
    _ENDS: ClassVar = (
        _BREAKS
        | {f"h{level}": "\n\n" for level in range(1, 7)}
        | {"td": " ", "th": " ", "pre": "\n```\n\n"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.title = ""
        self._inside: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside[tag] += 1
        if not self._hidden():
            self.parts.append(self._STARTS.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if not self._hidden() and (
            tag != "pre" or self._inside["pre"]
        ):  # a stray end would open a fence
            self.parts.append(self._ENDS.get(tag, ""))
        self._inside[tag] = max(0, self._inside[tag] - 1)

    def handle_data(self, data: str) -> None:
        if self._hidden():
            return
        if self._inside["title"]:
            self.title += data
        elif self._inside["pre"]:
            self.parts.append(data)
        else:
            text = re.sub(r"\s+", " ", data)
            self.parts.append(
                text.lstrip() if self.parts and self.parts[-1].endswith((" ", "\n")) else text
            )

    def _hidden(self) -> bool:
        return any(self._inside[tag] for tag in self._HIDDEN)


def _pdf(path: Path, data: bytes) -> Content:
    try:
        import pypdf
    except ImportError:
        raise Unreadable("reading PDF needs `pip install refine-fast[pdf]`") from None
    import io

    logging.getLogger("pypdf").setLevel(
        logging.CRITICAL
    )  # what it mends in silence is no news, and what it cannot read it raises
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        text = "\n\n".join(page.extract_text() for page in reader.pages)
        title = (reader.metadata.title if reader.metadata else None) or _name(path)
        title, text = (
            part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for part in (title, text)
        )
    except Exception as error:  # pypdf meets a broken file with whatever its parser stumbles over: KeyError, RecursionError, ...
        raise Unreadable(
            f"it is no PDF that pypdf can read ({type(error).__name__}: {error})"
        ) from None
    return Content(title, text, "text")


SUFFIXES = {
    ".txt": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
}


def _name(path: Path) -> str:
    return re.sub(r"[-_]+", " ", name_of(path.stem)).strip()


def markdown_headings(text: str) -> list[tuple[int, str]]:
    """(character offset, title) of the headings of a Markdown text, top level only (none inside a code block, quote or list)."""
    from markdown_it import MarkdownIt

    starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]
    tokens = MarkdownIt("commonmark").parse(text)
    return [
        (starts[token.map[0]], " ".join(inline.content.split()))
        for token, inline in pairwise(tokens)
        if token.type == "heading_open"
        and token.level == 0
        and token.map
        and inline.content.strip()
    ]
