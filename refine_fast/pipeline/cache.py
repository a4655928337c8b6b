"""Folder of what is fetched or made once and used by many runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = "REFINE_FAST_CACHE"
"""Environment variable that names the folder."""


def cache_folder() -> Path:
    """The folder that ``REFINE_FAST_CACHE`` names, else ``~/.cache/refine_fast``. It may not exist
    yet."""
    given = os.environ.get(CACHE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "refine_fast"
