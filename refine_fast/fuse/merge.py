"""``fuse`` and ``fuse_sweep``: a plan carried out, from file to file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import RefineFastError, RefineFastWarning
from ..files import fsync
from .adapter import LowRank
from .checkpoint import RAW
from .plan import Piece, Plan, Shard, make_plan
from .report import FuseReport, TensorChange
from .staging import Staging

Progress = Callable[[int, int], None]
_Changes = list[tuple[float, float, int, int]]  # per piece, as _core.stream returns them

_BATCH = 1 << 30  # bytes of one output between two points from which a killed merge can go on
_CHUNK = 1 << 23


def fuse(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    weight: float = 0.35,
    *,
    weights: Mapping[str, float] | None = None,
    dtype: str | None = None,
    checksum: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FuseReport:
    """``out = base + weight * (tuned - base)`` for every floating-point tensor of two checkpoints, bit for bit what ``torch.lerp`` gives
    (in float32 for 8- and 16-bit types), streamed: no tensor, shard or model is ever held in memory. Values that are equal in both stay as
    they are.

    base, tuned, out: three model folders (one file or shards with an index; sentence-transformers or plain transformers) or three
    ``.safetensors`` files. ``tuned`` may also be the folder of a PEFT LoRA adapter. Every other file is copied from base; integer and bool
    tensors too. Weights in other formats (``pytorch_model.bin``, ONNX) are left out, since they would still hold base's values.

    weight: the share of tuned; 0 is base, 1 is tuned. weights: ``{glob over tensor names: weight}``, first match wins, ``weight`` for the
    rest. dtype: of the output's float tensors ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"); default: base's. checksum: SHA-256 of
    every weight file read and written, in the same pass. threads: 1 to read and write in turn; by default
    they run beside the arithmetic, in threads of their own. progress: called with (bytes written, bytes in all).

    Everything is checked before a byte is written. ``out`` appears by a rename after the data are on disk; a killed merge leaves what was
    there, and the same call goes on where it was. Raises RefineFastError; warns (RefineFastWarning) of NaN and of integer tensors that
    differ.
    """
    return fuse_sweep(
        base, tuned, {weight: out}, weights=weights, dtype=dtype, checksum=checksum, threads=threads, overwrite=overwrite, progress=progress
    )[weight]


def fuse_sweep(
    base: str | Path,
    tuned: str | Path,
    outs: Mapping[float, str | Path],
    *,
    weights: Mapping[str, float] | None = None,
    dtype: str | None = None,
    checksum: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[float, FuseReport]:
    """``fuse`` at several weights, ``{weight: out}``, in one read of the inputs."""
    start = time.perf_counter()
    base, tuned = Path(base), Path(tuned)
    finals = [Path(os.path.abspath(out)) for out in outs.values()]
    try:
        plan = make_plan(base, tuned, list(outs), weights, dtype)
        _check_outputs(plan, [base, tuned], finals, overwrite)
        with ExitStack() as stack:
            stagings = [
                stack.enter_context(Staging(final, _fingerprint(plan, i, dtype), is_folder=plan.is_folder))
                for i, final in enumerate(finals)
            ]
            merge = _Merge(plan, stagings, checksum, threads != 1, progress)
            changes = merge.run()
            if plan.is_folder:
                for staging in stagings:
                    _copy_others(plan, staging.content)
            for staging in stagings:
                staging.publish()
    except OSError as error:
        raise RefineFastError(f"the merge failed and left nothing behind: {error}") from error
    seconds = time.perf_counter() - start
    return {w: merge.report(i, changes, seconds) for i, w in enumerate(outs)}


def _check_outputs(plan: Plan, inputs: list[Path], finals: list[Path], overwrite: bool) -> None:
    if not finals or len(set(finals)) != len(finals) or any(final in other.parents for final in finals for other in finals):
        raise RefineFastError("each weight of a sweep needs an output of its own, not in another's")
    for final in finals:
        real = final.resolve()
        for given in inputs:
            path = given.resolve()
            if real == path or real in path.parents or path in real.parents:
                raise RefineFastError(f"the output {final} and the input {given} lie in one another: give another output")
        if final.is_symlink():
            raise RefineFastError(f"the output {final} is a link: give the path that it points to")
        if final.is_mount():
            raise RefineFastError(f"the output {final} is a mount point, which no rename can replace: give a folder in it")
        if not plan.is_folder and final.suffix != ".safetensors":
            raise RefineFastError(f"the output {final} must be a .safetensors file, as the inputs are")
        if final.exists():
            if final.is_dir() != plan.is_folder:
                raise RefineFastError(f"the output {final} is a {'file' if plan.is_folder else 'folder'} already: give another output")
            if not overwrite and not (plan.is_folder and not any(final.iterdir())):
                raise RefineFastError(f"the output {final} exists: give another, or allow it to be replaced (overwrite=True, --overwrite)")
    needed: dict[int, tuple[int, Path]] = {}
    for final in finals:
        existing = next(path for path in final.parents if path.exists())
        device = existing.stat().st_dev
        staged = final.parent / f".{final.name}.refine-fast"
        has = sum(path.stat().st_blocks * 512 for path in staged.rglob("*") if path.is_file()) if staged.is_dir() else 0
        needed[device] = (needed.get(device, (0, existing))[0] + plan.nbytes - has, existing)
    for size, folder in needed.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise RefineFastError(f"the output takes {size / 1e9:.2f} GB, but the disk of {folder} has {free / 1e9:.2f} GB free")


def _fingerprint(plan: Plan, output: int, dtype: str | None) -> str:
    """What a merge is made of: a killed one is gone on with only if nothing of it has changed."""
    inputs = [(str(h.path.resolve()), (s := h.path.stat()).st_size, s.st_mtime_ns) for h in plan.inputs]
    pieces = [
        (piece.name, piece.weights[output if piece.is_float else 0], piece.low_rank and (piece.low_rank.scale, piece.low_rank.transposed))
        for shard in plan.shards
        for piece in shard.pieces
    ]
    return hashlib.sha256(json.dumps(["refine_fast 1", inputs, pieces, dtype]).encode()).hexdigest()


def _copy_others(plan: Plan, content: Path) -> None:
    for name in plan.base.others:
        target = content / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base.root / name, target)
        fsync(target)
    for relative, text in plan.indexes.items():
        (content / relative).write_bytes(text)
        fsync(content / relative)


class _Digest:
    """SHA-256 of a file from blocks as they pass by; what did not pass in order is read at the end."""

    def __init__(self, head: bytes = b"") -> None:
        self._sha, self._position = hashlib.sha256(head), len(head)

    def feed(self, offset: int, block: memoryview) -> None:
        if offset <= self._position < offset + len(block):
            self._sha.update(block[self._position - offset :])
            self._position = offset + len(block)

    def finish(self, path: Path) -> str:
        with path.open("rb") as file:
            file.seek(self._position)
            while chunk := file.read(_CHUNK):
                self._sha.update(chunk)
        return self._sha.hexdigest()


class _Merge:
    """One plan carried out into one or more stagings."""

    def __init__(self, plan: Plan, stagings: list[Staging], checksum: bool, overlap: bool, progress: Progress | None) -> None:
        self._plan, self._stagings, self._overlap, self._progress = plan, stagings, overlap, progress
        self._written = self._read = self._resumed = 0
        self._total = sum(shard.nbytes for shard in plan.shards) * len(stagings)
        self._inputs = {header.path: _Digest(header.raw) for header in plan.inputs} if checksum else {}
        self._sha256: list[dict[str, str]] = [{} for _ in stagings]

    def run(self) -> list[list[_Changes]]:
        """Per output, per shard: what happened to its pieces."""
        done = [dict(staging.state) for staging in self._stagings]
        for shard in self._plan.shards:
            self._write(shard, done)
        inputs = {str(path): digest.finish(path) for path, digest in self._inputs.items()}
        self._sha256 = [inputs | outputs for outputs in self._sha256]
        return [[changes[str(shard.relative)] for shard in self._plan.shards] for changes in done]

    def _path(self, staging: Staging, shard: Shard) -> Path:
        return staging.content / shard.relative if self._plan.is_folder else staging.content

    def _write(self, shard: Shard, done: list[dict[str, _Changes]]) -> None:
        key, paths = str(shard.relative), [self._path(staging, shard) for staging in self._stagings]
        offsets = [len(shard.header)]
        for piece in shard.pieces:
            offsets.append(offsets[-1] + piece.nbytes)
        finished = min(len(changes.get(key, [])) for changes in done)
        if not all(path.exists() and path.stat().st_size >= offsets[finished] for path in paths):
            finished = 0
        for changes in done:
            changes[key] = changes.get(key, [])[:finished]
        self._resumed += offsets[finished] * bool(finished)
        digests = [_Digest(b"" if finished else shard.header) for _ in paths]
        with ExitStack() as stack:
            outputs = []
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("r+b" if finished else "w+b", buffering=0))
                _core.preallocate(file.fileno(), os.fsencode(path), offsets[-1])
                if not finished:
                    os.pwrite(file.fileno(), shard.header, 0)
                outputs.append(file.fileno())
            names = sorted({e.file for p in shard.pieces for e in (p.base, p.tuned) if e is not None})
            files = [(stack.enter_context(path.open("rb", buffering=0)).fileno(), os.fsencode(path)) for path in names]
            self._advance(offsets[finished] * len(paths))

            def on_block(file: int, offset: int, block: memoryview) -> None:
                if file < 0:
                    self._advance(len(block))
                else:
                    self._read += len(block)
                if self._inputs:
                    (digests[-1 - file] if file < 0 else self._inputs[names[file]]).feed(offset, block)

            for first, last in _batches(shard.pieces, finished):
                pieces = shard.pieces[first:last]
                targets = [
                    (fd, os.fsencode(path), offsets[first], [p.weights[i if p.is_float else 0] for p in pieces])
                    for i, (fd, path) in enumerate(zip(outputs, paths, strict=True))
                ]
                updates = [p.low_rank for p in pieces if p.low_rank is not None]
                factors = [update.factors() for update in updates]
                table = [(a.data_ptr(), b.data_ptr(), a.shape[0], b.shape[0], a.shape[1]) for a, b in factors]
                work = [_as_tuple(p, names, updates) for p in pieces]
                results = _core.stream(files, work, table, targets, self._overlap, on_block)
                for changes, result in zip(done, results, strict=True):
                    changes[key] = [*changes[key], *result]
                if last < len(shard.pieces) or shard is not self._plan.shards[-1]:
                    for fd, staging, changes in zip(outputs, self._stagings, done, strict=True):
                        os.fsync(fd)
                        staging.save_state(changes)
            for fd in outputs:
                os.fsync(fd)
        if self._inputs:
            for staging, path, digest, sha256 in zip(self._stagings, paths, digests, self._sha256, strict=True):
                sha256[str(staging.final / shard.relative if self._plan.is_folder else staging.final)] = digest.finish(path)

    def _advance(self, nbytes: int) -> None:
        self._written += nbytes
        if self._progress is not None:
            self._progress(min(self._written, self._total), self._total)

    def report(self, output: int, changes: list[list[_Changes]], seconds: float) -> FuseReport:
        tensors, copied, unequal = {}, [], []
        for shard, of_shard in zip(self._plan.shards, changes[output], strict=True):
            for piece, (moved, size, not_finite, differing) in zip(shard.pieces, of_shard, strict=True):
                if piece.is_float:
                    relative = math.sqrt(moved / size) if size else 0.0 if moved == 0 else math.inf
                    tensors[piece.name] = TensorChange(piece.weights[output], math.sqrt(moved), relative, not_finite)
                else:
                    copied.append(piece.name)
                    if differing or (piece.tuned is not None and piece.tuned.dtype != piece.base.dtype):
                        unequal.append(piece.name)
        final = self._stagings[output].final
        report = FuseReport(
            final, tensors, copied, unequal, self._plan.notes, self._plan.base.left_out, self._read, self._written, seconds, self._resumed,
            self._sha256[output],
        )  # fmt: skip
        if report.not_finite:
            warnings.warn(f"{final} holds NaN or infinite values, first in {report.not_finite[0]!r}", RefineFastWarning, stacklevel=4)
        if unequal:
            warnings.warn(
                f"{len(unequal)} integer tensors differ between base and tuned, first {unequal[0]!r}: base's were kept",
                RefineFastWarning,
                stacklevel=4,
            )
        return report


def _batches(pieces: list[Piece], first: int) -> Iterator[tuple[int, int]]:
    """[first, last) of at least _BATCH bytes each, but for the last."""
    size = 0
    for i in range(first, len(pieces)):
        size += pieces[i].nbytes
        if size >= _BATCH or i + 1 == len(pieces):
            yield first, i + 1
            first, size = i + 1, 0


def _as_tuple(piece: Piece, files: list[Path], updates: list[LowRank]) -> tuple[Any, ...]:
    """refine_fast::Piece."""
    base, tuned = piece.base, piece.tuned
    if not piece.is_float and tuned is not None and tuned.dtype != base.dtype:
        tuned = None
    return (
        math.prod(base.shape) if piece.is_float else base.nbytes,
        RAW if base.storage is None else base.storage,
        RAW if tuned is None or tuned.storage is None else tuned.storage,
        piece.out_storage,
        files.index(base.file),
        base.offset,
        -1 if tuned is None else files.index(tuned.file),
        0 if tuned is None else tuned.offset,
        -1 if piece.low_rank is None else updates.index(piece.low_rank),
    )
