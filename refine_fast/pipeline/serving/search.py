"""Search in an index: passage vectors of base and product, BM25, and their blend, side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RefineFastError
from ...files import as_argument
from ...ops.best_of_groups import best_of_groups
from ..corpus.chunk import Chunk
from ..corpus.text import whole_characters
from . import ann
from .blend import Blend, Components, best_places, standard
from .dense import Moments, rows_of_groups
from .encoders import LABELS, Encoders
from .lexical import Lexical
from .segment import Segment
from .storage import IndexFolder, Manifest, readable

CODE = "the code"
"""Name of the code's digest in what an index is made from."""

MAX_QUERY = 10_000
"""Characters of a query. BM25 reads all of them, an encoder the first few hundred words."""


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    score: float
    chunk: Chunk
    sentence: tuple[int, int]
    """Where the sentence that matches best is in the passage's text."""

    def facts(self) -> dict[str, Any]:
        """As JSON: texts, and offsets into the document."""
        start, end = self.sentence
        return {
            "id": self.chunk.id,
            "score": round(self.score, 4),
            "title": self.chunk.title,
            "text": self.chunk.text,
            "source": self.chunk.source,
            "start": self.chunk.start,
            "end": self.chunk.end,
            "sentence": {
                "text": self.chunk.text[start:end],
                "in_text": [start, end],
                "in_source": [self.chunk.start + start, self.chunk.start + end],
            },
        }


class Index:
    """The passages of an index and their scores."""

    def __init__(self, segments: Sequence[Segment], dead: np.ndarray | None = None) -> None:
        """Takes the segments in order.

        Args:
            segments: at least one.
            dead: rows, counted over all segments, that are not found.
        """
        self.segments = segments
        self.starts = np.cumsum([0, *map(len, segments)])
        self.alive = np.ones(int(self.starts[-1]), bool)
        self._dead = np.array([], np.int64) if dead is None else dead
        self.alive[self._dead] = False
        self.lexical = Lexical([segment.postings for segment in segments], self.alive)

    @classmethod
    def open(cls, folder: IndexFolder, manifest: Manifest) -> Index:
        """The index that a manifest names.

        Raises:
            RefineFastError: if it is damaged.
        """
        dead = None
        if manifest.dead is not None:
            with readable(folder.path / manifest.dead):
                dead = np.load(folder.path / manifest.dead)
        return cls([Segment(folder.path / name) for name in manifest.segments], dead)

    @property
    def count(self) -> int:
        """Live passages."""
        return len(self.alive) - len(self._dead)

    @property
    def has_base(self) -> bool:
        """Whether the base encoder's vectors are there."""
        return "base" in self.segments[0].vectors

    def column(self, name: str) -> list[Any]:
        """One field of the chunk of every row, dead ones too."""
        return [value for segment in self.segments for value in segment.column(name)]

    def texts(self, ids: Collection[str]) -> dict[str, str]:
        """Chunk id -> text of the live passages with these ids."""
        rows = (row for row, id in enumerate(self.column("id")) if id in ids and self.alive[row])
        return {chunk.id: chunk.text for chunk in map(self.chunk, rows)}

    def chunk(self, row: int) -> Chunk:
        """The passage of a row."""
        part, place = self._place(row)
        return part.chunk(place)

    def _place(self, row: int) -> tuple[Segment, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[number], row - int(self.starts[number])

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        return {
            side: self._moments_of(side) for side in self.segments[0].vectors if side != "sentences"
        }

    def _moments_of(self, side: str) -> Moments:
        first, *rest = (segment.moments[side] for segment in self.segments)
        for moments in rest:
            first = first.plus(moments)
        if not len(self._dead):
            return first
        places = [self._place(int(row)) for row in self._dead]
        gone = np.stack([part.vectors[side][place] for part, place in places])
        return first.plus(Moments.of(gone), -1)

    def components(self, query: str, vector: np.ndarray) -> Components:
        """The standard scores of the passages that may be the best: of all where no index is
        approximate, and else of those that it or BM25 finds.

        Args:
            query: its text.
            vector: (d,) under the product.
        """
        bm25 = self.lexical.scores(query)
        rows, own, best = [], [], []
        for segment, start in zip(self.segments, self.starts, strict=False):
            places = self._candidates(segment, int(start), vector, bm25)
            rows.append(places + start)
            own.append(_products(segment.vectors["product"], places, vector))
            best.append(_best_sentences(segment, places, vector))
        mean, spread = (float(x[0]) for x in self._moments["product"].standard(vector[None]))
        chosen = np.concatenate(rows)
        return Components(
            chosen,
            (np.concatenate(own) - mean) / spread,
            (np.concatenate(best) - mean) / spread,
            standard(bm25, self.count, chosen),
            bm25[chosen] > 0,
            (mean, spread),
        )

    def _candidates(
        self, segment: Segment, start: int, vector: np.ndarray, bm25: np.ndarray
    ) -> np.ndarray:
        """Live rows of a segment that are scored exactly, ascending."""
        if not {"product", "sentences"} & segment.indexes.keys():
            return np.flatnonzero(self.alive[start : start + len(segment)])
        sentences = self._nearest(segment, start, "sentences", vector)
        found = (
            _best(bm25[start : start + len(segment)], ann.CANDIDATES),
            self._nearest(segment, start, "product", vector),
            np.searchsorted(segment.offsets, sentences, side="right") - 1,
        )
        return np.unique(np.concatenate(found))

    def _nearest(self, segment: Segment, start: int, side: str, vector: np.ndarray) -> np.ndarray:
        """Rows of the ``ann.CANDIDATES`` nearest live vectors of a segment, in any order."""
        live = None
        if len(self._dead):
            live = self.alive[start : start + len(segment)]
            if side == "sentences":
                live = np.repeat(live, np.diff(segment.offsets))
        index, vectors = segment.indexes.get(side), segment.vectors[side]
        return ann.nearest(index, vectors, vector, ann.CANDIDATES, live)

    def base(self, vector: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best passages by the base encoder's passage vectors: rows and similarities."""
        rows, scores = [], []
        for segment, start in zip(self.segments, self.starts, strict=False):
            if "base" in segment.indexes:
                places = np.sort(self._nearest(segment, int(start), "base", vector))
            else:
                places = np.flatnonzero(self.alive[start : start + len(segment)])
            rows.append(places + start)
            scores.append(_products(segment.vectors["base"], places, vector))
        found, values = np.concatenate(rows), np.concatenate(scores)
        best = best_places(values, k)
        return found[best], values[best]

    def hits(self, rows: np.ndarray, scores: np.ndarray, vector: np.ndarray) -> list[Hit]:
        """The passages of rows with the sentences that match best."""
        hits = []
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            segment, place = self._place(row)
            first, last = segment.offsets[place : place + 2]
            near = segment.vectors["sentences"][first:last] @ vector
            start, end = segment.spans[first + int(near.argmax())].tolist()
            hits.append(Hit(score, segment.chunk(place), (start, end)))
        return hits


def _products(vectors: np.ndarray, places: np.ndarray, vector: np.ndarray) -> np.ndarray:
    whole = len(places) == len(vectors)
    return (vectors if whole else vectors[places]) @ vector


def _best_sentences(segment: Segment, places: np.ndarray, vector: np.ndarray) -> np.ndarray:
    if not len(places):
        return np.zeros(0, np.float32)
    sentences, offsets = segment.vectors["sentences"], segment.offsets
    if len(places) < len(segment):
        rows, offsets = rows_of_groups(offsets, places)
        sentences = sentences[rows]
    return best_of_groups(vector[None], sentences, offsets)[0].numpy()


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k highest scores above 0, in any order."""
    if k < len(scores):
        rows = np.argpartition(scores, len(scores) - k)[len(scores) - k :]
    else:
        rows = np.arange(len(scores))
    return rows[scores[rows] > 0]


def open_index(run: Path) -> tuple[Manifest, Index]:
    """The index of a run, which a writer may replace meanwhile.

    Raises:
        RefineFastError: if the run has none, or a damaged one.
    """
    folder = IndexFolder(run)
    while True:
        manifest = folder.manifest()
        if manifest is None:
            raise RefineFastError(
                f"{run} has no index; make one: refine-fast index {as_argument(run)}."
            )
        try:
            return manifest, Index.open(folder, manifest)
        except RefineFastError:
            if folder.manifest() == manifest:
                raise
            # A writer has replaced the index since index.json was read.


class Searcher:
    """The index of a run with its encoders."""

    def __init__(self, run: Path, encoders: Encoders) -> None:
        """Opens the index of a run.

        Raises:
            RefineFastError: if the run has none, or a damaged one.
        """
        self.run = run
        self._encoders = encoders
        self._stamp = IndexFolder(run).stamp()  # before the index is read: a later one is seen
        self.manifest, self.index = open_index(run)

    def refresh(self) -> None:
        """Opens the index anew if a writer has replaced it.

        Raises:
            RefineFastError: if the new one is damaged, or was built under another encoder or by
                another version.
        """
        stamp = IndexFolder(self.run).stamp()
        if stamp in (None, self._stamp):
            return
        manifest, index = open_index(self.run)
        for label in (*LABELS.values(), CODE):
            if manifest.key.get(label) != self.manifest.key.get(label):
                raise RefineFastError(
                    f"{self.run}: the index was rebuilt ({label} changed); start the command again."
                )
        self.manifest, self.index, self._stamp = manifest, index, stamp

    @property
    def blend(self) -> Blend:
        """The weights that were chosen."""
        return Blend(self.manifest.blend["sentences"], self.manifest.blend["lexical"])

    def search(self, query: str, k: int = 10) -> dict[str, list[Hit]]:
        """The best passages by each system.

        Args:
            query: at most ``MAX_QUERY`` characters.
            k: passages per system.

        Returns:
            "base" (unless the product is the base), "fused", "BM25" and "blend", best first. The
            scores of the first two are similarities, of the others standard scores. BM25 finds only
            passages that share a term with the query.

        Raises:
            RefineFastError: a longer query.
        """
        if len(query) > MAX_QUERY:
            raise RefineFastError(
                f"query must have at most {MAX_QUERY:,} characters (got {len(query):,}); "
                "shorten it."
            )
        query, index = whole_characters(query), self.index
        vector = self._encoders.queries("product", [query])[0]
        parts = index.components(query, vector)
        mean, spread = parts.scale
        found: dict[str, list[Hit]] = {}
        if index.has_base:
            rows, scores = index.base(self._encoders.queries("base", [query])[0], k)
            found["base"] = index.hits(rows, scores, vector)
        lexical = np.where(parts.matched, parts.bm25, -np.inf)
        for name, scores, shown in (
            ("fused", parts.own, parts.own * spread + mean),
            ("BM25", lexical, lexical),
            ("blend", blended := self.blend(parts), blended),
        ):
            places = best_places(scores, k)
            places = places[scores[places] > -np.inf]
            found[name] = index.hits(parts.rows[places], shown[places], vector)
        return found
