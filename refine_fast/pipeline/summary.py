"""What each command shows at its end: a table for people, or the same facts as JSON."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from ..fuse import fuse
from .console import Console, facts_table
from .evaluate import evaluate_models, gain
from .job import Job
from .jsonl import read_records
from .queries import Query
from .stages import read_json
from .work import all_scores, chosen_weight

COLUMNS = ("recall@1", "recall@3", "recall@10", "ndcg@10")


def show_run(job: Job, command: str) -> None:
    """After a whole run the before/after table, after a part of it the facts of its last stage."""
    if command in ("run", "report"):
        return _show_scores(job)
    facts = read_json(job.path({"queries": "chunks.json", "mine": "mining.json", "train": "training.json"}[command]))
    if command == "queries":
        facts |= {name: len(read_records(job.path(f"{name}.jsonl"), Query)) for name in ("queries", "dev", "held_out")}
    shown = {name: value for name, value in facts.items() if name != "loss"}  # of every step
    job.console.result({"out": str(job.config.out), **facts}, facts_table(shown))
    job.console.say(f"{command}: in {job.config.out}")


def _show_scores(job: Job) -> None:
    weight = chosen_weight(job)
    systems = all_scores(job, weight)
    value: dict[str, Any] = {"model": str(job.path("model")), "report": str(job.path("report.html")), "weight": weight, "sets": {}}
    tables = []
    for name, before in systems["base"].items():
        if name == "dev":
            continue
        change = gain(before.per_query["recall@3"], systems["fused"][name].per_query["recall@3"])
        value["sets"][name] = {
            "systems": {system: scores[name].metrics for system, scores in systems.items()},
            "gain": {"metric": "recall@3", **vars(change), "verdict": change.verdict},
        }
        title = "your documents" if name == "in_domain" else f"out of domain: {name.removeprefix('ood:')}"
        caption = f"recall@3, base to fused: {points(**vars(change))}, {change.verdict}"
        table = Table("", *COLUMNS, title=f"{title} ({len(before.per_query['recall@3'])} queries)", caption=caption)
        for system, scores in systems.items():
            label = f"fused, weight {weight:g}" if system == "fused" else system
            style = "bold" if system == "fused" else None
            table.add_row(label, *(f"{scores[name].metrics[metric]:.3f}" for metric in COLUMNS), style=style)
        tables.append(table)
        if change.high < 0:
            job.console.warn(f"the fused model retrieves worse than the base on {title}; see report.html for the weights in between.")
    job.console.result(value, *tables)
    job.console.say(f"the model is {job.path('model')}, the report {job.path('report.html')}")


def show_evaluation(models: list[str], data: Path, split: str, console: Console) -> None:
    with console.progress("encoding") as progress:
        rows = evaluate_models(models, data, split, progress=progress)
    table = Table(Column(overflow="fold"), *COLUMNS, "recall@3 against the first")  # runs/a/model and runs/b/model differ in the middle
    for row in rows:
        change = row.get("gain", {}).get("recall@3")
        table.add_row(row["system"], *(f"{row[metric]:.3f}" for metric in COLUMNS), points(**change) if change else "")
    console.result({"rows": rows}, table)


def show_fusion(base: Path, tuned: Path, out: Path, console: Console, **how: Any) -> None:
    start = time.perf_counter()
    with console.progress("fusing, MB") as progress:

        def advance(done: int, total: int) -> None:
            progress(done // 10**6, total // 10**6, f"{done / 1e9 / (time.perf_counter() - start):.2f} GB/s")

        report = fuse(base, tuned, out, progress=advance, **how)
    tensors = {  # JSON has no NaN
        name: {what: value if math.isfinite(value) else None for what, value in asdict(change).items()}
        for name, change in report.tensors.items()
    }
    console.result({"weight": how["weight"], **vars(report), "tensors": tensors, "not_finite": report.not_finite})
    console.say(str(report))


def points(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
