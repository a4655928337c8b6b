"""train, with ``--distill choose``: the best of the encoders trained with several shares."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import write_json
from ..artifacts import (
    ADAPTER,
    DISTILL_FACTS,
    TRAINING_FACTS,
    TUNED,
    at_share,
    curve_file,
    read_scores,
)
from ..evaluation.choice import choose_share
from ..evaluation.scores import Scores
from .choose import chosen

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path, *, shares: Sequence[float], rule: float) -> None:
    """Copies what was trained with the best share, with its curve, and writes the scores of each.

    ``rule``: the one of ``shares`` that is kept unless another is better."""
    base = read_scores(context.path(curve_file(0)))
    fused = [weight for weight in context.compared_weights if weight > 0]
    dev: dict[float, Scores] = {}
    weights: dict[float, float] = {}
    for share in shares:
        files = {weight: context.path(at_share(share)) / curve_file(weight) for weight in fused}
        curve = {0.0: base} | {weight: read_scores(file) for weight, file in files.items()}
        weights[share] = _weight(context, curve)
        dev[share] = curve[weights[share]]["dev"]
    choice = choose_share(dev, rule)
    trained = context.path(at_share(choice.share))
    for name in (TUNED, ADAPTER):
        if (trained / name).exists():
            shutil.copytree(trained / name, folder / name, dirs_exist_ok=True)
    for name in (TRAINING_FACTS, *map(curve_file, fused)):
        shutil.copy(trained / name, folder / name)
    write_json(folder / DISTILL_FACTS, {**asdict(choice), "weights": weights})
    scores = ", ".join(f"{share:g}: {score:.3f}" for share, score in choice.scores.items())
    context.console.say(
        f"  teachers' share {choice.share:g}; ndcg@10 on held-out queries: {scores}"
    )


def _weight(context: RunContext, curve: dict[float, dict[str, Scores]]) -> float:
    """The fusion weight that a run with this curve would have."""
    config = context.config
    if config.weight != "auto":
        return float(config.weight)
    return chosen(context, curve).weight
