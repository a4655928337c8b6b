"""The report states what was measured, welcome or not, and its three forms agree."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from refine_fast.pipeline.evaluation.metrics import METRICS
from refine_fast.pipeline.evaluation.scores import Scores
from refine_fast.pipeline.reporting import render
from refine_fast.pipeline.reporting.data import (
    Documents,
    Mining,
    Queries,
    ReportData,
    SetScores,
    Training,
    Triple,
)
from refine_fast.pipeline.reporting.facts import report_facts
from refine_fast.pipeline.reporting.figures import (
    BLUE,
    VERMILION,
    recall_figure,
    similarities_figure,
    weights_figure,
)
from refine_fast.pipeline.reporting.model_card import model_card
from refine_fast.pipeline.reporting.render import write_report
from refine_fast.pipeline.reporting.templating import code_span, escape_markdown
from refine_fast.pipeline.reporting.verdict import Statement, verdict

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
    return SetScores(name, 1000, answered(0.5, queries), at_weight)


UP, SAME, DOWN = (0.05, 0.1, 0.2), (0.0, 0.0, 0.0), (-0.05, -0.1, -0.2)


@pytest.fixture
def data() -> ReportData:
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
            True,
            {"cloze": 1321, "title": 700},
            held_out_by_document=True,
        ),
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
            (triple,),
        ),
        Training("all-MiniLM-L6-v2", 0.02, 1e-4, 64, 1, 129, 2021, "bf16", 17, (1.2, 0.7)),
        0.35,
        None,
        set_scores("own", UP),
        [set_scores("scifact", SAME, 300), set_scores("travel", SAME, 500)],
        {"python": "3.11", "refine_fast": "0.1.0"},
    )


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
                "the largest that improved your documents",
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
    changed = dataclasses.replace(data, in_domain=set_scores("own", own), out_of_domain=others)
    text = bold(verdict(changed))
    for words in stated:
        assert words in text
    for words in absent:
        assert words not in text


def test_the_remedy_for_a_fusion_of_embeddings(data: ReportData) -> None:
    others = [set_scores("scifact", (0.0, -0.1, -0.2), 300)]
    changed = dataclasses.replace(data, fusion="embeddings", out_of_domain=others)
    text = bold(verdict(changed))
    assert "A smaller weight, 0.2," in text
    assert "set `weight` in `model/twin_config.json`." in text
    assert "--weight" not in text


def test_an_unmeasured_domain_is_stated(data: ReportData) -> None:
    changed = dataclasses.replace(data, out_of_domain=[])
    assert "Out of domain: not measured" in bold(verdict(changed))


def test_sets_are_pooled_by_query(data: ReportData) -> None:
    others = [set_scores("small", DOWN, 100), set_scores("large", UP, 300)]
    pooled = dataclasses.replace(data, out_of_domain=others).pooled
    assert pooled is not None
    assert (pooled.queries, pooled.passages) == (400, 2000)
    assert pooled.gain(0.35, "recall@3").mean == pytest.approx((100 * -0.1 + 300 * 0.1) / 400)


# ── the three forms ──

FACTS = (
    "temperature 0.02",
    "| learning rate, batch | 0.0001, 64 |",
    "cosine 0.50 to 0.70 (fixed) after the 5 most similar",
    "empty for 1,475 of 2,021 queries (73.0%)",
    "--band auto",
    "bf16, 17",
    "An LLM writes queries",
    "documents that training never saw",
    "| documents | my\\|docs \\<b\\>: 40 documents, 1,321 passages |",
    "3 exact, 14 near",
    "1,321 cloze, 700 title",
    "the weight given",
    "- **who \\*sees\\* it?**\n  - answer, 0.61: the reader of reports\n",
    "  - negative, 0.51: nobody \\| at all x",
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
    assert page.count("<table>") == 2 * (1 + sets) + 2

    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report_facts(data)))
    at_weight = {point["weight"]: point for point in saved["in_domain"]["weights"]}
    fused = at_weight[saved["weight"]]
    assert fused["metrics"] == pytest.approx(data.in_domain.at_weight[0.35].metrics)
    assert fused["gain"].keys() == set(METRICS)
    assert fused["gain"]["recall@3"]["verdict"] == "improved"
    assert saved["training"]["seed"] == 17
    assert saved["verdict"][0].startswith("On your documents: improved. recall@3 0.600 -> 0.700")


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
    given = Queries("from questions.jsonl", False, {"user": 900}, held_out_by_document=False)
    mining = dataclasses.replace(data.mining, calibrated=True, empty=3)
    changed = dataclasses.replace(
        data, queries=given, mining=mining, weight_chosen_on="120 dev queries"
    )
    write_report(tmp_path, changed)
    text = (tmp_path / "report.md").read_text()
    for words in (
        "chosen on 120 dev queries",
        "fitted to this encoder",
        "other queries about the same passages",
    ):
        assert words in text
    for words in ("without an LLM", "--band auto", "What the language model wrote"):
        assert words not in text


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


def test_what_the_language_model_wrote(data: ReportData, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_never_markup(text: str) -> None:
    """A reader of the rendered page sees exactly the text, line breaks aside."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
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
        queries=Queries(text, False, {text: 1}, held_out_by_document=True, account=account),
        training=dataclasses.replace(data.training, base=text, precision=text),
        weight_chosen_on=text,
        out_of_domain=[set_scores(text, DOWN, 300)],
        versions={text: text},
        mining=dataclasses.replace(
            data.mining, select=text, triples=(Triple(text, (text, 0.5), ((text, 0.4),)),)
        ),
    )
    write_report(tmp_path, named)
    page = (tmp_path / "report.html").read_text().partition("</style>")[2]
    assert set(re.findall(r"<([a-z0-9]+)", page)) <= {
        *("h1", "h2", "h3", "p", "strong", "em", "code", "ul", "li"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert page.count("<h1") == 1
    assert page.count("<h2") == 6
    assert "49" not in page.partition("</h1>")[0]  # no template is run
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd]>", row)) for row in rows}) == 1
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["documents"]["source"] == text


# ── the figures ──


def test_recall_figure_draws_the_recalls(data: ReportData) -> None:
    ks = (1, 3, 5, 10)

    def recalls(share: float) -> Scores:
        return Scores({f"recall@{k}": np.array([share + k / 100]) for k in ks})

    own = SetScores(
        "own", 9, recalls(0.1), {0.0: recalls(0.2), 0.35: recalls(0.4), 1.0: recalls(0.5)}
    )
    dollars = SetScores(
        "a$b$_", 8, recalls(0.3), {0.0: recalls(0.6), 0.35: recalls(0.5), 1.0: recalls(0.4)}
    )
    figure = recall_figure(dataclasses.replace(data, in_domain=own, out_of_domain=[dollars]))
    first, second = figure.axes
    for panel, (bm25, base, fused) in ((first, (0.1, 0.2, 0.4)), (second, (0.3, 0.6, 0.5))):
        drawn = {line.get_label(): line.get_xdata() for line in panel.lines}
        steps = np.array(ks) / 100
        assert drawn.keys() == {"BM25", "base model", "fused model, weight 0.35"}
        assert drawn["BM25"] == pytest.approx(bm25 + steps)
        assert drawn["base model"] == pytest.approx(base + steps)
        assert drawn["fused model, weight 0.35"] == pytest.approx(fused + steps)
        [arrows] = panel.collections  # one from the base to the fused model in each row
        for row, ((x0, y0), (x1, y1)) in enumerate(arrows.get_segments()):
            assert (y0, y1) == (row, row)
            assert (x0, x1) == pytest.approx((base + steps[row], fused + steps[row]))
        assert [text.get_text() for text in panel.texts] == [f"{100 * (fused - base):+.1f}"] * 4
        assert panel.get_ylim()[0] > panel.get_ylim()[1]  # recall@1 on top
    assert [label.get_text() for label in first.get_yticklabels()] == [f"recall@{k}" for k in ks]
    assert (
        first.get_title(loc="left") + first.get_title() == "your documents\n1 queries, 9 passages"
    )
    figure.canvas.draw()  # a name is no formula
    assert "out of domain: a$b$_" in second.get_title(loc="left") + second.get_title()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(drawn)


def test_weights_figure_draws_the_gains_with_their_intervals(data: ReportData) -> None:
    others = [set_scores("small", DOWN, 100), set_scores("large", UP, 300)]
    data = dataclasses.replace(data, out_of_domain=others)
    assert data.pooled is not None
    [panel] = weights_figure(data).axes
    lines = {line.get_label(): line for line in panel.lines}
    curves = {
        "your documents": (data.in_domain, BLUE),
        "out of domain": (data.pooled, VERMILION),
        "small": (others[0], VERMILION),
        "large": (others[1], VERMILION),
    }
    for name, (scores, colour) in curves.items():
        assert lines[name].get_xdata() == pytest.approx(WEIGHTS)
        gains = [100 * scores.gain(weight, "recall@3").mean for weight in WEIGHTS]
        assert lines[name].get_ydata() == pytest.approx(gains)
        assert to_hex(lines[name].get_color()) == colour.lower()
    for band, scores in zip(panel.collections, (data.in_domain, data.pooled), strict=True):
        corners = {(x, y) for x, y in np.round(band.get_paths()[0].vertices, 9).tolist()}
        for weight in WEIGHTS:
            change = scores.gain(weight, "recall@3")
            for side in (change.low, change.high):
                assert (round(weight, 9), round(100 * side, 9)) in corners
    texts = [text.get_text() for text in panel.texts]
    assert texts[0] == "this model: 0.35"
    assert sorted(texts[1:]) == ["out of domain\n(base 0.600)", "your documents\n(base 0.600)"]
    labelled = {text.get_text().partition("\n")[0]: text for text in panel.texts[1:]}
    assert labelled["your documents"].xy[1] > labelled["out of domain"].xy[1]  # +20 above +10


def test_similarities_figure_draws_both_histograms_and_the_band(data: ReportData) -> None:
    [panel] = similarities_figure(data).axes
    outlines = {patch.get_label(): patch for patch in panel.patches if "query" in patch.get_label()}
    mining = data.mining
    for name, cosines in (
        ("query and\na random passage", mining.random_scores),
        ("query and\nits answer", mining.answer_scores),
    ):
        values, edges, _ = outlines[name].get_data()
        assert edges[0] <= min(cosines)
        assert edges[-1] >= max(cosines)
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
        middle = ((edges[1:] + edges[:-1]) / 2 * values * np.diff(edges)).sum()
        assert middle == pytest.approx(cosines.mean(), abs=np.diff(edges)[0])
    [span] = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    assert (span.get_x(), span.get_width()) == pytest.approx((0.5, 0.2))
    assert "band\n0.50 to 0.70" in [text.get_text() for text in panel.texts]
    title = panel.get_title(loc="left") + panel.get_title()
    assert title == "73% of 2,021 queries have no passage in the band"


# ── the model card ──


def card(base: Path, name: str = "org/my_model", *, twin: bool = False) -> str:
    systems = {
        system: {
            "in_domain": answered(share, 400),
            "dev": answered(0.9, 10),
            "ood:a|b": answered(0.5, 300),
        }
        for system, share in (("BM25", 0.5), ("base", 0.6), ("fine-tuned", 0.8), ("fused", 0.7))
    }
    return model_card(base, name, 0.35, {"loss": "InfoNCE | *t*"}, systems, twin=twin)


def head_and_body(text: str) -> tuple[dict[str, object], str]:
    empty, head, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


def test_model_card(tmp_path: Path) -> None:
    head, body = head_and_body(card(tmp_path))
    assert head == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "refine", "model-fusion"],
        "base_model": "org/my_model",
    }
    for words in (
        "`base + 0.35 * (tuned - base)`: `org/my_model`",
        'model = SentenceTransformer("path/to/this/folder")\n',
        "On queries that were not trained on (400 queries):",
        "| fused | 0.700 | 0.700 | 0.700 | 0.700 | 0.700 |",
        "recall@3, base to fused: +10.0 points [",
        ": improved.",
        "Out of domain: a\\|b (300 queries):",
        "recall@3, base to fused: +0.0 points [+0.0, +0.0]: no measurable change.",
        "| loss | InfoNCE \\| \\*t\\* |",
    ):
        assert words in body, words
    assert "0.900" not in body  # the set that chose the weight
    page = MarkdownIt("commonmark").enable("table").render(body)
    assert page.count("<table>") == 3
    twin = card(tmp_path, twin=True)
    assert "normalize(0.35 * e_tuned + 0.65 * e_frozen)" in twin
    assert '("path/to/this/folder", trust_remote_code=True)\n' in twin


def test_model_card_survives_any_name(tmp_path: Path) -> None:
    for name in (*HOSTILE, "a: b", "'", "no", "---", "- x"):
        head, body = head_and_body(card(tmp_path, name))
        assert head["base_model"] == name
        page = MarkdownIt("commonmark", {"html": False}).enable("table").render(body)
        assert page.count("<h1>") == 1
        assert page.count("<h2>") == 2
        assert "<script" not in page
        assert "<a" not in page
        assert "<img" not in page


@pytest.mark.parametrize(
    ("readme", "fields"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\nHello", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://e.org\n---\n",
            {"license": "other", "license_name": "gemma", "license_link": "https://e.org"},
        ),
        ("no head", {}),
        ("---\n: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)
def test_model_card_names_the_licence_of_the_base(
    tmp_path: Path, readme: str | None, fields: dict[str, str]
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    head, _ = head_and_body(card(tmp_path))
    assert {name: value for name, value in head.items() if name.startswith("license")} == fields
