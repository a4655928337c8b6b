"""Peak memory of this process."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak() -> None:
    """Makes ``peak_mb`` count from here. It does nothing except on Linux."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # proc(5): resets VmHWM


def peak_mb() -> int:
    """The largest resident size, in MiB, since ``reset_peak`` on Linux, elsewhere since the
    start."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) >> 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes there, KiB elsewhere
