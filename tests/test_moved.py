"""The queries that moved most, by hand."""

from __future__ import annotations

import numpy as np

from refine_fast.pipeline.corpus.beir import RetrievalSet
from refine_fast.pipeline.evaluation.scores import Scores
from refine_fast.pipeline.reporting.data import Moved
from refine_fast.pipeline.reporting.moved import METRIC, moved_queries


def scores(*ranks: int | None) -> Scores:
    return Scores({METRIC: np.array([0.0 if rank is None else 1 / rank for rank in ranks])})


def test_the_queries_that_moved_most() -> None:
    qrels: list[dict[str, float]] = [{"b": 1.0, "a": 2.0, "lacking": 3.0}, *([{"b": 1.0}] * 4)]
    data = RetrievalSet("s", ["a", "b"], ["A", "B"], list("12345"), list("vwxyz"), qrels)
    before, after = scores(3, 2, 1, None, 4), scores(1, 2, None, 7, 5)
    rose, fell = moved_queries(data, before, after)
    assert rose == [Moved("v", "A", 3, 1), Moved("y", "B", None, 7)]
    assert fell == [Moved("x", "B", 1, None), Moved("z", "B", 4, 5)]
    assert moved_queries(data, before, after, most=1) == (rose[:1], fell[:1])
    assert moved_queries(data, before, before) == ([], [])
