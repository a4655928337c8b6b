"""Python's language reference: the default corpus, which every machine with Python has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...errors import RefineFastError

_HEADING = 6  # words that a topic of its own may begin with, and a part of another may not


class Entry(NamedTuple):
    """One topic; the fields are those of ``documents.Document``."""

    name: str
    title: str
    text: str
    source: str


def python_docs() -> Iterator[Entry]:
    """The topics that ``help()`` shows, which are the language reference.

    A topic that is a part of another one is left out: "if" is in "compound".

    Raises:
        RefineFastError: if pydoc's topics are not installed.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RefineFastError(
            "this Python lacks pydoc's topics; install the full standard library, or give a folder "
            "of documents."
        ) from None
    texts = {name: " ".join(text.split()[_HEADING:]) for name, text in topics.items()}
    for name, text in sorted(topics.items()):
        if any(texts[name] in other for key, other in texts.items() if key != name):
            continue
        title = text.lstrip().partition("\n")[0].replace('"', "") or name
        yield Entry(f"topic:{name}", title, text, f"pydoc_data/topics.py[{name}]")
