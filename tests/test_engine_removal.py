"""The stage engine: what it removes of a run folder, and what it does not touch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from refine_fast.pipeline import engine
from refine_fast.pipeline.engine import RunFolder, Stage


def writer(name: str, *outputs: str) -> Stage:
    """A stage that writes files, and folders, whose names end in /, with a file each."""

    def work(to: Path) -> None:
        for output in outputs:
            path = to / output / ("weights" if output.endswith("/") else "")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)

    return Stage(name, tuple(output.rstrip("/") for output in outputs), work)


def test_what_a_stage_no_longer_writes_goes(tmp_path: Path) -> None:
    """Beside what it writes now, it would be taken for a part of that. Another stage's stays."""
    with RunFolder(tmp_path / "run") as run:
        run.do(writer("train", "tuned/", "adapter/", "facts", "moved"))
        run.do(writer("other", "moved"))
        run.do(writer("train", "tuned/"))
    found = {path.name for path in (tmp_path / "run").iterdir() if path.name[0] != "."}
    assert found == {"tuned", "moved", "manifest.json"}


def test_what_is_of_no_stage_any_more_goes(tmp_path: Path) -> None:
    """Also what a stop has left of it; not what somebody added to it or changed."""
    out = tmp_path / "run"
    for own in (None, "distill/0.5/tuned/notes.txt", "distill/0.5/notes.txt", "sentences/weights"):
        with RunFolder(out) as run:
            run.do(train := writer("train", "tuned/", "curve/"))
            run.do(writer("curve", "curve/"))
            run.do(writer("sentences", "sentences/"))
            run.do(writer("train 0.5", "distill/0.5/tuned/"))
            with pytest.raises(ZeroDivisionError):
                run.do(Stage("teach", (), lambda folder: 1 / 0))
            if own is not None:
                (out / own).write_text("mine")
            run.keep_only([train])
        assert list(json.loads((out / "manifest.json").read_text())) == ["train"]
        assert not list((out / ".work").iterdir())
        found = {str(path.relative_to(out)) for path in out.rglob("[!.]*") if path.is_file()}
        expected = {"tuned/weights", "curve/weights", "manifest.json", *filter(None, [own])}
        if own == "distill/0.5/tuned/notes.txt":
            expected.add("distill/0.5/tuned/weights")
        assert found == expected
        assert (out / "distill").exists() == ("distill" in str(own))
        shutil.rmtree(out)


@pytest.mark.parametrize("gone", ["tuned/", "curve.json"])
@pytest.mark.parametrize("redone", [False, True])
def test_a_kill_while_that_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str, redone: bool
) -> None:
    def killed(path: Path) -> None:
        if path.exists():
            if path.is_dir():
                (path / "weights").unlink()
            raise KeyboardInterrupt

    def remove(run: RunFolder) -> None:
        if redone:
            run.do(writer("train", "facts"))
        run.keep_only([writer("train", "facts")] if redone else [])

    with RunFolder(tmp_path / "run") as run:
        run.do(writer("train", "facts", gone))
        monkeypatch.setattr(engine, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(run)
        monkeypatch.undo()
        remove(run)
    found = {path.name for path in (tmp_path / "run").rglob("[!.]*")}
    assert found == {"manifest.json", *(["facts"] if redone else [])}


@pytest.mark.parametrize("redone", [False, True])
def test_what_somebody_changed_or_linked_stays(tmp_path: Path, redone: bool) -> None:
    """A folder that was moved to another disk, with a link in its place, and an own file in what
    the stage, or any, writes no more."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    with RunFolder(run) as folder:
        folder.do(writer("train", "facts", "tuned/", "adapter/"))
        (run / "tuned").rename(disk)
        (run / "tuned").symlink_to(disk)
        (run / "adapter" / "notes").write_text("mine")
        if redone:
            folder.do(writer("train", "facts"))
        else:
            folder.keep_only([])
        assert not (run / "tuned").is_symlink()
        assert (run / "facts").exists() == redone
        assert {path.name for path in (run / "adapter").iterdir()} == {"weights", "notes"}
        (run / "tuned").symlink_to(disk)
        folder.do(writer("train", "facts", "tuned/"))
        assert not (run / "tuned").is_symlink()
    assert (disk / "weights").exists()


def test_a_copy_without_hidden_files_is_cleared_too(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        run.do(writer("train", "facts"))
        shutil.rmtree(run.work)
        run.keep_only([])
    assert not (tmp_path / "run" / "facts").exists()
