"""The choice of the fusion weight: as good as possible on the documents, without forgetting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from .scores import Scores
from .significance import FEWEST, Gain, gain

METRIC = "ndcg@10"
"""What decides: unlike recall at one depth, it changes with every rank."""

MADE_MOST = 0.5
"""The largest weight that is chosen where the held-out queries were made from the passages, as
those of training were: they prefer 1 (SQuAD without a language model, seed 0: nDCG@10 +6.7, +7.7
and +8.8 points at .5, .75 and 1). People's questions do not: recall@3 of SQuAD's split dev +4.2,
+3.8 and +3.1; of SciFact's and COVID-QA's train questions -1.2, -1.5, -1.5 and +3.5, +3.0, +0.5."""

NOT_BETTER = "not better"
FORGETS = "forgets"
TOO_FEW = "too few queries"


@dataclass(frozen=True)
class Choice:
    """A fusion weight, and the gains in ``METRIC`` that it was chosen by."""

    weight: float
    """0: the base encoder is kept."""
    best: float
    """``weight``; where the base is kept, the best of the weights that are better, else of those
    within the tolerance, else of all that may be chosen. ``gain``, ``guard`` and ``refused`` refer
    to it."""
    gain: Gain
    """At ``best``, on the documents."""
    guard: Gain
    """At ``best``, on general text."""
    refused: str | None = None
    """Why the base is kept: ``NOT_BETTER``, ``FORGETS`` or ``TOO_FEW``."""


@dataclass(frozen=True)
class ShareChoice:
    """The teachers' share of the loss, and the means in ``METRIC`` that it was chosen by."""

    share: float
    rule: float
    """The share that is kept unless another is better."""
    scores: Mapping[float, float]
    """Share -> the mean of the fused model on queries about held-out documents."""
    gains: Mapping[float, Gain]
    """Share -> the gain over the rule's share."""


def choose_share(dev: Mapping[float, Scores], rule: float) -> ShareChoice:
    """The share with the highest mean among the rule's share and those that are better than it: the
    95% interval of the gain lies above 0.

    Args:
        dev: share -> scores of the fused model on queries about the documents that are neither
            trained on nor in any test set. Holds the rule's share.
        rule: the share that is kept unless another is better.
    """
    unknown = Gain(0.0, 0.0, 0.0)
    per_query = {share: scores.per_query[METRIC] for share, scores in dev.items()}
    gains = {
        share: gain(per_query[rule], values) if len(values) else unknown
        for share, values in per_query.items()
    }
    better = [share for share, change in gains.items() if change.low > 0]
    best = max([rule, *better], key=lambda share: gains[share].mean)
    means = {share: scores.metrics[METRIC] for share, scores in dev.items()}
    return ShareChoice(best, rule, means, gains)


def choose_weight(
    dev: Mapping[float, Scores],
    guard: Mapping[float, Scores],
    *,
    tolerance: float,
    most: float = 1.0,
) -> Choice:
    """Among the weights that are better on ``dev``, the 95% interval of the gain lying above 0, and
    lose at most ``tolerance`` on ``guard``: the best one, or the smallest below it down to which
    all are within one standard error of it on ``dev``. More of the base is kept where few queries
    cannot tell two weights apart (Breiman et al., Classification and Regression Trees, 1984,
    section 3.4.3, who prefer the simpler model so).

    The base is kept (weight 0) where there is none: a model that is not shown to be better is not
    worth deploying.

    Args:
        dev: weight -> scores on queries about the documents that are neither trained on nor in any
            test set. Holds 0 and at least one more weight.
        guard: weight -> scores on text unlike the documents.
        tolerance: the largest loss of the mean on ``guard``, relative to the base; 0.005 is half a
            percent.
        most: the largest weight that may be chosen; if all are larger, the smallest may be.
    """
    positive = [weight for weight in sorted(dev) if weight > 0]
    weights = [weight for weight in positive if weight <= most] or positive[:1]
    if len(dev[0]) < FEWEST:
        unknown = Gain(0.0, 0.0, 0.0)
        return Choice(0.0, weights[0], unknown, unknown, TOO_FEW)
    least = (1 - tolerance) * guard[0].metrics[METRIC]
    gains = {weight: _gain(dev, 0, weight) for weight in weights}
    better = [weight for weight in weights if gains[weight].low > 0]
    allowed = [weight for weight in weights if guard[weight].metrics[METRIC] >= least]
    both = [weight for weight in better if weight in allowed]
    best = max(both or better or allowed or weights, key=lambda w: dev[w].metrics[METRIC])
    if both:
        below = [weight for weight in reversed(both) if weight < best]
        as_good = takewhile(lambda weight: _as_good(dev, weight, best), below)
        best = min([best, *as_good])
    refused = None if both else FORGETS if better else NOT_BETTER
    return Choice(0.0 if refused else best, best, gains[best], _gain(guard, 0, best), refused)


def _as_good(scores: Mapping[float, Scores], weight: float, best: float) -> bool:
    """Whether a weight is within one standard error of the best, or too few queries change to
    tell."""
    change = scores[best].per_query[METRIC] - scores[weight].per_query[METRIC]
    error = change.std(ddof=1) / math.sqrt(len(change))
    return bool(np.count_nonzero(change) < FEWEST or change.mean() <= error)


def _gain(scores: Mapping[float, Scores], before: float, after: float) -> Gain:
    return gain(scores[before].per_query[METRIC], scores[after].per_query[METRIC])
