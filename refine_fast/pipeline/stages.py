"""A run folder whose stages are redone only when something that they read has changed, and survive a kill at any moment.

A stage is a function from files and settings to files. manifest.json keeps, for each stage that is done, the SHA-256 of what it read and
wrote, its settings and the version of its code; a stage whose record still holds is skipped, any other is redone and the difference is the
reason given. What a stage writes goes through three states:

    .work/<stage>/            being written; kept after a kill, so that training finds its checkpoints, while the key still holds
    .work/<stage>/done.json   finished, fsynced, being moved: a redo log; a kill here repeats the moves and none of the work
    <output>                  in place by rename, and in the manifest
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import RefineFastError
from ..files import atomic, fsync_all, name_of, walk


class LockedError(RefineFastError):
    """Another process works in the run folder. The command line exits with 3."""


@dataclass(frozen=True)
class Stage:
    """``work(folder)`` must write every one of ``outputs`` (files or folders, relative) under ``folder`` and read nothing that is not
    among ``files`` (label -> path; a folder stands for its files), ``facts`` (label -> text: inputs that are no files) and ``settings``."""

    name: str
    outputs: tuple[str, ...]
    work: Callable[[Path], None]
    files: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    code: tuple[ModuleType, ...] = ()
    unfinished: Callable[[], list[str]] = list
    """Reasons to do the stage again although nothing that it read has changed."""


class RunFolder:
    """The folder of one run, held by this process alone while the context lasts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digests: dict[tuple[str, int, int], str] = {}

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            pid = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise LockedError(f"{self.path}: process {pid} is working in this run folder; wait for it or give another --out.") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def reasons(self, stage: Stage) -> list[str]:
        """Why the stage must be (re)done; empty when its outputs are up to date."""
        record = self._manifest().get(stage.name)
        if record is None:
            return ["not done yet"]
        return (
            differences(record, self._key(stage))
            + [
                f"{name} {'is missing' if not (self.path / name).exists() else 'was changed by hand'}"
                for name in stage.outputs
                if self._digest(self.path / name) != record["outputs"].get(name)
            ]
            + stage.unfinished()
        )

    def do(self, stage: Stage) -> float:
        """Does the stage, whatever the manifest says, and returns its seconds. Goes on where a killed run left it."""
        key = self._key(stage)
        folder = self.path / ".work" / stage.name
        if read_json(folder / "key.json") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / "key.json", key)
        record = read_json(folder / "done.json")
        if record is None:
            start = time.monotonic()
            stage.work(folder)
            for name in stage.outputs:
                fsync_all(folder / name)
            outputs = {name: self._digest(folder / name) for name in stage.outputs}
            record = {**key, "outputs": outputs, "seconds": round(time.monotonic() - start, 2)}
            write_json(folder / "done.json", record)
        self._publish(stage, folder, record)
        return record["seconds"]

    def _publish(self, stage: Stage, folder: Path, record: dict[str, Any]) -> None:
        manifest = self._manifest()
        if manifest.pop(stage.name, None) is not None:
            write_json(self.path / "manifest.json", manifest)
        for name in stage.outputs:
            if (folder / name).exists():  # else a killed run has moved it already
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(folder / name, target)
        write_json(self.path / "manifest.json", {**manifest, stage.name: record})
        shutil.rmtree(folder)

    def _manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json") or {}

    def _key(self, stage: Stage) -> dict[str, Any]:
        return {
            "files": {label: self._digests_under(path) for label, path in stage.files.items()},
            "facts": dict(stage.facts),
            "settings": json.loads(json.dumps(dict(stage.settings), default=str)),  # as it will be read back
            "code": {module.__name__: hashlib.sha256(inspect.getsource(module).encode()).hexdigest() for module in stage.code},
        }

    def _digests_under(self, path: Path) -> dict[str, str]:
        """SHA-256 of a file, or of each file of a folder, by its relative name."""
        if path.is_file():
            return {name_of(path.name): self._sha256(path)}
        return {name: self._sha256(file) for file, name in sorted(walk(path)) if file.is_file()}

    def _digest(self, path: Path) -> str | None:
        """One SHA-256 for a file or a folder; None where there is neither."""
        if path.is_file():
            return self._sha256(path)
        return hashlib.sha256(json.dumps(self._digests_under(path)).encode()).hexdigest() if path.is_dir() else None

    def _sha256(self, path: Path) -> str:
        stat = path.stat()
        known = (str(path), stat.st_size, stat.st_mtime_ns)
        if known not in self._digests:
            try:
                with path.open("rb") as file:
                    self._digests[known] = hashlib.file_digest(file, "sha256").hexdigest()
            except PermissionError:  # a document that is skipped
                self._digests[known] = "unreadable"
        return self._digests[known]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two keys of a stage, each in a few words."""
    reasons = []
    for label, digests in new["files"].items():
        before = old["files"].get(label, {})
        changed = sorted(name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name))
        if changed:
            names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            reasons.append(f"{label} changed" + ("" if changed == [label] else f" ({names})"))
    reasons += [f"{label} changed" for label in old["files"].keys() - new["files"].keys()]
    for kind, prefix in (("facts", ""), ("settings", "config.")):
        for name in sorted(old[kind].keys() | new[kind].keys()):
            before, after = old[kind].get(name), new[kind].get(name)
            if before != after:
                reasons.append(f"{prefix}{name} {json.dumps(before)} -> {json.dumps(after)}")
    reasons += [f"the code of {module} changed" for module in sorted(new["code"]) if old["code"].get(module) != new["code"][module]]
    return reasons


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
