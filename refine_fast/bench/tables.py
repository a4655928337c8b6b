"""The tables of README.md, from the rows in ``benchmarks/results``.

A table stands between the markers ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ..errors import RefineFastError
from .compare import latest
from .regression import result_files
from .rows import Row, load
from .suite import OURS

LEVELS = ("scalar", "neon", "avx2", "avx512", "avx512_bf16", "amx")
"""Slowest first."""


@dataclass(frozen=True)
class Line:
    """One line of the table of operations.

    Attributes:
        title: what the first column says.
        op, mode, dtype, shape, metric: whose rows it is made of.
        peers: provider -> how the text names it.
        memory: the provider whose memory is told beside ours, and how the text names it.
        besides: what our memory is, in words.
    """

    title: str
    op: str
    mode: str
    dtype: str
    shape: Mapping[str, float]
    metric: str
    peers: dict[str, str]
    memory: tuple[str, str] | None
    besides: str


INFO_NCE = {"B": 8192, "N": 8192, "D": 384}
LINES = (
    Line(
        "`info_nce`, B = 8,192, d = 384, fp32", "info_nce", "fwd+bwd", "fp32", INFO_NCE,
        "cpu_seconds",
        {
            "torch chunks of 256": "torch in chunks of 256 rows",
            "sentence-transformers cached": "sentence-transformers' cached loss",
        },
        ("naive cross_entropy", "naive"), "with gradients",
    ),
    Line(
        "the same in bf16", "info_nce", "fwd+bwd", "bf16", INFO_NCE, "cpu_seconds",
        {"torch chunks of 256": "torch in chunks of 256 rows"}, None, "with gradients",
    ),
    Line(
        "`band_topk`, 4,096 x 200,000, d = 384", "band_topk", "mine", "fp32",
        {"B": 4096, "N": 200_000, "D": 384, "k": 100, "skip": 5}, "cpu_seconds",
        {"faiss_top100": "faiss's exact top 100, which has no band"}, None, "besides the data",
    ),
    Line(
        "`fuse`, 3.15 GB bf16 pair in 3 shards, cold, fsynced", "fuse", "cold", "bf16",
        {"gb": 3.15, "shards": 3}, "seconds",
        {
            "cp": "`cp` of one model",
            "loop": "safetensors + `torch.lerp`",
            "mergekit": "mergekit",
        },
        ("loop", "the loop"), "",
    ),
)  # fmt: skip


def machine_name(row: Row) -> str:
    """``AMD EPYC, avx2``."""
    return f"{row.device.split(',')[0]}, {row.isa}"


def machines(results: Path) -> list[list[Row]]:
    """The latest rows of each machine, a file each, at its best level: rows of levels that were
    forced are left out. The machine with the most instructions comes first."""
    found = []
    for path in result_files(results):
        rows = load(path)
        best = max((row.isa for row in rows), key=LEVELS.index)
        found.append(latest(row for row in rows if row.isa == best))
    return sorted(found, key=lambda rows: (-LEVELS.index(rows[0].isa), rows[0].device))


def matches(row: Row, line: Line) -> bool:
    """Whether a row is about a line's subject, on one thread where CPU time is its metric."""
    same = (row.op, row.mode, row.dtype) == (line.op, line.mode, line.dtype)
    return same and row.sizes == line.shape and (line.op == "fuse" or row.threads == 1)


def speed(rows: Sequence[Row], line: Line) -> str:
    """``2.3x torch in chunks, 9.5x ...``: the peers' time over ours."""
    times = {row.provider: row.p50 for row in rows if row.metric == line.metric}
    ratios = {
        row.peer: row.ratio_to_peer
        for row in rows
        if row.metric == line.metric and row.provider == OURS and row.ratio_to_peer
    }
    said = []
    for peer, words in line.peers.items():
        if peer in ratios:
            said.append(f"{1 / ratios[peer]:.1f}x {words}")
        elif OURS in times and peer in times:
            said.append(f"{times[peer] / times[OURS]:.1f}x {words}")
    return ", ".join(said)


def memory(rows: Sequence[Row], line: Line) -> str:
    """``47 MiB with gradients; naive 773``."""
    peaks = {row.provider: row.p50 for row in rows if row.metric == "peak_mb"}
    if OURS not in peaks:
        return ""
    said = f"{peaks[OURS]:,.0f} MiB {line.besides}".strip()
    if line.memory is not None and line.memory[0] in peaks:
        said += f"; {line.memory[1]} {peaks[line.memory[0]]:,.0f}"
    return said


def operations_table(results: Path) -> str:
    """Each operation on each machine: how much faster than its peers, and its memory."""
    lines = ["| operation | machine | speed | memory |", "|---|---|---|---|"]
    by_machine = machines(results)
    for line in LINES:
        for rows in by_machine:
            own = [row for row in rows if matches(row, line)]
            if said := speed(own, line):
                place = machine_name(own[0])
                lines.append(f"| {line.title} | {place} | {said} | {memory(own, line)} |")
    return "\n".join(lines)


RECIPES = (
    ("squad", "none"),
    ("squad", "smollm2 and made"),
    ("squad", "llm"),
    ("squad", "human"),
    ("covidqa", "none"),
    ("covidqa", "human"),
    ("dstc11_travel", "none"),
    ("dstc11_travel", "human"),
)
"""Documents and queries of the table of adapted encoders, each under the default recipe."""
DOMAINS = {"squad": "SQuAD", "covidqa": "COVID-QA", "dstc11_travel": "Travel (DSTC11)"}
WRITERS = {
    "none": "made from the passages, no LLM",
    "smollm2 and made": "the same, and others by SmolLM2 (`--llm smollm2`)",
    "llm": "written by a large language model",
    "human": "asked by people (`--queries`)",
}
"""The names of both."""
SETS = {
    "scifact": "SciFact",
    "covidqa": "COVID-QA",
    "dstc11_travel": "travel",
    "pubmedqa": "PubMedQA",
    "squad": "SQuAD",
}
"""The order and the names of the sets in the last column."""


def recipe_table(results: Path) -> str:
    """Adapted encoders: recall@3 before and after, and elsewhere."""
    lines = [
        "| documents | queries | BM25 | base | **adapted** | served | elsewhere | measured on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with (results / "recipe.csv").open(newline="") as opened:
        table = list(csv.DictReader(opened))
    for domain, queries in RECIPES:
        wanted = (domain, queries, "best")
        rows, where = best_measured(
            [row for row in table if (row["set"], row["queries"], row["option"]) == wanted]
        )
        of = means(rows)
        base, adapted = of["in_domain", "base"], of["in_domain", "fused"]
        elsewhere = [
            f"{SETS[other]} {_gain(of[other, 'fused'])}" for other in SETS if (other, "fused") in of
        ]
        served = _gain(of["served", "fused"]) if ("served", "fused") in of else "–"
        lines.append(
            f"| {DOMAINS[domain]}, {int(adapted['passages']):,} passages | {WRITERS[queries]} | "
            f"{_recall(of['in_domain', 'BM25'])} | {_recall(base)} | **{_recall(adapted)}** "
            f"({_gain(adapted)}) | {served} | {', '.join(elsewhere)} | {where} |"
        )
    return "\n".join(lines)


def best_measured(rows: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """The rows of the machine with the most seeds, the first of several, and what they are in
    words: ``AMD EPYC, 3 seeds``."""
    seeds: dict[str, set[str]] = {}
    for row in rows:
        seeds.setdefault(row["device"], set()).add(row["seed"])
    device = max(seeds, key=lambda device: len(seeds[device]))
    count = len(seeds[device])
    place = re.sub(r"\(R\)| Processor", "", device.split(",")[0])
    said = f"{place}, {count} seed{'s' if count > 1 else ''}"
    return [row for row in rows if row["device"] == device], said


def means(rows: Sequence[dict[str, str]]) -> dict[tuple[str, str], dict[str, float]]:
    """(judged on, system) -> the numbers of the table, each its mean over the seeds.

    The means of the bounds are an interval at least as wide as that of the mean gain itself, since
    the spread of a mean is at most the mean of the spreads.
    """
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["judged_on"], row["system"]), []).append(row)
    numbers = ("passages", "recall@3", "recall@3_gain", "gain_low", "gain_high")
    return {
        key: {name: fmean(float(row[name] or "nan") for row in own) for name in numbers}
        for key, own in groups.items()
    }


def _recall(numbers: Mapping[str, float]) -> str:
    return f"{numbers['recall@3']:.3f}".lstrip("0")


def _gain(numbers: Mapping[str, float]) -> str:
    mean, low, high = (100 * numbers[name] for name in ("recall@3_gain", "gain_low", "gain_high"))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


TABLES: dict[str, Callable[[Path], str]] = {
    "operations": operations_table,
    "recipe": recipe_table,
}


def with_tables(text: str, results: Path, name: str = "README.md") -> str:
    """The text with every table as the results have it.

    Raises:
        RefineFastError: a marker names no table or has no end, or a table has no marker.
    """
    for table, make in TABLES.items():
        start, end = f"<!-- table: {table} -->\n", "<!-- end of table -->"
        found = re.findall(f"{start}((?:(?!<!--).)*?){end}", text, re.S)
        count = len(found)
        if count == 1:
            text = text.replace(f"{start}{found[0]}{end}", f"{start}{make(results)}\n{end}")
        else:
            raise RefineFastError(
                f"{name}: the markers <!-- table: {table} --> and <!-- end of table --> must occur "
                f"once (found {count})."
            )
    return text
