"""choose: what the held-out queries may choose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refine_fast.pipeline.artifacts import DEV
from refine_fast.pipeline.evaluation.scores import Scores
from refine_fast.pipeline.stages.choose import chosen


@pytest.mark.parametrize(
    ("kinds", "weight"),
    [(["cloze", "keywords", "user"], 0.5), (["user"], 1.0), (["llm:question", "span"], 1.0)],
)
def test_made_queries_choose_no_large_weight(
    tmp_path: Path, kinds: list[str], weight: float
) -> None:
    """Each question has several answers, the people's most: questions count, not answers."""
    rows = [
        {"text": f"query {i}", "chunk_id": f"{i}-{answer}", "kind": kind}
        for i, kind in enumerate(kinds)
        for answer in range(4 if kind in ("user", "span") else 1)
    ]
    (tmp_path / DEV).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    context: Any = SimpleNamespace(
        path=lambda name: tmp_path / name, config=SimpleNamespace(tolerance=0.005)
    )
    curve = {
        at: {
            "dev": Scores({"ndcg@10": np.full(20, 0.2 + at / 2)}),
            "guard": Scores({"ndcg@10": np.full(20, 0.5)}),
        }
        for at in (0.0, 0.5, 1.0)
    }
    assert chosen(context, curve).weight == weight
