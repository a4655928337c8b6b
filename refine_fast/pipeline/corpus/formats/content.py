"""What is read from one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from ....files import name_of

Markup = Literal["text", "markdown", "passage"]
"""Where a text may be cut: "text" at sentences, "markdown" at headings too, "passage" nowhere."""


class Content(NamedTuple):
    """The title and the decoded text of a file."""

    title: str
    text: str
    markup: Markup


class Unreadable(Exception):
    """Why a file is skipped, as the end of the sentence "<file> is skipped: ..."."""


def missing(package: str, suffix: str, extra: str = "documents") -> Unreadable:
    """The reason if the package that reads files of this suffix is not installed."""
    return Unreadable(f"reading {suffix} needs {package}; pip install 'refine-fast[{extra}]'")


def title_of_name(path: Path) -> str:
    """A title made from the file's name."""
    return re.sub(r"[-_]+", " ", name_of(path.stem)).strip()
