"""The report says what was measured, whether it is welcome or not, and its three forms say the same."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from refine_fast.pipeline.evaluation.metrics import METRICS, Scores, score_ranking
from refine_fast.pipeline.reporting.data import (
    Documents,
    Judged,
    Mining,
    Queries,
    ReportData,
    Training,
    Triple,
)
from refine_fast.pipeline.reporting.render import facts, write_report
from refine_fast.pipeline.reporting.verdict import verdict

WEIGHTS = (0.0, 0.2, 0.35, 1.0)


def judged(name: str, changes: Sequence[float], queries: int = 400) -> Judged:
    """60% of the queries are answered at once by the base model; ``changes``: the share that each weight adds to or takes from these."""

    def scores(share: float) -> Scores:
        ranked = np.full((queries, 10), -1)
        ranked[: round(queries * share), 0] = 7
        return score_ranking(ranked, [{7}] * queries)

    return Judged(name, 1000, scores(0.5), {weight: scores(0.6 + change) for weight, change in zip(WEIGHTS, (0.0, *changes), strict=True)})


UP, SAME, DOWN = (0.05, 0.1, 0.2), (0.0, 0.0, 0.0), (-0.05, -0.1, -0.2)


@pytest.fixture
def data() -> ReportData:
    rng = np.random.default_rng(0)
    return ReportData(
        Documents("my|docs <b>", 40, 1321, {"exact": 3, "near": 14}),
        Queries("made from the documents without an LLM", True, {"cloze": 1321, "title": 700}, held_out_by_document=True),
        Mining(
            (0.5, 0.7),
            False,
            5,
            4,
            "hardest",
            2021,
            1475,
            rng.normal(0.1, 0.1, 2000),
            rng.normal(0.5, 0.1, 500),
            (Triple("who *sees* it?", ("the reader\nof reports", 0.615), (("nobody | at all " + 100 * "x ", 0.507),)),),
        ),
        Training("all-MiniLM-L6-v2", 0.02, 1e-4, 64, 1, 129, 2021, "bf16", 17, (1.2, 0.7)),
        0.35,
        None,
        judged("own", UP),
        [judged("scifact", SAME, 300), judged("travel", SAME, 500)],
        {"python": "3.11", "refine_fast": "0.1.0"},
    )


@pytest.mark.parametrize(
    ("own", "elsewhere", "said", "unsaid"),
    [
        (UP, SAME, ["documents: improved.** recall@3 0.600 -> 0.700: +10.0 points [", "pooled): no measurable change"], ["Keep the base"]),
        (SAME, SAME, ["your documents: no measurable change", "Keep the base model", "arXiv 2502.19712"], ["improved"]),
        (DOWN, SAME, ["your documents: got worse", "Keep the base model"], ["improved"]),
        (UP, DOWN, ["pooled): got worse", "No smaller weight that was tried improves"], []),
        (UP, (0.0, -0.1, -0.2), ["pooled): got worse", "0.2 is the largest that improved your documents", "`--weight 0.2`"], []),
    ],
)
def test_verdict(data: ReportData, own: Sequence[float], elsewhere: Sequence[float], said: list[str], unsaid: list[str]) -> None:
    others = [judged("scifact", elsewhere, 300), judged("travel", elsewhere, 500)]
    text = "\n".join(verdict(dataclasses.replace(data, in_domain=judged("own", own), out_of_domain=others)))
    for words in said:
        assert words in text
    for words in unsaid:
        assert words not in text


def test_what_fusion_of_embeddings_means_is_said(data: ReportData) -> None:
    others = [judged("scifact", (0.0, -0.1, -0.2), 300)]
    text = "\n".join(verdict(dataclasses.replace(data, fusion="embeddings", out_of_domain=others)))
    assert "0.2 is the largest" in text
    assert "`weight` in `model/twin_config.json` sets it." in text
    assert "--weight" not in text


def test_what_was_not_measured_is_said(data: ReportData) -> None:
    assert "Out of domain: not measured" in "\n".join(verdict(dataclasses.replace(data, out_of_domain=[])))


def test_sets_are_pooled_by_query(data: ReportData) -> None:
    others = [judged("small", DOWN, 100), judged("large", UP, 300)]
    pooled = dataclasses.replace(data, out_of_domain=others).pooled
    assert (pooled.queries, pooled.passages) == (400, 2000)
    assert pooled.gain(0.35, "recall@3").mean == pytest.approx((100 * -0.1 + 300 * 0.1) / 400)


@pytest.mark.parametrize("sets", [0, 1, 4])  # no panel besides one's own; one; a second row that is not full
def test_write_report(data: ReportData, tmp_path: Path, sets: int) -> None:
    data = dataclasses.replace(data, out_of_domain=[judged(f"set {i}", SAME, 50) for i in range(sets)])
    write_report(tmp_path, data)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == [
        "figures/recall.png", "figures/similarities.png", "figures/weights.png", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    for path in (tmp_path / "figures").iterdir():
        picture = imread(path)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].min(axis=2).mean() < 0.999  # something is drawn

    text = (tmp_path / "report.md").read_text()
    for fact in (
        "temperature 0.02", "| learning rate, batch | 0.0001, 64 |", "cosine 0.50 to 0.70 (fixed) after the 5 most similar",
        "empty for 1,475 of 2,021 queries (73.0%)", "--band auto", "bf16, 17", "An LLM writes queries", "documents that training never saw",
        "3 exact, 14 near", "1,321 cloze, 700 title", "the weight given",
        "- **who \\*sees\\* it?**\n  - answer, 0.61: the reader of reports\n",
        "  - negative, 0.51: nobody \\| at all x",
    ):  # fmt: skip
        assert fact in text, fact
    assert "| **0.35** | +10.0 points [" in text

    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # one file: nothing is fetched
    assert page.count("data:image/png;base64,") == 3
    assert "<b>" not in page  # the user's names are text, never markup
    assert "my|docs &lt;b&gt;" in page
    assert page.count("<table>") == 2 * (1 + sets) + 2

    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(facts(data)))
    fused = next(point for point in saved["in_domain"]["weights"] if point["weight"] == saved["weight"])
    assert fused["metrics"] == pytest.approx(data.in_domain.at_weight[0.35].metrics)
    assert fused["gain"].keys() == set(METRICS)
    assert fused["gain"]["recall@3"]["verdict"] == "improved"
    assert saved["training"]["seed"] == 17


def test_other_sources_other_words(data: ReportData, tmp_path: Path) -> None:
    """A weight chosen by the rule, the user's own queries, a calibrated band that few queries miss."""
    given = Queries("from questions.jsonl", False, {"user": 900}, held_out_by_document=False)
    mining = dataclasses.replace(data.mining, calibrated=True, empty=3)
    write_report(tmp_path, dataclasses.replace(data, queries=given, mining=mining, weight_chosen_on="120 dev queries"))
    text = (tmp_path / "report.md").read_text()
    for words in ("chosen on 120 dev queries", "fitted to this encoder", "other queries about the same passages"):
        assert words in text
    for words in ("without an LLM", "--band auto"):
        assert words not in text
