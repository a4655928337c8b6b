"""The content of report.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..evaluation.metrics import METRICS
from .data import ReportData, SetScores
from .verdict import caveats, verdict


def report_facts(data: ReportData) -> dict[str, Any]:
    """Everything that the report states, with full precision, as JSON values."""
    mining = {
        name: value for name, value in asdict(data.mining).items() if not name.endswith("_scores")
    }
    return {
        "verdict": [str(statement) for statement in verdict(data)],
        "caveats": caveats(data),
        "fusion": data.fusion,
        "weight": data.weight,
        "weight_chosen_on": data.weight_chosen_on,
        "in_domain": _set_facts(data.in_domain),
        "out_of_domain": [_set_facts(scores) for scores in data.out_of_domain],
        "out_of_domain_pooled": None if data.pooled is None else _set_facts(data.pooled),
        "documents": asdict(data.documents),
        "queries": asdict(data.queries),
        "mining": mining,
        "training": asdict(data.training),
        "versions": dict(data.versions),
    }


def _set_facts(scores: SetScores) -> dict[str, Any]:
    weights = []
    for weight, at_weight in sorted(scores.at_weight.items()):
        gains = {metric: scores.gain(weight, metric) for metric in METRICS}
        changes = {
            metric: {**vars(change), "verdict": change.verdict} for metric, change in gains.items()
        }
        weights.append({"weight": weight, "metrics": at_weight.metrics, "gain": changes})
    return {
        "name": scores.name,
        "passages": scores.passages,
        "queries": scores.queries,
        "bm25": scores.bm25.metrics,
        "weights": weights,
    }
