"""Templates of Markdown and HTML. Every string that a template inserts is escaped, unless it is
marked as safe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def escape_markdown(text: str) -> Markup:
    """Text that Markdown reads as plain text on one line, in a table cell too.

    An underscore inside a word is never markup, so it stays as it is. ``~`` and ``$`` are GitHub's:
    struck out, and maths.
    """
    markup = r"[\\`*\[\]<>|#!&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    return Markup(re.sub(markup, r"\\\g<0>", _one_line(text)))


def code_span(text: str) -> Markup:
    """A code span that shows exactly this text (CommonMark 6.1), line breaks aside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return Markup(fence + padding + _one_line(text) + padding + fence)


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n]", " ", text)


def markdown_template(name: str, **filters: Any) -> Template:
    """The template ``name`` of the folder templates. Strings are escaped for Markdown.

    Args:
        filters: Functions that the template may use besides ``code``, ``count``, ``number`` and
            ``shorten``.
    """

    def finalize(value: Any) -> Any:
        return escape_markdown(value) if isinstance(value, str) and not _is_safe(value) else value

    environment = _environment(finalize=finalize)
    environment.filters |= {
        "code": code_span,
        "count": "{:,}".format,
        "number": "{:g}".format,
        "shorten": _shorten,
    }
    environment.filters |= filters
    return environment.get_template(name)


def _shorten(text: str, width: int) -> str:
    """At most ``width`` characters, with white space collapsed; in scripts without blanks too."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def html_template(name: str) -> Template:
    """The template ``name`` of the folder templates. Strings are escaped for HTML."""
    return _environment(autoescape=True).get_template(name)


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _is_safe(text: str) -> bool:
    return hasattr(text, "__html__")
