"""The weights of the blend that search serves, and what chooses them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from refine_fast.pipeline.corpus.beir import RetrievalSet
from refine_fast.pipeline.evaluation.metrics import METRICS
from refine_fast.pipeline.serving import systems
from refine_fast.pipeline.serving.blend import (
    LEXICAL_SHARE,
    Blend,
    BlendChoice,
    Choosing,
    Components,
    choose_blend,
    choose_by_made,
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


def test_made_queries_choose_sentences_and_bm25_keeps_its_share_unless_it_loses() -> None:
    def queries(own: list[float], best: list[float], bm25: list[float]) -> Choosing:
        return Choosing([components(own, best, bm25)] * 30, [{1: 1.0}] * 30)

    words = choose_by_made(queries([1, 0.9, 0.8], [1, 0, 0], [0, 2, 0]))
    assert words.blend == Blend(lexical=LEXICAL_SHARE)
    assert words.without == {"sentences": words.blend, "lexical": Blend()}
    assert words.gains["lexical"].low > 0
    assert words.gains["all"] == words.gains["lexical"]
    assert words.queries == 30

    # Sentences find every passage already, as an adapted encoder does: BM25 cannot gain.
    both = choose_by_made(queries([1, 0.9, 0.8], [0, 2, 0], [0, 2, 0]))
    assert both.blend.sentences > 0
    assert both.blend.lexical == LEXICAL_SHARE
    assert both.gains["lexical"].mean == 0
    assert both.gains["sentences"].low > 0
    assert both.without["lexical"] == Blend(both.blend.sentences)
    assert both.without["sentences"] == words.blend

    loses = queries([0, 1, 0], [0, 1, 0], [9, 0, 9])
    assert choose_by_made(loses).blend == Blend()
    assert choose_by_made(loses).gains["lexical"].high < 0
    # One query of a hundred that loses shows no more than that the encoder finds them all.
    found = components([0, 1, 0], [0, 1, 0], [0, 1, 0])
    mixed = Choosing([*[found] * 594, *loses.parts[:6]], [{1: 1.0}] * 600)
    assert choose_by_made(mixed).gains["lexical"].high < 0
    assert choose_by_made(mixed).blend.lexical == LEXICAL_SHARE


def test_without_queries_passages_alone_are_served() -> None:
    """Few questions with several answers each may leave no query that chooses."""

    def encoded(texts: Sequence[str]) -> np.ndarray:
        return np.ones((len(texts), 8), np.float32)

    data = RetrievalSet("dev", ["a"], ["A passage."], [], [], [])
    held = Choosing(systems.components_of(data, encoded, systems.Remembered(encoded)), [])
    choice = systems.choose(held, [])
    assert (choice.blend, choice.queries) == (Blend(), 0)
    assert held.scores(Blend()).metrics == dict.fromkeys(METRICS, 0.0)


def test_terms_of_several_sentences_do_not_choose_the_blend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If there are no other queries, they do."""
    chosen: list[Choosing] = []

    def record(queries: Choosing) -> BlendChoice:
        chosen.append(queries)
        return BlendChoice(Blend(), 0, {})

    monkeypatch.setattr(systems, "choose_by_made", record)
    held = Choosing([components([1, 0], [1, 0], [1, 0])] * 3, [{i: 1.0} for i in range(3)])
    systems.choose(held, ["span", "keywords", "question"])
    systems.choose(held, ["span"] * 3)
    asked = [sorted(min(grades) for grades in queries.relevant) for queries in chosen]
    assert asked == [[1, 2], [0, 1, 2]]
    systems.choose(held, ["span", "user", "user"])
    assert len(chosen) == 2  # what people ask chooses both weights at once
