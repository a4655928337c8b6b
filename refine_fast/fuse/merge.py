"""``fuse`` and ``fuse_sweep``: carry out a merge plan, from file to file."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from numbers import Integral
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import RefineFastError, RefineFastWarning
from ..files import fsync, real_path
from ..profiling import stage
from .adapter import LowRank
from .atomic_output import AtomicOutput, is_taken
from .checkpoint import RAW
from .plan import Piece, Plan, Shard, make_plan
from .report import FuseReport, TensorChange

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""
_Changes = list[tuple[float, float, int, int]]  # per piece, as _core.stream returns them

_BATCH = 1 << 30  # bytes of one output between two points at which a killed merge can resume
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
    force: bool = False,
    progress: Progress | None = None,
) -> FuseReport:
    """``out = base + weight * (tuned - base)`` for every floating-point tensor of two checkpoints.

    Bit for bit what ``torch.lerp`` gives (in float32 for 8- and 16-bit types), streamed: no tensor,
    shard or model is ever held in memory. Values that are equal in both stay as they are, and a
    weight of 0 or 1 gives one input back, whatever the other holds. Every other file is copied from
    base, integer and bool tensors too. Weights in other formats
    (``pytorch_model.bin``, ONNX) are left out, since they would still hold base's values. Quantized
    weights, which are codes with scales, are refused.

    Two folders must also agree on what gives the tensors their meaning: the tokens and their ids,
    the merges of BPE, the values of config.json that define the architecture, the modules of a
    SentenceTransformer, their pooling and activations. Differences that change nothing there, such
    as prompts, dtype or a Normalize module, are reported.

    Everything is checked before a byte is written. ``out`` appears by a rename after the data are
    on disk; a killed merge leaves what was there, and the same call resumes it.

    Args:
        base: a model folder (one file or shards with an index; sentence-transformers or plain
            transformers) or a ``.safetensors`` file.
        tuned: the same kind as base, or the folder of a PEFT LoRA adapter.
        out: the same kind as base.
        weight: the share of tuned; 0 is base, 1 is tuned.
        weights: ``{glob over tensor names: weight}``, first match wins, ``weight`` for the rest.
        dtype: of the output's float tensors: "BF16", "F16", "F32", "F64", "F8_E4M3" or "F8_E5M2";
            default: base's. config.json then names it too, but for the 8-bit types.
        checksum: computes the SHA-256 of every weight file read and written, in the same pass.
        threads: 1 reads, computes and writes in turn in one thread. None, or 2 and more, overlap
            reading and writing with the arithmetic, in threads of their own; their number is fixed,
            so every such value does the same.
        overwrite: replaces ``out`` if it exists.
        force: fuses models whose tokenizer, architecture or modules differ, with base's files.
        progress: called with (bytes written, bytes in all).

    Returns:
        What happened to every tensor.

    Raises:
        RefineFastError: inputs that cannot be merged, an output that may not be written, or a
            failed write, which leaves nothing behind.

    Warns:
        RefineFastWarning: NaN or infinite values in the output, or integer tensors that differ.
    """
    return fuse_sweep(
        base,
        tuned,
        {weight: out},
        weights=weights,
        dtype=dtype,
        checksum=checksum,
        threads=threads,
        overwrite=overwrite,
        force=force,
        progress=progress,
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
    force: bool = False,
    progress: Progress | None = None,
) -> dict[float, FuseReport]:
    """``fuse`` at several weights, in one read of the inputs.

    Args:
        base, tuned, weights, dtype, checksum, threads, overwrite, force, progress: as for ``fuse``.
        outs: ``{weight: out}``.

    Returns:
        The report of each weight.

    Raises:
        RefineFastError: as ``fuse``.
    """
    start = time.perf_counter()
    base, tuned = Path(base), Path(tuned)
    finals = [Path(os.path.abspath(out)) for out in outs.values()]
    overlap = _overlaps(threads)
    outputs: list[AtomicOutput] = []
    try:
        with stage("plan"):
            plan = make_plan(base, tuned, list(outs), weights, dtype, force=force)
            _check_outputs(plan, [base, tuned], finals, overwrite)
        with ExitStack() as stack:
            for i, final in enumerate(finals):
                output = AtomicOutput(
                    final,
                    _fingerprint(plan, i, dtype),
                    is_folder=plan.is_folder,
                    overwrite=overwrite,
                )
                outputs.append(stack.enter_context(output))
            merge = _Merge(plan, outputs, checksum, overlap, progress)
            changes = merge.run()
            with stage("finish"):
                if plan.is_folder:
                    for output in outputs:
                        _copy_others(plan, output.content)
                for output in outputs:
                    output.publish()
    except OSError as error:
        whole = ", ".join(str(output.final) for output in outputs if output.published)
        left = f"left only {whole}, which is whole" if whole else "left nothing behind"
        raise RefineFastError(f"the merge failed and {left}: {error}") from error
    seconds = time.perf_counter() - start
    return {w: merge.report(i, changes, seconds) for i, w in enumerate(outs)}


def _overlaps(threads: int | None) -> bool:
    """Whether reading, computing and writing overlap."""
    if threads is None:
        return True
    if isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1:
        raise RefineFastError(f"threads must be None or an integer >= 1 (got {threads!r})")
    return bool(threads > 1)


def _check_outputs(plan: Plan, inputs: list[Path], finals: list[Path], overwrite: bool) -> None:
    distinct = len(set(finals)) == len(finals)
    nested = any(final in other.parents for final in finals for other in finals)
    if not finals or not distinct or nested:
        raise RefineFastError(
            "each weight of a sweep needs its own output, which is not inside another's"
        )
    for final in finals:
        real = real_path(final)
        for given in inputs:
            path = real_path(given)
            if real == path or real in path.parents or path in real.parents:
                raise RefineFastError(
                    f"the output {final} and the input {given} contain each other:"
                    " give another output"
                )
        if final.is_symlink():
            raise RefineFastError(f"the output {final} is a link: give its target")
        if final.is_mount():
            raise RefineFastError(
                f"the output {final} is a mount point, which a rename cannot replace:"
                " give a folder inside it"
            )
        if not plan.is_folder and final.suffix != ".safetensors":
            raise RefineFastError(
                f"the output {final} must be a .safetensors file, as the inputs are"
            )
        if final.exists():
            if final.is_dir() != plan.is_folder:
                kind = "file" if plan.is_folder else "folder"
                raise RefineFastError(
                    f"the output {final} is already a {kind}: give another output"
                )
            if not overwrite and is_taken(final):
                raise RefineFastError(
                    f"the output {final} exists: give another, or pass overwrite=True"
                    " (--overwrite) to replace it"
                )
    needed: dict[int, tuple[int, Path]] = {}
    for final in finals:
        existing = next(path for path in final.parents if path.exists())
        device = existing.stat().st_dev
        staged = final.parent / f".{final.name}.refine-fast"
        files = [path for path in staged.rglob("*") if path.is_file()] if staged.is_dir() else []
        has = sum(path.stat().st_blocks * 512 for path in files)
        needed[device] = (needed.get(device, (0, existing))[0] + plan.nbytes - has, existing)
    for size, folder in needed.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise RefineFastError(
                f"the output takes {size / 1e9:.2f} GB, but the disk of {folder} has"
                f" {free / 1e9:.2f} GB free: free some space, or give another output"
            )


def _fingerprint(plan: Plan, output: int, dtype: str | None) -> str:
    """Fingerprint of inputs and weights; a killed merge resumes only if it matches."""
    inputs = [
        (str(h.path.resolve()), (s := h.path.stat()).st_size, s.st_mtime_ns) for h in plan.inputs
    ]
    pieces = [
        (
            piece.name,
            piece.weights[output if piece.is_float else 0],
            piece.low_rank and (piece.low_rank.scale, piece.low_rank.transposed),
        )
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
    for relative, text in plan.changed.items():
        (content / relative).write_bytes(text)
        fsync(content / relative)


class _Digest:
    """SHA-256 of a file from its blocks as they are read or written; finish() reads the blocks that
    did not arrive in order."""

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
    """Carries out one plan, into one or more outputs."""

    def __init__(
        self,
        plan: Plan,
        outputs: list[AtomicOutput],
        checksum: bool,
        overlap: bool,
        progress: Progress | None,
    ) -> None:
        self._plan, self._outputs = plan, outputs
        self._overlap, self._progress = overlap, progress
        self._written = self._read = self._resumed = 0
        self._total = sum(shard.nbytes for shard in plan.shards) * len(outputs)
        headers = plan.inputs if checksum else []
        self._inputs = {header.path: _Digest(header.raw) for header in headers}
        self._sha256: list[dict[str, str]] = [{} for _ in outputs]

    def run(self) -> list[list[_Changes]]:
        """Per output, per shard: what happened to its pieces."""
        done = [dict(output.state) for output in self._outputs]
        for shard in self._plan.shards:
            self._write(shard, done)
        inputs = {str(path): digest.finish(path) for path, digest in self._inputs.items()}
        self._sha256 = [inputs | digests for digests in self._sha256]
        return [[changes[str(shard.relative)] for shard in self._plan.shards] for changes in done]

    def _path(self, root: Path, shard: Shard) -> Path:
        return root / shard.relative if self._plan.is_folder else root

    def _write(self, shard: Shard, done: list[dict[str, _Changes]]) -> None:
        """Writes the pieces of a shard that ``done`` does not list, and lists them there."""
        key = str(shard.relative)
        paths = [self._path(output.content, shard) for output in self._outputs]
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
            descriptors = []
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("r+b" if finished else "w+b", buffering=0))
                with stage("setup"):
                    _core.preallocate(file.fileno(), os.fsencode(path), offsets[-1])
                    if not finished:
                        os.pwrite(file.fileno(), shard.header, 0)
                descriptors.append(file.fileno())
            entries = (e for p in shard.pieces for e in (p.base, p.tuned) if e is not None)
            names = sorted({entry.file for entry in entries})
            files = []
            for path in names:
                file = stack.enter_context(path.open("rb", buffering=0))
                files.append((file.fileno(), os.fsencode(path)))
            self._advance(offsets[finished] * len(paths))

            def on_block(file: int, offset: int, block: memoryview) -> None:
                if file < 0:
                    self._advance(len(block))
                else:
                    self._read += len(block)
                if self._inputs:
                    digest = digests[-1 - file] if file < 0 else self._inputs[names[file]]
                    digest.feed(offset, block)

            for first, last in _batches(shard.pieces, finished):
                batch = shard.pieces[first:last]
                outputs = []
                for i, (descriptor, path) in enumerate(zip(descriptors, paths, strict=True)):
                    weights = [p.weights[i if p.is_float else 0] for p in batch]
                    outputs.append((descriptor, os.fsencode(path), offsets[first], weights))
                updates = [p.low_rank for p in batch if p.low_rank is not None]
                matrices = [update.factors() for update in updates]
                factors = [
                    (a.data_ptr(), b.data_ptr(), a.shape[0], b.shape[0], a.shape[1])
                    for a, b in matrices
                ]
                pieces = [_as_tuple(p, names, updates) for p in batch]
                results = _core.stream(files, pieces, factors, outputs, self._overlap, on_block)
                for changes, result in zip(done, results, strict=True):
                    changes[key] = [*changes[key], *result]
                if last < len(shard.pieces) or shard is not self._plan.shards[-1]:
                    with stage("sync"):
                        for fd, output, changes in zip(
                            descriptors, self._outputs, done, strict=True
                        ):
                            os.fsync(fd)
                            output.save_state(changes)
            with stage("sync"):
                for descriptor in descriptors:
                    os.fsync(descriptor)
        if self._inputs:
            for output, path, digest, sha256 in zip(
                self._outputs, paths, digests, self._sha256, strict=True
            ):
                sha256[str(self._path(output.final, shard))] = digest.finish(path)

    def _advance(self, nbytes: int) -> None:
        self._written += nbytes
        if self._progress is not None:
            self._progress(min(self._written, self._total), self._total)

    def report(self, output: int, changes: list[list[_Changes]], seconds: float) -> FuseReport:
        """The report of one output; warns of NaN and of integer tensors that differ."""
        tensors, copied, unequal = {}, [], []
        for shard, of_shard in zip(self._plan.shards, changes[output], strict=True):
            for piece, change in zip(shard.pieces, of_shard, strict=True):
                moved, size, not_finite, differing = change
                if piece.is_float:
                    relative = math.sqrt(moved / size) if size else 0.0 if moved == 0 else math.inf
                    tensors[piece.name] = TensorChange(
                        piece.weights[output], math.sqrt(moved), relative, not_finite
                    )
                    continue
                copied.append(piece.name)
                retyped = piece.tuned is not None and piece.tuned.dtype != piece.base.dtype
                if differing or retyped:
                    unequal.append(piece.name)
        final = self._outputs[output].final
        report = FuseReport(
            out=final,
            tensors=tensors,
            copied=copied,
            unequal=unequal,
            reconciled=self._plan.notes,
            differences=self._plan.differences,
            left_out=self._plan.base.left_out,
            bytes_read=self._read,
            bytes_written=self._written,
            seconds=seconds,
            resumed=self._resumed,
            sha256=self._sha256[output],
        )
        if report.not_finite:
            warnings.warn(
                f"{final} holds NaN or infinite values, first in {report.not_finite[0]!r}",
                RefineFastWarning,
                stacklevel=_stack_level(),
            )
        if unequal:
            warnings.warn(
                f"{len(unequal)} tensors that are copied differ between base and tuned, first"
                f" {unequal[0]!r}: base's were kept",
                RefineFastWarning,
                stacklevel=_stack_level(),
            )
        return report


def _stack_level() -> int:
    """Of a warning that is to name the call of ``fuse`` or ``fuse_sweep``, from its caller here."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    return level - 1


def _batches(pieces: list[Piece], first: int) -> Iterator[tuple[int, int]]:
    """[first, last) of at least _BATCH bytes each, except for the last."""
    size = 0
    for i in range(first, len(pieces)):
        size += pieces[i].nbytes
        if size >= _BATCH or i + 1 == len(pieces):
            yield first, i + 1
            first, size = i + 1, 0


def _as_tuple(piece: Piece, files: list[Path], updates: list[LowRank]) -> tuple[Any, ...]:
    """As refine_fast::Piece (csrc)."""
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
