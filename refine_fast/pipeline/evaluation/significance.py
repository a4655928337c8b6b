"""Paired confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scores import mean

FEWEST = 6
"""Queries that change: five that all change one way are no evidence at 95% (sign test, p = 0.0625),
but a bootstrap of them would say so, however many unchanged ones are beside them."""

BLOCK = 1 << 20
"""Counts that are drawn at a time."""


@dataclass(frozen=True)
class Gain:
    """``mean(after - before)`` over queries, with a 95% interval, in the unit of the metric
    (1 = 100 points)."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In words, whether 0 lies below, above or inside the interval."""
        if self.low > 0:
            return "improved"
        return "got worse" if self.high < 0 else "no measurable change"


def gain(before: np.ndarray, after: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Gain:
    """Paired bootstrap of a mean difference.

    The interval covers the choice of queries, not the randomness of training. Fewer than ``FEWEST``
    queries show nothing, and have the interval [-1, 1]; where fewer than ``FEWEST`` change, it
    holds 0.

    Args:
        before: (Q,) one metric of one system, per query.
        after: (Q,) the same metric of another system, for the same queries.
        resamples: Draws of the Q queries with replacement.
        seed: Of the draws.

    Returns:
        The mean difference, with the 2.5 and 97.5 percentiles of its bootstrap distribution.
    """
    change = after - before
    if len(change) < FEWEST:
        return Gain(mean(change), -1.0, 1.0)
    # A draw matters only by how often it takes each distinct change, and those are few: one
    # multinomial replaces resamples * Q indices.
    values, counts = np.unique(change, return_counts=True)
    rng, rows = np.random.default_rng(seed), max(1, BLOCK // len(values))
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        block = means[start : start + rows]
        draws = rng.multinomial(len(change), counts / len(change), size=len(block))
        block[:] = draws @ values / len(change)
    low, high = np.percentile(means, [2.5, 97.5])
    if np.count_nonzero(change) < FEWEST:
        # an unchanged query is no evidence either way: the sign test counts only those that change
        low, high = min(low, 0.0), max(high, 0.0)
    return Gain(float(change.mean()), float(low), float(high))
