"""What an installed package shows of itself: its version, and the two ways to start the command
line.
"""

from __future__ import annotations

import subprocess
import sys
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
