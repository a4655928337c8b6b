"""A person's marks, "this passage answers this query", in the run's own format of queries."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ...errors import RefineFastError
from ...files import atomic, fsync
from ..corpus.jsonl import read_jsonl, text_field
from ..corpus.text import whole_characters

JUDGED = "judged.jsonl"
"""File in the run folder: {"text", "doc_id"} a line, as ``--queries`` reads, and a digest of the
passage's text, since another cut or an edit gives the id to another passage."""

DIGEST = "passage_sha256"
"""Field of the digest. Marks of earlier versions have none and count for any passage of the id."""

Texts = Callable[[Collection[str]], Mapping[str, str]]
"""Of ids of passages the texts; those of other passages may be there too."""


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

    def _read(self) -> dict[tuple[str, str], str]:
        marks: dict[tuple[str, str], str] = {}
        for number, row in read_jsonl(self._path) if self._path.exists() else ():
            place = f"{self._path}:{number}"
            text, doc_id = (text_field(row, (name,), place) for name in ("text", "doc_id"))
            marks[text, doc_id] = text_field(row, (DIGEST,), place, default="")
        return marks

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread and no other process changes the file meanwhile; says so if it cannot be
        changed."""
        lock = self._path.with_name(f".{self._path.name}.lock")
        try:
            with self._lock, lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise RefineFastError(
                f"{self._path} cannot be written ({error.strerror or error}); fix this and mark "
                "again."
            ) from None

    def __len__(self) -> int:
        return len(self._marks)

    @property
    def marks(self) -> list[tuple[str, str]]:
        """Every (query, id of a passage that answers it), in the order of marking."""
        return list(self._marks)

    def matching(self, texts: Texts) -> tuple[list[tuple[str, str]], int]:
        """The marks of passages that are still those that were marked, and how many are not."""
        found = texts({doc_id for _, doc_id in self._marks})
        kept = [
            mark
            for mark, digest in self._marks.items()
            if not digest or digest == _digest(found.get(mark[1]))
        ]
        return kept, len(self._marks) - len(kept)

    def of(self, query: str, texts: Mapping[str, str]) -> list[str]:
        """Which of the passages in ``texts`` (id -> text) are marked for a query."""
        return [
            doc_id
            for (text, doc_id), digest in self._marks.items()
            if text == query and doc_id in texts and digest in ("", _digest(texts[doc_id]))
        ]

    def mark(
        self, query: str, doc_id: str, passage: str | None = None, *, answers: bool = True
    ) -> int:
        """Adds a mark, or takes it back; returns how many there are.

        Args:
            query: its text.
            doc_id: id of the passage.
            passage: its text; None: not known.
            answers: whether the passage answers the query.

        Raises:
            RefineFastError: for a malformed line, or if the file cannot be written.
        """
        with self._alone():
            marks = self._read()
            if answers:
                marks[query, doc_id] = _digest(passage)
            else:
                marks.pop((query, doc_id), None)
            rows = (
                {"text": text, "doc_id": doc} | ({DIGEST: digest} if digest else {})
                for (text, doc), digest in marks.items()
            )
            with atomic(self._path) as temporary:
                text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
                temporary.write_text(whole_characters(text), encoding="utf-8")
            fsync(self._path.parent)  # the name of a new file too
            self._marks = marks
            return len(marks)


def _digest(passage: str | None) -> str:
    """Of a passage's text; empty without one."""
    if passage is None:
        return ""
    return hashlib.sha256(whole_characters(passage).encode()).hexdigest()
