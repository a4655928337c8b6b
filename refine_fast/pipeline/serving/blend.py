"""The blend of passage, best sentence and BM25, and the choice of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..evaluation.choice import METRIC
from ..evaluation.metrics import DEPTH, score_ranking
from ..evaluation.scores import Scores
from ..evaluation.significance import Gain, gain

SENTENCE_SHARES = tuple(i / 10 for i in range(11))
LEXICAL_SHARES = tuple(i / 20 for i in range(21))
"""The weights that are tried."""

LEXICAL_SHARE = 0.25
"""Share of BM25 where the queries that choose were made from the passages. It has the highest mean
nDCG@10 of .1, .15, ..., .4 on people's train questions about SQuAD, COVID-QA, travel and SciFact,
with MiniLM as it is and adapted: .7823, next to .7812 at .2 and .7819 at .3."""

MADE_TOLERANCE = 0.01
"""What BM25 may lose with such queries: an adapted encoder finds nearly all of them, and beside it
any other score can only lose (SQuAD: 0.2 points, while people's questions gain 3.6)."""

TOP = 300
"""Passages of each query that are compared: the best by each of the three scores."""


@dataclass(frozen=True)
class Blend:
    """``(1 - lexical) * ((1 - sentences) * own + sentences * best) + lexical * bm25``, over
    standard scores."""

    sentences: float = 0.0
    """Share of the best sentence in the dense score."""
    lexical: float = 0.0
    """Share of BM25."""

    def __call__(self, parts: Components) -> np.ndarray:
        """The score of each passage."""
        dense = (1 - self.sentences) * parts.own + self.sentences * parts.best
        return (1 - self.lexical) * dense + self.lexical * parts.bm25


@dataclass(frozen=True)
class Components:
    """Standard scores of some passages for one query. The mean and the spread are over every
    passage: of ``own`` for the two dense scores, of BM25 for its."""

    rows: np.ndarray
    """(n,) the passages, ascending."""
    own: np.ndarray
    """By the passage's vector."""
    best: np.ndarray
    """By the vector of its best sentence."""
    bm25: np.ndarray
    matched: np.ndarray
    """(n,) bool: whether the passage shares a term with the query."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and spread of ``own`` before it was standardized."""

    def trimmed(self, k: int = TOP) -> Components:
        """Only the passages that are among the best k by one of the scores."""
        best = [best_places(scores, k) for scores in (self.own, self.best, self.bm25)]
        kept = np.unique(np.concatenate(best))
        columns = ("rows", "own", "best", "bm25", "matched")
        return replace(self, **{name: getattr(self, name)[kept] for name in columns})


def best_places(scores: np.ndarray, k: int) -> np.ndarray:
    """Where the k highest scores are, best first, ties by lower place."""
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        places = np.flatnonzero(scores >= least)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:k]


def standard(scores: np.ndarray, count: int, rows: np.ndarray | None = None) -> np.ndarray:
    """BM25 scores with mean 0 and variance 1 over ``count`` passages; 0 if all are equal.

    Args:
        scores: (n,) of those passages; may leave out passages with the score 0.
        count: how many passages there are.
        rows: whose standard scores are returned; None: of all.
    """
    wide = scores.astype(np.float64)
    mean = float(wide.sum()) / max(count, 1)
    square = float(wide @ wide) / max(count, 1)
    spread = np.sqrt(max(square - mean**2, 0.0))
    shown = scores if rows is None else scores[rows]
    return np.asarray((shown - mean) / spread if spread > 1e-9 else np.zeros_like(shown))


@dataclass(frozen=True)
class BlendChoice:
    """The weights, and the gains in ``METRIC`` that they were chosen by."""

    blend: Blend
    queries: int
    gains: Mapping[str, Gain]
    """"sentences", "lexical": of the best blend over the best one without (``choose_by_made``: of
    the part when it was added); "all": of the chosen blend over passage vectors alone."""
    without: Mapping[str, Blend] = field(default_factory=dict)
    """"sentences", "lexical": the best blend without."""

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        gains = {name: asdict(change) for name, change in self.gains.items()}
        return {**asdict(self.blend), "queries": self.queries, "metric": METRIC, "gains": gains}


class Choosing:
    """Held-out queries by which blends are compared, in ``METRIC``."""

    def __init__(
        self, parts: Sequence[Components], relevant: Sequence[Mapping[int, float]]
    ) -> None:
        """Takes the queries.

        Args:
            parts: of each the components, trimmed.
            relevant: of each: row -> grade.
        """
        self.parts, self.relevant = parts, relevant
        self._known: dict[Blend, Scores] = {}

    def scores(self, blend: Blend) -> Scores:
        """Of a blend's first ten passages; computed once."""
        if blend not in self._known:
            self._known[blend] = score_blend(self.parts, self.relevant, blend, 10)
        return self._known[blend]

    def best(self, blends: Iterable[Blend]) -> Blend:
        """The blend with the highest mean, the first of several."""
        return max(blends, key=lambda blend: self.scores(blend).metrics[METRIC])

    def change(self, before: Blend, after: Blend) -> Gain:
        """From one blend to another."""
        return gain(*(self.scores(blend).per_query[METRIC] for blend in (before, after)))

    def drawn(self, rows: Iterable[int]) -> Choosing:
        """Some of the queries."""
        kept = list(rows)
        return Choosing([self.parts[i] for i in kept], [self.relevant[i] for i in kept])


def choose_blend(queries: Choosing) -> BlendChoice:
    """The weights with the highest mean of ``METRIC``. A part whose gain is not shown, because its
    95% interval does not lie above 0, gets the weight 0."""
    if not queries.parts:
        return BlendChoice(Blend(), 0, {})
    chosen = queries.best(Blend(w, b) for w in SENTENCE_SHARES for b in LEXICAL_SHARES)
    without = {
        "sentences": queries.best(Blend(0, b) for b in LEXICAL_SHARES),
        "lexical": queries.best(Blend(w, 0) for w in SENTENCE_SHARES),
    }
    gains = {name: queries.change(blend, chosen) for name, blend in without.items()}
    if min(gain.low for gain in gains.values()) <= 0:
        # The part that adds least goes; the other must then be better than passages alone.
        chosen = without[min(gains, key=lambda name: gains[name].mean)]
        if queries.change(Blend(), chosen).low <= 0:
            chosen = Blend()
    gains["all"] = queries.change(Blend(), chosen)
    return BlendChoice(chosen, len(queries.parts), gains, without)


def choose_by_made(queries: Choosing) -> BlendChoice:
    """The weights, from queries that were made from the passages.

    The share of sentences is chosen without BM25, and is 0 where its gain is not shown. Like what
    people ask, these queries are about one sentence. They cannot choose the share of BM25, since
    they have the passages' words, and since an adapted encoder has learned to find such queries. It
    is ``LEXICAL_SHARE``, or 0 where that is shown to lose more than ``MADE_TOLERANCE``.
    """
    dense = queries.best(Blend(w) for w in SENTENCE_SHARES)
    gains = {"sentences": queries.change(Blend(), dense)}
    if gains["sentences"].low <= 0:
        dense = Blend()
    chosen = replace(dense, lexical=LEXICAL_SHARE)
    gains["lexical"] = queries.change(dense, chosen)
    if gains["lexical"].high < -MADE_TOLERANCE:
        chosen = dense
    gains["all"] = queries.change(Blend(), chosen)
    without = {"sentences": Blend(lexical=chosen.lexical), "lexical": dense}
    return BlendChoice(chosen, len(queries.parts), gains, without)


def score_blend(
    parts: Sequence[Components],
    relevant: Sequence[Mapping[int, float]],
    blend: Blend,
    depth: int = DEPTH,
) -> Scores:
    """The scores of a blend's first ``depth`` passages of each query."""
    ranked = [part.rows[best_places(blend(part), depth)].tolist() for part in parts]
    return score_ranking(ranked, relevant)
