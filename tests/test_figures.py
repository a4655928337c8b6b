"""The figures draw what was measured: checked on the lines, bands and labels of their axes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from report_samples import DOWN, UP, WEIGHTS, report_data, set_scores

from refine_fast.mine import NO_LOWER_EDGE
from refine_fast.pipeline.evaluation.scores import Scores
from refine_fast.pipeline.reporting.data import ReportData, SetScores
from refine_fast.pipeline.reporting.figures import (
    BLUE,
    VERMILION,
    recall_figure,
    similarities_figure,
    weights_figure,
)


@pytest.fixture
def data() -> ReportData:
    return report_data()


def test_recall_figure_draws_the_recalls(data: ReportData) -> None:
    ks = (1, 3, 5, 10)

    def recalls(share: float) -> Scores:
        return Scores({f"recall@{k}": np.array([share + k / 100]) for k in ks})

    own = SetScores(
        name="own",
        passages=9,
        bm25=recalls(0.1),
        at_weight={0.0: recalls(0.2), 0.35: recalls(0.4), 1.0: recalls(0.5)},
    )
    dollars = SetScores(
        name="a$b$_",
        passages=8,
        bm25=recalls(0.3),
        at_weight={0.0: recalls(0.6), 0.35: recalls(0.5), 1.0: recalls(0.4)},
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
    curves = set_scores("your documents", UP, 100), set_scores("general knowledge", DOWN, 300)
    [panel] = weights_figure(dataclasses.replace(data, curves=curves)).axes
    lines = {line.get_label(): line for line in panel.lines}
    for scores, colour in zip(curves, (BLUE, VERMILION), strict=True):
        name = scores.name
        assert lines[name].get_xdata() == pytest.approx(WEIGHTS)
        gains = [100 * scores.gain(weight, "recall@3").mean for weight in WEIGHTS]
        assert lines[name].get_ydata() == pytest.approx(gains)
        assert to_hex(lines[name].get_color()) == colour.lower()
    for band, scores in zip(panel.collections, curves, strict=True):
        corners = {(x, y) for x, y in np.round(band.get_paths()[0].vertices, 9).tolist()}
        for weight in WEIGHTS:
            change = scores.gain(weight, "recall@3")
            for side in (change.low, change.high):
                assert (round(weight, 9), round(100 * side, 9)) in corners
    texts = [text.get_text() for text in panel.texts]
    assert texts[0] == "this model: 0.35"
    assert sorted(texts[1:]) == ["general knowledge\n(base 0.600)", "your documents\n(base 0.600)"]
    labelled = {text.get_text().partition("\n")[0]: text for text in panel.texts[1:]}
    assert labelled["your documents"].xy[1] > labelled["general knowledge"].xy[1]  # +20 above -20


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
    without = dataclasses.replace(mining, band=(NO_LOWER_EDGE, 0.7))
    [panel] = similarities_figure(dataclasses.replace(data, mining=without)).axes
    [span] = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    lowest = min(mining.random_scores.min(), mining.answer_scores.min())
    assert (span.get_x(), span.get_width()) == pytest.approx((lowest, 0.7 - lowest))
    assert "band\nup to 0.70" in [text.get_text() for text in panel.texts]
    assert title == "73% of 2,021 queries have no passage in the band"
