"""The report states what was measured, welcome or not, and its three forms agree."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.image import imread
from report_samples import DOWN, HOSTILE, SAME, UP, report_data, set_scores

from refine_fast.mine import NO_LOWER_EDGE
from refine_fast.pipeline import RunConfig
from refine_fast.pipeline.artifacts import QUERIES
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.corpus.jsonl import write_records
from refine_fast.pipeline.evaluation.choice import FORGETS, NOT_BETTER, TOO_FEW, Choice
from refine_fast.pipeline.evaluation.metrics import METRICS
from refine_fast.pipeline.evaluation.significance import Gain
from refine_fast.pipeline.queries.query import Made, Query
from refine_fast.pipeline.reporting import render
from refine_fast.pipeline.reporting.data import Documents, Moved, Queries, ReportData, Triple
from refine_fast.pipeline.reporting.facts import report_facts
from refine_fast.pipeline.reporting.figures import similarities_figure
from refine_fast.pipeline.reporting.render import write_report
from refine_fast.pipeline.reporting.templating import code_span, escape_markdown
from refine_fast.pipeline.reporting.verdict import Statement, verdict
from refine_fast.pipeline.stages.report import _queries


@pytest.fixture
def data() -> ReportData:
    return report_data()


# ── the verdict ──


def bold(statements: Iterable[Statement]) -> str:
    return "\n".join(f"**{statement.lead}** {statement.text}" for statement in statements)


@pytest.mark.parametrize(
    ("own", "elsewhere", "stated", "absent"),
    [
        (
            UP,
            SAME,
            [
                "documents: improved.** recall@3 0.600 -> 0.700: +10.0 points [",
                "pooled): no measurable change",
            ],
            ["Keep the base"],
        ),
        (
            SAME,
            SAME,
            [
                "your documents: no measurable change",
                "Keep the base model",
                "arXiv 2502.19712",
            ],
            ["improved"],
        ),
        (DOWN, SAME, ["your documents: got worse", "Keep the base model"], ["improved"]),
        (UP, DOWN, ["pooled): got worse", "none that was tried improves"], ["--weight"]),
        (
            UP,
            (0.0, -0.1, -0.2),
            [
                "pooled): got worse",
                "A smaller weight, 0.2, loses nothing measurable",
                "the largest that improves your documents",
                "`--weight 0.2`",
            ],
            [],
        ),
    ],
)
def test_verdict(
    data: ReportData,
    own: Sequence[float],
    elsewhere: Sequence[float],
    stated: list[str],
    absent: list[str],
) -> None:
    others = [set_scores("scifact", elsewhere, 300), set_scores("travel", elsewhere, 500)]
    changed = dataclasses.replace(
        data,
        in_domain=set_scores("own", own),
        out_of_domain=others,
        curves=(set_scores("your documents", own), set_scores("general knowledge", elsewhere)),
    )
    text = bold(verdict(changed))
    for words in stated:
        assert words in text
    for words in absent:
        assert words not in text


@pytest.mark.parametrize(("made", "which"), [("all", "They"), ("some", "Some of them")])
def test_queries_that_judge_what_was_made_like_them(
    data: ReportData, made: Made, which: str
) -> None:
    """The verdict says what they are: on people's questions the same model may have lost."""

    def stated(made: Made, held_out: bool) -> str:
        asked = dataclasses.replace(data.queries, made=made, held_out_by_document=held_out)
        return bold(verdict(dataclasses.replace(data, queries=asked)))

    warning = "people's questions may gain less, or lose"
    assert f"{which} were made without an LLM, like those" in stated(made, held_out=True)
    assert warning in stated(made, held_out=True)
    assert warning not in stated(made, held_out=False) + stated("none", held_out=True)


@pytest.mark.parametrize(
    ("options", "made", "source"),
    [
        ({}, "none", "written by a large language model for this package"),
        ({"query_kinds": "span"}, "all", "made from the documents without an LLM"),
        ({"llm": "http://localhost/v1", "llm_model": "m"}, "none", "written by m"),
        ({"llm": "smollm2"}, "some", "written by smollm2 and made from the documents"),
        ({"queries": __file__, "query_kinds": "none"}, "none", "from test_report.py"),
        # those that test are the user's alone
        (
            {"queries": __file__, "query_kinds": "span"},
            "none",
            "from test_report.py and made from the documents",
        ),
    ],
    ids=["the demo's", "made", "a model's", "both", "the user's", "the user's and made"],
)
def test_who_wrote_the_queries(
    tmp_path: Path, options: dict[str, str], made: Made, source: str
) -> None:
    context = RunContext(RunConfig(out=tmp_path, **options), tmp_path, Console(quiet=True))
    write_records(tmp_path / QUERIES, [Query("who?", "c", "span")])
    queries = _queries(context)
    assert (queries.made, queries.source) == (made, source)


def test_the_remedy_for_a_fusion_of_embeddings(data: ReportData) -> None:
    others = [set_scores("scifact", (0.0, -0.1, -0.2), 300)]
    curves = data.curves[0], set_scores("general knowledge", (0.0, -0.1, -0.2))
    changed = dataclasses.replace(data, fusion="embeddings", out_of_domain=others, curves=curves)
    text = bold(verdict(changed))
    assert "A smaller weight, 0.2," in text
    assert "set `weight` in `model/twin_config.json`." in text
    assert "--weight" not in text


def test_an_unmeasured_domain_is_stated(data: ReportData) -> None:
    changed = dataclasses.replace(data, out_of_domain=[])
    assert "Out of domain: not measured" in bold(verdict(changed))


@pytest.mark.parametrize(
    ("refused", "stated"),
    [
        (NOT_BETTER, "no fusion weight is shown to retrieve your documents better"),
        (FORGETS, "every fusion weight that is better forgets more than is tolerated"),
        (TOO_FEW, "too few queries are left to compare fusion weights on (400; fewer than 6 can"),
    ],
)
def test_a_kept_base_is_the_verdict(data: ReportData, refused: str, stated: str) -> None:
    choice = Choice(0.0, 0.75, Gain(0.01, -0.01, 0.03), Gain(-0.02, -0.03, -0.01), refused)
    [statement] = verdict(dataclasses.replace(data, weight=0.0, choice=choice))
    assert statement.lead == "The base model is kept:"
    assert stated in statement.text
    assert ("At the best weight, 0.75" in statement.text) == (refused != TOO_FEW)
    assert "`--weight`" in statement.text


def test_sets_are_pooled_by_query(data: ReportData) -> None:
    others = [set_scores("small", DOWN, 100), set_scores("large", UP, 300)]
    pooled = dataclasses.replace(data, out_of_domain=others).pooled
    assert pooled is not None
    assert (pooled.queries, pooled.passages) == (400, 2000)
    assert pooled.gain(0.35, "recall@3").mean == pytest.approx((100 * -0.1 + 300 * 0.1) / 400)


# ── the three forms ──

FACTS = (
    "temperature 0.02",
    "| learning rate, batch | 0.0001, 64, similar documents together |",
    "cosine 0.50 to 0.70 (fixed) after the 5 most similar",
    "empty for 1,475 of 2,021 queries (73.0%)",
    "--band auto",
    "bf16, 17",
    "An LLM writes queries",
    "passages that training never saw",
    "| documents | my\\|docs \\<b\\>: 40 documents, 1,321 passages |",
    "3 exact, 14 near",
    "1,321 cloze, 700 title",
    "the weight given",
    "- **who \\*sees\\* it?**\n  - answer, 0.61: the reader of reports\n",
    "  - negative, 0.51: nobody \\| at all x",
    "| over 10 -> 2 | who \\*sees\\* it? | the reader \\| of reports |\n",
    "| 1 -> 3 | where? | here |\n",
    "| train | 1.5 min | 5,120 MiB |\n| all | 1.5 min | 5,120 MiB |\n",
    "| fused, weight 0.35 | 0.700 | 0.700 | 0.700 | 0.700 | 0.700 | 0.700 |",
)


@pytest.mark.parametrize("sets", [0, 1, 4])  # one panel; two; a second row that is not full
def test_write_report(data: ReportData, tmp_path: Path, sets: int) -> None:
    others = [set_scores(f"set {i}", SAME, 50) for i in range(sets)]
    data = dataclasses.replace(data, out_of_domain=others)
    write_report(tmp_path, data)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == [
        "figures/recall.png",
        "figures/similarities.png",
        "figures/weights.png",
        "report.html",
        "report.json",
        "report.md",
    ]
    for path in (tmp_path / "figures").iterdir():
        assert min(imread(path).shape[:2]) > 300

    text = (tmp_path / "report.md").read_text()
    for fact in FACTS:
        assert fact in text, fact
    assert "| **0.35** | +10.0 points [" in text
    assert "\n\n\n" not in text

    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # one file that fetches nothing
    assert page.count("data:image/png;base64,") == 3
    assert "<b>" not in page  # the user's names are text, never markup
    assert "<title>all-MiniLM-L6-v2, refined on my|docs &lt;b&gt;</title>" in page
    assert "<h1>all-MiniLM-L6-v2, refined on my|docs &lt;b&gt;</h1>" in page
    assert page.count("<table>") == 2 * (1 + sets) + 5

    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report_facts(data)))
    at_weight = {point["weight"]: point for point in saved["in_domain"]["weights"]}
    fused = at_weight[saved["weight"]]
    assert fused["metrics"] == pytest.approx(data.in_domain.at_weight[0.35].metrics)
    assert fused["gain"].keys() == set(METRICS)
    assert fused["gain"]["recall@3"]["verdict"] == "improved"
    assert saved["training"]["seed"] == 17
    assert saved["verdict"][0].startswith("On your documents: improved. recall@3 0.600 -> 0.700")


def test_the_similarity_of_a_model_compared_by_dot_product(
    data: ReportData, tmp_path: Path
) -> None:
    mining = dataclasses.replace(data.mining, similarity="dot product divided by 23.4")
    data = dataclasses.replace(data, mining=mining)
    write_report(tmp_path, data)
    text = (tmp_path / "report.md").read_text()
    assert "dot product divided by 23.4 0.50 to 0.70 (fixed) after the 5 most similar" in text
    assert "each with its similarity under the base model (dot product divided by 23.4)" in text
    assert "InfoNCE over the dot product divided by 23.4, temperature 0.02" in text
    assert "cosine" not in text
    [panel] = similarities_figure(data).axes
    assert panel.get_xlabel() == "dot product divided by 23.4 under the base model"
    open_band = dataclasses.replace(
        data, mining=dataclasses.replace(mining, band=(NO_LOWER_EDGE, 0.7))
    )
    write_report(tmp_path, open_band)
    text = (tmp_path / "report.md").read_text()
    assert "dot product divided by 23.4 up to 0.70 (fixed) after the 5 most similar" in text
    bounded = dataclasses.replace(mining, mine_by="sentence", relative_margin=0.05)
    write_report(tmp_path, dataclasses.replace(data, mining=bounded))
    text = (tmp_path / "report.md").read_text()
    assert "(fixed) by the best sentence, at most 0.95 of the answer's, after the 5 most" in text


def test_every_table_has_as_many_cells_in_each_row(data: ReportData, tmp_path: Path) -> None:
    write_report(tmp_path, data)
    page = (tmp_path / "report.html").read_text()
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    for table in tables:
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        assert len(rows) > 1
        assert len({len(re.findall(r"<t[hd]>", row)) for row in rows}) == 1


def test_other_sources_other_words(data: ReportData, tmp_path: Path) -> None:
    """A weight chosen by the rule, the user's own queries, a calibrated band that few miss."""
    given = Queries("from questions.jsonl", "none", {"user": 900}, held_out_by_document=False)
    mining = dataclasses.replace(data.mining, calibrated=True, empty=3)
    choice = Choice(0.35, 0.35, Gain(0.1, 0.05, 0.15), Gain(0.0, -0.01, 0.01))
    changed = dataclasses.replace(data, queries=given, mining=mining, choice=choice)
    write_report(tmp_path, changed)
    text = (tmp_path / "report.md").read_text()
    for words in (
        "chosen on held-out queries and general knowledge",
        "fitted to this encoder",
        "other queries about the same passages",
    ):
        assert words in text
    for words in ("without an LLM", "--band auto", "What the language model wrote"):
        assert words not in text
    half = dataclasses.replace(data.queries, made="some")
    write_report(tmp_path, dataclasses.replace(changed, queries=half))
    text = (tmp_path / "report.md").read_text()
    assert "Some of the queries were made from the documents without an LLM. Real questions" in text
    assert "`--llm" not in text


ACCOUNT = {
    "models": ["big|llm", "b"],
    "chunks": 1100,
    "replied": 1090,
    "failed": 10,
    "failures": {"refused": 3, "timeout": 7},
    "stopped": "max_calls",
    "calls": 1200,
    "cost": 1.5,
    "tokens_in": 1000,
    "tokens_out": 2000,
    "reused": 3,
    "replies_per_second": 2.34,
    "structured_output": "json_schema",
    "parsed": {"lines": 10, "json": 80},
    "candidates": 300,
    "kept": 200,
    "unjudged": 4,
    "dropped": {"other *language*": 40, "near duplicate": 50},
}


def test_what_the_language_model_wrote(
    data: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "draw_figures", lambda folder, data: {})
    queries = dataclasses.replace(data.queries, source="written by b", account=ACCOUNT)
    write_report(tmp_path, dataclasses.replace(data, queries=queries))
    text = (tmp_path / "report.md").read_text()
    for row in (
        "| model | big\\|llm, b |",
        "| passages | 1,100: 1,090 got a reply, 10 failed (7 timeout, 3 refused); "
        "stopped by max_calls |",
        "| calls, cost | 1,200 calls, 1.5000 |",
        "| tokens | 1,000 in, 2,000 out |",
        "| replies | 2.3 per second in the last start; response format json_schema; "
        "read as 80 json, 10 lines |",
        "| queries | 300 in the replies, 200 kept, 4 of them without a verdict of the judge |",
        "| dropped | 50 near duplicate, 40 other \\*language\\* |",
    ):
        assert row + "\n" in text, row
    plain = ACCOUNT | {
        "failures": {},
        "stopped": None,
        "cost": None,
        "reused": 1090,
        "structured_output": None,
        "unjudged": 0,
        "dropped": {},
    }
    queries = dataclasses.replace(data.queries, source="written by b", account=plain)
    write_report(tmp_path, dataclasses.replace(data, queries=queries))
    text = (tmp_path / "report.md").read_text()
    for row in (
        "| passages | 1,100: 1,090 got a reply, 10 failed |",
        "| calls, cost | 1,200 calls, no prices given |",
        "| replies | response format not requested; read as 80 json, 10 lines |",
        "| queries | 300 in the replies, 200 kept |",
        "| dropped | none |",
    ):
        assert row + "\n" in text, row


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_never_markup(text: str) -> None:
    """A reader of the rendered page sees exactly the text, line breaks aside."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    expected = html.escape(re.sub(r"[\r\n]", " ", text)).replace("&#x27;", "'")
    table = parser.render(f"| {escape_markdown(text)} | next |\n| --- | --- |\n")
    assert re.sub(r"\s+", " ", expected.strip()) in re.sub(r"\s+", " ", table)
    assert table.count("<th>") == 2
    assert f"<code>{expected}</code>" in parser.render(f"a {code_span(text)} b")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_the_user_is_markup_anywhere(
    data: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(render, "draw_figures", lambda folder, data: {})
    account = ACCOUNT | {
        "models": [text],
        "stopped": text,
        "structured_output": text,
        "failures": {text: 1},
        "parsed": {text: 1},
        "dropped": {text: 1},
    }
    named = dataclasses.replace(
        data,
        documents=Documents(text, 1, 1, {text: 1}),
        queries=Queries(text, "none", {text: 1}, held_out_by_document=True, account=account),
        training=dataclasses.replace(data.training, base=text, precision=text, loss_function=text),
        out_of_domain=[set_scores(text, DOWN, 300)],
        versions={text: text},
        mining=dataclasses.replace(
            data.mining, select=text, triples=(Triple(text, (text, 0.5), ((text, 0.4),)),)
        ),
        gained=[Moved(text, text, None, 1)],
        costs={text: (1.0, 1)},
    )
    write_report(tmp_path, named)
    page = (tmp_path / "report.html").read_text().partition("</style>")[2]
    assert set(re.findall(r"<([a-z0-9]+)", page)) <= {
        *("h1", "h2", "h3", "p", "strong", "em", "code", "ul", "li"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert page.count("<h1") == 1
    assert page.count("<h2") == 8
    assert "49" not in page.partition("</h1>")[0]  # no template is run
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd]>", row)) for row in rows}) == 1
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["documents"]["source"] == text
