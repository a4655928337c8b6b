"""What each command prints at its end: a table, or the same facts as JSON."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.table import Column, Table

from ...files import read_json
from ...fuse import fuse
from ..artifacts import (
    CHUNK_FACTS,
    DEV,
    HELD_OUT,
    MINING_FACTS,
    QUERIES,
    TRAINING_FACTS,
    all_scores,
    fused_weight,
)
from ..console import Console, facts_table
from ..context import RunContext
from ..corpus.jsonl import read_records
from ..evaluation.evaluate import evaluate_models
from ..evaluation.significance import Gain, gain
from ..queries.query import Query
from ..reporting.format import HEADLINE, points
from ..serving.evaluate import evaluate_systems

COLUMNS = ("recall@1", "recall@3", "recall@10", "ndcg@10")
"""The metrics in the tables."""


def show_run(context: RunContext, command: str) -> None:
    """After a whole run, prints the scores; after a part of it, facts of its last stage."""
    if command in ("run", "report"):
        return _show_scores(context)
    name = {"queries": CHUNK_FACTS, "mine": MINING_FACTS, "train": TRAINING_FACTS}[command]
    facts = read_json(context.path(name))
    if command == "queries":
        for part in (QUERIES, DEV, HELD_OUT):
            facts[part.partition(".")[0]] = len(read_records(context.path(part), Query))
    shown = {name: value for name, value in facts.items() if name != "loss"}  # of every step
    context.console.result({"out": str(context.config.out), **facts}, facts_table(shown))
    context.console.say(f"{command}: written to {context.config.out}")


def _show_scores(context: RunContext) -> None:
    weight = fused_weight(context.out)
    systems = all_scores(context.out)
    value: dict[str, Any] = {
        "model": str(context.model),
        "report": str(context.path("report.html")),
        "weight": weight,
        "kept_base": context.kept_base,
        "sets": {},
    }
    tables = []
    for name, before in systems["base"].items():
        change = gain(before.per_query[HEADLINE], systems["fused"][name].per_query[HEADLINE])
        value["sets"][name] = {
            "systems": {system: scores[name].metrics for system, scores in systems.items()},
            "gain": {"metric": HEADLINE, **vars(change), "verdict": change.verdict},
        }
        title = (
            "your documents"
            if name == "in_domain"
            else f"out of domain: {name.removeprefix('ood:')}"
        )
        caption = f"{HEADLINE}, base to fused: {points(change)}, {change.verdict}"
        table = Table(
            "",
            *COLUMNS,
            title=f"{title} ({len(before)} queries)",
            caption=caption,
        )
        for system, scores in systems.items():
            label = f"fused, weight {weight:g}" if system == "fused" else system
            style = "bold" if system == "fused" else None
            table.add_row(
                label, *(f"{scores[name].metrics[metric]:.3f}" for metric in COLUMNS), style=style
            )
        tables.append(table)
        if change.high < 0 and weight:
            context.console.warn(
                f"the fused model retrieves worse than the base on {title}; "
                "see report.html for smaller weights."
            )
    if context.kept_base:
        context.console.warn(context.report["verdict"][0])
    context.console.result(value, *tables)
    context.console.say(f"the model is {context.model}, the report {context.path('report.html')}")


def _title(about: dict[str, Any]) -> str:
    """Of a table of scores on one set."""
    return (
        f"{about['data']}, {about['split']}: {about['queries']:,} queries, "
        f"{about['passages']:,} passages, precision {about['precision']}"
    )


def show_evaluation(
    models: list[str],
    data: Path,
    split: str,
    console: Console,
    *,
    precision: Literal["fp32", "bf16", "auto"] = "fp32",
    trust_remote_code: bool = False,
) -> None:
    """Scores the models and shows a row for each, with the gains over the first."""
    with console.progress("encoding") as progress:
        rows = evaluate_models(
            models,
            data,
            split,
            precision=precision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    about = rows[-1]  # of a model
    table = Table(
        Column(overflow="fold"),  # runs/a/model and runs/b/model differ in the middle
        *COLUMNS,
        f"{HEADLINE} against the first",
        title=_title(about),
    )
    for row in rows:
        change = row.get("gain", {}).get(HEADLINE)
        table.add_row(
            row["system"],
            *(f"{row[metric]:.3f}" for metric in COLUMNS),
            points(Gain(**change)) if change else "",
        )
    console.result({"rows": rows}, table)


def show_systems(
    models: list[str],
    data: Path,
    split: str,
    console: Console,
    *,
    precision: Literal["fp32", "bf16", "auto"] = "fp32",
    trust_remote_code: bool = False,
) -> None:
    """Scores the models in the systems that are served; a row for each, and the weights."""
    found = evaluate_systems(
        models,
        data,
        split,
        precision=precision,
        trust_remote_code=trust_remote_code,
        progress=console.progress,
    )
    gains = {"gain": "passages"} | ({"gain_over_first": "the first"} if len(models) > 1 else {})
    table = Table(
        Column(overflow="fold"),
        "",
        *COLUMNS,
        *(f"{HEADLINE} against {what}" for what in gains.values()),
        title=_title(found),
    )
    for row in found["rows"]:
        changes = [row.get(name, {}).get(HEADLINE) for name in gains]
        table.add_row(
            row["model"] or "",
            row["system"],
            *(f"{row[metric]:.3f}" for metric in COLUMNS),
            *(points(Gain(**change)) if change else "" for change in changes),
        )
    console.result(found, table)
    chosen_on = found["chosen_on"]
    for name, blend in found["blends"].items():
        console.say(
            f"{name}: blend of best sentence {blend['sentences']:g}, BM25 {blend['lexical']:g}, "
            f"chosen on {chosen_on['queries']:,} queries ({chosen_on['name']})"
        )


def show_fusion(base: Path, tuned: Path, out: Path, console: Console, **how: Any) -> None:
    """Fuses two checkpoints with progress and prints the report; ``how`` as in ``fuse``."""
    start = time.perf_counter()
    with console.progress("fusing, MB") as progress:

        def advance(done: int, total: int) -> None:
            progress(
                done // 10**6,
                total // 10**6,
                f"{done / 1e9 / (time.perf_counter() - start):.2f} GB/s",
            )

        report = fuse(base, tuned, out, progress=advance, **how)
    tensors = {  # JSON has no NaN
        name: {
            what: value if math.isfinite(value) else None for what, value in asdict(change).items()
        }
        for name, change in report.tensors.items()
    }
    console.result(
        {
            "weight": how["weight"],
            **vars(report),
            "tensors": tensors,
            "not_finite": report.not_finite,
        }
    )
    console.say(str(report))
