"""Small runs over a tiny random encoder: their settings, their stages, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refine_fast.cli import main
from refine_fast.pipeline import RunConfig, engine

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


ALL = [*STAGES, "teach", "curve 0.5", "systems"]


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


def undeclared_settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Stage -> the settings that it reads and does not declare; filled as stages are done. Folders
    and files are declared as such."""
    names = RunConfig.model_fields.keys()
    as_files = {"out", "docs", "model", "queries", "ood"}
    read: set[str] = set()
    undeclared: dict[str, set[str]] = {}
    plain, do = RunConfig.__getattribute__, engine.RunFolder.do

    def recorded(self: RunConfig, name: str) -> object:
        # A dump reads every field by way of __dict__.
        read.update(names if name == "__dict__" else [name])
        return plain(self, name)

    def watched(self: engine.RunFolder, stage: engine.Stage) -> float:
        read.clear()
        seconds = do(self, stage)
        undeclared[stage.name] = (read & names) - as_files - stage.settings.keys()
        return seconds

    monkeypatch.setattr(RunConfig, "__getattribute__", recorded)
    monkeypatch.setattr(engine.RunFolder, "do", watched)
    return undeclared
