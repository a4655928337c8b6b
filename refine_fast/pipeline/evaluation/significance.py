"""Paired confidence intervals, and the choice of a fusion weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .metrics import Scores


@dataclass(frozen=True)
class Gain:
    """``mean(after - before)`` over queries, with a 95% interval, in the unit of the metric (1 = 100 points)."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return (
            "improved" if self.low > 0 else "got worse" if self.high < 0 else "no measurable change"
        )


def gain(before: np.ndarray, after: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Gain:
    """Paired bootstrap: the 2.5 and 97.5 percentiles of the mean difference over ``resamples`` draws of the queries with replacement.

    before, after: (Q,) one metric of two systems, per query. The interval covers the choice of queries, not the randomness of training.
    """
    change = after - before
    # A draw matters by how often it takes each distinct change, and those are few: a multinomial in place of resamples * Q indices.
    values, counts = np.unique(change, return_counts=True)
    means = (
        np.random.default_rng(seed).multinomial(len(change), counts / len(change), size=resamples)
        @ values
        / len(change)
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Gain(float(change.mean()), float(low), float(high))


def choose_weight(dev: dict[float, Scores], *, metric: str = "ndcg@10") -> float:
    """``--weight auto``: the smallest fusion weight that is as good, within one standard error, as the best one on held-out dev queries.

    dev: weight -> scores of the fused model on queries that are neither trained on nor in any test set. Let w* maximise the mean of
    ``metric``; the answer is the least w whose paired mean shortfall against w* is at most the standard error of that shortfall (the
    one-standard-error rule of Breiman et al. 1984, Section 3.4.3). Small weights are preferred because what is forgotten out of domain
    grows with the weight. If tuning does not help, the answer is the smallest weight given: include 0.
    """
    best = max(sorted(dev), key=lambda weight: dev[weight].metrics[metric])
    for weight in sorted(dev):
        shortfall = dev[best].per_query[metric] - dev[weight].per_query[metric]
        error = shortfall.std(ddof=1) / len(shortfall) ** 0.5 if len(shortfall) > 1 else 0.0
        if shortfall.mean() <= error:
            return weight
    raise AssertionError("the best weight falls short of itself by nothing")
