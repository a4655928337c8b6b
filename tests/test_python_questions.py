"""The questions about Python's language reference: what the demo trains on and is judged by."""

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
from refine_fast.pipeline.corpus.text import normalize, normalized_words
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.queries.python_questions import (
    python_questions,
    python_training_queries,
)
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.stages.query import offline_queries, split_queries
from refine_fast.pipeline.stages.score import scored_sets

FOLDER = resources.files("refine_fast.pipeline.queries.python_questions")
ROWS, TRAINING = (
    [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]
    for file in ("test.jsonl", "training.jsonl")
)


def paragraphs() -> list[Chunk]:
    return [
        Chunk(f"{entry.name}#{i}", text, entry.title, entry.source, 0, len(text))
        for entry in python_docs()
        for i, text in enumerate(entry.text.split("\n\n"))
    ]


def demo(out: Path, **options: Any) -> RunContext:
    return RunContext(RunConfig(out=out, **options), out, cast(Any, SimpleNamespace()))


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
    for row in ROWS + TRAINING:
        assert row["phrase"] not in normalized_words(row["question"])


def test_training_queries_cover_the_topics_and_hold_no_test_question(tmp_path: Path) -> None:
    """Nearly all of them find their passage."""
    chunks = paragraphs()
    written = python_training_queries(chunks)
    assert len({query.text for query in written}) >= 0.8 * len(TRAINING) >= 640
    by_id = {chunk.id: chunk for chunk in chunks}
    phrase = {row["question"]: row["phrase"] for row in TRAINING}
    for query in written:
        assert f" {phrase[query.text]} " in f" {normalized_words(by_id[query.chunk_id].text)} "
    topics = {chunk.source for chunk in chunks}
    assert len({by_id[query.chunk_id].source for query in written}) >= 0.9 * len(topics)
    test = {normalize(row["question"]) for row in ROWS}
    split = split_queries(demo(tmp_path), chunks, written)
    assert not test & {normalize(query.text) for query in (*split["train"], *split["dev"])}


def test_no_test_question_resembles_a_training_question(minilm: Path) -> None:
    """As README.md says."""
    model = load_encoder(minilm)
    test, training = (
        encode(model, [row["question"] for row in rows], role="query", bf16=False)
        for rows in (ROWS, TRAINING)
    )
    assert (test @ training.T).max() < 0.8


def test_the_demo_trains_on_them_unless_other_queries_are_asked_for(tmp_path: Path) -> None:
    chunks = paragraphs()[:50]
    context = demo(tmp_path)
    assert offline_queries(context, chunks, {}) == python_training_queries(chunks)
    assert context.distill == 0.25
    assert demo(tmp_path, distill="choose").shares == (0, 0.25, 1)
    assert "language model" in context.query_source
    made = demo(tmp_path, query_kinds="cloze,title")
    assert {query.kind for query in offline_queries(made, chunks, {})} <= {"cloze", "title"}
    assert made.distill == 0.5
    assert demo(tmp_path, llm="smollm2").distill == 0.5  # made queries come besides
    assert demo(tmp_path, llm="smollm2", query_kinds="none").distill == 0.25


def test_python_docs_are_judged_by_these_questions_alone(tmp_path: Any) -> None:
    """No training query is held out, and none of the questions is a training query."""
    chunks = paragraphs()[:400]
    write_records(tmp_path / CHUNKS, chunks)
    context = demo(tmp_path)
    made = [Query(f"query {i}", chunk.id, "cloze") for i, chunk in enumerate(chunks)]
    assert split_queries(context, chunks, made).keys() == {"train", "dev"}
    data = scored_sets(context)["in_domain"]
    assert (data.name, data.docs) == ("Python questions", [chunk.passage for chunk in chunks])
    assert set(data.queries) <= {row["question"] for row in ROWS}


def test_what_is_given_overrides_the_demos_settings(tmp_path: Any) -> None:
    assert RunConfig(out=tmp_path).chunk_tokens == 128
    assert RunConfig(out=tmp_path, chunk_tokens=64).chunk_tokens == 64
    assert RunConfig(out=tmp_path / "out", docs=Path(__file__)).chunk_tokens == 256
