"""A merge that is killed, or that runs out of disk, leaves the old output or the new one; a killed
one is resumed."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import refine_fast as rf
from refine_fast import _core
from refine_fast.errors import RefineFastError
from refine_fast.fuse import atomic_output, merge

KILLS = int(os.environ.get("REFINE_FAST_KILLS", "30"))


def save_model(folder: Path, seed: int, shards: int = 3, rows: int = 512) -> Path:
    g = torch.Generator().manual_seed(seed)
    folder.mkdir()
    weight_map = {}
    for i in range(shards):
        save_file(
            {f"{i}.{j}": torch.randn(rows, 256, generator=g) for j in range(3)},
            folder / f"{i}.safetensors",
        )
        weight_map |= {f"{i}.{j}": f"{i}.safetensors" for j in range(3)}
    (folder / "model.safetensors.index.json").write_text(
        str({"weight_map": weight_map}).replace("'", '"')
    )
    (folder / "config.json").write_text(f'{{"seed": {seed}}}')
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_kill_leaves_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    if kind == "file":
        base, tuned, out, wanted = (
            base / "0.safetensors",
            tuned / "0.safetensors",
            tmp_path / "out.safetensors",
            tmp_path / "wanted.safetensors",
        )
    rf.fuse(base, tuned, wanted)

    def state(path: Path) -> object:
        return snapshot(path) if path.is_dir() else path.read_bytes() if path.is_file() else None

    new = state(wanted)
    rng = random.Random(0)
    start = time.perf_counter()
    rf.fuse(base, tuned, out, 0.35)
    span = 1.5 * (time.perf_counter() - start)
    outcomes = []
    for _ in range(KILLS):
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
        if rng.random() < 0.5:  # something is there already, which a kill must not lose
            shutil.copytree(base, out) if kind == "folder" else shutil.copy(base, out)
        old = state(out)
        child = os.fork()  # cheap, and safe here: a merge uses no OpenMP
        if child == 0:
            try:
                rf.fuse(base, tuned, out, 0.35, overwrite=True)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = state(out)
        assert found in (old, new)
        outcomes.append(found == new)
        if rng.random() < 0.5:  # the next one finds what was left; the others begin on a clean disk
            rf.fuse(base, tuned, out, 0.35, overwrite=True)
            assert state(out) == new
    rf.fuse(base, tuned, out, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted({"base", "tuned", out.name, wanted.name})
    print(f"{sum(outcomes)} of {KILLS} had finished")


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up, since __exit__ is skipped for it."""


@pytest.fixture
def killable(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = atomic_output.AtomicOutput.__exit__

    def skip(
        self: atomic_output.AtomicOutput, kind: type[BaseException] | None, *rest: object
    ) -> None:
        if kind is Killed:
            os.close(self._lock)
        else:
            clean(self, kind, *rest)

    monkeypatch.setattr(atomic_output.AtomicOutput, "__exit__", skip)
    monkeypatch.setattr(merge, "_BATCH", 600_000)  # a tensor or two


@pytest.mark.usefixtures("killable")
@pytest.mark.parametrize("at", [0.15, 0.5, 0.9])
def test_resume(tmp_path: Path, at: float) -> None:
    """Killed at a part of the way, the next call writes only the rest, and its report is the
    whole."""
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    whole = rf.fuse(base, tuned, tmp_path / "wanted", checksum=True)

    def stop(done: int, total: int) -> None:
        if done > at * total:
            raise Killed

    with pytest.raises(Killed):
        rf.fuse(base, tuned, tmp_path / "out", progress=stop)
    report = rf.fuse(base, tuned, tmp_path / "out", checksum=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "wanted")
    assert (report.resumed > 0) == (at > 0.2)
    assert report.bytes_written == whole.bytes_written
    assert report.bytes_read < whole.bytes_read or at < 0.2
    assert report.tensors == whole.tensors
    assert {Path(p).name: d for p, d in report.sha256.items()} == {
        Path(p).name: d for p, d in whole.sha256.items()
    }
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "tuned", "wanted"]


@pytest.mark.usefixtures("killable")
@pytest.mark.parametrize("change", ["weight", "input", "damage"])
def test_no_resume_of_something_else(tmp_path: Path, change: str) -> None:
    """Another weight, an input that was written since, a partial file that is too short: from the
    start, and right."""
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)

    def stop(done: int, total: int) -> None:
        if done > 0.2 * total:
            raise Killed

    with pytest.raises(Killed):
        rf.fuse(base, tuned, tmp_path / "out", progress=stop)
    weight = 0.5 if change == "weight" else 0.35
    if change == "input":
        save_file({f"0.{j}": torch.zeros(512, 256) for j in range(3)}, base / "0.safetensors")
    if change == "damage":
        os.truncate(tmp_path / ".out.refine-fast" / "content" / "0.safetensors", 1000)
    report = rf.fuse(base, tuned, tmp_path / "out", weight)
    assert report.resumed == 0
    rf.fuse(base, tuned, tmp_path / "wanted", weight)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "wanted")


@pytest.mark.usefixtures("killable")
def test_no_resume_with_another_scale_of_an_adapter(tmp_path: Path) -> None:
    """What is in adapter_config.json alone makes other weights too."""
    save_file(
        {f"{i}.weight": torch.randn(512, 256) for i in range(4)}, tmp_path / "base.safetensors"
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {f"{i}.lora_A.weight": torch.randn(2, 256) for i in range(4)} | {
        f"{i}.lora_B.weight": torch.randn(512, 2) for i in range(4)
    }
    save_file(factors, adapter / "adapter_model.safetensors")

    def stop(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise Killed

    for alpha, progress in ((2, stop), (4, None)):
        (adapter / "adapter_config.json").write_text(
            f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {alpha}}}'
        )
        with pytest.raises(Killed) if progress else nullcontext():
            report = rf.fuse(
                tmp_path / "base.safetensors",
                adapter,
                tmp_path / "out.safetensors",
                progress=progress,
            )
    assert report.resumed == 0


def test_two_merges_to_one_output(tmp_path: Path) -> None:
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)

    def second(done: int, total: int) -> None:
        with pytest.raises(RefineFastError, match="is being written by another process"):
            rf.fuse(base, tuned, tmp_path / "out")

    rf.fuse(base, tuned, tmp_path / "out", progress=second)


def test_a_lock_of_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another merge ends, and removes the folder, between the opening and the lock."""
    output = atomic_output.AtomicOutput(tmp_path / "out", "", is_folder=True, overwrite=False)
    flock, descriptors = fcntl.flock, len(os.listdir("/proc/self/fd"))

    def late(*arguments: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(output.folder)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with output:
        assert output.content.is_dir()
        with pytest.raises(RefineFastError, match="is being written by another process"):
            output.__enter__()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_an_old_output_that_was_deleted_in_part_does_not_come_back(tmp_path: Path) -> None:
    """A merge was killed while it deleted what it had replaced; the user deleted the new output."""
    output = atomic_output.AtomicOutput(tmp_path / "out", "", is_folder=True, overwrite=False)
    (output.folder / "replaced").mkdir(parents=True)
    with output:
        assert not (tmp_path / "out").exists()
        assert not (output.folder / "replaced").exists()


def test_a_folder_that_cannot_be_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock ends with the merge that fails."""
    output = atomic_output.AtomicOutput(tmp_path / "out", "", is_folder=True, overwrite=False)

    def fail(*_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(atomic_output, "put_back", fail)
    with pytest.raises(PermissionError):
        output.__enter__()
    monkeypatch.undo()
    with output:
        pass


def test_why_an_output_cannot_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self), None, str(target))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RefineFastError, match=r"Permission denied: .*content' -> .*out'"):
        rf.fuse(base, tuned, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


@pytest.mark.parametrize("at", ["second", "after"])
def test_outputs_that_are_whole_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A failure at the second output of a sweep, or after the rename."""
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    rename, sync = Path.rename, atomic_output.fsync

    def refuse(self: Path, target: Path) -> Path:
        if target.name == "b":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    if at == "second":
        monkeypatch.setattr(Path, "rename", refuse)
    else:
        monkeypatch.setattr(atomic_output, "fsync", fail)
    with pytest.raises(RefineFastError, match=r"failed and left only \S*/a, which is whole: \["):
        rf.fuse_sweep(base, tuned, {0.2: tmp_path / "a", 0.5: tmp_path / "b"})
    assert sorted(os.listdir(tmp_path)) == ["a", "base", "tuned"]
    assert snapshot(tmp_path / "a").keys() == snapshot(base).keys()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_appears_during_the_merge_stays(tmp_path: Path, kind: str) -> None:
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    out = tmp_path / "out"
    if kind == "file":
        base, tuned = (next(folder.glob("*.safetensors")) for folder in (base, tuned))
        out = out.with_suffix(".safetensors")

    def appear(done: int, total: int) -> None:
        if kind == "folder":
            out.mkdir(exist_ok=True)
            (out / "precious").write_text("mine")
        else:
            out.write_text("mine")

    with pytest.raises(RefineFastError, match="appeared during the merge: give another output"):
        rf.fuse(base, tuned, out, progress=appear)
    assert (out / "precious" if kind == "folder" else out).read_text() == "mine"


def test_replacing_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is exchanged in one step; where the file system cannot, in two."""
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    for exchange in (_core.exchange_paths, lambda a, b: False):
        monkeypatch.setattr(_core, "exchange_paths", exchange)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
        rf.fuse(base, tuned, tmp_path / "out", 1.0, overwrite=True)
        assert snapshot(tmp_path / "out") == snapshot(tuned) | {"config.json": b'{"seed": 0}'}
        assert sorted(os.listdir(tmp_path)) == ["base", "out", "tuned"]


@pytest.mark.usefixtures("killable")
@pytest.mark.parametrize("how", [OSError, Killed])
def test_stopped_between_the_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: type[BaseException]
) -> None:
    """The old output comes back: at once, or with the next call after a kill, even if that call
    fails."""
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name == "content" and not target.exists():
            raise how
        return rename(self, target)

    def fail(done: int, total: int) -> None:
        raise OSError

    monkeypatch.setattr(_core, "exchange_paths", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises((RefineFastError, Killed)):
        rf.fuse(base, tuned, tmp_path / "out", overwrite=True)
    if how is Killed:
        with pytest.raises(RefineFastError):
            rf.fuse(base, tuned, tmp_path / "out", overwrite=True, progress=fail)
    assert snapshot(tmp_path / "out") == {"old": b"old"}
    assert sorted(os.listdir(tmp_path)) == ["base", "out", "tuned"]


def test_too_little_space_is_noticed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4_000_000))
    with pytest.raises(
        RefineFastError, match=r"takes 0.00 GB|takes .* GB, but the disk of .* has 0.00 GB free"
    ):
        rf.fuse(base, tuned, tmp_path / "new" / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on file sizes makes the writes fail midway, as a full disk does: one sentence,
    nothing left, the old output untouched."""
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    script = (
        "import resource, sys, refine_fast as rf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: rf.fuse(*sys.argv[1:4])\n"
        "except rf.errors.RefineFastError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, base, tuned, tmp_path / "new" / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "writing" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lost its room after the check: no space is left for the second file of a
    merge."""
    base, tuned = save_model(tmp_path / "base", 0), save_model(tmp_path / "tuned", 1)
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
        ).returncode
        != 0
    ):
        pytest.skip("needs the right to mount a tmpfs (a container without CAP_SYS_ADMIN has none)")
    try:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
        with pytest.raises(RefineFastError, match=r"/disk is a mount point"):
            rf.fuse(base, tuned, disk)
        with pytest.raises(
            RefineFastError,
            match=r"reserving disk space for .*/disk/.*\.safetensors failed: No space left",
        ):
            rf.fuse(base, tuned, disk / "out")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["tuned", os.fsdecode(b"sp ace, \xc3\xbc and no UTF-8: \xff")])
def test_an_input_that_shrinks(tmp_path: Path, name: str) -> None:
    base, tuned = (
        save_model(tmp_path / "base", 0, rows=4096),
        save_model(tmp_path / name, 1, rows=4096),
    )

    def cut(done: int, total: int) -> None:
        os.truncate(tuned / "2.safetensors", 100_000)

    with pytest.raises(
        RefineFastError, match=rf"reading .*{name}/2\.safetensors failed: the file became shorter"
    ):
        rf.fuse(base, tuned, tmp_path / f"{name}.out", progress=cut)
    assert sorted(os.listdir(tmp_path)) == sorted(["base", name])


@pytest.mark.parametrize("who", ["its owner", "another"])
def test_warm_pages_stay(who: str) -> None:
    """What was in the page cache before is there after, cold or not the rest, also if the kernel
    tells us nothing of another's file."""
    me = os.geteuid()
    if who == "another" and me != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        base, tuned = (
            save_model(folder / "base", 0, shards=1, rows=16_384),
            save_model(folder / "tuned", 1, shards=1, rows=16_384),
        )
        path = base / "0.safetensors"
        for file in (path, tuned / "0.safetensors"):
            file.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(file.fileno(), 4096, 20_000_000)
            before = resident(path)
            if len(before) == path.stat().st_size // 4096 + 1:
                pytest.skip(
                    "this file system keeps its pages in memory (tmpfs); set TMPDIR to a folder on"
                    " a disk"
                )
        try:
            os.seteuid(65534 if who == "another" else me)
            rf.fuse(base, tuned, folder / "out")
        finally:
            os.seteuid(me)
        assert before <= resident(path)
        # and the rest of a cold file is gone again
        assert len(resident(path)) < 2 * len(before) + 64
        assert load_file(folder / "out" / "0.safetensors").keys() == {"0.0", "0.1", "0.2"}


def resident(path: Path) -> set[int]:
    """The pages of a file that are in the page cache."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    pages = (size + 4095) // 4096
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        vector = (ctypes.c_ubyte * pages)()
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) == 0
        found = {i for i, bit in enumerate(vector) if bit & 1}
    return found
