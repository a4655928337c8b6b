"""Exchange over object storage: driver and workers share no folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...errors import RefineFastError
from ..reserve import save_rows
from ..workers import Part, SharedRows
from .exchange import SharedFolder
from .object_path import ObjectPath
from .shards import Shards, sha256

SHARED = "shared"
"""Name under which files of the driver are published, each under the SHA-256 of its content."""


@dataclass(frozen=True)
class ObjectExchange:
    """Shards and the files of the driver are objects under one URL."""

    place: ObjectPath
    root: Path
    """The folder of the driver that holds the stages' folders."""

    def shards(self, folder: Path) -> Shards:
        """See ``Exchange.shards``."""
        return ObjectShards(self._under(folder))

    def share_rows(
        self, folder: Path, rows: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> SharedRows:
        """See ``Workers.share_rows``. Publishes the spans that the store does not have yet."""
        published = {}
        for begin, end in spans:
            with _temporary_folder() as temporary:
                path = temporary / "rows.npy"
                save_rows(path, rows[begin:end])
                published[begin] = self._publish(path)
        return RowsOfObjects(published)

    def share_loader(self, load: partial[Any]) -> Callable[..., Any]:
        """See ``Workers.share_loader``. Publishes the folders, each file once."""
        arguments = [self._shared(value) for value in load.args]
        options = {name: self._shared(value) for name, value in load.keywords.items()}
        return partial(_load, load.func, arguments, options)

    def share_folder(self, folder: Path, key: str) -> SharedFolder:
        """See ``Exchange.share_folder``."""
        return ObjectFolder(self._under(folder) / key)

    def discard(self, folder: Path) -> None:
        """See ``Exchange.discard``."""
        self._under(folder).remove()

    def close(self) -> None:
        """See ``Exchange.close``."""
        (self.place / SHARED).remove()

    def _under(self, folder: Path) -> ObjectPath:
        return self.place / folder.relative_to(self.root).as_posix().replace(" ", "_")

    def _shared(self, value: Any) -> Any:
        if isinstance(value, Path) and value.is_dir():
            value = Part(value, ("",))
        if not isinstance(value, Part):
            return value
        files = _files(value.folder, value.names)
        return FolderOfObjects(tuple((name, self._publish(path)) for name, path in files))

    def _publish(self, path: Path) -> ObjectPath:
        target = self.place / SHARED / sha256(path)
        if target.size() != path.stat().st_size:
            target.upload(path)
        return target


class ObjectShards(Shards):
    """Shards under a URL. Each is written and read through a temporary file."""

    def __init__(self, place: ObjectPath) -> None:
        self._place = place

    def where(self, name: str) -> str:
        """See ``Shards.where``."""
        return (self._place / name).url

    def _record(self, name: str) -> Any:
        content = (self._place / f"{name}.json").read()
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def _write_record(self, name: str, facts: dict[str, Any]) -> None:
        (self._place / f"{name}.json").write(json.dumps(facts).encode())

    @contextmanager
    def _existing(self, name: str) -> Iterator[Path | None]:
        with _temporary_folder() as temporary:
            path = temporary / name
            yield path if (self._place / name).download(path) else None

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        with _temporary_folder() as temporary:
            yield temporary / name
            (self._place / name).upload(temporary / name)


@dataclass(frozen=True)
class RowsOfObjects:
    """Rows in spans, each a .npy object."""

    spans: dict[int, ObjectPath]
    """First row -> object."""

    def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """See ``SharedRows.read``. The span is on the local disk while its rows are in use."""
        with _temporary_folder() as temporary:
            path = temporary / "rows.npy"
            _fetch(self.spans[begin], path)
            rows: np.ndarray = np.load(path, mmap_mode="r")  # outlives the name of its file
        return rows


@dataclass(frozen=True)
class FolderOfObjects:
    """A folder whose files are objects."""

    files: tuple[tuple[str, ObjectPath], ...]
    """(path in the folder, object)."""

    @contextmanager
    def copied(self) -> Iterator[Path]:
        """A local copy, until the context ends."""
        with _temporary_folder() as temporary:
            self.copy(temporary)
            yield temporary

    def copy(self, folder: Path) -> None:
        """Copies the files into a folder."""
        for name, source in self.files:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(source, path)


@dataclass(frozen=True)
class ObjectFolder:
    """A folder as objects, each under the SHA-256 of its content, and the list of its files, which
    is replaced last."""

    place: ObjectPath

    def opened(self) -> AbstractContextManager[Path]:
        """See ``SharedFolder.opened``: a copy of its own for each worker."""
        return self._holding(self._saved()).copied()

    def save(self, folder: Path) -> None:
        """See ``SharedFolder.save``."""
        before = self._saved()
        files = dict(_files(folder, ("",)))
        now = {name: sha256(path) for name, path in files.items()}
        for name, digest in now.items():
            if digest not in before.values():
                (self.place / digest).upload(files[name])
        self._list().write(json.dumps(now).encode())
        for digest in {*before.values()} - {*now.values()}:
            (self.place / digest).remove()

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """See ``SharedFolder.fetch``."""
        saved = self._saved().items()
        wanted = {name: digest for name, digest in saved if Path(name).parts[0] in names}
        self._holding(wanted).copy(folder)

    def _list(self) -> ObjectPath:
        return self.place / "files.json"

    def _saved(self) -> dict[str, str]:
        """File -> SHA-256."""
        return dict(json.loads(self._list().read() or b"{}"))

    def _holding(self, files: dict[str, str]) -> FolderOfObjects:
        return FolderOfObjects(tuple((name, self.place / sha) for name, sha in files.items()))


def _files(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(path in the folder, file), for every file of these names and of these subfolders."""
    for name in names:
        top = folder / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _load(
    function: Callable[..., Any], arguments: list[Any], options: dict[str, Any], *more: Any
) -> Any:
    """Calls the function with copies of the folders, which it does not need afterwards, and with
    what the worker adds."""
    with ExitStack() as copies:

        def local(value: Any) -> Any:
            shared = isinstance(value, FolderOfObjects)
            return copies.enter_context(value.copied()) if shared else value

        here = {name: local(value) for name, value in options.items()}
        return function(*map(local, arguments), *more, **here)


def _fetch(source: ObjectPath, path: Path) -> None:
    """Downloads a published file; its name is its SHA-256."""
    if not source.download(path) or sha256(path) != source.url.rpartition("/")[2]:
        raise RefineFastError(
            f"shards: {source.url} is missing or damaged; delete what is left of it, then run the "
            "same command again: finished shards are kept."
        )


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="refine-fast-") as folder:
        yield Path(folder)
