"""Runs that are killed or interrupted end, in the end, with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import fork
from small_runs import SMALL, STAGES, outputs, rerun, results

from refine_fast.cli import main
from refine_fast.pipeline import RunConfig, engine, run
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the killed runs


def _killed(config: RunConfig, at: str) -> None:
    """A run that kills itself in stage ``at``: when its work is written and nothing of it is
    recorded; training in its eighth step."""
    from transformers import TrainerCallback

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    trainer.CHECKPOINT_SECONDS = 0.0
    sync, work_of = engine.fsync_all, engine.RunFolder.do
    current = ""

    def do(self: engine.RunFolder, stage: engine.Stage) -> float:
        nonlocal current
        current = stage.name
        return work_of(self, stage)

    def sync_or_die(path: Path) -> None:
        if current == at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    def die(self: TrainerCallback, args, state, control, **kwargs) -> None:
        if at == "train" and state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    engine.RunFolder.do, engine.fsync_all, TrainerCallback.on_step_begin = do, sync_or_die, die
    run(config, console=Console(quiet=True))


def kill_at(stage: str, config: RunConfig) -> None:
    process = fork(_killed, config, stage)
    process.join(600)  # a busy machine takes minutes
    assert process.exitcode == -signal.SIGKILL
    if stage == "train":
        assert list((config.out / ".work").rglob("checkpoint-6/complete"))


def test_kill_9_in_each_stage(tmp_path: Path, tiny: Path, docs: Path, whole: Path) -> None:
    """A chain of runs over one folder, each killed one stage further on, leaves the very bytes of
    the run that was never interrupted, time and memory in the report aside. Training is killed
    between two checkpoints, so this also covers a resumed training."""
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **SMALL)
    for stage in STAGES:
        kill_at(stage, config)
        done = outputs(config.out) if (config.out / "manifest.json").exists() else {}
        assert list(done) == STAGES[: STAGES.index(stage)]
    run(config, console=Console(quiet=True))
    assert results(config.out) == results(whole)


def test_fusion_of_embeddings(
    copied: Path, whole: Path, tiny: Path, docs: Path, tmp_path: Path, capsys
) -> None:
    """Over the folder of a run with the other fusion, what the loss decides is redone. Killed in
    training and in the assembly, it ends with the same bytes. The product is the sum of the two
    encoders under every command."""
    killed = RunConfig(
        out=shutil.copytree(copied, tmp_path / "killed"),
        docs=docs,
        model=str(tiny),
        fusion="embeddings",
        **SMALL,
    )
    why = rerun(copied, capsys, "--fusion=embeddings")
    assert 'config.fusion "weights" -> "embeddings"' in why["train"]
    redone = "train", "curve 0.35", "curve 1.0", "score fine-tuned", "score fused", "fuse", "report"
    assert tuple(why) == redone
    assert outputs(copied)["train"]["tuned"] != outputs(whole)["train"]["tuned"]  # another loss
    for stage in ("train", "fuse"):
        kill_at(stage, killed)
    run(killed, console=Console(quiet=True))
    assert results(killed.out) == results(copied)

    texts = ["a river in France", "the boiling point of water"]
    tuned, frozen, product = (
        load_encoder(folder).encode_query(texts)
        for folder in (copied / "tuned", tiny, copied / "model")
    )
    mixed = 0.35 * tuned + 0.65 * frozen
    torch.testing.assert_close(
        product, mixed / np.linalg.norm(mixed, axis=1, keepdims=True), rtol=0, atol=2e-7
    )  # sums of float32
    report = json.loads((copied / "report.json").read_text())
    assert report["fusion"] == "embeddings"
    assert "normalize(0.35 * e_tuned + 0.65 * e_frozen)" in (copied / "report.md").read_text()
    assert "trust_remote_code=True" in (copied / "model" / "README.md").read_text()
    assert main(["index", str(copied)]) == 0

    assert rerun(copied, capsys) == {}
    assert (
        "config.weight 0.35 -> 1.0" in rerun(copied, capsys, "--weight=1")["train"]
    )  # it is in the loss
    assert (
        main(["plan", "--out", str(tmp_path / "more"), str(docs), "--model", str(copied / "model")])
        == 2
    )
    assert (
        "holds two encoders (fusion embeddings); adapt its subfolder tuned or frozen instead."
        in capsys.readouterr().err
    )


def test_ctrl_c(copied: Path, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refine_fast.pipeline.stages.mine.mine", lambda *a, **k: interrupt())
    assert main(["mine", "--out", str(copied), "--skip", "4"]) == 130
    assert "stopped; run the same command to resume." in capsys.readouterr().err


def test_two_runs_into_one_folder(copied: Path, capsys) -> None:
    with engine.RunFolder(copied):
        assert main(["run", "--out", str(copied)]) == 3
    assert (
        f"is in use by another process ({os.getpid()}); "
        "wait for it to finish or give another --out." in capsys.readouterr().err
    )
