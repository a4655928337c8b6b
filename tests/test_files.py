"""Files and folders that appear completely or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import full_disk

from refine_fast.errors import RefineFastError
from refine_fast.files import atomic, atomic_folder


@pytest.mark.parametrize("killed", [True, False])
def test_a_stopped_replacement_of_a_folder_keeps_the_old_one(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two renames: the process is gone, or an error leaves it."""
    folder = tmp_path / "folder"

    def write(text: str) -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "file").write_text(text)

    def fails(*_: object) -> None:
        raise OSError("stopped")

    write("old")
    if killed:
        if (child := os.fork()) == 0:
            os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
            write("new")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not folder.exists()
        with pytest.raises(KeyError), atomic_folder(folder):
            raise KeyError
    else:
        monkeypatch.setattr("os.replace", fails)
        with pytest.raises(OSError, match="stopped"):
            write("new")
        monkeypatch.undo()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"file": "old"}
    for text in ("new", "newer"):
        write(text)
        assert (folder / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_where_its_link_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "link") as temporary:
            (temporary / "file").write_text(text)
    assert (tmp_path / "disk" / "file").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_atomic_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def write_half() -> None:
        with atomic(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("writer", [atomic, atomic_folder])
def test_a_full_disk_is_named(writer: Callable[[Path], Any], tmp_path: Path) -> None:
    """The error of an open file has no name."""
    path = tmp_path / "result"

    def write() -> None:
        with writer(path) as temporary:
            file = temporary / "file" if temporary.is_dir() else temporary
            file.write_text("x" * 2_000_000)

    with pytest.raises(OSError, match="File too large") as raised, full_disk():
        write()
    assert raised.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_an_old_folder_that_was_deleted_in_part_does_not_come_back(tmp_path: Path) -> None:
    """The process is gone while it deletes what it has replaced; the user deletes the new one."""
    folder = tmp_path / "folder"
    for text in ("old", "new"):
        if (child := os.fork()) == 0:

            def half(path: Path, **_: Any) -> None:
                for file in sorted(path.rglob("a")):
                    file.unlink()
                    os._exit(9)

            with atomic_folder(folder) as temporary:
                for name in "ab":
                    (temporary / name).write_text(text)
                shutil.rmtree = half  # type: ignore[assignment]
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if text == "new" else 0)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "new", "b": "new"}
    shutil.rmtree(folder)
    with pytest.raises(KeyError), atomic_folder(folder):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_two_writers_of_a_folder(tmp_path: Path) -> None:
    """The second neither deletes what the first is writing nor puts an old folder back."""
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text(text)
            with (
                pytest.raises(RefineFastError, match="folder is being written by another process"),
                atomic_folder(tmp_path / "folder"),
            ):
                pass
        assert (tmp_path / "folder" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flock of a folder on NFS: an exclusive lock needs a file that is open for writing."""

    def none(*_: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", none)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("new")
    assert (tmp_path / "folder" / "file").read_text() == "new"
