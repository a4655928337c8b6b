"""How much GPU memory an operation may take besides its inputs and outputs."""

from __future__ import annotations

import os

VARIABLE = "REFINE_FAST_WORKSPACE_MB"
"""The environment variable that sets it, in MB."""
MIN_BYTES = 16 << 20
"""The smallest workspace with which every operation runs."""
DEFAULT_BYTES = 512 << 20


def workspace_bytes() -> int:
    """The bytes that REFINE_FAST_WORKSPACE_MB allows: 512 MB by default, at least 16 MB.

    Raises:
        ValueError: a value that is not an integer >= 16.
    """
    text = os.environ.get(VARIABLE, str(DEFAULT_BYTES >> 20))
    if not text.isdecimal() or int(text) << 20 < MIN_BYTES:
        raise ValueError(f"{VARIABLE} must be an integer >= {MIN_BYTES >> 20} (got {text!r})")
    return int(text) << 20
