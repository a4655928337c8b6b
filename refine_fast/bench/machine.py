"""What the rows say of the machine and the versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .._native import available_isas

CHECKOUT = Path(__file__).parents[2]


def device_name() -> str:
    """The GPU if there is one, else the CPU's model name and cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def file_name() -> str:
    """Of the results of this machine: CPUs of one name may differ in their instructions."""
    name = device_name() if torch.cuda.is_available() else f"{device_name()} {available_isas()[-1]}"
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"


def commit() -> str:
    """The checkout's short hash, with "+" where the sources differ from it; REFINE_FAST_COMMIT
    where it is set; empty where there is no checkout."""
    if "REFINE_FAST_COMMIT" in os.environ:
        return os.environ["REFINE_FAST_COMMIT"]
    if not (CHECKOUT / "CMakeLists.txt").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "csrc", "refine_fast")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def package_version(name: str) -> str:
    """Of an installed package, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
