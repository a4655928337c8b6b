"""BM25 over segments that are added and removed: statistics are those of the live passages.

bm25s computes every score when it indexes, so one new passage changes the whole index. Here the
postings hold counts, and the score is computed at search time:

    sum over the query's terms of idf * tf / (tf + k1 * (1 - b + b * length / mean length)),
    idf = log(1 + (N - df + 0.5) / (df + 0.5))

It is Lucene's variant, as in bm25s, with the same scores.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..corpus.bm25 import K1, B
from ..corpus.terms import search_terms
from ..reserve import save_rows

_ARRAYS = ("terms", "term_ends", "ends", "rows", "counts", "lengths")


@dataclass(frozen=True)
class Postings:
    """Term -> the passages that hold it, as arrays that can be memory-mapped."""

    terms: np.ndarray
    """uint8: the terms in UTF-8, sorted, one after the other."""
    term_ends: np.ndarray
    """(V,) int64: where each term ends in ``terms``."""
    ends: np.ndarray
    """(V,) int64: where each term's postings end."""
    rows: np.ndarray
    """(P,) int32: passages, ascending within a term."""
    counts: np.ndarray
    """(P,) int32: how often the term is in the passage."""
    lengths: np.ndarray
    """(N,) int32: terms of each passage."""

    @classmethod
    def of(cls, passages: Sequence[str]) -> Postings:
        """The postings of passages, tokenized by ``search_terms``."""
        number: dict[str, int] = {}
        flat = array("i")  # 4 bytes for each word of the corpus
        lengths = np.zeros(len(passages), np.int32)
        for row, tokens in enumerate(search_terms(passages)):
            flat.extend([number.setdefault(token, len(number)) for token in tokens])
            lengths[row] = len(tokens)
        encoded = [term.encode("utf-8", "surrogatepass") for term in number]
        order = sorted(range(len(encoded)), key=encoded.__getitem__)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        owner = np.repeat(np.arange(len(passages)), lengths)
        keys = rank[np.frombuffer(flat, np.int32)] * max(len(passages), 1) + owner
        pairs, counts = np.unique(keys, return_counts=True)
        term_of, row_of = np.divmod(pairs, max(len(passages), 1))
        return cls(
            np.frombuffer(b"".join(encoded[i] for i in order), np.uint8),
            np.cumsum([len(encoded[i]) for i in order], dtype=np.int64),
            np.cumsum(np.bincount(term_of, minlength=len(order)), dtype=np.int64),
            row_of.astype(np.int32),
            counts.astype(np.int32),
            lengths,
        )

    def save(self, folder: Path) -> None:
        """Writes the arrays into a folder."""
        folder.mkdir()
        for name in _ARRAYS:
            save_rows(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Postings:
        """Maps what ``save`` wrote."""
        return cls(*(np.load(folder / f"{n}.npy", mmap_mode="r").view(np.ndarray) for n in _ARRAYS))

    def find(self, term: str) -> slice:
        """Where the term's postings are; empty if no passage holds it."""
        wanted = term.encode("utf-8", "surrogatepass")
        low, high = 0, len(self.term_ends)
        while low < high:
            middle = (low + high) // 2
            found = self._term(middle)
            if found == wanted:
                return slice(self.ends[middle - 1] if middle else 0, self.ends[middle])
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return slice(0, 0)

    def _term(self, number: int) -> bytes:
        start = self.term_ends[number - 1] if number else 0
        return self.terms[start : self.term_ends[number]].tobytes()


class Lexical:
    """BM25 over several ``Postings``, of which some passages may be dead."""

    def __init__(self, parts: Sequence[Postings], alive: np.ndarray) -> None:
        """Takes the parts in order.

        Args:
            parts: of N passages together.
            alive: (N,) bool: which of them count.
        """
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        self._alive = alive
        self._all_alive = bool(alive.all())
        lengths = np.concatenate([part.lengths for part in parts]).astype(np.float32)
        self._count = int(alive.sum())
        mean = float(lengths[alive].mean()) if self._count else 0.0
        self._saturation = K1 * (1 - B + B * lengths / max(mean, 1e-9))

    def scores(self, query: str) -> np.ndarray:
        """(N,) float32; 0 for a passage that shares no term with the query or is dead."""
        scores = np.zeros(len(self._alive), np.float32)
        (terms,) = search_terms([query])
        for term, times in Counter(terms).items():
            found = [self._live(number, term) for number in range(len(self._parts))]
            frequency = sum(len(rows) for rows, _ in found)
            idf = np.log(1 + (self._count - frequency + 0.5) / (frequency + 0.5))
            for (rows, counts), start in zip(found, self._starts, strict=False):
                # In place and in float32: a common word has a posting in most passages.
                shares = self._saturation[start:][rows]
                shares += counts
                np.divide(counts, shares, out=shares)
                shares *= np.float32(times * idf)
                scores[start:][rows] += shares
        return scores

    def _live(self, number: int, term: str) -> tuple[np.ndarray, np.ndarray]:
        """The live passages of a part that hold the term, and how often, as float32."""
        part, start = self._parts[number], self._starts[number]
        at = part.find(term)
        rows, counts = part.rows[at].astype(np.int64), part.counts[at].astype(np.float32)
        if self._all_alive:
            return rows, counts
        live = self._alive[start:][rows]
        return rows[live], counts[live]
