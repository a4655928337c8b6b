"""fuse over the portable reads and writes (pread, pwrite) that systems other than Linux use, forced
here by REFINE_FAST_PORTABLE_IO."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import refine_fast as rf
from refine_fast.errors import RefineFastError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere every test of fuse takes this path"
)


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_FAST_PORTABLE_IO", "1")


def save(path: Path, seed: int) -> Path:
    """30 MB of every kind of piece. Windows of 8 MiB end inside tensors, and a header of odd length
    misaligns them."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(1_300_001, generator=g),
        "b": torch.randn(2_500_003, generator=g).bfloat16(),
        "c": torch.arange(1_000_001),
        "d": torch.randn(1_400_000, generator=g, dtype=torch.float64),
    }
    save_file(tensors, path, metadata={"odd": "x" * (seed + 1)})
    return path


def direct_descriptors() -> int:
    """How many files this process has open for direct I/O."""
    count = 0
    for info in Path("/proc/self/fdinfo").iterdir():
        try:
            flags = re.search(r"^flags:\s*([0-7]+)", info.read_text(), re.MULTILINE)
        except FileNotFoundError:  # the descriptor that lists them
            continue
        count += flags is not None and int(flags[1], 8) & os.O_DIRECT != 0
    return count


@pytest.mark.parametrize("threads", [1, None])
def test_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None
) -> None:
    base, tuned = save(tmp_path / "base.safetensors", 0), save(tmp_path / "tuned.safetensors", 1)
    seen: dict[str, int] = {}
    for name in ("linux", "portable"):
        if name == "portable":
            monkeypatch.setenv("REFINE_FAST_PORTABLE_IO", "1")

        def count(done: int, total: int, name: str = name) -> None:
            seen[name] = max(seen.get(name, 0), direct_descriptors())

        rf.fuse(
            base, tuned, tmp_path / name / "out.safetensors", 0.35, threads=threads, progress=count
        )
    linux, portable = (tmp_path / name / "out.safetensors" for name in ("linux", "portable"))
    assert portable.read_bytes() == linux.read_bytes()
    assert seen["portable"] == 0
    try:
        os.close(os.open(base, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return  # this file system has no direct I/O to compare with
    assert seen["linux"] > 0


@pytest.mark.usefixtures("portable")
def test_an_input_that_shrinks(tmp_path: Path) -> None:
    base, tuned = save(tmp_path / "base.safetensors", 0), save(tmp_path / "tuned.safetensors", 1)

    def cut(done: int, total: int) -> None:
        os.truncate(tuned, 100_000)

    message = r"reading .*/tuned\.safetensors failed: the file became shorter while it was read"
    with pytest.raises(RefineFastError, match=message):
        rf.fuse(base, tuned, tmp_path / "out.safetensors", progress=cut)
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "tuned.safetensors"]


@pytest.mark.usefixtures("portable")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    base, tuned = save(tmp_path / "base.safetensors", 0), save(tmp_path / "tuned.safetensors", 1)
    script = (
        "import resource, sys, refine_fast as rf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: rf.fuse(*sys.argv[1:4])\n"
        "except rf.errors.RefineFastError as e: print(e)\n"
    )
    command = [sys.executable, "-c", script, base, tuned, tmp_path / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r".*writing .*File too large.*\n", done.stdout), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "tuned.safetensors"]
