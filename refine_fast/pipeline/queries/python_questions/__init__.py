"""Questions about Python's language reference, written for this project.

Each was written from a sentence of the topics that ``help()`` shows, in the words of somebody who
has a problem. A passage answers a question if it holds the beginning of that sentence. Where a
version of Python words it differently, the question is left out.

    test.jsonl: what the demo is judged on.
    training.jsonl: what it trains on, by a large language model that read the topics but not
        test.jsonl: what ``--llm`` does for other documents, done beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...corpus.beir import RetrievalSet
from ...corpus.chunk import Chunk
from ...corpus.text import normalized_words
from ..query import Query


def python_questions(chunks: Sequence[Chunk]) -> RetrievalSet:
    """The test questions that the chunks answer, with all chunks as the corpus.

    Args:
        chunks: those of ``python_docs``. A topic that repeats another one answers its questions
            too.
    """
    answered = list(_answered("test.jsonl", chunks))
    return RetrievalSet(
        "Python questions",
        [chunk.id for chunk in chunks],
        [chunk.passage for chunk in chunks],
        [f"question {i}" for i in range(len(answered))],
        [question for question, _ in answered],
        [dict.fromkeys(ids, 1.0) for _, ids in answered],
        [chunk.title for chunk in chunks],
    )


def python_training_queries(chunks: Sequence[Chunk]) -> list[Query]:
    """The training questions that the chunks answer, one query for each chunk that does.

    Args:
        chunks: as for ``python_questions``.
    """
    answered = _answered("training.jsonl", chunks)
    return [Query(question, id, "llm:question") for question, ids in answered for id in ids]


def _answered(file: str, chunks: Sequence[Chunk]) -> Iterator[tuple[str, list[str]]]:
    """(question, ids of the chunks that answer it) of each question that has any."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    texts = [f" {normalized_words(chunk.text)} " for chunk in chunks]
    for row in map(json.loads, lines):
        phrase = f" {row['phrase']} "
        found = [chunk.id for chunk, text in zip(chunks, texts, strict=True) if phrase in text]
        if found:
            yield row["question"], found
