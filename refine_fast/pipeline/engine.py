"""A run folder: redoes a stage only when its input changed, and survives a kill at any moment.

A stage is a function from files and settings to files. manifest.json records, for each finished
stage, the SHA-256 of what it read and wrote, its settings, the version of its code, and the time
and memory that it took. A stage whose record still matches is skipped. Any other is redone, and the
difference is the reason given. What a stage writes passes through three states:

    .work/<stage>/            being written; kept after a kill while the key matches, so that
                              training finds its checkpoints
    .work/<stage>/done.json   finished and fsynced, being moved: a redo log; after a kill here only
                              the moves are repeated
    <output>                  renamed into place, and in the manifest
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RefineFastError
from ..files import fsync_all, name_of, read_json, walk, write_errors, write_json
from .code_version import CodeVersion, code_version
from .usage import peak_mb, reset_peak


class LockedError(RefineFastError):
    """Another process is using the run folder. The command line exits with 3."""


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    ``work(folder)`` writes every output under ``folder``. Everything that it reads is declared as
    ``files``, ``facts`` or ``settings``.
    """

    name: str
    outputs: tuple[str, ...]
    """Files or folders, relative to the run folder."""
    work: Callable[[Path], None]
    files: Mapping[str, Path] = field(default_factory=dict)
    """Label -> file or folder; of a folder, every file counts."""
    counts: Mapping[str, Callable[[Path], bool]] = field(default_factory=dict)
    """Label -> which files of that folder count, if not all."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Label -> text: inputs that are not files."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    module: str | None = None
    """The module of ``work``, whose code and imports are part of the key."""
    unfinished: Callable[[], list[str]] = list
    """Reasons to redo the stage although its inputs are unchanged."""


class RunFolder:
    """The folder of one run, locked by this process while the context is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / ".work"
        """Holds the folders of the stages that are being done, each under the stage's name."""
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
            raise LockedError(
                f"{self.path} is in use by another process ({pid}); "
                "wait for it to finish or give another --out."
            ) from None
        with write_errors(self.path / ".lock"):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def reasons(self, stage: Stage, *, but: Collection[str] = ()) -> list[str]:
        """Why the stage must be done, in a few words each; empty if its outputs are up to date.

        ``but``: names of settings that do not count.
        """
        record = self._manifest().get(stage.name)
        if record is None:
            return ["not done yet"]
        key = self._key(stage)
        same = {name: value for name, value in key["settings"].items() if name in but}
        return (
            differences({**record, "settings": record["settings"] | same}, key)
            + self._changed_outputs(record, stage.outputs)
            + stage.unfinished()
        )

    def changes(
        self, name: str, files: Mapping[str, Path], settings: Mapping[str, Any] | None = None
    ) -> list[str]:
        """What of a finished stage's files differs from its record, in a few words each.

        Unlike ``reasons``, for what only reads the outputs: other settings, code and packages that
        have changed since do not count.

        Args:
            name: the stage.
            files: label -> file or folder, those of its inputs to compare.
            settings: those of its settings to compare, as far as the record has them.
        """
        record = self._manifest().get(name)
        if record is None:
            return ["not done yet"]
        changed = (
            f"{label} was changed"
            for label, path in files.items()
            if self._digests_under(path) != record["files"].get(label)
        )
        others = (
            f"config.{label} was changed"
            for label, value in _as_json(settings or {}).items()
            if value != record["settings"].get(label, value)
        )
        return [*changed, *others, *self._changed_outputs(record, record["outputs"])]

    def _changed_outputs(self, record: Mapping[str, Any], names: Iterable[str]) -> list[str]:
        return [
            f"{name} {'was changed' if (self.path / name).exists() else 'is missing'}"
            for name in names
            if self._digest(self.path / name) != record["outputs"].get(name)
        ]

    def do(self, stage: Stage) -> float:
        """Does the stage even if it is up to date, and returns the seconds that it took, over all
        its starts.

        Resumes where a killed run stopped.
        """
        key = self._key(stage)
        folder = self.work / stage.name
        record = read_json(folder / "done.json")
        if read_json(folder / "key.json") != key or not self._publishable(folder, record):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / "key.json", key)
            record = None
        if record is None:
            reset_peak()
            before = _seconds_before(folder)
            write_json(folder / "started.json", before)
            start = time.monotonic()
            with write_errors(folder):
                stage.work(folder)
            for name in stage.outputs:
                fsync_all(folder / name)
            outputs = {name: self._digest(folder / name) for name in stage.outputs}
            seconds = before + time.monotonic() - start
            cost = {"seconds": round(seconds, 2), "peak_mb": peak_mb()}
            record = {**key, "outputs": outputs, **cost}
            write_json(folder / "done.json", record)
        self._publish(stage, folder, record)
        return record["seconds"]

    @property
    def begun(self) -> bool:
        """Whether a run has begun in the folder."""
        return self.work.exists() or (self.path / "manifest.json").exists()

    def stopped(self) -> set[str]:
        """Names of the stages that were begun and not finished, of other options too."""
        return {path.name for path in self.work.glob("*")}

    def refuse_others(self, stages: Iterable[Stage]) -> None:
        """Raises RefineFastError if something in the folder that is not of a run has the name of an
        output, which would replace it. Where a run has begun and left no record, such as after a
        kill in its first stage, everything counts as of that run."""
        manifest = read_json(self.path / "manifest.json")
        if manifest is None and self.begun:
            return
        moved = map(read_json, self.work.glob("*/done.json"))  # and perhaps not recorded yet
        records = [*(manifest or {}).values(), *filter(None, moved)]
        own = {name for record in records for name in record["outputs"]}
        for name in (name for stage in stages for name in stage.outputs):
            if name not in own and os.path.lexists(self.path / name):
                raise not_of_a_run(self.path / name)

    def keep_only(self, stages: Collection[Stage]) -> None:
        """Removes what stages that are not among ``stages``, all those of a run, have written:
        beside a new report it would be taken for a part of that. What has changed since is
        somebody's own, and stays."""
        names = {stage.name for stage in stages}
        self.work.mkdir(exist_ok=True)
        for name in self.stopped() - names:
            _remove(self.work / name)
        manifest = self._manifest()
        remaining = {name: record for name, record in manifest.items() if name in names}
        if remaining != manifest:
            kept = {name for stage in stages for name in stage.outputs}
            for name in manifest.keys() - names:
                self._discard(manifest[name]["outputs"], kept)
            write_json(self.path / "manifest.json", remaining)

    def _discard(self, outputs: Mapping[str, str], kept: Collection[str]) -> None:
        """Removes those outputs that are not ``kept`` and have not changed, and the folders that
        are empty then."""
        for name, digest in outputs.items():
            path = self.path / name
            if name not in kept and self._digest(path) == digest:
                removed = self.work / "removed"  # whole, or what a kill left would look changed
                _remove(removed)
                os.replace(path, removed)
                _remove(removed)
                for parent in path.relative_to(self.path).parents[:-1]:
                    with suppress(OSError):  # not empty
                        (self.path / parent).rmdir()

    def _publishable(self, folder: Path, record: dict[str, Any] | None) -> bool:
        """Whether each output of a finished stage is in its folder or in place already. One may be
        gone since a kill that came after the moves and left the folder."""
        return record is None or all(
            digest in (self._digest(folder / name), self._digest(self.path / name))
            for name, digest in record["outputs"].items()
        )

    def _publish(self, stage: Stage, folder: Path, record: dict[str, Any]) -> None:
        manifest = self._manifest()
        if (before := manifest.pop(stage.name, None)) is not None:
            kept = {
                *stage.outputs,
                *(name for other in manifest.values() for name in other["outputs"]),
            }
            self._discard(before["outputs"], kept)  # such as the adapter of an earlier training
            write_json(self.path / "manifest.json", manifest)
        for name in stage.outputs:
            if (folder / name).exists():  # otherwise a killed run has moved it already
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    _remove(target)
                os.replace(folder / name, target)
        write_json(self.path / "manifest.json", {**manifest, stage.name: record})
        shutil.rmtree(folder)

    def _manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json") or {}

    def _key(self, stage: Stage) -> dict[str, Any]:
        code = CodeVersion() if stage.module is None else code_version(stage.module)
        return {
            "files": {
                label: self._digests_under(path, stage.counts.get(label))
                for label, path in stage.files.items()
            },
            "facts": dict(stage.facts),
            "settings": _as_json(stage.settings),
            "code": code.modules,
            "packages": code.packages,
        }

    def _digests_under(
        self, path: Path, counts: Callable[[Path], bool] | None = None
    ) -> dict[str, str]:
        """SHA-256 of a file, or of each file of a folder, or of those that count, by its relative
        name."""
        if path.is_file():
            return {name_of(path.name): self._sha256(path)}
        files = ((file, name) for file, name in sorted(walk(path)) if file.is_file())
        return {name: self._sha256(file) for file, name in files if counts is None or counts(file)}

    def _digest(self, path: Path) -> str | None:
        """One SHA-256 for a file or a folder; None where there is neither."""
        if path.is_file():
            return self._sha256(path)
        if not path.is_dir():
            return None
        return hashlib.sha256(json.dumps(self._digests_under(path)).encode()).hexdigest()

    def _sha256(self, path: Path) -> str:
        stat = path.stat()
        known = (str(path), stat.st_size, stat.st_mtime_ns)
        if known not in self._digests:
            try:
                with path.open("rb") as file:
                    self._digests[known] = hashlib.file_digest(file, "sha256").hexdigest()
            except PermissionError:  # the stage skips such a document
                self._digests[known] = "unreadable"
        return self._digests[known]


def not_of_a_run(path: Path) -> RefineFastError:
    """What a run raises before it would replace a file or folder that no run wrote."""
    return RefineFastError(
        f"out: {path} is not of a run, and this one would replace it; move it, or give another "
        "--out."
    )


def _remove(path: Path) -> None:
    """Removes a file, a folder or a link, if it is there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are read back from a record."""
    return dict(json.loads(json.dumps(dict(settings), default=str)))


def _seconds_before(folder: Path) -> float:
    """What the earlier starts of the stage in ``folder`` took, each up to the last file that it
    wrote: a kill leaves no other trace."""
    started = folder / "started.json"
    before = read_json(started)
    if before is None:
        return 0.0
    last = max(path.stat().st_mtime for path in folder.rglob("*"))
    return float(before + last - started.stat().st_mtime)


def key_digest(folder: Path) -> str:
    """Of the key of the stage that is being done in ``folder``, or in a folder above it: another
    for any other input, setting or code. A stage that is done outside of a run has no key."""
    keys = (read_json(each / "key.json") for each in (folder, *folder.parents))
    key = next((key for key in keys if key is not None), None)
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two keys of a stage, in a few words each."""
    reasons = []
    for label, digests in new["files"].items():
        changed = _changed(old["files"].get(label, {}), digests)
        if changed:
            reasons.append(
                f"{label} changed" + ("" if changed == [label] else f" ({_list(changed)})")
            )
    reasons += [f"{label} changed" for label in old["files"].keys() - new["files"].keys()]
    for kind, prefix in (("facts", ""), ("settings", "config."), ("packages", "package ")):
        before, after = old.get(kind, {}), new[kind]
        for name in _changed(before, after):
            values = (json.dumps(side.get(name)) for side in (before, after))
            reasons.append(f"{prefix}{name} {' -> '.join(values)}")
    if modules := _changed(old["code"], new["code"]):
        reasons.append(f"the code of {_list(modules)} changed")
    return reasons


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
