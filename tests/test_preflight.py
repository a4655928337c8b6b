"""What cannot work is refused before anything is spent: by plan, by doctor and by a run's start."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from disks import full_disk
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from refine_fast.cli import main
from refine_fast.pipeline import runner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in sorted(topics)[:12]:
        (folder / f"{name}.md").write_text(topics[name][:300], encoding="utf-8")
    return folder


@pytest.fixture
def damaged(tmp_path: Path, tiny: Path) -> Path:
    """An encoder with one NaN among its weights."""
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.usefixtures("no_cluster")
def test_an_encoder_that_cannot_end_well(docs: Path, damaged: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    flags = [str(docs), "--out", str(out), "--model", str(damaged), "--quiet"]
    for command in (["plan", *flags], ["run", *flags]):
        assert main(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: model: {damaged} encodes a query to NaN or infinity; ")
    assert not (out / "chunks.jsonl").exists()
    assert main(["doctor", "--model", str(damaged)]) == 2
    assert "NaN" in capsys.readouterr().out


@pytest.mark.usefixtures("no_cluster")
def test_a_disk_is_not_blamed_on_the_encoder(
    docs: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The one of temporary files, which hold a copy of the encoder, and that of the cache."""
    plan = ["plan", str(docs), "--out", str(tmp_path / "run"), "--quiet"]
    with full_disk():
        assert main([*plan, "--model", str(tiny)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tempfile.gettempdir()}/")
    assert "File too large; fix this" in line
    cache = constants.HF_HUB_CACHE
    for error, told in (
        (OSError(errno.ENOSPC, "No space left on device"), f"{cache}: No space left on device; "),
        (PermissionError(errno.EACCES, "Permission denied", "hub/x"), "hub/x: Permission denied; "),
        (FileNotFoundError("no network"), "model: some/encoder is not a local folder and cannot"),
    ):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
        assert main([*plan, "--model", "some/encoder"]) in (1, 2)
        assert capsys.readouterr().err.startswith(f"error: {told}")


def test_a_run_that_is_up_to_date_tries_nothing(
    docs: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(runner, "try_encoder", lambda *a, **k: tried.append(a))
    command = ["queries", str(docs), "--out", str(tmp_path / "run"), "--model", str(tiny)]
    for _ in range(2):
        assert main([*command, "--quiet"]) == 0
    assert len(tried) == 1
    assert main([*command, "--quiet", "--queries-per-chunk", "3"]) == 0
    assert len(tried) == 2


def test_what_no_run_wrote_is_not_replaced(docs: Path, tiny: Path, tmp_path: Path, capsys) -> None:
    """Such as queries that lie where the run is to be; what a run wrote is replaced by the next."""
    run = tmp_path / "run"
    run.mkdir()
    flags = [str(docs), "--out", str(run), "--model", str(tiny), "--quiet"]

    def is_refused(name: str, text: str) -> None:
        (own := run / name).write_text(text)
        for command in ("plan", "run", "queries"):
            assert main([command, *flags]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert line == (
                f"error: out: {own} is not of a run, and this one would replace it; move it, or "
                "give another --out."
            )
        assert own.read_text() == text
        own.unlink()

    is_refused("config.yaml", "title: Of a web site")
    is_refused("queries.jsonl", "mine")
    assert not (run / "config.yaml").exists()
    (run / "config.yaml").write_text("seed: 1")
    for lost in ("config.yaml", "manifest.json"):
        assert main(["queries", *flags]) == 0
        is_refused("report.md", "mine")
        (run / lost).unlink()
    assert main(["queries", *flags]) == 0
