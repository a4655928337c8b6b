"""The questions about Python's language reference, by which the demo is judged."""

import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from refine_fast.pipeline.artifacts import CHUNKS
from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import write_records
from refine_fast.pipeline.corpus.python_docs import python_docs
from refine_fast.pipeline.corpus.text import normalized_words
from refine_fast.pipeline.queries.python_questions import python_questions
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.stages.query import split_queries
from refine_fast.pipeline.stages.score import scored_sets

ROWS = [
    json.loads(line)
    for line in (
        resources.files("refine_fast.pipeline.queries.python_questions") / "questions.jsonl"
    )
    .read_text(encoding="utf-8")
    .splitlines()
]


def paragraphs() -> list[Chunk]:
    return [
        Chunk(f"{entry.name}#{i}", text, entry.title, entry.source, 0, len(text))
        for entry in python_docs()
        for i, text in enumerate(entry.text.split("\n\n"))
    ]


def test_most_questions_have_their_passage_in_any_python() -> None:
    """Nearly all in the version that they were written from; fewer where the text was revised."""
    assert len({row["question"] for row in ROWS}) == len(ROWS) >= 150
    data = python_questions(paragraphs())
    assert len(data.queries) >= 0.8 * len(ROWS)
    answers = [len(relevant) for relevant in data.qrels]
    assert max(answers) <= 4
    assert sum(answers) / len(answers) < 1.2  # a phrase names one passage, or repeats of it


def test_no_question_quotes_its_passage() -> None:
    """A question that holds the phrase would test string matching."""
    for row in ROWS:
        assert row["phrase"] not in normalized_words(row["question"])


def test_python_docs_are_judged_by_these_questions_alone(tmp_path: Any) -> None:
    """No training query is held out, and none of the questions is a training query."""
    chunks = paragraphs()[:400]
    write_records(tmp_path / CHUNKS, chunks)
    config = RunConfig(out=tmp_path)
    context = RunContext(config, tmp_path, cast(Any, SimpleNamespace()))
    made = [Query(f"query {i}", chunk.id, "cloze") for i, chunk in enumerate(chunks)]
    assert split_queries(context, chunks, made).keys() == {"train", "dev"}
    data = scored_sets(context)["in_domain"]
    assert (data.name, data.docs) == ("Python questions", [chunk.passage for chunk in chunks])
    assert set(data.queries) <= {row["question"] for row in ROWS}


def test_what_is_given_overrides_the_demos_settings(tmp_path: Any) -> None:
    assert RunConfig(out=tmp_path).chunk_tokens == 128
    assert RunConfig(out=tmp_path, chunk_tokens=64).chunk_tokens == 64
    assert RunConfig(out=tmp_path / "out", docs=Path(__file__)).chunk_tokens == 256
