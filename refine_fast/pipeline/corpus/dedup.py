"""Removal of exact and near-duplicate chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..progress import Progress
from .chunk import Chunk
from .text import normalize, words


@dataclass(frozen=True)
class Duplicates:
    """How many chunks ``deduplicate`` removed."""

    exact: int
    near: int


def deduplicate(
    chunks: Sequence[Chunk], *, threshold: float = 0.8, progress: Progress | None = None
) -> tuple[list[Chunk], Duplicates]:
    """The chunks without those that repeat an earlier one, and how many were removed.

    exact: the same text after NFKC, case folding and blanks made one. near: ``len(A & B) / len(A | B) >= threshold`` over the sets of five
    words in a row (Lee et al. 2022, arXiv 2107.06499); candidates by MinHash (``datasketch``), each decided by the sets themselves.
    """
    from datasketch import MinHash, MinHashLSH

    # A lower threshold for candidates than for the decision: at equal ones the index would miss every other pair near it.
    index = MinHashLSH(threshold=max(threshold - 0.15, 0.1), num_perm=128)
    kept: list[Chunk] = []
    seen = set()
    exact = near = 0
    for number, chunk in enumerate(chunks):
        if progress is not None:
            progress(number, len(chunks))
        digest = hashlib.blake2b(normalize(chunk.text).encode(), digest_size=16).digest()
        if digest in seen:
            exact += 1
            continue
        seen.add(digest)
        shingles = _shingles(chunk.text)
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        if any(
            _jaccard(shingles, _shingles(kept[at].text)) >= threshold for at in index.query(sketch)
        ):
            near += 1
            continue
        index.insert(len(kept), sketch)
        kept.append(chunk)
    return kept, Duplicates(exact, near)


def _shingles(text: str) -> set[str]:
    """Every five words in a row."""
    found = words(normalize(text))
    return {" ".join(found[at : at + 5]) for at in range(max(len(found) - 4, 1))}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
