"""What the tests of the report, its figures and the model card share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_fast.pipeline.evaluation.metrics import METRICS
from refine_fast.pipeline.evaluation.scores import Scores
from refine_fast.pipeline.reporting.data import (
    Documents,
    Mining,
    Moved,
    Queries,
    ReportData,
    SetScores,
    Training,
    Triple,
)

WEIGHTS = (0.0, 0.2, 0.35, 1.0)


def answered(share: float, queries: int) -> Scores:
    """A system that answers this share of the queries at rank 1 and none of the others."""
    values = np.zeros(queries)
    values[: round(queries * share)] = 1
    return Scores(dict.fromkeys(METRICS, values))


def set_scores(name: str, changes: Sequence[float], queries: int = 400) -> SetScores:
    """BM25 answers 50% of the queries and the base model 60%; ``changes`` are the shares that each
    fusion weight adds."""
    at_weight = {
        weight: answered(0.6 + change, queries)
        for weight, change in zip(WEIGHTS, (0.0, *changes), strict=True)
    }
    return SetScores(name=name, passages=1000, bm25=answered(0.5, queries), at_weight=at_weight)


UP, SAME, DOWN = (0.05, 0.1, 0.2), (0.0, 0.0, 0.0), (-0.05, -0.1, -0.2)


def report_data() -> ReportData:
    """A report with two out-of-domain sets, in which the fused model wins at home."""
    rng = np.random.default_rng(0)
    triple = Triple(
        "who *sees* it?",
        ("the reader\nof reports", 0.615),
        (("nobody | at all " + 100 * "x ", 0.507),),
    )
    return ReportData(
        Documents("my|docs <b>", 40, 1321, {"exact": 3, "near": 14}),
        Queries(
            "made from the documents without an LLM",
            "all",
            {"cloze": 1321, "title": 700},
            held_out_by_document=True,
        ),
        Mining(
            "cosine",
            (0.5, 0.7),
            False,
            5,
            4,
            "hardest",
            "passage",
            None,
            2021,
            1475,
            rng.normal(0.1, 0.1, 2000),
            rng.normal(0.5, 0.1, 500),
            triples=(triple,),
        ),
        Training(
            base="all-MiniLM-L6-v2",
            temperature=0.02,
            learning_rate=1e-4,
            batch_size=64,
            similar_batches=True,
            epochs=1,
            steps=129,
            examples=2021,
            precision="bf16",
            seed=17,
            loss_function="InfoNCE",
            loss=(1.2, 0.7),
        ),
        0.35,
        None,
        (set_scores("your documents", UP), set_scores("general knowledge", SAME)),
        set_scores("own", UP),
        [set_scores("scifact", SAME, 300), set_scores("travel", SAME, 500)],
        {"python": "3.11", "refine_fast": "0.1.0"},
        [Moved("who *sees* it?", "the reader | of reports", None, 2)],
        [Moved("where?", "here", 1, 3)],
        {"chunk": (2.0, 312), "train": (90.0, 5120)},
    )


HOSTILE = (
    "a|b",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://e.org/p.png)",
    "`code` ``",
    "*_strong_*",
    "__init__ _x_ my_file_name",
    "# no\n## heading",
    "&lt;b&gt; &amp;",
    "back\\slash \\| \\",
    "a \r\n\r\n- b",
    "{{ 7 * 7 }} {% raw %}",
    "$x$ ~~s~~",
)
"""Texts that are markup in Markdown, HTML or a template."""
