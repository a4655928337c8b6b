"""Folder of what is fetched or made once and used by many runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import RefineFastError
from ..files import fsync_all

CACHE = "REFINE_FAST_CACHE"
"""Environment variable that names the folder."""

_UNFINISHED = ".unfinished-"
"""Begins the names of what is being made there."""


def cache_folder() -> Path:
    """The folder that ``REFINE_FAST_CACHE`` names, else ``~/.cache/refine_fast``. It may not exist
    yet."""
    given = os.environ.get(CACHE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "refine_fast"


@contextmanager
def made_once(place: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes ``place`` when the block ends. If another process was
    faster, its folder stays; after an exception there is none. What is written beside the yielded
    folder goes when the block ends; after a kill, when another block begins.

    Raises:
        RefineFastError: if nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_swept(place.parent))
            beside = tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=place.parent)
        except OSError as error:
            raise RefineFastError(
                f"{place.parent} cannot be written to ({error.strerror}); name another folder in "
                f"the environment variable {CACHE}."
            ) from None
        folder = Path(stack.enter_context(beside)) / "content"
        folder.mkdir()
        yield folder
        fsync_all(folder)
        try:
            folder.rename(place)
        except OSError:
            if not place.is_dir():
                raise


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Removes what killed processes have left unfinished in a folder, unless another process is at
    work there; until the block ends, this one is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # another is at work, or the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
