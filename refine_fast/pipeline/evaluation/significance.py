"""Paired confidence intervals, and the choice of a fusion weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scores import Scores


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

    The interval covers the choice of queries, not the randomness of training.

    Args:
        before: (Q,) one metric of one system, per query.
        after: (Q,) the same metric of another system, for the same queries.
        resamples: Draws of the Q queries with replacement.
        seed: Of the draws.

    Returns:
        The mean difference, with the 2.5 and 97.5 percentiles of its bootstrap distribution.
    """
    change = after - before
    # A draw matters only by how often it takes each distinct change, and those are few: one
    # multinomial replaces resamples * Q indices.
    values, counts = np.unique(change, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        len(change), counts / len(change), size=resamples
    )
    means = draws @ values / len(change)
    low, high = np.percentile(means, [2.5, 97.5])
    return Gain(float(change.mean()), float(low), float(high))


def choose_weight(dev: dict[float, Scores], *, metric: str = "ndcg@10") -> float:
    """The smallest fusion weight that is as good as the best one, within one standard error.

    Let w* maximise the mean of ``metric``. The answer is the least w whose paired mean shortfall
    against w* is at most the standard error of that shortfall: the one-standard-error rule of
    Breiman et al. (1984), Section 3.4.3. Small weights are preferred because forgetting out of
    domain grows with the weight. If tuning does not help, the answer is the smallest weight given,
    so include 0.

    Args:
        dev: Weight -> scores of the model fused at it, on queries that are neither trained on nor
            in any test set.
        metric: The metric to compare.
    """
    best = max(sorted(dev), key=lambda weight: dev[weight].metrics[metric])
    for weight in sorted(dev):
        shortfall = dev[best].per_query[metric] - dev[weight].per_query[metric]
        error = shortfall.std(ddof=1) / len(shortfall) ** 0.5 if len(shortfall) > 1 else 0.0
        if shortfall.mean() <= error:
            return weight
    raise AssertionError("unreachable: the best weight always qualifies")
