"""Files of rows whose space on the disk is taken before they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np


def reserve(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A new .npy file of zeros, memory-mapped. A sparse one would end the process with SIGBUS, and
    without a word, at the write for which the disk has no room.

    Args:
        path: the file.
        dtype: of the array.
        shape: of the array.

    Raises:
        OSError: if the disk has too little room; the file is gone then.
    """
    try:
        values = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # macOS has none
            _allocate(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return values


def save_rows(path: Path, values: np.ndarray) -> None:
    """``np.save``, whose error for a full disk names neither the file nor the reason.

    Raises:
        OSError: as ``reserve`` does.
    """
    reserve(path, values.dtype, values.shape)[...] = values


def _allocate(path: Path) -> None:
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of a file system that cannot
            raise
