"""The choice of the fusion weight: as good as possible on the documents, without forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .scores import Scores
from .significance import Gain, gain

METRIC = "ndcg@10"
"""What decides: unlike recall at one depth, it changes with every rank."""

NOT_BETTER = "not better"
FORGETS = "forgets"
NO_QUERIES = "no queries"


@dataclass(frozen=True)
class Choice:
    """A fusion weight, and the gains in ``METRIC`` that it was chosen by."""

    weight: float
    """0: the base encoder is kept."""
    best: float
    """The best weight within the tolerance, or the best of all if none is. ``gain``, ``guard`` and
    ``refused`` refer to it."""
    gain: Gain
    """At ``best``, on the documents."""
    guard: Gain
    """At ``best``, on general text."""
    refused: str | None = None
    """Why the base is kept: ``NOT_BETTER``, ``FORGETS`` or ``NO_QUERIES``."""


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
    dev: Mapping[float, Scores], guard: Mapping[float, Scores], *, tolerance: float
) -> Choice:
    """The weight with the highest mean on ``dev`` among those that lose at most ``tolerance`` on
    ``guard``.

    The base is kept (weight 0) where every weight loses more, or where the 95% interval of the gain
    on ``dev`` does not lie above 0: a model that is not shown to be better is not worth deploying.

    Args:
        dev: weight -> scores on queries about the documents that are neither trained on nor in any
            test set. Holds 0 and at least one more weight.
        guard: weight -> scores on text unlike the documents.
        tolerance: the largest loss of the mean on ``guard``, relative to the base; 0.005 is half a
            percent.
    """
    weights = [weight for weight in sorted(dev) if weight > 0]
    if not len(dev[0]):
        unknown = Gain(0.0, 0.0, 0.0)
        return Choice(0.0, weights[0], unknown, unknown, NO_QUERIES)
    least = (1 - tolerance) * guard[0].metrics[METRIC]
    allowed = [weight for weight in weights if guard[weight].metrics[METRIC] >= least]
    best = max(allowed or weights, key=lambda weight: dev[weight].metrics[METRIC])
    on_dev, on_guard = (
        gain(scores[0].per_query[METRIC], scores[best].per_query[METRIC]) for scores in (dev, guard)
    )
    refused = NOT_BETTER if on_dev.low <= 0 else None if allowed else FORGETS
    return Choice(0.0 if refused else best, best, on_dev, on_guard, refused)
