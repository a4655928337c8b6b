"""The content of report.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..evaluation.metrics import METRICS
from ..evaluation.significance import gain
from .data import Curve, ReportData, Served, SetScores
from .format import HEADLINE, TABLE_METRICS
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
        "choice": None if data.choice is None else asdict(data.choice),
        "curves": [_curve_facts(curve) for curve in data.curves],
        "in_domain": _set_facts(data.in_domain),
        "out_of_domain": [_set_facts(scores) for scores in data.out_of_domain],
        "out_of_domain_pooled": None if data.pooled is None else _set_facts(data.pooled),
        "gained": [asdict(query) for query in data.gained],
        "lost": [asdict(query) for query in data.lost],
        "stages": {
            name: {"seconds": seconds, "peak_mb": peak}
            for name, (seconds, peak) in data.costs.items()
        },
        "documents": asdict(data.documents),
        "queries": asdict(data.queries),
        "mining": mining,
        "training": asdict(data.training),
        "served": None if data.served is None else _served_facts(data.served),
        "versions": dict(data.versions),
    }


def _served_facts(served: Served) -> dict[str, Any]:
    """Each system under each encoder; its gain over passage vectors under the base."""
    first = served.systems["base"]["passages"].per_query
    sides = {
        side: {
            system: {
                "metrics": scores.metrics,
                "gain": {
                    metric: vars(gain(first[metric], scores.per_query[metric]))
                    for metric in TABLE_METRICS
                },
            }
            for system, scores in systems.items()
        }
        for side, systems in served.systems.items()
    }
    return {
        "queries": served.queries,
        "passages": served.passages,
        "choices": dict(served.choices),
        "systems": sides,
        "gain": vars(served.gain(HEADLINE)) if "fused" in served.systems else None,
    }


def _set_facts(scores: SetScores) -> dict[str, Any]:
    return {
        **_curve_facts(scores),
        "passages": scores.passages,
        "bm25": scores.bm25.metrics,
    }


def _curve_facts(curve: Curve) -> dict[str, Any]:
    weights = []
    for weight, at_weight in sorted(curve.at_weight.items()):
        gains = {metric: curve.gain(weight, metric) for metric in METRICS}
        changes = {
            metric: {**vars(change), "verdict": change.verdict} for metric, change in gains.items()
        }
        weights.append({"weight": weight, "metrics": at_weight.metrics, "gain": changes})
    return {"name": curve.name, "queries": curve.queries, "weights": weights}
