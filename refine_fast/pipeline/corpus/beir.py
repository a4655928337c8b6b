"""A retrieval set: passages, queries and judgements, read from a folder in BEIR layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ...errors import RefineFastError
from ...files import name_of
from .jsonl import read_jsonl, text_field
from .qrels import read_qrels
from .text import passage_text

DEV_SPLITS = ("dev", "validation", "valid", "val", "development")
"""Names of the split that is set aside for choices; the first that a set has counts. Hugging Face's
sets have a validation."""


def dev_split(folder: Path) -> str | None:
    """The split of a folder in BEIR layout that is set aside for choices; None: there is none."""
    names = (name for name in DEV_SPLITS if (folder / "qrels" / f"{name}.tsv").is_file())
    return next(names, None)


def is_beir(path: Path, split: str = "test") -> bool:
    """Whether ``path`` is a retrieval set in BEIR layout that has this split."""
    return (path / "qrels" / f"{split}.tsv").is_file() and beir_file(path, "corpus") is not None


def beir_file(folder: Path, stem: str) -> Path | None:
    """``stem``.jsonl[.gz] in a folder, the plain one if there are both."""
    names = (folder / f"{stem}.jsonl{packed}" for packed in ("", ".gz"))
    return next((path for path in names if path.is_file()), None)


def read_by_beir(folder: Path, split: str = "test") -> Callable[[Path], bool]:
    """Which files of a folder ``load_beir`` reads."""
    texts = (beir_file(folder, stem) for stem in ("corpus", "queries"))
    read = {path.resolve() for path in (*texts, folder / "qrels" / f"{split}.tsv") if path}
    return lambda path: path.resolve() in read


@dataclass(frozen=True)
class RetrievalSet:
    """Passages, queries, and how well which passage answers which query."""

    name: str
    doc_ids: list[str]
    docs: list[str]
    query_ids: list[str]
    queries: list[str]
    qrels: list[dict[str, float]]
    """Per query: passage id -> grade, relevant if above 0. May name passages that the corpus lacks:
    they count as relevant and cannot be found."""
    titles: list[str] = field(default_factory=list)
    """Per passage: the title that ``docs`` begins with; empty: no passage has one."""

    @cached_property
    def relevant(self) -> list[set[int]]:
        """Per query: the rows of ``docs`` that answer it. Empty if no passage here does."""
        row_of = self._row_of
        return [
            {row_of[doc] for doc in _relevant_ids(judged) if doc in row_of} for judged in self.qrels
        ]

    @cached_property
    def own_rows(self) -> list[list[int]]:
        """Per query: the row of the passage with the query's own id, if any. BEIR leaves it out of
        the ranking (``ignore_identical_ids``), since in some sets a query is itself a passage."""
        row_of = self._row_of
        return [[row_of[query]] if query in row_of else [] for query in self.query_ids]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {doc: row for row, doc in enumerate(self.doc_ids)}

    def ids_at(self, rows: np.ndarray) -> list[list[str | None]]:
        """The passage ids at rows of ``docs``, of any (Q, k) array; None where a row is -1."""
        ids = np.array([*self.doc_ids, None], object)
        return ids[rows].tolist()

    def remarks(self) -> Iterator[str]:
        """What lowers every system's scores on this set, in one sentence each."""
        row_of = self._row_of
        judged = list(zip(self.query_ids, self.qrels, strict=True))
        unanswered = [query for query, grades in judged if not any(_relevant_ids(grades))]
        if unanswered:
            yield (
                f"{self.name}: {len(unanswered)} of {len(judged)} queries, such as"
                f" {unanswered[0]!r}, have no relevant passage; they score 0, as in trec_eval."
            )
        missing = [
            doc for _, grades in judged for doc in _relevant_ids(grades) if doc not in row_of
        ]
        if missing:
            yield (
                f"{self.name}: {len(missing)} relevant passages, such as {missing[0]!r}, are not in"
                " the corpus; as in BEIR, they count as not found."
            )
        own = [query for query, grades in judged if query in row_of and grades.get(query, 0) > 0]
        if own:
            yield (
                f"{self.name}: {len(own)} queries, such as {own[0]!r}, have the id of their own"
                " relevant passage. As in BEIR, a query's own document is left out of its ranking;"
                " rename these queries to rank it."
            )

    def sample(self, *, queries: int, docs: int, seed: int) -> RetrievalSet:
        """A smaller set for a quick look: easier than the whole, so compare scores only within one
        sample.

        Args:
            queries: How many queries to draw; every passage that answers them is kept.
            docs: How many passages to have in all, as far as the kept ones leave room.
            seed: Of the draw.
        """
        rng = np.random.default_rng(seed)
        kept = sorted(rng.permutation(len(self.queries))[:queries].tolist())
        needed: set[int] = set().union(*(self.relevant[i] for i in kept))
        filler = [row for row in rng.permutation(len(self.docs)).tolist() if row not in needed]
        rows = sorted(needed | set(filler[: max(0, docs - len(needed))]))
        return RetrievalSet(
            self.name,
            [self.doc_ids[row] for row in rows],
            [self.docs[row] for row in rows],
            [self.query_ids[i] for i in kept],
            [self.queries[i] for i in kept],
            [self.qrels[i] for i in kept],
            [self.titles[row] for row in rows] if self.titles else [],
        )


def _relevant_ids(judged: Mapping[str, float]) -> Iterator[str]:
    return (doc for doc, grade in judged.items() if grade > 0)


def load_beir(folder: Path, split: str = "test") -> RetrievalSet:
    """Reads a folder in BEIR layout by BEIR's rules.

    Args:
        folder: Holds ``corpus.jsonl[.gz]`` {"_id", "title", "text"}, ``queries.jsonl[.gz]``
            {"_id", "text"} and ``qrels/<split>.tsv`` (``read_qrels``).
        split: Which qrels to use.

    Returns:
        All passages, and the queries that are judged in the split, in the order of the qrels;
        queries whose grades are all 0 too.

    Raises:
        RefineFastError: A missing or malformed file, or no relevant passage in the corpus.
    """
    if not folder.is_dir():
        raise RefineFastError(
            f"{folder} is not a folder; give one in BEIR layout (corpus.jsonl, queries.jsonl,"
            f" qrels/{split}.tsv)."
        )
    path = folder / "qrels" / f"{split}.tsv"
    corpus, queries = _texts(folder, "corpus"), _texts(folder, "queries")
    qrels = read_qrels(path, queries.keys())
    relevant = {doc for judged in qrels.values() for doc in _relevant_ids(judged)}
    if not relevant:
        raise RefineFastError(
            f"{path} names no relevant passage: every score is 0 or the file is empty; choose"
            " another split."
        )
    if relevant.isdisjoint(corpus):
        raise RefineFastError(
            f"{path}: the corpus has none of the {len(relevant)} relevant passages, such as"
            f" {min(relevant)!r}; check that the qrels belong to this corpus."
        )
    return RetrievalSet(
        name_of(folder.resolve().name),
        list(corpus),
        [passage_text(title, text) for title, text in corpus.values()],
        list(qrels),
        [passage_text(*queries[key]) for key in qrels],
        list(qrels.values()),
        [title for title, _ in corpus.values()],
    )


def judged_queries(
    folder: Path, splits: Collection[str]
) -> list[tuple[str, str, dict[str, float]]]:
    """The queries in splits of a folder in BEIR layout, which may hide their grades: id, text, and
    grade by passage.

    Raises:
        RefineFastError: A missing or malformed file.
    """
    if not splits:
        return []
    queries = _texts(folder, "queries")
    judged = [read_qrels(folder / "qrels" / f"{split}.tsv", queries.keys()) for split in splits]
    return [
        (key, passage_text(*queries[key]), grades)
        for qrels in judged
        for key, grades in qrels.items()
    ]


def _texts(folder: Path, stem: str) -> dict[str, tuple[str, str]]:
    """_id -> title and text of a passage or query of ``stem``.jsonl[.gz]."""
    path = beir_file(folder, stem)
    if path is None:
        raise RefineFastError(
            f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz; give a folder in BEIR layout."
        )
    texts: dict[str, tuple[str, str]] = {}
    for number, row in read_jsonl(path):
        place = f"{path}:{number}"
        key = text_field(row, ("_id",), place)
        if key in texts:
            raise RefineFastError(f"{place}: duplicate _id {key!r}; ids must be unique.")
        title = text_field(row, ("title",), place, default="")
        texts[key] = title, text_field(row, ("text",), place)
    return texts
