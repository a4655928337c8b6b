"""Files that appear completely or not at all, and folder walks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import RefineFastError


@contextmanager
def atomic(path: Path, writer: str = "") -> Iterator[Path]:
    """Yields a temporary path next to ``path`` to write to. On success it is flushed and renamed to
    ``path``; on an exception it is removed. ``write_errors`` name ``path``.

    Args:
        path: the file.
        writer: tells the processes apart that may write it at the same time. A temporary file has
            the same name otherwise, so that a rerun overwrites what a kill left.
    """
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with write_errors(path):
            yield temporary
            fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """``atomic`` for a folder: yields an empty one on the same disk as ``path``, or as what it
    links to, which then replaces it. A kill leaves the old one or the new one; between the two
    renames it leaves the old one in ``.NAME.tmp``, and the next call puts that back first.

    Raises:
        RefineFastError: another process is writing it.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    content, old = temporary / "content", temporary / "old"
    lock = lock_folder(temporary, path)
    try:
        put_back(old, path, content)
        for left in (content, old):
            shutil.rmtree(left, ignore_errors=True)
        content.mkdir()
        try:
            with write_errors(path):
                yield content
                fsync_all(content)
            if path.is_dir():
                os.rename(path, old)
            os.replace(content, path)
        finally:
            put_back(old, path, content)
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


def put_back(old: Path, path: Path, content: Path) -> None:
    """Puts an old output back if its replacement by ``content`` was stopped between two renames."""
    # without content the new one was in place once, and the old one may be deleted in part
    if old.exists() and content.exists() and not path.exists():
        os.rename(old, path)


def lock_folder(folder: Path, result: Path) -> int:
    """Makes a folder in which ``result`` is written and locks it, until the descriptor that it
    returns is closed.

    Raises:
        RefineFastError: another process, or another call in this one, holds the lock.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # who holds it may end, which removes the folder, between any two of these steps
        with suppress(FileNotFoundError), ExitStack() as stack:
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RefineFastError(
                    f"{result} is being written by another process: wait for it, or give another"
                    " output"
                ) from None
            except OSError:
                pass  # the file system has no locks of folders, such as NFS
            if os.path.samestat(os.fstat(lock), os.stat(folder)):
                stack.pop_all()
                return lock


_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_REFUSED = (errno.EACCES, errno.EPERM)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""Of a folder that was deleted or unmounted."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Where a file cannot be written, such as on a full disk or in a folder that is gone, raises an
    OSError that says where, with ``path``, a file or a folder, as the file: safetensors,
    ``torch.save`` and faiss hide it in exceptions of their own, and that of an open file has no
    name."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in _WRITE_ERRORS:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (SafetensorError, RuntimeError) as error:
        code = _hidden_code(str(error))
        if code in (*_WRITE_ERRORS, *_REFUSED, *_GONE):
            raise OSError(code, os.strerror(code), str(path)) from error
        if re.search("unexpected pos|PytorchStreamWriter", str(error)) is None:
            raise
        reason = "a file could not be written whole; the disk may be full"
        raise OSError(errno.ENOSPC, reason, str(path)) from error


def _hidden_code(message: str) -> int | None:
    """The errno in what safetensors, torch or faiss says; None: it has none."""
    if found := re.search(r"\(os error (\d+)\)", message):
        return int(found[1])
    if re.search("Parent directory .* does not exist", message):
        return errno.ENOENT
    found = re.search(r"(?:for writing|with strerror): (.+)", message)
    codes = {os.strerror(code): code for code in errno.errorcode}
    return codes.get(found[1].strip()) if found else None


def of_the_disk(error: BaseException) -> bool:
    """Whether an error says that a file cannot be written, for want of room or of permission:
    neither the model nor the network is to blame then."""
    return isinstance(error, OSError) and error.errno in (*_WRITE_ERRORS, *_REFUSED)


def real_path(path: Path) -> Path:
    """The absolute path without links. ``Path.resolve`` raises RuntimeError for a link to itself
    before Python 3.13."""
    return Path(os.path.realpath(path))


def name_of(path: str | os.PathLike[str]) -> str:
    """The path as printable text: bytes that are not UTF-8 become ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def as_argument(path: str | os.PathLike[str]) -> str:
    """The path as it is written in a command, for messages: quoted where it has blanks."""
    return shlex.quote(name_of(path))


def walk(
    root: Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, str]]:
    """Yields every file of a folder as (file, its path relative to ``root``), in a fixed order.

    Follows links, leaves out hidden files and folders, and visits each real folder and each real
    file once, so that a loop of links ends.

    Args:
        root: the folder.
        onerror: called with the error of a folder that cannot be read.
    """
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=onerror):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                yield path, name_of(path.relative_to(root))


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(path: Path) -> None:
    """``fsync`` of a file, or of a folder and everything in it."""
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fsync(item)


def write_json(path: Path, value: Any, writer: str = "") -> None:
    """Writes ``value`` as JSON, all of the file or nothing. ``writer`` is that of ``atomic``."""
    with atomic(path, writer) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        # A path that is not UTF-8 has lone surrogates, whose replacement is JSON's own escape.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """The JSON value in the file; None if the file is missing, incomplete or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
