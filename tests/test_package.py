"""What an installed package shows of itself: its version, and the two ways to start the command
line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import refine_fast as rf
from refine_fast import cli


def test_metadata_take_the_version_from_the_package() -> None:
    assert version("refine-fast") == rf.__version__


def test_command_is_the_command_line() -> None:
    (command,) = entry_points(group="console_scripts", name="refine-fast")
    assert command.load() is cli.main


@pytest.mark.parametrize("arguments", [["--help"], ["fuse", "base", "tuned"]])
def test_python_dash_m_is_the_command(arguments: list[str], tmp_path: Path) -> None:
    """The same text and the same exit code."""
    start = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    module = subprocess.run([sys.executable, "-m", "refine_fast", *arguments], **start)
    script = "import sys; from refine_fast.cli import main; sys.exit(main())"
    command = subprocess.run([sys.executable, "-c", script, *arguments], **start)
    assert (module.returncode, module.stdout, module.stderr) == (
        command.returncode,
        command.stdout,
        command.stderr,
    )
    assert module.stdout or module.stderr


def _stopped(folder: Path, sent: int, *start: str | Path, **more: str) -> tuple[int, str]:
    """Exit code and stderr of a process that gets a signal while it imports torch."""
    (folder / "torch.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(sent)})\nraise ImportError"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)} | more
    line = [sys.executable, *start]
    ended = subprocess.run(line, env=environment, stderr=subprocess.PIPE, text=True)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_torch_is_imported(sent: signal.Signals, tmp_path: Path) -> None:
    """It takes seconds, and the command has nothing to clean up. A program that imports the package
    is stopped as it would be without it."""
    command = Path(sysconfig.get_path("scripts"), "refine-fast")
    for start in (
        [command],
        ["-m", "refine_fast"],
        ["-um", "refine_fast"],
        ["-mrefine_fast"],
        ["-u", command],
    ):
        assert _stopped(tmp_path, sent, *start) == (128 + sent, "error: stopped.\n")
    assert _stopped(tmp_path, sent, command, RANK="1") == (128 + sent, "")
    other, message = _stopped(tmp_path, sent, "-c", "import refine_fast", "-m", "refine_fast")
    assert other == -sent
    assert "error: stopped" not in message
