"""How much GPU memory an operation may take besides its inputs and outputs."""

from __future__ import annotations

import os

VARIABLE = "REFINE_FAST_WORKSPACE_MB"
LEAST = 16 << 20
DEFAULT = 512 << 20


def workspace_bytes() -> int:
    """What REFINE_FAST_WORKSPACE_MB allows: 512 MB by default, at least 16."""
    text = os.environ.get(VARIABLE, str(DEFAULT >> 20))
    if not text.isdecimal() or int(text) << 20 < LEAST:
        raise ValueError(f"{VARIABLE} is {text!r}; it must be a whole number of megabytes, at least {LEAST >> 20}")
    return int(text) << 20
