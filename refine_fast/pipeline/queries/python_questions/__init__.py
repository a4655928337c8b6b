"""Questions about Python's language reference, written for this project.

They are asked in the words of somebody who has a problem, and each was written from a sentence of
the topics that ``help()`` shows. A passage answers a question if it holds the beginning of that
sentence. Where a version of Python words it differently, the question is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...corpus.beir import RetrievalSet
from ...corpus.chunk import Chunk
from ...corpus.text import normalized_words


def python_questions(chunks: Sequence[Chunk]) -> RetrievalSet:
    """The questions that the chunks answer, with all chunks as the corpus.

    Args:
        chunks: those of ``python_docs``. A topic that repeats another one answers its questions
            too.
    """
    lines = (Path(__file__).parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [f" {normalized_words(chunk.text)} " for chunk in chunks]
    asked, relevant = [], []
    for row in map(json.loads, lines):
        phrase = f" {row['phrase']} "
        found = {chunk.id: 1.0 for chunk, text in zip(chunks, texts, strict=True) if phrase in text}
        if found:
            asked.append(row["question"])
            relevant.append(found)
    return RetrievalSet(
        "Python questions",
        [chunk.id for chunk in chunks],
        [chunk.passage for chunk in chunks],
        [f"question {i}" for i in range(len(asked))],
        asked,
        relevant,
        [chunk.title for chunk in chunks],
    )
