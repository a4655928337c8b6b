"""What is evaluated: passages, queries and which passages answer each; read from a BEIR folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import RefineFastError
from .jsonl import read_jsonl, text_field
from .text import passage_text


def is_beir(path: Path, split: str = "test") -> bool:
    """Whether ``path`` is a retrieval set in BEIR layout that has this split."""
    return (path / "qrels" / f"{split}.tsv").is_file() and any(
        (path / f"corpus.jsonl{gz}").is_file() for gz in ("", ".gz")
    )


@dataclass(frozen=True)
class RetrievalSet:
    name: str
    doc_ids: list[str]
    docs: list[str]
    query_ids: list[str]
    queries: list[str]
    relevant: list[set[int]]
    """Per query the rows of ``docs`` that answer it; never empty."""

    def sample(self, *, queries: int, docs: int, seed: int) -> RetrievalSet:
        """A smaller set for a quick look: random ``queries``, all that answers them, and random passages up to ``docs`` in all. Easier than
        the whole, so compare only figures from the same sample."""
        rng = np.random.default_rng(seed)
        kept = sorted(rng.permutation(len(self.queries))[:queries].tolist())
        needed = set().union(*(self.relevant[i] for i in kept))
        filler = [row for row in rng.permutation(len(self.docs)).tolist() if row not in needed]
        rows = sorted(needed | set(filler[: max(0, docs - len(needed))]))
        new_row = {row: i for i, row in enumerate(rows)}
        return RetrievalSet(
            self.name,
            [self.doc_ids[row] for row in rows],
            [self.docs[row] for row in rows],
            [self.query_ids[i] for i in kept],
            [self.queries[i] for i in kept],
            [{new_row[row] for row in self.relevant[i]} for i in kept],
        )


def load_beir(folder: Path, split: str = "test") -> RetrievalSet:
    """``corpus.jsonl[.gz]`` {"_id", "title", "text"}, ``queries.jsonl[.gz]`` {"_id", "text"}, ``qrels/<split>.tsv`` (query-id, corpus-id,
    score; above 0 is relevant). All passages, and the queries that have a relevant passage in the split, in the order of the qrels."""
    if not folder.is_dir():
        raise RefineFastError(
            f"{folder} is not a folder; give one in BEIR layout (corpus.jsonl, queries.jsonl, qrels/{split}.tsv)."
        )
    path = folder / "qrels" / f"{split}.tsv"
    corpus, queries = _texts(folder, "corpus"), _texts(folder, "queries")
    row_of = {key: row for row, key in enumerate(corpus)}
    relevant: dict[str, set[int]] = {}
    for query, passage, place in _judgements(path):
        for kind, key, known in (("query", query, queries), ("passage", passage, corpus)):
            if key not in known:
                raise RefineFastError(
                    f"{place}: the {kind} id {key!r} is not in {folder}; add it there or remove the line."
                )
        relevant.setdefault(query, set()).add(row_of[passage])
    if not relevant:
        raise RefineFastError(
            f"{path} names no relevant passage: every score is 0 or the file is empty; choose another split."
        )
    asked = [queries[key] for key in relevant]
    return RetrievalSet(
        folder.resolve().name,
        list(corpus),
        list(corpus.values()),
        list(relevant),
        asked,
        list(relevant.values()),
    )


def _texts(folder: Path, stem: str) -> dict[str, str]:
    """_id -> passage or query of ``stem``.jsonl[.gz]."""
    path = next(
        (p for p in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if p.is_file()), None
    )
    if path is None:
        raise RefineFastError(
            f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz; give a folder in BEIR layout."
        )
    texts: dict[str, str] = {}
    for number, row in read_jsonl(path):
        place = f"{path}:{number}"
        key = text_field(row, ("_id",), place)
        if key in texts:
            raise RefineFastError(
                f"{place}: the _id {key!r} stands on an earlier line too; make the ids unique."
            )
        texts[key] = passage_text(
            text_field(row, ("title",), place, default=""), text_field(row, ("text",), place)
        )
    return texts


def _judgements(path: Path) -> Iterator[tuple[str, str, str]]:
    """(query id, passage id, where it stands) of the judgements above 0."""
    if not path.is_file():
        splits = sorted(p.stem for p in path.parent.glob("*.tsv"))
        raise RefineFastError(
            f"{path} does not exist; the splits of this set are: {', '.join(splits) or 'none'}."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefineFastError(
            f"{path} cannot be read as UTF-8 ({error}); fetch the set again."
        ) from None
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if not line.strip() or (number == 1 and fields[-1] == "score"):
            continue
        if len(fields) != 3 or not re.fullmatch(r"-?\d+", fields[2].strip()):
            raise RefineFastError(
                f"{path}:{number} is {line!r:.80}; it must be query-id, corpus-id and whole score, tab-separated."
            )
        if int(fields[2]) > 0:
            yield fields[0], fields[1], f"{path}:{number}"
