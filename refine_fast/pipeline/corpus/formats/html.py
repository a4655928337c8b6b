"""HTML: the visible text, with headings as Markdown's."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from .content import Content, Unreadable, title_of_name
from .markdown import markdown_headings, split_front_matter

_HEADINGS = tuple(f"h{level}" for level in range(1, 7))
_VOID: frozenset[str] = frozenset().union(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source"),
    ("track", "wbr"),
)
_CONTROLS = frozenset(("button", "datalist", "select", "textarea"))
_HIDDEN = _CONTROLS.union(
    ("annotation", "canvas", "iframe", "nav", "noscript", "rp", "rt", "script", "style", "svg"),
    ("template", "title"),
)
_BLOCKS: frozenset[str] = frozenset().union(
    ("address", "article", "aside", "blockquote", "caption", "center", "dd", "details", "dialog"),
    ("div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "header", "hgroup"),
    ("hr", "label", "legend", "li", "main", "menu", "nav", "ol", "p", "search", "section"),
    ("summary", "table", "ul"),
)
# Blocks are apart by a blank line, as Markdown's paragraphs. <pre> is fenced, or its comments
# would be headings: # in a shell, in Python. A definition follows its term on the next line.
_BREAKS = dict.fromkeys(_BLOCKS, "\n\n") | {"br": "\n", "tr": "\n"}
_STARTS = (
    _BREAKS
    | {tag: f"\n\n{'#' * level} " for level, tag in enumerate(_HEADINGS, 1)}
    | {"pre": "\n\n```\n", "dd": "\n"}
)
_ENDS = (
    _BREAKS
    | dict.fromkeys(_HEADINGS, "\n\n")
    | dict.fromkeys(("td", "th", *_CONTROLS), " ")
    | {"pre": "\n```\n\n", "dt": "", "dd": "\n"}
)
# Tag -> the open elements that its start ends, for their end tags may be left out.
_ENDED_BY = dict.fromkeys((*_BLOCKS, *_HEADINGS, "pre"), frozenset({"p"})) | {
    "a": frozenset({"a"}),
    "dd": frozenset({"p", "dt", "dd"}),
    "dt": frozenset({"p", "dt", "dd"}),
    "li": frozenset({"p", "li"}),
    "td": frozenset({"p", "td", "th"}),
    "th": frozenset({"p", "td", "th"}),
    "tr": frozenset({"p", "td", "th", "tr"}),
}
_INVISIBLE = re.compile(r"(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)
_MAX_PERMALINK_PARTS = 8


def read_html(path: Path, text: str) -> Content:
    """The visible text, headings as Markdown's, blocks apart by a blank line, so that it is split
    as Markdown is."""
    title, text = split_front_matter(text)  # of a page that a site generator has yet to fill
    parser = _VisibleText()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError as error:  # what html.parser makes of some broken declarations
        raise Unreadable(f"it is not HTML ({error})") from None
    text = "".join(parser.parts).replace("\u00ad", "")
    # Not from within a run of blanks: every such try would read the rest of the run.
    text = re.sub(r"(?<![ \t])[ \t]*\n(?:[ \t]*\n)+ ?", "\n\n", text).strip()
    title = title or " ".join(parser.title.split())
    headings = (heading for _, heading in markdown_headings(text))
    return Content(title or next(headings, title_of_name(path)), text, "markdown")


class _Element(NamedTuple):
    tag: str
    start: int
    """Number of parts before the element."""
    hidden: bool
    permalink: bool


class _VisibleText(HTMLParser):
    """One pass with a stack of open elements, without a tree.

    The time is linear in pages that nest or repeat tags by the thousand. A hidden element hides its
    content when its end tag arrives: one that is never closed hides nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.title = ""
        self._open: list[_Element] = []
        self._inside: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        while self._open and self._open[-1].tag in _ENDED_BY.get(tag, ()):
            self._end(ended=True)
        given = dict(attrs)
        hidden = (
            tag in _HIDDEN
            or "hidden" in given
            or (tag == "dialog" and "open" not in given)
            or (tag != "body" and _INVISIBLE.search(given.get("style") or "") is not None)
        )
        if tag in _CONTROLS and self._in_heading():
            hidden = False  # a heading that unfolds its section
        if tag not in _VOID:
            permalink = tag == "a" and "#" in (given.get("href") or "")
            self._open.append(_Element(tag, len(self.parts), hidden, permalink))
            self._inside[tag] += 1
        if tag == "dd" and self.parts:
            self.parts[-1] = self.parts[-1].rstrip(" ")
        self._break(_STARTS.get(tag, ""), tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)  # HTML knows no self-closing tags, except in SVG
        if self._inside["svg"] and tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._inside[tag]:
            if tag != "pre":  # it would open a fence
                self._break(_ENDS.get(tag, ""), tag)
            return
        while self._open[-1].tag != tag:
            self._end(ended=False)
        self._end(ended=True)

    def handle_data(self, data: str) -> None:
        if self._inside["pre"]:
            self.parts.append(data)
            return
        text = re.sub(r"\s+", " ", data)
        self.parts.append(text.lstrip() if self._at_blank() else text)

    def close(self) -> None:
        super().close()
        while self._open:
            self._end(ended=False)

    def _end(self, *, ended: bool) -> None:
        """Ends the innermost element; ``ended``: by its end tag or one that replaces it."""
        element = self._open.pop()
        tag = element.tag
        self._inside[tag] -= 1
        if ended and element.hidden:
            if tag == "title" and not self._inside["svg"]:
                self.title = self.title or "".join(self.parts[element.start :])
            del self.parts[element.start :]
        elif ended and element.permalink and self._is_sign(element.start):
            del self.parts[element.start :]
        self._break(_ENDS.get(tag, ""), tag)

    def _is_sign(self, start: int) -> bool:
        """Whether the parts from ``start`` are a sign such as ¶ or #, without a word."""
        parts = self.parts[start : start + _MAX_PERMALINK_PARTS + 1]
        return len(parts) <= _MAX_PERMALINK_PARTS and not re.search(r"\w", "".join(parts))

    def _in_heading(self) -> bool:
        return any(self._inside[tag] for tag in (*_HEADINGS, "summary"))

    def _break(self, text: str, tag: str) -> None:
        """Appends the break of a tag: a blank in a heading, a line end in preformatted text."""
        if tag not in _HEADINGS and any(self._inside[heading] for heading in _HEADINGS):
            text = " " if text else ""
        elif tag != "pre" and self._inside["pre"]:
            text = text and "\n"
        if text and (text != " " or not self._at_blank()):
            self.parts.append(text)

    def _at_blank(self) -> bool:
        return bool(self.parts) and self.parts[-1].endswith((" ", "\n"))
