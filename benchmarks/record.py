"""Times a subject beside its peers in one run and keeps the rows in
``benchmarks/results/<device>.csv``.
 A machine's speed drifts, so a figure means something only beside a peer's of the same run:
``measure`` takes the contestants in turn (A B C A B C ...) and every row carries the ratio to the
peer named. Memory is the growth of the process's peak resident size, read in a fresh process, since
a peak never shrinks. A row's key is everything but its values and its time: a re-run overwrites it.
"""

from __future__ import annotations

import csv
import ctypes
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import refine_fast as rf

RESULTS = Path(__file__).parent / "results"
VALUES = {"p20", "p50", "p80", "ratio_to_peer", "commit", "timestamp"}
METRICS = {
    "seconds": "s",
    "cpu_seconds": "s",
    "peak_mb": "MiB",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "fraction_of_roofline": "1",
}


@dataclass(frozen=True)
class Row:
    """One measured figure; the columns of the results file."""

    op: str
    provider: str
    mode: str
    dtype: str
    shape: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    ratio_to_peer: float | None
    peer: str
    device: str
    isa: str
    threads: int
    torch: str
    triton: str
    refine_fast: str
    commit: str
    timestamp: str


def device_name() -> str:
    """The GPU if there is one, else the CPU's model name and cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{models[0] if models else 'cpu'}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's short hash, with "+" where the sources differ from it; REFINE_FAST_COMMIT
    where there is no checkout.
    """
    if "REFINE_FAST_COMMIT" in os.environ:
        return os.environ["REFINE_FAST_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=RESULTS.parent.parent, capture_output=True, text=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "csrc", "refine_fast") else ""
    )


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def cpu_seconds() -> float:
    """CPU time of this process, all threads: the clock to use where neighbours steal wall time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def sample(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """What one call of ``run`` costs on ``clock``; a GPU is waited for on both sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """``rounds`` samples of each contestant, taken in turn after one uncounted round."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for r in range(rounds + 1):
        for name, run in contestants.items():
            cost = sample(run, clock)
            if r > 0:
                samples[name].append(cost)
    return samples


def _peak_in_child(build: Callable[[], Callable[[], object]], pipe: Connection) -> None:
    def peak() -> float:
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024

    run = build()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # else what building freed is used again, and hides as much of the run's own
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before = peak()
    run()
    pipe.send(peak() - before)


def peak_mb(build: Callable[[], Callable[[], object]]) -> float:
    """MiB by which one call raises the peak resident size, in a fresh process: ``build()`` makes
    the inputs, what it returns is measured. ``build`` must be picklable: a module-level function or
    a functools.partial of one.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_in_child, args=(build, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {build} died") from None
    finally:
        child.join()


def rows(
    samples: Mapping[str, list[float]],
    *,
    op: str,
    mode: str,
    dtype: str,
    shape: Mapping[str, object],
    metric: str,
    peer: str,
) -> list[Row]:
    """One row a contestant: 20th, 50th and 80th percentile, and the median's ratio to the median of
    ``peer``.
    """

    def percentiles(values: list[float]) -> list[float]:
        return (
            values * 3
            if len(values) == 1
            else [statistics.quantiles(values, n=10, method="inclusive")[i] for i in (1, 4, 7)]
        )

    middle = {name: statistics.median(values) for name, values in samples.items()}
    common = {
        "op": op,
        "mode": mode,
        "dtype": dtype,
        "shape": json.dumps(shape, sort_keys=True),
        "metric": metric,
        "unit": METRICS[metric],
        "peer": peer,
        "device": device_name(),
        "isa": rf.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "refine_fast": rf.__version__,
        "commit": commit(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    found = []
    for name, values in samples.items():
        p20, p50, p80 = percentiles(values)
        ratio = middle[name] / middle[peer] if middle.get(peer) else None
        found.append(Row(provider=name, p20=p20, p50=p50, p80=p80, ratio_to_peer=ratio, **common))
    return found


def save(new: list[Row]) -> Path:
    """Merges rows into this device's file, key by key, and prints them."""
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name().lower()).strip('-')}.csv"
    names = [field.name for field in fields(Row)]

    def key(row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in names if name not in VALUES)

    table: dict[tuple[str, ...], Mapping[str, object]] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {key(row): row for row in csv.DictReader(file)}
    for row in new:
        text = {
            name: f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
            for name, value in asdict(row).items()
        }
        table[key(text)] = text
        ratio = "" if row.ratio_to_peer is None else f"  = {row.ratio_to_peer:.3g} x {row.peer}"
        print(
            f"{row.op:10} {row.mode:12} {row.dtype:5} {row.shape:44} {row.provider:32} "
            f"{row.metric:12} {row.p50:10.4g} {row.unit}{ratio}"
        )
    RESULTS.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(table[k] for k in sorted(table))
    temporary.replace(path)
    return path
