"""Folder of what is fetched or made once and used by many runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RefineFastError
from ..files import fsync_all

CACHE = "REFINE_FAST_CACHE"
"""Environment variable that names the folder."""


def cache_folder() -> Path:
    """The folder that ``REFINE_FAST_CACHE`` names, else ``~/.cache/refine_fast``. It may not exist
    yet."""
    given = os.environ.get(CACHE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "refine_fast"


@contextmanager
def made_once(place: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``place`` when the block ends. If another process was
    faster, its folder stays; after an exception there is none.

    Raises:
        RefineFastError: if nothing can be written there.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=place.parent)
    except OSError as error:
        raise RefineFastError(
            f"{place.parent} cannot be written to ({error.strerror}); name another folder in the "
            f"environment variable {CACHE}."
        ) from None
    with beside as temporary:
        folder = Path(temporary) / "content"
        folder.mkdir()
        yield folder
        fsync_all(folder)
        try:
            folder.rename(place)
        except OSError:
            if not place.is_dir():
                raise
