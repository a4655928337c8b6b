"""The report: one Markdown text, rendered to HTML with its figures inside, and the same facts as JSON."""

from __future__ import annotations

import base64
import html
import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.metrics import METRICS
from .data import Judged, ReportData, Triple
from .figures import draw_figures
from .format import points
from .verdict import HEADLINE, verdict

FUSION = {
    "weights": "of weights: base + {0:g} * (tuned - base)",
    "embeddings": "of embeddings, in the loss and when serving: normalize({0:g} * e_tuned + {1:g} * e_frozen)",
}


def write_report(out_dir: Path, data: ReportData) -> None:
    """Writes report.md, report.json, report.html (one file, figures inside) and figures/*.png into the folder ``out_dir``."""
    figures = out_dir / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    captions = draw_figures(figures, data)
    text = _markdown(data, captions)
    (out_dir / "report.md").write_text(text, encoding="utf-8")
    (out_dir / "report.html").write_text(_html(text, figures), encoding="utf-8")
    (out_dir / "report.json").write_text(
        json.dumps(facts(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _caveats(data: ReportData) -> list[str]:
    caveats = []
    if data.queries.without_llm:
        caveats.append(
            "The queries were made from the documents without an LLM. An LLM writes queries that are closer to what people ask, and does"
            " better: `--llm URL --llm-model NAME`; so do real questions of your users: `--queries FILE`."
        )
    if data.queries.held_out_by_document:
        caveats.append(
            "The queries that judge come from the same source as those that trained, about documents that training never saw. The gain on"
            " your users' own questions may differ."
        )
    else:
        caveats.append(
            "The queries that judge are the collection's own; training may have seen other queries about the same passages."
        )
    mining = data.mining
    if mining.per_query and mining.empty > mining.queries / 2:
        remedy = "" if mining.calibrated else "; `--band auto` fits the band to this encoder"
        caveats.append(
            f"The band was empty for {mining.empty:,} of {mining.queries:,} queries ({mining.empty / mining.queries:.0%}): they had"
            f" in-batch negatives alone{remedy}."
        )
    if data.fusion == "embeddings":
        caveats.append(
            f"The encoder was tuned for weight {data.weight:g} beside its frozen twin: the other weights mix the same two encoders, which"
            " were not trained for it; nor was the fine-tuned one to serve alone. Serving takes two encoders."
        )
    caveats.append(
        "Intervals are 95%, from a paired bootstrap over the queries: they cover the choice of queries, not what another seed would train."
    )
    return caveats


def _recipe(data: ReportData) -> list[tuple[str, str]]:
    documents, queries, mining, training = data.documents, data.queries, data.mining, data.training
    removed = ", ".join(f"{count:,} {kind}" for kind, count in documents.duplicates.items())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in queries.kinds.items())
    chosen = f"chosen on {data.weight_chosen_on}" if data.weight_chosen_on else "given"
    low, high = mining.band
    origin = "fitted to this encoder" if mining.calibrated else "fixed"
    band = f"cosine {low:.2f} to {high:.2f} ({origin}) after the {mining.skip} most similar"
    empty = f"empty for {mining.empty:,} of {mining.queries:,} queries ({mining.empty / mining.queries:.1%})"
    return [
        (
            "documents",
            f"{documents.source}: {documents.documents:,} documents, {documents.chunks:,} passages",
        ),
        ("duplicates removed", removed or "none"),
        ("queries", f"{queries.source}: {kinds}"),
        ("hard negatives", f"{mining.per_query} a query, {mining.select}; {band}; {empty}"),
        ("base model", training.base),
        (
            "loss",
            f"InfoNCE, temperature {training.temperature:g}; {training.loss[0]:.3f} at the start, {training.loss[1]:.3f} at the end",
        ),
        (
            "training",
            f"{training.examples:,} examples, {training.epochs:g} epochs, {training.steps:,} steps",
        ),
        ("learning rate, batch", f"{training.learning_rate:g}, {training.batch_size}"),
        ("precision, seed", f"{training.precision}, {training.seed}"),
        (
            "fusion",
            f"{FUSION[data.fusion].format(data.weight, 1 - data.weight)}; the weight {chosen}",
        ),
        (
            "versions",
            ", ".join(f"{package} {version}" for package, version in data.versions.items()),
        ),
    ]


def _written(account: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The account of the queries' stage: what was asked, what it took, what became of it."""

    def listed(counts: Mapping[str, int]) -> str:
        return (
            ", ".join(
                f"{count:,} {_cell(what)}"
                for what, count in sorted(counts.items(), key=lambda item: -item[1])
            )
            or "none"
        )

    stopped = f"; stopped by {account['stopped']}" if account["stopped"] else ""
    failures = f" ({listed(account['failures'])})" if account["failures"] else ""
    rate = (
        f"{account['replies_per_second']:.1f} a second in the last start; "
        if account["replied"] > account["reused"]
        else ""
    )
    unjudged = (
        f", {account['unjudged']:,} of them without a verdict of the judge"
        if account["unjudged"]
        else ""
    )
    cost = "no prices given" if account["cost"] is None else f"{account['cost']:,.4f}"
    return [
        ("model", _cell(", ".join(account["models"]))),
        (
            "passages",
            f"{account['chunks']:,}: {account['replied']:,} got a reply, {account['failed']:,} failed{failures}{stopped}",
        ),
        ("calls, cost", f"{account['calls']:,} calls, {cost}"),
        ("tokens", f"{account['tokens_in']:,} in, {account['tokens_out']:,} out"),
        (
            "replies",
            f"{rate}response format {account['structured_output'] or 'not asked for'}; read as {listed(account['parsed'])}",
        ),
        (
            "queries",
            f"{account['candidates']:,} in the replies, {account['kept']:,} kept{unjudged}",
        ),
        ("dropped", listed(account["dropped"])),
    ]


# ── how it looks ──


def _markdown(data: ReportData, captions: dict[str, str]) -> str:
    parts = [f"# {_cell(data.training.base)}, refined on {_cell(data.documents.source)}"]
    parts += verdict(data)
    for name, caption in captions.items():
        parts.append(f"![{Path(name).stem}](figures/{name})\n\n*{caption}*")
    parts.append("## Results")
    elsewhere = ((f"Out of domain: {_cell(judged.name)}", judged) for judged in data.out_of_domain)
    for place, judged in (("Your documents", data.in_domain), *elsewhere):
        parts.append(
            f"### {place}\n\n{judged.queries:,} queries against {judged.passages:,} passages."
        )
        systems = {
            "BM25": judged.bm25,
            "base": judged.at_weight[0],
            f"fused, weight {data.weight:g}": judged.at_weight[data.weight],
        }
        systems["fine-tuned"] = judged.at_weight[1]
        parts.append(
            _table(
                ("", *METRICS),
                ((name, *(f"{s.metrics[m]:.3f}" for m in METRICS)) for name, s in systems.items()),
            )
        )
        changes = (
            (metric, points(judged.gain(data.weight, metric)), points(judged.gain(1, metric)))
            for metric in METRICS
        )
        parts.append(
            _table(
                ("change against the base", f"fused, weight {data.weight:g}", "fine-tuned"), changes
            )
        )
    parts.append(f"## The fusion weight\n\nChange of {HEADLINE} against the base model.")
    judged_sets = [("your documents", data.in_domain)]
    if data.pooled is not None:
        judged_sets.append((f"out of domain ({data.pooled.name})", data.pooled))
    rows = []
    for weight in sorted(data.in_domain.at_weight)[1:]:
        shown = f"**{weight:g}**" if weight == data.weight else f"{weight:g}"
        rows.append((shown, *(points(judged.gain(weight, HEADLINE)) for _, judged in judged_sets)))
    parts.append(_table(("weight", *(name for name, _ in judged_sets)), rows))
    parts.append("## What was done\n\n" + _table(("", ""), _recipe(data)))
    if data.queries.account is not None:
        parts.append(
            "## What the language model wrote\n\n"
            + _table(("", ""), _written(data.queries.account))
        )
    if triples := data.mining.triples:
        parts.append(
            f"## {len(triples)} queries with what training was shown\n\nDrawn at random; cosines under the base model."
        )
        parts.append("\n".join(_triple(triple) for triple in triples))
    parts.append("## How to read this\n\n" + "\n".join(f"- {caveat}" for caveat in _caveats(data)))
    return "\n\n".join(parts) + "\n"


def _triple(triple: Triple) -> str:
    rows = [("answer", triple.positive), *(("negative", negative) for negative in triple.negatives)]
    passages = (
        f"\n  - {role}, {cosine:.2f}: {_cell(textwrap.shorten(text, 240))}"
        for role, (text, cosine) in rows
    )
    return f"- **{_cell(textwrap.shorten(triple.query, 240))}**" + "".join(passages)


def _cell(text: str) -> str:
    """Text of the user's that Markdown shall not read as markup."""
    return "".join("\\" + c if c in "\\`*_[]<>|#!" else " " if c in "\r\n" else c for c in text)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 54rem; margin: 3rem auto; padding: 0 1.25rem }}
h1 {{ font-size: 1.6rem; line-height: 1.25 }} h2 {{ margin-top: 2.5rem }} h3 {{ margin-top: 2rem }}
img {{ max-width: 100%; display: block; margin: 2rem auto 0 }} em {{ color: #555; font-size: .9rem }}
table {{ border-collapse: collapse; margin: 1rem 0; font: .9rem system-ui; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }}
</style>
{body}
</html>
"""


def _html(text: str, figures: Path) -> str:
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for path in figures.glob("*.png"):
        body = body.replace(
            f'src="figures/{path.name}"',
            f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"',
        )
    return PAGE.format(
        title=html.escape(text.splitlines()[0].removeprefix("# ").replace("\\", "")), body=body
    )


def facts(data: ReportData) -> dict[str, Any]:
    """report.json: everything in the report, with full precision."""

    def judged(one: Judged) -> dict[str, Any]:
        weights = []
        for weight, scores in sorted(one.at_weight.items()):
            gains = {metric: one.gain(weight, metric) for metric in METRICS}
            changes = {
                metric: {**vars(change), "verdict": change.verdict}
                for metric, change in gains.items()
            }
            weights.append({"weight": weight, "metrics": scores.metrics, "gain": changes})
        return {
            "name": one.name,
            "passages": one.passages,
            "queries": one.queries,
            "bm25": one.bm25.metrics,
            "weights": weights,
        }

    mining = {
        key: value for key, value in asdict(data.mining).items() if not key.endswith("_scores")
    }
    return {
        "verdict": [sentence.replace("**", "") for sentence in verdict(data)],
        "caveats": _caveats(data),
        "fusion": data.fusion,
        "weight": data.weight,
        "weight_chosen_on": data.weight_chosen_on,
        "in_domain": judged(data.in_domain),
        "out_of_domain": [judged(one) for one in data.out_of_domain],
        "out_of_domain_pooled": None if data.pooled is None else judged(data.pooled),
        "documents": asdict(data.documents),
        "queries": asdict(data.queries),
        "mining": mining,
        "training": asdict(data.training),
        "versions": dict(data.versions),
    }
