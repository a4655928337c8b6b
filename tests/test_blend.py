"""The weights of the blend that search serves, and what chooses them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from refine_fast.pipeline.corpus.beir import RetrievalSet
from refine_fast.pipeline.evaluation.metrics import METRICS
from refine_fast.pipeline.serving import systems
from refine_fast.pipeline.serving.blend import (
    Blend,
    BlendChoice,
    Choosing,
    Components,
    choose_blend,
    choose_in_turn,
)


def components(own: list[float], best: list[float], bm25: list[float]) -> Components:
    columns = (np.array(x, float) for x in (own, best, bm25))
    return Components(np.arange(len(own)), *columns, np.array(bm25) > 0)


def test_the_blend_takes_what_helps_and_refuses_what_is_not_shown_to() -> None:
    useful = [components([1, 0.9, 0.8], [0, 0, 0], [0, 2, 0])] * 40
    choice = choose_blend(Choosing(useful, [{1: 1.0}] * 40))
    assert choice.blend.lexical > 0
    assert choice.blend.sentences == 0
    assert choice.gains["all"].low > 0

    helps_once = [components([1, 0.9, 0.8], [0, 0, 0], [0, 2, 0])]
    alike = [components([1, 0, 0], [1, 0, 0], [1, 0, 0])] * 39
    choice = choose_blend(Choosing(helps_once + alike, [{1: 1.0}] + [{0: 1.0}] * 39))
    assert choice.blend == Blend()
    assert choice.gains["all"].mean == 0
    assert choose_blend(Choosing([], [])).blend == Blend()


def test_made_queries_choose_sentences_alone_and_bm25_together_with_others() -> None:
    # Of the queries' own set sentences find the answer, and so does BM25; elsewhere neither does.
    own = Choosing([components([1, 0.9, 0.8], [0, 2, 0], [0, 2, 0])] * 30, [{1: 1.0}] * 30)
    alike = Choosing([components([1, 0.9, 0.8], [1, 0, 0], [1, 0, 0])] * 30, [{0: 1.0}] * 30)
    misled = Choosing([components([1, 0.9, 0], [0, 0, 3], [0, 0, 99])] * 30, [{0: 1.0}] * 30)
    choice = choose_in_turn(own, alike)
    assert choice.blend.sentences > 0
    assert choice.blend.lexical == 0  # sentences found them already
    assert (choice.queries, choice.general) == (60, 30)
    assert choice.gains["sentences"].low > 0
    assert choice.without["lexical"] == choice.blend
    assert choice.without["sentences"].sentences == 0 < choice.without["sentences"].lexical
    assert choose_in_turn(own, misled).blend == choice.blend  # others do not judge sentences
    unhelped = Choosing([components([1, 0.9, 0.8], [1, 0, 0], [0, 2, 0])] * 30, [{1: 1.0}] * 30)
    assert choose_in_turn(unhelped, alike).blend.lexical > 0
    assert choose_in_turn(unhelped, misled).blend == Blend()


def test_without_queries_passages_alone_are_served() -> None:
    """Few questions with several answers each may leave no query that chooses."""

    def encoded(texts: Sequence[str]) -> np.ndarray:
        return np.ones((len(texts), 8), np.float32)

    data = RetrievalSet("dev", ["a"], ["A passage."], [], [], [])
    held = Choosing(systems.components_of(data, encoded, systems.Remembered(encoded)), [])
    choice = systems.choose(held, [], encoded, encoded)
    assert (choice.blend, choice.queries) == (Blend(), 0)
    assert held.scores(Blend()).metrics == dict.fromkeys(METRICS, 0.0)


def test_drawn_terms_do_not_choose_the_blend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their words are those that weigh most in BM25; if there are no others, they do."""
    chosen: list[tuple[Choosing, Choosing]] = []

    def record(own: Choosing, others: Choosing) -> BlendChoice:
        chosen.append((own, others))
        return BlendChoice(Blend(), 0, {})

    def encoded(texts: Sequence[str]) -> np.ndarray:
        return np.random.default_rng(0).standard_normal((len(texts), 8)).astype(np.float32)

    monkeypatch.setattr(systems, "choose_in_turn", record)
    held = Choosing([components([1, 0], [1, 0], [1, 0])] * 3, [{i: 1.0} for i in range(3)])
    systems.choose(held, ["span", "keywords", "question"], encoded, encoded)
    systems.choose(held, ["span"] * 3, encoded, encoded)
    asked = [sorted(min(grades) for grades in own.relevant) for own, _ in chosen]
    assert asked == [[1, 2], [0, 1, 2]]
    assert [len(others.parts) for _, others in chosen] == [2, 3]
    systems.choose(held, ["span", "user", "user"], encoded, encoded)
    assert len(chosen) == 2  # what people ask chooses both weights at once
