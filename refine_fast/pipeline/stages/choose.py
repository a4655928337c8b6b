"""choose: the fusion weight, on the curve or as given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import write_json
from ..artifacts import DEV, FUSION_FACTS, curve_file, read_scores
from ..corpus.jsonl import read_records
from ..evaluation.choice import MADE_MOST, Choice, choose_weight
from ..evaluation.scores import Scores
from ..queries.query import Query
from ..queries.synthetic import mostly_made

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the weight; where it was chosen, also the gains that it was chosen by, and why the
    base was kept if it was."""
    config = context.config
    facts: dict[str, object]
    if context.chooses_weight:
        curve = {w: read_scores(context.path(curve_file(w))) for w in context.weights}
        facts = asdict(chosen(context, curve))
    else:
        facts = {"weight": float(config.weight), "refused": None}
    write_json(folder / FUSION_FACTS, facts)


def chosen(context: RunContext, curve: Mapping[float, Mapping[str, Scores]]) -> Choice:
    """The weight that a run with this curve gets, by its held-out queries and settings.

    Args:
        context: of the run, whose held-out queries are written.
        curve: weight -> scores on "dev" and on "guard".
    """
    # a question with several answers is in as many records
    kinds = {query.text: query.kind for query in read_records(context.path(DEV), Query)}
    dev, guard = ({w: sets[name] for w, sets in curve.items()} for name in ("dev", "guard"))
    most = MADE_MOST if mostly_made([*kinds.values()]) else 1.0
    return choose_weight(dev, guard, tolerance=context.config.tolerance, most=most)
