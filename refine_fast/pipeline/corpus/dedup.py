"""Removal of exact and near-duplicate chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..progress import Progress
from ..workers import Spread
from .chunk import Chunk
from .near_duplicates import near_duplicate_mask
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


def deduplicate(
    chunks: Sequence[Chunk],
    *,
    remove: Remove = "near",
    is_labelled: Callable[[Chunk], bool] = lambda _: False,
    threshold: float = 0.8,
    progress: Progress | None = None,
    spread: Spread | None = None,
) -> tuple[list[Chunk], Duplicates]:
    """Drops the chunks that repeat an earlier one.

    A chunk is compared as the encoder reads it, title and text: the same answer under two hotels'
    names is two passages. exact: the same after ``normalize``; found in this process, by a digest
    of 16 bytes a chunk. near: Jaccard similarity of at least ``threshold`` over the sets of five
    words in a row (Lee et al. 2022, arXiv 2107.06499).

    Args:
        chunks: in order of preference.
        remove: which duplicates to remove.
        is_labelled: whether a query names the chunk. A labelled chunk is never removed as a near
            duplicate: pages made from one template differ in the very facts that are asked about.
        threshold: see above.
        progress: counts distinct texts.
        spread: the workers that find near duplicates (``near_duplicate_mask``); None: this process.

    Returns:
        The chunks that are kept, in order, and what was removed.
    """
    if remove == "keep":
        return list(chunks), Duplicates(0, 0)
    numbers: dict[bytes, int] = {}
    text_of = [numbers.setdefault(_digest(chunk.passage), len(numbers)) for chunk in chunks]
    repeats = np.zeros(len(numbers), bool)
    if remove == "near":
        # A labelled chunk that is near an earlier one is kept, and others are not compared with it.
        _, first = np.unique(text_of, return_index=True)
        texts = [chunks[i].passage for i in first]
        repeats = near_duplicate_mask(texts, shingles, threshold, progress=progress, spread=spread)
    kept: list[Chunk] = []
    seen: dict[int, str | None] = {}  # id of the chunk with this text; None: it was removed
    twins: dict[str, str] = {}
    exact = near = 0
    for chunk, text in zip(chunks, text_of, strict=True):
        twin = seen.get(text)
        labelled = is_labelled(chunk)
        if twin is not None or (text in seen and not labelled):
            exact += 1
            if twin is not None and labelled:
                twins[chunk.id] = twin
        elif labelled or not repeats[text]:
            kept.append(chunk)
            seen[text] = chunk.id
        else:
            near += 1
            seen[text] = None
    return kept, Duplicates(exact, near, twins)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normalize(text).encode(), digest_size=16).digest()


def shingles(text: str) -> set[str]:
    """Every five words in a row of the normalized text; the whole text if it has fewer."""
    found = words(normalize(text))
    return {" ".join(found[at : at + 5]) for at in range(max(len(found) - 4, 1))}
