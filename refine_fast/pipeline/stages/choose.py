"""choose: the fusion weight, on the curve or as given."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import write_json
from ..artifacts import FUSION_FACTS, curve_file, read_scores
from ..evaluation.choice import choose_weight

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the weight; where it was chosen, also the gains that it was chosen by, and why the
    base was kept if it was."""
    config = context.config
    facts: dict[str, object]
    if context.chooses_weight:
        curve = {w: read_scores(context.path(curve_file(w))) for w in context.weights}
        dev, guard = ({w: sets[name] for w, sets in curve.items()} for name in ("dev", "guard"))
        facts = asdict(choose_weight(dev, guard, tolerance=config.tolerance))
    else:
        facts = {"weight": float(config.weight), "refused": None}
    write_json(folder / FUSION_FACTS, facts)
