"""Small runs over a tiny random encoder: their settings, their stages, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refine_fast.cli import main

SMALL = {
    "batch_size": 8,
    "queries_per_chunk": 2,
    "chunk_tokens": 64,
    "curve": (0, 1),
    "weight": 0.35,
    "epochs": 1,
    "band": (-0.9, 1),
    "precision": "fp32",
    "ood": (),
    "served": False,  # encodes every sentence twice; one test does
}


STAGES = [
    "chunk",
    "query",
    "embed",
    "mine",
    "train",
    "curve 0.0",
    "curve 0.35",
    "curve 1.0",
    "choose",
    "score BM25",
    "score base",
    "score fine-tuned",
    "score fused",
    "fuse",
    "report",
]


ALL = [*STAGES, "curve 0.5", "systems"]


def outputs(out: Path) -> dict[str, dict[str, str]]:
    """Stage -> output -> SHA-256."""
    return {
        stage: record["outputs"]
        for stage, record in json.loads((out / "manifest.json").read_text()).items()
    }


def results(out: Path) -> dict[str, object]:
    """``outputs``, and of the report everything but what the stages took."""
    report = json.loads((out / "report.json").read_text())
    del report["stages"]
    return {**outputs(out), "report": report}


def rerun(out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """Runs the command again over its folder; stage -> why it was redone."""
    assert main(["run", "--out", str(out), *flags]) == 0
    lines = [
        line.split(": ", 1)
        for line in capsys.readouterr().err.splitlines()
        if line.startswith(tuple(f"{name}: " for name in ALL))
    ]
    return {
        stage: reason
        for stage, reason in lines
        if reason != "up to date" and not reason.startswith("done in")
    }
