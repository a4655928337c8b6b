"""Markdown: headings, and the front matter of site generators and note takers."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..text import whole_characters
from .content import Content, title_of_name

_FRONT_MATTER = re.compile(
    r"\s*?(?:---[ \t]*\r?\n(?P<yaml>.*?)^(?:---|\.\.\.)|\+\+\+[ \t]*\r?\n(?P<toml>.*?)^\+\+\+)"
    r"[ \t]*(?:\r?\n|\Z)\s*",
    re.DOTALL | re.MULTILINE,
)
_KEY_LINE = re.compile(r"[\w.-]+[ \t]*:(?:[ \t].*)?|[ \t]+.*|[ \t]*#.*|[ \t]*-(?:[ \t].*)?|[ \t]*")
_TITLE_LINE = re.compile(r"^title[ \t]*:(.*)", re.MULTILINE | re.IGNORECASE)
# What site generators append to a heading: {#anchor .class}, and a link to the heading itself.
_HEADING_TAIL = re.compile(r"(?:\s*\{[#.:][^{}]*\}|\s*\[[^\w\[\]]*\]\(#[^()]*\))+$")


def read_markdown(path: Path, text: str) -> Content:
    """The title is the front matter's, else the first heading, else the file's name."""
    title, text = split_front_matter(text)
    title = title or next((title for _, title in markdown_headings(text)), title_of_name(path))
    return Content(title, text, "markdown")


def split_front_matter(text: str) -> tuple[str, str]:
    """The title in the front matter, "" if there is none, and the text after it.

    Front matter is YAML between two lines ``---``, or TOML between two lines ``+++``, at the top of
    the file. A block that is not a mapping stays in the text.
    """
    match = _FRONT_MATTER.match(text)
    if match is None:
        return "", text
    fields = _toml(match["toml"]) if match["yaml"] is None else _yaml(match["yaml"])
    if fields is None:
        return "", text
    titles = [value for key, value in fields.items() if str(key).lower() == "title"]
    # Only a scalar: the text of a list of aliases may have any length.
    title = titles[0] if titles and isinstance(titles[0], str | int | float | date) else ""
    # YAML may write an emoji as the two escapes of its surrogate pair.
    return " ".join(whole_characters(str(title)).split()), text[match.end() :]


def _toml(block: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(block)
    except tomllib.TOMLDecodeError:
        return None


def _yaml(block: str) -> dict[Any, Any] | None:
    import yaml

    try:
        fields = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError):
        # Hand-written blocks are often not quite YAML, as in "title: Pumps: a primer".
        if not all(_KEY_LINE.fullmatch(line) for line in block.splitlines()):
            return None
        title = _TITLE_LINE.search(block)
        return {} if title is None else {"title": title[1].strip().strip("\"'")}
    if fields is None and not block.strip():
        return None  # two rules, one below the other
    return fields if isinstance(fields, dict) else {} if fields is None else None


def markdown_headings(text: str) -> list[tuple[int, str]]:
    """(character offset, title) of the headings of a Markdown text, top level only.

    A heading inside a code block, quote or list does not count.
    """
    from markdown_it import MarkdownIt

    starts = [0, *(match.end() for match in re.finditer(r"\r\n|\n|\r", text))]
    tokens = MarkdownIt("commonmark").parse(text)
    headings = []
    for token, inline in pairwise(tokens):
        if token.type == "heading_open" and token.level == 0 and token.map:
            title = _HEADING_TAIL.sub("", " ".join(inline.content.split()))
            if title:
                headings.append((starts[token.map[0]], title))
    return headings
