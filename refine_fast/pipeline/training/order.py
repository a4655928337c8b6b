"""The order of the training examples: which of them share a batch.

The passages of a batch are each other's negatives. Drawn at random they differ in topic, and an
encoder that is any good tells them apart; the passages that it confuses are those of one topic.
Groups of similar passages put some of those into every batch, at no cost (topic-aware sampling,
TAS-B, arXiv 2104.06967, section 3.1).
"""

from __future__ import annotations

import math

import numpy as np

GROUP = 8
"""The most examples that stay together. A batch holds several groups, so that it has distant
passages too."""

CELL = 8192
"""The most examples among which the nearest are looked for."""


def random_order(examples: int, count: int, seed: int) -> np.ndarray:
    """``count`` int64 rows: one permutation of the examples after the other."""
    random = np.random.default_rng(seed)
    passes = math.ceil(count / examples)
    return np.concatenate([random.permutation(examples) for _ in range(passes)])[:count]


def grouped_order(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """As ``random_order``, with similar examples next to each other in groups of at most ``GROUP``.
    Each pass has other groups.

    Args:
        vectors: (N, d) float32, a vector for each example.
        count: how many rows.
        seed: of the groups and their order.
    """
    random = np.random.default_rng(seed)
    passes = math.ceil(count / len(vectors))
    return np.concatenate([_grouped(vectors, random) for _ in range(passes)])[:count]


def _grouped(vectors: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Groups of nearest neighbours within the cells, in random order."""
    groups = [cell[group] for cell in _cells(vectors, random) for group in _nearest(vectors[cell])]
    return np.concatenate([random.permutation(groups[i]) for i in random.permutation(len(groups))])


def _cells(vectors: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Rows, split at the median along the line between two random vectors until few are left: with
    them, N vectors take O(N CELL d) operations, and nearest neighbours alone O(N^2 d)."""
    cells, left = [], [random.permutation(len(vectors))]
    while left:
        rows = left.pop()
        if len(rows) <= CELL:
            cells.append(rows)
            continue
        one, other = vectors[rows[:2]]
        along = rows[np.argsort(vectors[rows] @ (one - other), kind="stable")]
        left += [random.permutation(half) for half in np.array_split(along, 2)]
    return cells


def _nearest(vectors: np.ndarray) -> list[np.ndarray]:
    """Groups: the first row with its nearest neighbours, then the first of the rest, ..."""
    groups, rest = [], np.arange(len(vectors))
    while len(rest):
        similarity = vectors[rest] @ vectors[rest[0]]
        similarity[0] = np.inf
        nearest = np.argsort(-similarity, kind="stable")
        groups.append(rest[nearest[:GROUP]])
        rest = np.sort(rest[nearest[GROUP:]])
    return groups
