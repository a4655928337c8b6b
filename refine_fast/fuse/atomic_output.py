"""Output that appears all at once or not at all.

Everything is written into ``.NAME.refine-fast``, next to the output and on the same disk, flushed,
and renamed. After a kill before the rename the old output (or none) is in place, and the next merge
of the same inputs resumes from ``state.json``; after a later kill the new one is.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import RefineFastError
from ..files import atomic, fsync, lock_folder, put_back


def is_taken(path: Path) -> bool:
    """Whether something is there that an output would replace; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


class AtomicOutput:
    """One output being written; a context manager that removes everything it wrote if an exception
    leaves it.

    ``content`` is the path to write to, which ``publish`` moves to ``final``; ``published``:
    whether it has; ``state`` is what an earlier, killed run of the same ``plan`` had finished.

    Raises:
        RefineFastError: another process is writing ``final``.
    """

    def __init__(self, final: Path, plan: str, *, is_folder: bool, overwrite: bool) -> None:
        self.final = final
        self.folder = final.parent / f".{final.name}.refine-fast"
        self.content = self.folder / "content"
        self._replaced = self.folder / "replaced"
        self._plan = plan
        self._is_folder = is_folder
        self._overwrite = overwrite
        self.published = False

    def __enter__(self) -> AtomicOutput:
        self._made = [parent for parent in self.folder.parents if not parent.exists()]
        self._lock = lock_folder(self.folder, self.final)
        with ExitStack() as stack:
            stack.callback(os.close, self._lock)
            put_back(self._replaced, self.final, self.content)
            self.state = self._read_state()
            if not self.state:
                for path in self.folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if self._is_folder:
                self.content.mkdir(exist_ok=True)
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            put_back(self._replaced, self.final, self.content)
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                for parent in self._made:
                    parent.rmdir()
        os.close(self._lock)

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / "state.json").read_text())
            return state["done"] if state["plan"] == self._plan and self.content.exists() else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def save_state(self, done: dict[str, Any]) -> None:
        """Records what is finished and flushed."""
        with atomic(self.folder / "state.json") as temporary:
            temporary.write_text(json.dumps({"plan": self._plan, "done": done}))

    def publish(self) -> None:
        """Moves the content to its final name, in place of what was there, and cleans up.

        Raises:
            RefineFastError: something is there that may not be overwritten.
        """
        if is_taken(self.final) and not self._overwrite:
            raise RefineFastError(
                f"the output {self.final} appeared during the merge: give another output or"
                " overwrite=True (--overwrite)"
            )
        if self._is_folder:
            for folder, _, _ in os.walk(self.content):
                fsync(Path(folder))
            # after the exchange this folder holds the old output: nothing to resume
            (self.folder / "state.json").unlink(missing_ok=True)
            try:
                self.content.rename(self.final)
            except OSError:
                if not self.final.exists():
                    raise
                # a folder that is not empty
                if not _core.exchange_paths(os.fsencode(self.content), os.fsencode(self.final)):
                    # the file system cannot exchange two names: two steps
                    self.final.rename(self._replaced)
                    self.content.rename(self.final)
        else:
            self.content.replace(self.final)
        self.published = True
        fsync(self.final.parent)
        shutil.rmtree(self.folder)
