"""The rows of some passages' sentences, and the moments of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE_ROWS = 8192
"""Vectors that are read at a time."""


def rows_of_groups(offsets: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of some groups, one group after the other, and the offsets of the groups there."""
    sizes = offsets[groups + 1] - offsets[groups]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.arange(ends[-1]) + np.repeat(offsets[groups] - ends[:-1], sizes)
    return rows, ends


@dataclass(frozen=True)
class Moments:
    """Count, sum and second moments of vectors: what the mean and the spread of their inner
    products with any query follow from, without a look at the vectors."""

    count: int
    total: np.ndarray
    """(d,) float64."""
    second: np.ndarray
    """(d, d) float64: the sum of the outer products."""

    @classmethod
    def of(cls, vectors: np.ndarray) -> Moments:
        """The moments of (n, d) vectors."""
        d = vectors.shape[1]
        total, second = np.zeros(d), np.zeros((d, d))
        for start in range(0, len(vectors), TILE_ROWS):
            tile = np.asarray(vectors[start : start + TILE_ROWS], np.float64)
            total += tile.sum(0)
            second += tile.T @ tile
        return cls(len(vectors), total, second)

    def plus(self, other: Moments, sign: int = 1) -> Moments:
        """The moments of both sets of vectors; with ``sign`` -1, of this one without the other."""
        return Moments(
            self.count + sign * other.count,
            self.total + sign * other.total,
            self.second + sign * other.second,
        )

    def standard(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Q,) mean and (Q,) standard deviation of each query's inner products with the vectors."""
        q = np.asarray(queries, np.float64)
        n = max(self.count, 1)
        mean = q @ self.total / n
        square = ((q @ self.second) * q).sum(1) / n
        return mean, np.sqrt(np.maximum(square - mean**2, 1e-12))
