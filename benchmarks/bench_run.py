"""Whole runs on real retrieval sets: recall before and after, in and out of domain, with time and
peak memory, in results/runs.csv.

    REFINE_FAST_DATA=<folder of BEIR sets> python benchmarks/bench_run.py [squad] [fusion-weights]
    [fusion-embeddings] [covidqa]
 squad: its passages alone, without an LLM. fusion-*: half an epoch of it, to set the two fusions
beside one another. covidqa: with the human questions of its train split. Judged on their test
questions; out of domain on SciFact's claims. A row's key is (run, system, judged on, device): a
re-run overwrites.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from record import RESULTS, commit, device_name

DATA = Path(os.environ.get("REFINE_FAST_DATA", ""))
HALF = [
    "--ood",
    "{data}/scifact",
    "--band",
    "auto",
    "--max-steps",
    "20",
    "--curve",
    "0,1",
    "--ood-passages",
    "500",
]
RUNS = {
    "squad": ["{data}/squad", "--ood", "{data}/scifact", "--band", "auto"],
    "fusion-weights": ["{data}/squad", *HALF],
    "fusion-embeddings": ["{data}/squad", *HALF, "--fusion", "embeddings"],
    "covidqa": [
        "{data}/covidqa",
        "--queries",
        "{data}/covidqa",
        "--ood",
        "{data}/scifact",
        "--band",
        "auto",
    ],
}
KEY = ("run", "system", "judged_on", "device")
METRICS = ("recall@1", "recall@3", "recall@10", "ndcg@10", "mrr@10")
GAIN = {"mean": "recall@3_gain", "low": "gain_low", "high": "gain_high"}
COLUMNS = (
    *KEY,
    "passages",
    "queries",
    *METRICS,
    *GAIN.values(),
    "seconds",
    "peak_mb",
    "arguments",
    "commit",
)


def measure(name: str, folder: Path) -> list[dict[str, object]]:
    arguments = [word.format(data=DATA) for word in RUNS[name]]
    start = time.perf_counter()
    process = subprocess.Popen(["refine-fast", "run", *arguments, "--out", str(folder)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"{name}: refine-fast ended with status {os.waitstatus_to_exitcode(status)}"
        )
    cost = {"seconds": round(time.perf_counter() - start), "peak_mb": usage.ru_maxrss // 1024}
    return rows_of(name, json.loads((folder / "report.json").read_text()), cost)


def rows_of(name: str, report: dict[str, Any], cost: dict[str, int]) -> list[dict[str, object]]:
    common = {
        "run": name,
        "device": device_name(),
        **cost,
        "arguments": " ".join(RUNS[name]),
        "commit": commit(),
    }
    rows: list[dict[str, object]] = []
    for judged in (report["in_domain"], *report["out_of_domain"]):
        about = {
            **common,
            "judged_on": judged["name"],
            "passages": judged["passages"],
            "queries": judged["queries"],
        }
        rows.append(
            {
                **about,
                "system": "BM25",
                **{metric: round(judged["bm25"][metric], 4) for metric in METRICS},
            }
        )
        for point in judged["weights"]:
            gain = {
                column: round(point["gain"]["recall@3"][key], 4) for key, column in GAIN.items()
            }
            metrics = {metric: round(point["metrics"][metric], 4) for metric in METRICS}
            rows.append({**about, "system": f"weight {point['weight']:g}", **metrics, **gain})
    return rows


def save(new: list[dict[str, object]]) -> None:
    path = RESULTS / "runs.csv"
    table: dict[tuple[str, ...], dict[str, object]] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(row[key] for key in KEY): dict(row) for row in csv.DictReader(file)}
    table |= {tuple(str(row[key]) for key in KEY): row for row in new}
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(table[key] for key in sorted(table))
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []], help="default: all")
    for name in parser.parse_args().runs or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            save(measure(name, Path(folder) / "run"))


if __name__ == "__main__":
    main()
