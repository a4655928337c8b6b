"""A person's marks, "this passage answers this query", in the run's own format of queries."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ...files import atomic
from ..corpus.jsonl import read_jsonl, text_field

JUDGED = "judged.jsonl"
"""File in the run folder: {"text", "doc_id"} a line, as ``--queries`` reads."""


class Judged:
    """The marks of a run. Every change is on the disk before it counts, and keeps those that
    another process has made."""

    def __init__(self, path: Path) -> None:
        """Reads the marks that are there.

        Raises:
            RefineFastError: for a malformed line.
        """
        self._path = path
        self._lock = Lock()
        self._marks = self._read()

    def _read(self) -> dict[tuple[str, str], None]:
        marks: dict[tuple[str, str], None] = {}
        for number, row in read_jsonl(self._path) if self._path.exists() else ():
            place = f"{self._path}:{number}"
            text, doc_id = (text_field(row, (name,), place) for name in ("text", "doc_id"))
            marks[text, doc_id] = None
        return marks

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread and no other process changes the file meanwhile."""
        with self._lock, open(self._path.with_name(f".{self._path.name}.lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def __len__(self) -> int:
        return len(self._marks)

    @property
    def marks(self) -> list[tuple[str, str]]:
        """Every (query, id of a passage that answers it), in the order of marking."""
        return list(self._marks)

    def of(self, query: str) -> list[str]:
        """The passages that are marked for a query."""
        return [doc_id for text, doc_id in self._marks if text == query]

    def mark(self, query: str, doc_id: str, *, answers: bool = True) -> int:
        """Adds a mark, or takes it back; returns how many there are.

        Raises:
            RefineFastError: for a malformed line.
        """
        with self._alone():
            marks = self._read()
            if answers:
                marks[query, doc_id] = None
            else:
                marks.pop((query, doc_id), None)
            lines = [
                json.dumps({"text": text, "doc_id": doc}, ensure_ascii=False) for text, doc in marks
            ]
            with atomic(self._path) as temporary:
                text = "".join(f"{line}\n" for line in lines)
                temporary.write_text(text, encoding="utf-8", errors="replace")
            self._marks = marks
            return len(marks)
