"""How figures are written: the report, the model card and the terminal say them alike."""

from __future__ import annotations

from ..evaluation.significance import Gain


def points(change: Gain) -> str:
    """A gain in percentage points with its 95% interval: "+3.2 points [+1.9, +4.5]"."""
    return f"{100 * change.mean:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
