"""The report's three figures. Colours from Okabe and Ito's palette, which is safe for every colour
vision; curves are labelled where they end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ...mine import NO_LOWER_EDGE, band_in_words
from .data import ReportData, SetScores
from .format import HEADLINE, TABLE_METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILION, GREY, INK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 200,
}

PANELS_PER_ROW = 3

RECALLS = tuple(metric for metric in TABLE_METRICS if metric.startswith("recall"))
"""Rows of the recall figure."""


def draw_figures(folder: Path, data: ReportData) -> dict[str, str]:
    """Writes the figures as .png files.

    Args:
        folder: An existing folder.
        data: The content.

    Returns:
        File name -> caption.
    """
    figures = {
        "recall.png": (
            recall_figure,
            "Recall before (hollow) and after (full), with the change in points. The tick is BM25.",
        ),
        "weights.png": (
            weights_figure,
            f"Change of {HEADLINE} against the base model at each fusion weight, with 95%"
            " intervals: what is learned and what is forgotten.",
        ),
        "similarities.png": (
            similarities_figure,
            "Similarities under the base model, and the band that hard negatives come from.",
        ),
    }
    with matplotlib.rc_context(STYLE):
        for name, (draw, _) in figures.items():
            draw(data).savefig(folder / name)
    return {name: caption for name, (_, caption) in figures.items()}


def recall_figure(data: ReportData) -> Figure:
    """A panel per set and a row per k: the base model (hollow), the fused model (full), BM25 (a
    tick), and the change in points at the right."""
    sets = [data.in_domain, *data.out_of_domain]
    columns = min(len(sets), PANELS_PER_ROW)
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(1 + 3 * columns, 0.5 + 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, scores in zip(panels.flat, sets, strict=False):
        _recall_panel(panel, data, scores)
    for panel in panels.flat[len(sets) :]:
        panel.remove()
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper left", ncols=3, frameon=False, handletextpad=0.3
    )
    return figure


def _recall_panel(panel: Axes, data: ReportData, scores: SetScores) -> None:
    systems = scores.bm25, scores.at_weight[0], scores.at_weight[data.weight]
    bm25, base, fused = ([system.metrics[metric] for metric in RECALLS] for system in systems)
    rows = range(len(RECALLS))
    fused_name = f"fused model, weight {data.weight:g}"
    panel.hlines(rows, base, fused, color=BLUE, lw=2)
    panel.plot(bm25, rows, "|", color=GREY, ms=9, mew=1.5, label="BM25")
    panel.plot(base, rows, "o", mfc="white", mec=INK, ms=6, label="base model")
    panel.plot(fused, rows, "o", color=BLUE, ms=6, label=fused_name)
    for row, before, after in zip(rows, base, fused, strict=True):
        panel.annotate(
            f"{100 * (after - before):+.1f}",
            (1.03, row),
            xycoords=("axes fraction", "data"),
            color=BLUE,
            va="center",
            annotation_clip=False,
        )
    panel.set_title(_title(data, scores), parse_math=False)  # a set may be named a$b$
    panel.set_yticks(rows, RECALLS)
    panel.set_ylim(len(RECALLS) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="y", color=GREY, alpha=0.25, lw=0.6)
    panel.margins(x=0.06)


def weights_figure(data: ReportData) -> Figure:
    """Gain in ``HEADLINE`` over the fusion weight, on the two sets that the weights are compared
    on."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    curves = list(zip(data.curves, (BLUE, VERMILION), strict=True))
    weights = sorted(data.curves[0].at_weight)
    ends = []
    for scores, colour in curves:
        name = scores.name
        gains = [scores.gain(weight, HEADLINE) for weight in weights]
        mean, low, high = (
            100 * np.array([getattr(g, side) for g in gains]) for side in ("mean", "low", "high")
        )
        panel.fill_between(weights, low, high, color=colour, alpha=0.13, lw=0)
        panel.plot(
            weights,
            mean,
            color=colour,
            lw=2,
            marker="o",
            ms=4,
            clip_on=False,
            zorder=3,
            label=name,
        )
        base = scores.at_weight[0].metrics[HEADLINE]
        ends.append((float(mean[-1]), f"{name}\n(base {base:.3f})", colour))
    panel.axhline(0, color=GREY, lw=0.8, zorder=0)
    panel.axvline(data.weight, color=GREY, lw=0.8, ls=":", zorder=0)
    panel.text(
        data.weight + 0.01,
        1,
        f"this model: {data.weight:g}",
        transform=panel.get_xaxis_transform(),
        va="top",
    )
    panel.set_xlim(0, 1)
    panel.set_xlabel("fusion weight: 0 = base model, 1 = fine-tuned model")
    panel.set_ylabel(f"change of {HEADLINE}, points")
    _label_ends(panel, 1, ends)
    return figure


def similarities_figure(data: ReportData) -> Figure:
    """Histograms of the base model's similarities to random passages and answers, over the band."""
    mining = data.mining
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    panel = figure.subplots()
    words, (low, high) = band_in_words(mining.band), mining.band
    both = np.concatenate([mining.random_scores, mining.answer_scores])
    low = both.min() if low == NO_LOWER_EDGE else low
    bins = np.linspace(min(both.min(), low), max(both.max(), high), 60)
    panel.axvspan(low, high, color=GREY, alpha=0.18, lw=0)
    tallest = 0.0
    kinds = (
        (mining.random_scores, INK, "query and\na random passage"),
        (mining.answer_scores, BLUE, "query and\nits answer"),
    )
    for scores, colour, name in kinds:
        density, _ = np.histogram(scores, bins, density=True)
        panel.stairs(density, bins, color=colour, fill=True, alpha=0.25, lw=0)
        panel.stairs(density, bins, color=colour, lw=1.4, label=name)
        top = int(density.argmax())
        tallest = max(tallest, density[top])
        panel.annotate(
            name,
            (bins[top], density[top]),
            xytext=(0, 3),
            textcoords="offset points",
            color=colour,
            ha="center",
            va="bottom",
        )
    panel.set_ylim(0, 1.45 * tallest)
    panel.text((low + high) / 2, 1.43 * tallest, f"band\n{words}", ha="center", va="top")
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel(f"{mining.similarity} under the base model")
    share = mining.empty / mining.queries
    panel.set_title(f"{share:.0%} of {mining.queries:,} queries have no passage in the band")
    return figure


def _title(data: ReportData, scores: SetScores) -> str:
    place = "your documents" if scores is data.in_domain else f"out of domain: {scores.name}"
    return f"{place}\n{scores.queries:,} queries, {scores.passages:,} passages"


def _label_ends(panel: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels each curve at its last point.

    Labels that would overlap are moved apart, inside the panel.

    Args:
        panel: The axes.
        x: Where every curve ends.
        ends: (y, label, colour) of each curve.
    """
    low, high = panel.get_ylim()
    gap = (high - low) * 0.075 * max(name.count("\n") + 1 for _, name, _ in ends)
    ends = sorted(ends)
    places = [y for y, _, _ in ends]
    for i in range(1, len(ends)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(ends))):
        places[i] = min(places[i], high - gap * (len(ends) - 1 - i))
    for place, (_, name, colour) in zip(places, ends, strict=True):
        panel.annotate(
            name,
            (x, place),
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
