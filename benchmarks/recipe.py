"""What the recipe gains and forgets: whole runs on real retrieval sets, in results/recipe.csv.

    REFINE_FAST_DATA=<folder of BEIR sets> python benchmarks/recipe.py [--sets squad covidqa ...]
        [--queries none smollm2 llm human ...] [--options best paper ...] [--seeds 0 1 2]
        [--runs FOLDER] [--again]

Each set is the domain once, judged on its own test questions; out of domain are the other sets.
Queries: "none", made from the passages without a language model; "smollm2", written by the embedded
language model; "smollm2 and made", both; "human", the set's train split; "llm", those of queries/,
which a large language model wrote from the passages alone (two each for SQuAD, CC BY-SA 4.0 like
its text; one each for COVID-QA). That model may have met the public test questions in its own
training. A query that equals one is never trained on; 5% of SQuAD's test questions and 2% of
COVID-QA's have a paraphrase among its queries (cosine of at least 0.9 under MiniLM).
``OPTIONS`` changes one thing at a time.

Judged on "served": the blend of passages, sentences and BM25 that a run's index serves, in the
domain, with its weights chosen on held-out queries; of a sample of the test set, or of all of it,
where ``refine-fast eval --systems`` scored the run's model with its held-out queries as split dev.

A run whose rows are in the table is skipped, and one that was stopped resumes in ``--runs``: start
the same command again. Seconds and memory are right for runs that were not stopped. A row's key is
(set, queries, option, seed, judged on, system, device).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from keyed_table import read, save

from refine_fast.bench.machine import commit, device_name
from refine_fast.cli import KEPT_BASE

RESULTS = Path(__file__).parent / "results"
WRITTEN = Path(__file__).parent / "queries"
DATA = Path(os.environ.get("REFINE_FAST_DATA", ""))
SETS = ("squad", "covidqa", "dstc11_travel", "pubmedqa", "scifact")
QUERIES: dict[str, list[str]] = {
    "none": [],
    "smollm2": ["--llm", "smollm2", "--query-kinds", "none"],
    "smollm2 and made": ["--llm", "smollm2"],
    "llm": ["--queries", str(WRITTEN / "{set}.jsonl")],
    "human": ["--queries", str(DATA / "{set}")],
    "human and made": [
        *("--queries", str(DATA / "{set}")),
        *("--query-kinds", "span,keywords,question"),
    ],
}
CLOZES = ["--query-kinds", "cloze,span,cloze,title", "--queries-per-chunk", "2"]
"""Sentences and titles, once the default."""
OPTIONS: dict[str, list[str]] = {
    "best": [],
    "paper": ["--recipe", "paper"],
    "InfoNCE": ["--distill", "0"],
    "half distilled": ["--distill", "0.5"],
    "distilled": ["--distill", "1"],
    "random batches": ["--batches", "random"],
    "similar batches": ["--batches", "similar"],
    "lr 3e-4": ["--lr", "3e-4"],
    "fp32": ["--precision", "fp32"],
    "1 epoch": ["--epochs", "1"],
    "2 epochs": ["--epochs", "2"],
    "2 queries": ["--queries-per-chunk", "2"],
    "4 queries": ["--queries-per-chunk", "4"],
    "keywords": ["--query-kinds", "keywords"],
    "spans and keywords": ["--query-kinds", "span,keywords"],
    "crops": ["--query-kinds", "span,keywords,crop"],
    "clozes": CLOZES,
    "clozes, fp32": [*CLOZES, "--precision", "fp32"],
    "clozes, similar batches": [*CLOZES, "--batches", "similar"],
    "no negatives": ["--negatives", "0"],
    "1 negative": ["--negatives", "1"],
    "relative margin": ["--relative-margin", "0.05"],
    "fixed band": ["--band", "0.5,0.7"],
    "last 2 layers": ["--train-layers", "2"],
    "embeddings": ["--fusion", "embeddings"],
}
KEY = ("set", "queries", "option", "seed", "judged_on", "system", "device")
METRICS = ("recall@1", "recall@3", "recall@10", "ndcg@10", "mrr@10")
GAIN = {"mean": "recall@3_gain", "low": "gain_low", "high": "gain_high"}
COLUMNS = (
    *KEY,
    "passages",
    "test_queries",
    *METRICS,
    *GAIN.values(),
    "weight",
    "kept_base",
    "seconds",
    "peak_mb",
    "commit",
)


def measure(run: dict[str, str], folder: Path, ood_passages: int) -> list[dict[str, Any]]:
    """One run; the rows of all sets and systems that it was judged on."""
    docs = DATA / run["set"]
    flags = ["--seed", run["seed"], "--ood-passages", str(ood_passages), *OPTIONS[run["option"]]]
    flags += [flag.replace("{set}", run["set"]) for flag in QUERIES[run["queries"]]]
    for other in SETS:
        flags += ["--ood", str(DATA / other)] if other != run["set"] else []
    own_commit, start = commit(), time.perf_counter()
    command = ["refine-fast", "run", str(docs), "--out", str(folder), *flags]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, KEPT_BASE):
        raise SystemExit(f"{' '.join(command)} ended with status {code}")
    report = json.loads((folder / "report.json").read_text())
    common = {
        **run,
        "device": device_name(),
        "weight": report["weight"],
        "kept_base": int(code == KEPT_BASE),
        "seconds": round(time.perf_counter() - start),
        "peak_mb": usage.ru_maxrss // 1024,
        "commit": own_commit,
    }
    rows = [
        row
        for judged in (report["in_domain"], *report["out_of_domain"])
        for row in rows_of(judged, report["weight"])
    ]
    return [{**common, **row} for row in rows + served_rows(report["served"])]


def rows_of(judged: dict[str, Any], weight: float) -> list[dict[str, Any]]:
    """The rows of one test set: BM25, the base, the fused model and the fine-tuned one."""
    about = {
        "judged_on": judged["name"],
        "passages": judged["passages"],
        "test_queries": judged["queries"],
    }
    at = {point["weight"]: point for point in judged["weights"]}
    rows = [{**about, "system": "BM25", **rounded(judged["bm25"], METRICS)}]
    for system, point in (("base", at[0]), ("fused", at[weight]), ("fine-tuned", at[1])):
        gain = {GAIN[side]: round(point["gain"]["recall@3"][side], 4) for side in GAIN}
        rows.append({**about, "system": system, **rounded(point["metrics"], METRICS), **gain})
    return rows


def served_rows(served: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of the blend that is served, with the base and with the fused encoder: a sample of
    the domain's test queries and passages."""
    if served is None or served["gain"] is None:
        return []
    about = {
        "judged_on": "served",
        "passages": served["passages"],
        "test_queries": served["queries"],
    }
    change = {"base": dict.fromkeys(GAIN, 0.0), "fused": served["gain"]}
    return [
        {
            **about,
            "system": side,
            **rounded(served["systems"][side]["blend"]["metrics"], METRICS),
            **{GAIN[bound]: round(change[side][bound], 4) for bound in GAIN},
        }
        for side in change
    ]


def rounded(values: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """The named values to four digits."""
    return {name: round(values[name], 4) for name in names}


def main() -> None:
    """Does what the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--queries", nargs="+", choices=QUERIES, default=["none"])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=["best"])
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--ood-passages", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=Path("recipe-runs"))
    parser.add_argument("--again", action="store_true", help="also what is in the table")
    given = parser.parse_args()
    table = RESULTS / "recipe.csv"
    chosen = (given.sets, given.queries, given.options, given.seeds)
    for combination in itertools.product(*chosen):
        run = dict(zip(("set", "queries", "option", "seed"), combination, strict=True))
        key = (*combination, "in_domain", "fused", device_name())
        if key in read(table, KEY) and not given.again:
            continue
        save(
            table,
            KEY,
            COLUMNS,
            measure(run, given.runs / "-".join(combination), given.ood_passages),
        )


if __name__ == "__main__":
    main()
