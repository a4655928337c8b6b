"""Python's own documentation: the default corpus, which every machine with Python has."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...errors import RefineFastError

# Folders without anything that a reader of the library reference would look up.
_LEFT_OUT = {
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "turtledemo",
    "__phello__",
}


# Shorter docstrings name a thing but say nothing that a question could be about. With the topics,
# this leaves 1,500 to 2,000 chunks.
_MIN_WORDS = 50


_Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Entry(NamedTuple):
    """One topic or docstring; the fields are those of ``documents.Document``."""

    name: str
    title: str
    text: str
    source: str


def python_docs() -> Iterator[Entry]:
    """The topics of pydoc (the language reference), then the docstrings of the standard library's
    public modules, classes and functions.

    The library is parsed, never imported: no code runs, and the same Python gives the same entries
    in the same order.

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
    for name, text in sorted(topics.items()):
        title = text.lstrip().partition("\n")[0].replace('"', "") or name
        yield Entry(f"topic:{name}", title, text, f"pydoc_data/topics.py[{name}]")

    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT & set(parts) or any(
            part.startswith("_") for part in parts if part != "__init__"
        ):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # a distribution's own addition; the standard library itself parses
        module = ".".join(part for part in parts if part != "__init__")
        for name, node in _public(module, tree):
            text = ast.get_docstring(node) or ""
            if len(text.split()) >= _MIN_WORDS:
                line = getattr(node, "lineno", 1)
                yield Entry(name, name, text, f"{path.relative_to(root).as_posix()}:{line}")


def _public(name: str, node: _Node) -> Iterator[tuple[str, _Node]]:
    yield name, node
    for child in node.body:
        if isinstance(
            child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and not child.name.startswith("_"):
            yield from _public(f"{name}.{child.name}", child)
