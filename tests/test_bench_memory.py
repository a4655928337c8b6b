"""The process of its own in which the benchmark suite measures memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")


def test_the_process_that_measures_memory_removes_its_files(tmp_path: Path) -> None:
    """In a process of its own, whose temporary files lie in a folder of their own."""
    code = """
from functools import partial
import refine_fast as rf
from refine_fast.bench import measuring
from refine_fast.bench.measuring import peak_mb
from refine_fast.bench.suite import ready
measuring.IMPORTED = ["refine_fast.bench.suite"]  # the others take seconds
if __name__ == "__main__":
    what = "fuse", "warm", {"gb": 0.004, "shards": 1}, "fp32", "cpu"
    assert peak_mb(partial(ready, what, "loop", rf.isa(), 1)) > 0
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    with TemporaryDirectory() as files:  # a short path, since a socket will be there
        subprocess.run([sys.executable, script], env=os.environ | {"TMPDIR": files}, check=True)
        assert not list(Path(files).glob("refine-fast-bench-*"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_process_that_measures_memory_ends_with_the_command(
    tmp_path: Path, sent: signal.Signals
) -> None:
    """Ctrl-C reaches both processes, SIGTERM one. The child is waited for, which removes its files,
    and says nothing of its own."""
    code = """
import argparse, os, sys, time
from refine_fast import cli
from refine_fast.bench import measuring
from refine_fast.bench.measuring import peak_mb

measuring.IMPORTED = []  # they take seconds

def build():
    with open("files", "w"):
        pass
    try:
        with open("child.part", "w") as file:
            file.write(str(os.getpid()))
        os.rename("child.part", "child")
        time.sleep(10_000)
    finally:
        os.remove("files")

if __name__ == "__main__":
    command = {"work": lambda *_: peak_mb(build), "quiet": False, "json": False, "stopped": "so"}
    sys.exit(cli.perform(argparse.Namespace(**command)))
"""
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "script.py"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    while not (tmp_path / "child").exists():
        assert process.poll() is None
        time.sleep(0.1)
    send = os.killpg if sent == signal.SIGINT else os.kill
    send(process.pid, sent)
    assert process.wait(600) == 128 + sent
    assert process.stderr.read() == "error: stopped; so.\n"
    assert not (tmp_path / "files").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)
