"""What the rows say of the machine and the versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import _core
from .._native import available_isas

CHECKOUT = Path(__file__).parents[2]


def device_name() -> str:
    """The GPU if there is one, else the CPU's model name and cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        cpu = cpu_name(Path("/proc/cpuinfo").read_text())
    except OSError:
        cpu = ""
    return f"{cpu or platform.machine()}, {os.cpu_count()} cores"


def cpu_name(info: str) -> str:
    """The model name in a ``/proc/cpuinfo``; of AMD's, with the microarchitecture: virtual machines
    name every generation "AMD EPYC". Empty if there is none."""
    fields = dict(re.findall(r"^(.+?)\s*:[ \t]*(.*)$", info, re.MULTILINE))
    name = fields.get("model name", "")
    if fields.get("vendor_id") != "AuthenticAMD":
        return name
    family, model = int(fields["cpu family"]), int(fields["model"])
    # as Linux tells them apart (arch/x86/kernel/cpu/amd.c)
    zen_4 = 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF
    zen = {0x19: " (Zen 4)" if zen_4 else " (Zen 3)", 0x1A: " (Zen 5)"}.get(family, "")
    return name + zen


def file_name() -> str:
    """Of the results of this machine: CPUs of one name may differ in their instructions."""
    name = device_name() if torch.cuda.is_available() else f"{device_name()} {available_isas()[-1]}"
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"


def commit() -> str:
    """The short hash of the commit that runs, with "+" where the code differs from it.

    In a checkout that is its HEAD; the code differs if the sources do, or if the extension was
    built from another csrc. Elsewhere it is what the build noted down. REFINE_FAST_COMMIT overrides
    both. Empty: neither git nor the build knows. Call it before measuring, since a checkout may
    change meanwhile.
    """
    if "REFINE_FAST_COMMIT" in os.environ:
        return os.environ["REFINE_FAST_COMMIT"]
    noted = Path(_core.__file__).parent / "bench" / "built_from.txt"
    built, csrc = noted.read_text().splitlines() if noted.exists() else ("", "")
    if not (CHECKOUT / ".git").exists():
        return built
    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "csrc", "refine_fast", "CMakeLists.txt")
    stale = csrc != git("rev-parse", "HEAD:csrc")
    return head + ("+" if head and (changed or stale) else "")


def git(*words: str) -> str:
    """What git says of the checkout; an empty string if it refuses or is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def package_version(name: str) -> str:
    """Of an installed package, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
