"""Writes a report as Markdown, as one HTML file with the figures inside, and as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from ...mine import band_in_words
from ..evaluation.significance import Gain
from .data import ReportData
from .facts import report_facts
from .figures import draw_figures
from .format import HEADLINE, TABLE_METRICS, points
from .templating import html_template, markdown_template
from .verdict import verdict


def write_report(out_dir: Path, data: ReportData) -> None:
    """Writes report.md, report.json, report.html and figures/*.png.

    Args:
        out_dir: An existing folder.
        data: The content.
    """
    figures = out_dir / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    captions = draw_figures(figures, data)
    facts = report_facts(data)
    text = _markdown(data, facts, captions)
    page = _html(text, f"{data.training.base}, refined on {data.documents.source}", figures)
    (out_dir / "report.md").write_text(text, encoding="utf-8")
    (out_dir / "report.html").write_text(page, encoding="utf-8")
    (out_dir / "report.json").write_text(
        json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _markdown(data: ReportData, facts: Mapping[str, Any], captions: Mapping[str, str]) -> str:
    filters = {
        "points": _points,
        "at": _at,
        "band": band_in_words,
        "listed": _listed,
        "most_first": _most_first,
        "rank": _rank,
        "duration": _duration,
    }
    template = markdown_template("report.md.jinja", **filters)
    context = {**facts, "verdict": verdict(data), "captions": captions}
    return template.render(**context, headline=HEADLINE, metrics=TABLE_METRICS)


def _points(change: Mapping[str, Any]) -> Markup:
    return Markup(points(Gain(change["mean"], change["low"], change["high"])))


def _at(scores: Mapping[str, Any], weight: float) -> Mapping[str, Any]:
    """The facts of one set at one fusion weight."""
    return next(point for point in scores["weights"] if point["weight"] == weight)


def _listed(counts: Mapping[str, int]) -> str:
    """Counts of kinds: "1,321 cloze, 700 title"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "none"


def _rank(rank: int | None) -> str:
    return "over 10" if rank is None else str(rank)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _html(markdown: str, title: str, figures: Path) -> str:
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for path in figures.glob("*.png"):
        image = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="figures/{path.name}"', f'src="data:image/png;base64,{image}"')
    return html_template("report.html.jinja").render(title=title, body=Markup(body))
