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
    """"sentences", "lexical": of the best blend over the best one without; "all": of the chosen
    blend over passage vectors alone."""
    without: Mapping[str, Blend] = field(default_factory=dict)
    """"sentences", "lexical": the best blend without."""
    general: int = 0
    """How many of the queries are questions of general knowledge."""

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        gains = {name: asdict(change) for name, change in self.gains.items()}
        counts = {"queries": self.queries, "general_knowledge": self.general}
        return {**asdict(self.blend), **counts, "metric": METRIC, "gains": gains}


def choose_blend(
    queries: Iterable[Components], relevant: Sequence[Mapping[int, float]]
) -> BlendChoice:
    """The weights with the highest mean of ``METRIC``. A part whose gain is not shown, because its
    95% interval does not lie above 0, gets the weight 0.

    Args:
        queries: of each held-out query the components, trimmed.
        relevant: of each query: row -> grade.
    """
    parts = list(queries)
    if not parts:
        return BlendChoice(Blend(), 0, {})
    grid = {
        Blend(w, b): score_blend(parts, relevant, Blend(w, b), 10)
        for w in SENTENCE_SHARES
        for b in LEXICAL_SHARES
    }

    def best(keep: Iterable[Blend]) -> Blend:
        return max(keep, key=lambda blend: grid[blend].metrics[METRIC])

    def change(before: Blend, after: Blend) -> Gain:
        return gain(grid[before].per_query[METRIC], grid[after].per_query[METRIC])

    chosen = best(grid)
    without = {
        "sentences": best(blend for blend in grid if not blend.sentences),
        "lexical": best(blend for blend in grid if not blend.lexical),
    }
    gains = {name: change(blend, chosen) for name, blend in without.items()}
    if min(gain.low for gain in gains.values()) <= 0:
        # The part that adds least goes; the other must then be better than passages alone.
        chosen = without[min(gains, key=lambda name: gains[name].mean)]
        if change(Blend(), chosen).low <= 0:
            chosen = Blend()
    return BlendChoice(chosen, len(parts), {**gains, "all": change(Blend(), chosen)}, without)


def score_blend(
    parts: Sequence[Components],
    relevant: Sequence[Mapping[int, float]],
    blend: Blend,
    depth: int = DEPTH,
) -> Scores:
    """The scores of a blend's first ``depth`` passages of each query."""
    ranked = [part.rows[best_places(blend(part), depth)].tolist() for part in parts]
    return score_ranking(ranked, relevant)
