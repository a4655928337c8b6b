"""A retrieval set of general knowledge, written for this project.

Short passages on everyday and school subjects, nine on each, close enough to one another that
telling them apart takes reading; two questions on each, in words other than the passage's. It shows
what an encoder forgets while it adapts to documents on something else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from ...corpus.beir import RetrievalSet
from ...corpus.text import passage_text


def general_knowledge(questions: Literal["guard", "test"]) -> RetrievalSet:
    """All passages with one question on each.

    Args:
        questions: "guard": the first question of each passage, which may choose a weight; "test":
            the second one, which chooses nothing.
    """
    lines = (Path(__file__).parent / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    passages = [json.loads(line) for line in lines]
    ids = [f"passage {i}" for i in range(len(passages))]
    asked = ["guard", "test"].index(questions)
    return RetrievalSet(
        "general knowledge",
        ids,
        [passage_text(passage["title"], passage["text"]) for passage in passages],
        [f"question {i}" for i in range(len(passages))],
        [passage["questions"][asked] for passage in passages],
        [{id: 1.0} for id in ids],
    )
