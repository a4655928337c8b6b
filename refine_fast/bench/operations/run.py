"""run: the whole pipeline on Python's documentation, as the command line runs it.

It has no peer that does the same; its rows show what a run costs, and ``--profile`` shows its
stages.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import RefineFastError
from ...files import read_json
from ..operation import Contender, Operation, Shape, Work

KEPT_BASE = 4
"""The exit code of a run in which no fine-tuned model was better."""


@dataclass
class Job:
    """Where a run goes, and how long it may be."""

    folder: Path
    limit: int
    runs: int = 0


@contextmanager
def inputs(shape: Shape, dtype: str, device: str) -> Iterator[Job]:
    """An empty folder."""
    with tempfile.TemporaryDirectory(prefix="refine-fast-bench-") as folder:
        yield Job(Path(folder), int(shape["limit"]))


def ours(job: Job) -> Path:
    """``refine-fast run --quick`` from the start, in a process of its own."""
    job.runs += 1
    out = job.folder / f"run-{job.runs}"
    command = [sys.executable, "-m", "refine_fast", "run", "--quick", "--quiet"]
    command += ["--limit", str(job.limit), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, KEPT_BASE):
        raise RefineFastError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return out


def stages(folder: Path) -> dict[str, float]:
    """Seconds by stage, as the run wrote them down."""
    manifest = read_json(folder / "manifest.json") or {}
    return {name: record["seconds"] for name, record in manifest.items()}


OPERATIONS = (
    Operation(
        "run",
        "quick",
        shape={"limit": 400},
        quick={"limit": 100},
        tiny={"limit": 60},
        rounds=1,
        own_process=True,
        contenders=(Contender("refine_fast", ours, "refine-fast run --quick", exact=False),),
        peer="refine_fast",
        inputs=inputs,
        work=lambda shape, dtype: Work(),
        needs="sentence-transformers",
        stages_of=stages,
    ),
)
