"""Removal of exact and near-duplicate chunks, and the near-duplicate index for any texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..progress import Progress
from .chunk import Chunk
from .text import normalize, words

Remove = Literal["near", "exact", "keep"]
"""Which duplicates are removed: near and exact ones, exact ones, or none."""


@dataclass(frozen=True)
class Duplicates:
    """What ``deduplicate`` removed."""

    exact: int
    near: int
    twins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Id of a labelled chunk that was removed as an exact duplicate -> id of the kept one."""


class NearDuplicates:
    """An index of texts that no two near duplicates enter.

    Two texts are near duplicates if the Jaccard similarity ``len(A & B) / len(A | B)`` of their
    shingle sets is at least ``threshold``. MinHash (``datasketch``) proposes candidates, and the
    sets decide.
    """

    def __init__(self, shingles: Callable[[str], set[str]], threshold: float) -> None:
        from datasketch import MinHashLSH

        self._shingles = shingles
        self._threshold = threshold
        # A lower threshold for candidates than for the decision: at equal ones the index would
        # miss every other pair near it.
        self._index = MinHashLSH(threshold=max(threshold - 0.15, 0.1), num_perm=128)
        self._kept: list[str] = []

    def add(self, text: str) -> bool:
        """Adds the text unless a near duplicate is there. Returns whether it was added."""
        from datasketch import MinHash

        own = self._shingles(text)
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in own])
        # Shingles are computed again rather than kept: those of a corpus need gigabytes.
        if any(
            _jaccard(own, self._shingles(self._kept[at])) >= self._threshold
            for at in self._index.query(sketch)
        ):
            return False
        self._index.insert(len(self._kept), sketch, check_duplication=False)
        self._kept.append(text)
        return True


def deduplicate(
    chunks: Sequence[Chunk],
    *,
    remove: Remove = "near",
    is_labelled: Callable[[Chunk], bool] = lambda _: False,
    threshold: float = 0.8,
    progress: Progress | None = None,
) -> tuple[list[Chunk], Duplicates]:
    """Keeps the chunks that repeat an earlier one.

    exact: the same text after ``normalize``. near: Jaccard similarity of at least ``threshold``
    over the sets of five words in a row (Lee et al. 2022, arXiv 2107.06499).

    Args:
        chunks: in order of preference.
        remove: which duplicates to remove.
        is_labelled: whether a query names the chunk. A labelled chunk is never removed as a near
            duplicate: pages made from one template differ in the very facts that are asked about.
        threshold: see above.
        progress: counts chunks.

    Returns:
        The chunks that are kept, in order, and what was removed.
    """
    if remove == "keep":
        return list(chunks), Duplicates(0, 0)
    distinct = NearDuplicates(shingles, threshold)
    kept: list[Chunk] = []
    seen: dict[bytes, str | None] = {}  # id of the chunk with this text; None: it was removed
    twins: dict[str, str] = {}
    exact = near = 0
    for number, chunk in enumerate(chunks):
        if progress is not None:
            progress(number, len(chunks))
        digest = hashlib.blake2b(normalize(chunk.text).encode(), digest_size=16).digest()
        twin = seen.get(digest)
        labelled = is_labelled(chunk)
        if twin is not None or (digest in seen and not labelled):
            exact += 1
            if twin is not None and labelled:
                twins[chunk.id] = twin
        elif remove == "exact" or distinct.add(chunk.text) or labelled:
            kept.append(chunk)
            seen[digest] = chunk.id
        else:
            near += 1
            seen[digest] = None
    return kept, Duplicates(exact, near, twins)


def shingles(text: str) -> set[str]:
    """Every five words in a row of the normalized text; the whole text if it has fewer."""
    found = words(normalize(text))
    return {" ".join(found[at : at + 5]) for at in range(max(len(found) - 4, 1))}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
