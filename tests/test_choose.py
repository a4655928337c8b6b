"""The choice of the fusion weight, and what made held-out queries may choose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refine_fast.pipeline.artifacts import DEV
from refine_fast.pipeline.evaluation.choice import (
    FORGETS,
    NOT_BETTER,
    TOO_FEW,
    choose_weight,
)
from refine_fast.pipeline.evaluation.scores import Scores
from refine_fast.pipeline.stages.choose import chosen


def curve(means: dict[float, float], queries: int = 400) -> dict[float, Scores]:
    noise = np.random.default_rng(0).normal(0, 0.1, (len(means), queries))
    noise -= noise.mean(1, keepdims=True)
    return {w: Scores({"ndcg@10": noise[i] + mean}) for i, (w, mean) in enumerate(means.items())}


@pytest.mark.parametrize(
    ("dev", "guard", "weight", "refused"),
    [
        # the standard error of a gain is about .007
        ((0.50, 0.60, 0.70), (0.80, 0.80, 0.80), 1.0, None),
        ((0.50, 0.60, 0.70), (0.80, 0.797, 0.795), 0.35, None),  # 1.0 loses .6 percent
        ((0.50, 0.60, 0.70), (0.80, 0.795, 0.79), 0.0, FORGETS),
        ((0.50, 0.60, 0.70), (0.80, 0.9, 0.79), 0.35, None),
        ((0.60, 0.605, 0.40), (0.80, 0.80, 0.80), 0.0, NOT_BETTER),
        ((0.60, 0.58, 0.40), (0.80, 0.70, 0.60), 0.0, NOT_BETTER),
        ((0.50, 0.505, 0.70), (0.80, 0.80, 0.79), 0.0, FORGETS),  # of 1.0, which is better
    ],
)
def test_choose_weight(
    dev: tuple[float, ...], guard: tuple[float, ...], weight: float, refused: str | None
) -> None:
    weights = (0.0, 0.35, 1.0)
    on_dev, on_guard = (curve(dict(zip(weights, x, strict=True))) for x in (dev, guard))
    chosen = choose_weight(dict(reversed(on_dev.items())), on_guard, tolerance=0.005)
    assert (chosen.weight, chosen.refused) == (weight, refused)
    assert chosen.gain.mean == pytest.approx(dev[weights.index(chosen.best)] - dev[0])
    assert (chosen.gain.low > 0) == (refused != NOT_BETTER)


@pytest.mark.parametrize(
    ("dev", "weight"),
    [
        ((0.50, 0.60, 0.603, 0.606), 0.35),  # 1.0 is hardly better than any
        ((0.50, 0.60, 0.603, 0.609), 0.5),  # but than 0.35
        ((0.50, 0.505, 0.50, 0.52), 1.0),  # which must be better than 0 as well
        ((0.50, 0.60, 0.55, 0.605), 1.0),  # 0.5, in between, is worse
    ],
)
def test_the_smallest_weight_down_to_which_all_are_within_one_standard_error_is_chosen(
    dev: tuple[float, ...], weight: float
) -> None:
    """The standard error of a difference is .007."""
    weights = (0.0, 0.35, 0.5, 1.0)
    on_dev = curve(dict(zip(weights, dev, strict=True)))
    flat = curve(dict.fromkeys(weights, 0.8))
    assert choose_weight(on_dev, flat, tolerance=0.005).weight == weight


@pytest.mark.parametrize(("changed", "weight"), [(0, 0.5), (5, 0.5), (6, 1.0)])
def test_a_larger_weight_needs_more_than_five_queries(changed: int, weight: float) -> None:
    """As an interval does: of fewer that change, all one way, nothing is concluded."""
    best = np.full(100, 0.6)
    other = best - 0.1 * (np.arange(100) < changed)
    dev = {at: Scores({"ndcg@10": x}) for at, x in ((0.0, best - 0.3), (0.5, other), (1.0, best))}
    flat = curve({0.0: 0.8, 0.5: 0.8, 1.0: 0.8})
    assert choose_weight(dev, flat, tolerance=0.005).weight == weight


@pytest.mark.parametrize(("most", "weight"), [(1.0, 1.0), (0.5, 0.35), (0.1, 0.35)])
def test_larger_weights_are_not_chosen(most: float, weight: float) -> None:
    dev, guard = curve({0.0: 0.5, 0.35: 0.6, 1.0: 0.7}), curve({0.0: 0.8, 0.35: 0.8, 1.0: 0.8})
    assert choose_weight(dev, guard, tolerance=0.005, most=most).weight == weight


@pytest.mark.parametrize(
    ("queries", "weight", "refused"), [(0, 0.0, TOO_FEW), (5, 0.0, TOO_FEW), (6, 1.0, None)]
)
def test_with_too_few_queries_the_base_is_kept(
    queries: int, weight: float, refused: str | None
) -> None:
    few = curve({0.0: 0.1, 1.0: 0.8}, queries=queries)
    chosen = choose_weight(few, curve({0.0: 0.5, 1.0: 0.5}), tolerance=0.005)
    assert (chosen.weight, chosen.refused) == (weight, refused)


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
