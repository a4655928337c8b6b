"""The stage engine: what is redone, why, and what a kill at any moment leaves.

The stages here are tiny; test_run.py kills real ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import full_disk
from safetensors import SafetensorError
from safetensors.torch import save_file

from refine_fast.errors import RefineFastError
from refine_fast.pipeline import engine
from refine_fast.pipeline.artifacts import stage_costs
from refine_fast.pipeline.cluster.shards import FolderShards
from refine_fast.pipeline.code_version import CodeVersion
from refine_fast.pipeline.corpus.documents import may_be_read
from refine_fast.pipeline.engine import LockedError, RunFolder, Stage
from refine_fast.pipeline.reserve import save_rows


def copy_upper(source: Path, **kwargs) -> Stage:
    def work(to: Path) -> None:
        (to / "upper.txt").write_text(source.read_text().upper())

    return Stage("upper", ("upper.txt",), work, {"source.txt": source}, **kwargs)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("one")
    return path


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda path: save_file({"w": torch.zeros(10**6)}, path), "File too large"),
        (lambda path: torch.save({"w": torch.zeros(10**6)}, path), "the disk may be full"),
        # many small tensors, of which the first ones fit
        (lambda path: torch.save([torch.zeros(9999) for _ in range(99)], path), "may be full"),
        (lambda path: path.write_text("x" * 2_000_000), "File too large"),
        (lambda path: save_rows(path, np.zeros((1000, 300))), r"File too large: .*rows\.npy"),
    ],
)
def test_a_full_disk_is_named(tmp_path: Path, save: Callable[[Path], None], reason: str) -> None:
    """The libraries that write it hide an OSError in others, or its reason and the file."""
    stage = Stage("full", (), lambda folder: save(folder / "rows.npy"))
    caught_error = pytest.raises(OSError, match=reason)
    with RunFolder(tmp_path / "run") as run, caught_error as caught, full_disk():
        run.do(stage)
    assert str(caught.value.filename).startswith(str(tmp_path / "run" / ".work" / "full"))


def _faiss_index(path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    faiss.write_index(faiss.IndexFlatIP(4), str(path))


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_file({"w": torch.zeros(1)}, path),
        lambda path: torch.save({"w": torch.zeros(1)}, path),
        lambda path: save_rows(path, np.zeros((1, 3))),
        _faiss_index,
    ],
)
@pytest.mark.parametrize(
    ("instead", "reason"), [(None, "No such file or directory"), ("a file", "Not a directory")]
)
def test_a_folder_that_is_gone_is_named(
    tmp_path: Path, save: Callable[[Path], None], instead: str | None, reason: str
) -> None:
    """Deleted or unmounted while a stage writes there."""

    def work(folder: Path) -> None:
        shutil.rmtree(folder)
        if instead is not None:
            folder.write_text(instead)
        save(folder / "rows.npy")

    with RunFolder(tmp_path / "run") as run, pytest.raises(OSError, match="directory") as caught:
        run.do(Stage("gone", (), work))
    assert str(caught.value.filename).startswith(str(tmp_path / "run" / ".work" / "gone"))
    assert caught.value.strerror in (reason, "No such file or directory")  # torch's of both


@pytest.mark.parametrize("error", [RuntimeError("diverged"), SafetensorError("bad header")])
def test_another_error_of_a_stage_stays(tmp_path: Path, error: Exception) -> None:
    def work(folder: Path) -> None:
        raise error

    with RunFolder(tmp_path / "run") as run, pytest.raises(type(error), match=str(error)):
        run.do(Stage("broken", (), work))


def test_no_array_is_written_without_its_space() -> None:
    """``np.save`` tells of a full disk without naming the file; ``save_rows`` does."""
    modules = Path(engine.__file__).parent.rglob("*.py")
    assert [str(path) for path in modules if "np.save(" in path.read_text("utf-8")] == []


def test_a_finished_stage_needs_no_redoing(tmp_path: Path, source: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        assert run.reasons(copy_upper(source)) == ["not done yet"]
        run.do(copy_upper(source))
        assert (tmp_path / "run" / "upper.txt").read_text() == "ONE"
        assert run.reasons(copy_upper(source)) == []
    assert not (tmp_path / "run" / ".work" / "upper").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda run, source: source.write_text("two"), "source.txt changed"),
        (lambda run, source: (run / "upper.txt").unlink(), "upper.txt is missing"),
        (lambda run, source: (run / "upper.txt").write_text("!"), "upper.txt was changed"),
    ],
)
def test_why_files(tmp_path: Path, source: Path, change, reason: str) -> None:
    with RunFolder(tmp_path / "run") as run:
        run.do(copy_upper(source))
        change(tmp_path / "run", source)
        assert run.reasons(copy_upper(source)) == [reason]


def test_why_settings_and_facts(tmp_path: Path, source: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        old, new = {"docs": "Python 3.11"}, {"docs": "Python 3.12"}
        run.do(copy_upper(source, settings={"skip": 5, "band": (0.5, 0.7)}, facts=old))
        again = copy_upper(source, settings={"skip": 5, "band": [0.5, 0.7]}, facts=old)
        assert run.reasons(again) == []
        changed = copy_upper(source, settings={"skip": 3, "band": "auto"}, facts=new)
        reasons = run.reasons(changed)
    assert reasons == [
        'docs "Python 3.11" -> "Python 3.12"',
        'config.band [0.5, 0.7] -> "auto"',
        "config.skip 5 -> 3",
    ]


def test_why_code_and_packages(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = copy_upper(source, module="the stage")
    old = CodeVersion({"a": "1", "b": "1", "c": "1", "d": "1"}, {"numpy": "2.0", "torch": "2.13"})
    new = CodeVersion({"a": "2", "b": "2", "c": "1", "e": "1"}, {"numpy": "2.1", "torch": "2.13"})
    monkeypatch.setattr(engine, "code_version", {"the stage": old}.__getitem__)
    with RunFolder(tmp_path / "run") as run:
        run.do(stage)
        assert run.reasons(stage) == []
        monkeypatch.setattr(engine, "code_version", {"the stage": new}.__getitem__)
        assert run.reasons(stage) == [
            'package numpy "2.0" -> "2.1"',
            "the code of a, b, d and 1 more changed",
        ]


def test_why_names_the_files_of_a_folder(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in "abcdef":
        (docs / f"{name}.md").write_text(name)
    stage = Stage("count", ("n",), lambda to: (to / "n").touch(), {"docs": docs})
    with RunFolder(tmp_path / "run") as run:
        run.do(stage)
        (docs / "b.md").write_text("changed")
        assert run.reasons(stage) == ["docs changed (b.md)"]
        for name in "acde":
            (docs / f"{name}.md").unlink()
        assert run.reasons(stage) == ["docs changed (a.md, b.md, c.md and 2 more)"]


def test_of_a_folder_only_some_files_may_count(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("a")

    def stage() -> Stage:
        return Stage(
            "read", ("out.txt",), lambda to: (to / "out.txt").touch(), {"docs": folder},
            counts={"docs": may_be_read(folder)},
        )  # fmt: skip

    with RunFolder(tmp_path / "run") as run:
        run.do(stage())
        (folder / "film.mp4").write_text("large")
        assert run.reasons(stage()) == []
        (folder / "b.TXT").write_text("b")
        assert run.reasons(stage()) == ["docs changed (b.TXT)"]
        run.do(stage())
        (folder / "dataset_info.json").write_text("{}")  # now all of it is one dataset
        assert run.reasons(stage()) == ["docs changed (dataset_info.json, film.mp4)"]


def test_why_names_files_that_are_linked_in_closed_or_of_another_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents are read through links, and so are their changes. A file that cannot be read is
    skipped, not the run."""
    docs, elsewhere = tmp_path / "docs", tmp_path / "elsewhere"
    docs.mkdir()
    elsewhere.mkdir()
    (docs / "linked").symlink_to(elsewhere)
    for path in (docs / os.fsdecode(b"caf\xe9.md"), docs / "closed.md", elsewhere / "page.md"):
        path.write_text("one")
    stage = Stage("count", ("n",), lambda to: (to / "n").touch(), {"docs": docs})
    with RunFolder(tmp_path / "run") as run:
        run.do(stage)
        assert run.reasons(stage) == []
        (elsewhere / "page.md").write_text("two")
        (docs / os.fsdecode(b"caf\xe9.md")).write_text("two")
        (docs / "closed.md").write_text("two")
        opened = Path.open

        def closed(path: Path, *args, **kwargs):
            if path.name == "closed.md":
                raise PermissionError(13, "Permission denied")  # the tests may run as root
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", closed)
        assert run.reasons(stage) == [r"docs changed (caf\xe9.md, closed.md, linked/page.md)"]


def test_same_content_downstream_is_not_redone(tmp_path: Path, source: Path) -> None:
    """Content decides, not time: a stage that is redone to the same bytes leaves later stages
    alone."""

    def count(to: Path) -> None:
        (to / "count.txt").write_text(str(len((tmp_path / "run" / "upper.txt").read_text())))

    counting = Stage("count", ("count.txt",), count, {"upper.txt": tmp_path / "run" / "upper.txt"})
    with RunFolder(tmp_path / "run") as run:
        run.do(copy_upper(source))
        run.do(counting)
        source.write_text("ONE")
        assert run.reasons(copy_upper(source)) == ["source.txt changed"]
        run.do(copy_upper(source))
        assert run.reasons(counting) == []


def test_a_failed_stage_leaves_the_old_output(tmp_path: Path, source: Path) -> None:
    def fail(to: Path) -> None:
        (to / "upper.txt").write_text("half")
        raise RefineFastError("no")

    with RunFolder(tmp_path / "run") as run:
        run.do(copy_upper(source))
        with pytest.raises(RefineFastError, match="no"):
            run.do(Stage("upper", ("upper.txt",), fail, {"source.txt": source}))
        assert (tmp_path / "run" / "upper.txt").read_text() == "ONE"


def run_twins(run: Path, kill_at: int) -> int:
    """Does a stage of two outputs in a child process that kills itself at its ``kill_at``-th fsync
    or rename (0: never): every moment at which a write becomes durable or visible. Returns the
    number of moments passed, or -SIGKILL."""

    def work(to: Path) -> None:
        with (run / "log").open("a") as log:
            log.write("worked ")
        (to / "a.txt").write_text("a")
        (to / "folder").mkdir(exist_ok=True)
        (to / "folder" / "b.txt").write_text("b")

    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    passed = 0

    def counted(function):
        def call(*args):
            nonlocal passed
            passed += 1
            if passed == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    status = 99
    try:
        with RunFolder(run) as folder:
            stage = Stage("twins", ("a.txt", "folder"), work)
            folder.refuse_others([stage])
            if folder.reasons(stage):
                folder.do(stage)
            status = 99 if folder.reasons(stage) else passed
    finally:
        os._exit(status)


def test_what_a_kill_left_after_the_moves_does_not_stand_for_outputs(
    tmp_path: Path, source: Path
) -> None:
    with RunFolder(tmp_path / "run") as run:
        left = tmp_path / "run" / ".work" / "upper"
        stage = copy_upper(source)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.shutil, "rmtree", lambda *arguments, **options: None)
            run.do(stage)  # as if killed while it removes the folder
        assert (left / "done.json").exists()
        assert run.reasons(stage) == []
        (tmp_path / "run" / "upper.txt").unlink()
        run.do(stage)
        assert (tmp_path / "run" / "upper.txt").read_text() == "ONE"
        assert not left.exists()


def test_kill_at_every_write(tmp_path: Path) -> None:
    """SIGKILL before each rename and fsync in turn: the rerun ends with whole outputs and repeats
    no work that was finished."""
    moments = run_twins(tmp_path / "whole", 0)
    assert 8 <= moments < 99
    for moment in range(1, moments + 1):
        run = tmp_path / str(moment)
        assert run_twins(run, moment) == -signal.SIGKILL
        finished = (run / ".work" / "twins" / "done.json").exists() or (
            run / "manifest.json"
        ).exists()
        assert run_twins(run, 0) not in (99, -signal.SIGKILL)
        assert (run / "a.txt").read_text() + (run / "folder" / "b.txt").read_text() == "ab"
        assert (run / "log").read_text().split().count("worked") <= (1 if finished else 2)
        assert not list(run.rglob("*.tmp"))


def test_a_stage_states_its_own_peak_memory(tmp_path: Path) -> None:
    """In MiB; the peak of the stage before it does not count."""

    def stage(name: str, mib: int) -> Stage:
        def work(to: Path) -> None:
            held = np.ones(mib << 20, np.uint8)
            (to / name).write_text(str(held[-1]))

        return Stage(name, (name,), work)

    with RunFolder(tmp_path) as run:
        run.do(stage("large", 400))
        run.do(stage("small", 1))
    large, small = (stage_costs(tmp_path)[name][1] for name in ("large", "small"))
    assert large >= 400
    if sys.platform == "linux":
        assert small <= large - 300


def test_a_stage_states_the_time_of_all_its_starts(tmp_path: Path) -> None:
    """Of one that was killed, up to its last file."""

    def work(to: Path) -> None:
        started = (to / "started.json").stat().st_mtime
        count = len(list(to.glob("checkpoint *")))
        (to / f"checkpoint {count}").touch()
        os.utime(to / f"checkpoint {count}", (started + 1000, started + 1000))
        if count < 2:
            raise KeyboardInterrupt
        (to / "out.txt").touch()

    with RunFolder(tmp_path) as run:
        stage = Stage("train", ("out.txt",), work)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run.do(stage)
        assert 2000 <= run.do(stage) < 2900
    assert 2000 <= stage_costs(tmp_path)["train"][0] < 2900


def test_the_second_run_stops_and_names_the_first(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path),
        pytest.raises(
            LockedError,
            match=rf"is in use by another process \({os.getpid()}\); wait for it to finish or",
        ),
    ):
        RunFolder(tmp_path).__enter__()
    with RunFolder(tmp_path):
        pass


def test_two_writers_of_one_shard(tmp_path: Path) -> None:
    """A worker that was given up finishes while its successor writes the same shard."""
    shards = FolderShards(tmp_path)

    def write(path: Path) -> None:
        path.write_text("same")
        if len(list(tmp_path.iterdir())) < 3:
            shards.write("000000", "digest", write)

    shards.write("000000", "digest", write)
    with shards.found("000000", "digest") as path:
        assert path is not None
        assert path.read_text() == "same"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000", "000000.json"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b'{"chunk": {'])
def test_a_damaged_manifest_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with RunFolder(tmp_path) as folder:
        assert folder.changes("chunk", {}) == ["not done yet"]
