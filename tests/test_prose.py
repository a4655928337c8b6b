"""What is no prose is no query, with a language model and without one."""

import numpy as np
import pytest

from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm.filters import (
    MIN_LEAD,
    check,
    found_by_retriever,
    lead_over_neighbours,
)
from refine_fast.pipeline.queries.prose import not_prose
from refine_fast.pipeline.queries.synthetic import BOILERPLATE, synthesize_queries


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("+--------+--------+ a border of a table", "line of a table"),
        ("| Option | Meaning | Default |", "line of a table"),
        ("─────── Ergebnis der Messung", "line of a table"),
        ("12 345 -- 67", "no letters"),
        ("</table> what follows the table", "markup"),
        (">>> print(value) shows the value", "code"),
        ("for (int i = 0; i < n; ++i) {", "code"),
        ("if a == b then they are the same", "code"),
        ("a1 2 3 4 5 6 7 8 9 10 11", "mostly signs"),
        ("How does the museum's east wing (closed since 1908) earn $3 a ticket?", None),
        ("What do x.__get__(a) and C++ have in common?", None),
        ("What does a == b compare, and when is it the same as a is b?", None),
        ("How do I use a List<String> in Java?", None),
        ("What does the <table> tag do?", None),
        ("A List<String> holds texts in Java.", "markup"),
        ("Wie hoch ist der Kran?", None),
        ("Πότε έκλεισε το μουσείο του λιμανιού;", None),
        ("博物館の東館はいつから休館しますか？", None),
        ("เครนยกของได้กี่ตัน", None),
        ("संग्रहालय कब बंद होता है?", None),
        ("متى يغلق المتحف؟", None),
    ],
)
def test_what_is_prose(text: str, reason: str | None) -> None:
    assert not_prose(text) == reason


def made(*texts: str) -> set[str]:
    chunks = [Chunk(f"c{i}", t, "", f"f{i}", 0, len(t)) for i, t in enumerate(texts)]
    queries = synthesize_queries(chunks, seed=0, per_chunk=4, kinds=("cloze",))
    return {query.text for query in queries}


def test_clozes_are_prose() -> None:
    heading = (
        'The "assert" statement of the Python language\n*********************************\n\n'
        "Assert statements are a convenient way to insert checks into a program.\n\n"
        "+----------+-------------+\n| Operator | Description |\n+----------+-------------+\n"
        "| lambda of the table that is here | Lambda expression of the table |\n"
    )
    assert made(heading, "Nothing else is to be found in this other text.") == {
        'The "assert" statement of the Python language',
        "Assert statements are a convenient way to insert checks into a program.",
        "Nothing else is to be found in this other text.",
    }


def test_boilerplate_makes_no_cloze() -> None:
    texts = [
        f"All rights are reserved by the old harbour office. Crane number {name} lifts many tonnes."
        for name in ("one", "two", "three", "four")
    ]
    assert not any("rights" in text for text in made(*texts))
    assert any("rights" in text for text in made(*texts[: BOILERPLATE - 1]))


def test_a_vague_query_leads_its_neighbours_by_little() -> None:
    """Chunks 0 to 3 resemble one another; the first query fits 0 alone, the second all four."""
    rng = np.random.default_rng(0)
    theme, own = rng.standard_normal((2, 64))
    chunks = np.array([theme + own * (i == 0) + 0.1 * rng.standard_normal(64) for i in range(4)])
    queries = np.array([theme + own, theme])
    chunks, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (chunks, queries))
    leads = lead_over_neighbours(
        queries.astype(np.float32), chunks.astype(np.float32), np.array([0, 1])
    )
    expected = [
        q @ chunks[i] - np.delete(chunks, i, 0).dot(q).mean() for i, q in enumerate(queries)
    ]
    np.testing.assert_allclose(leads, expected, atol=1e-5)
    assert leads[0] > MIN_LEAD > 0
    longer = lead_over_neighbours(
        7 * queries.astype(np.float32), 3 * chunks.astype(np.float32), np.array([0, 1])
    )
    np.testing.assert_allclose(longer, leads, rtol=1e-5)  # a dot product's unit is another
    alone = lead_over_neighbours(
        queries[:1].astype(np.float32), chunks[:1].astype(np.float32), np.array([0])
    )
    assert alone == [np.inf]


def test_the_round_trip_finds_by_any_similarity() -> None:
    """Dot products are not within (-1, 1), as cosines are."""
    rng = np.random.default_rng(0)
    chunks = 10 * rng.standard_normal((50, 16)).astype(np.float32)
    assert found_by_retriever(chunks, chunks, np.arange(50), 3).all()
    assert not found_by_retriever(-chunks, chunks, np.arange(50), 3).any()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("how to center a <div> with flexbox", "how-to"),
        ("difference between == and === in JavaScript", "keywords"),
        ("I have chest pain after taking ibuprofen", "claim"),
        ("sure start programme eligibility", "keywords"),
        ("sorry day Australia date", "keywords"),
        ("Okay Airways fleet size", "keywords"),
    ],
)
def test_a_kind_that_the_reply_names_may_begin_and_name_what_prose_does_not(
    text: str, kind: str
) -> None:
    assert check(text, "A passage about something else.", kind) is None
    assert check(text, "A passage about something else.", "query") is not None


@pytest.mark.parametrize(
    "text",
    [
        "Here are the keywords for the passage",
        "I cannot provide a claim for this",
        "Sorry, I am unable to help with this",
    ],
)
def test_a_preamble_under_a_kind_is_one(text: str) -> None:
    assert check(text, "A passage about something else.", "claim") in ("preamble", "refusal")
