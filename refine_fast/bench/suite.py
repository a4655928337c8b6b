"""Measures one operation beside its peers and makes its rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import torch

import refine_fast as rf

from ..errors import RefineFastError
from .measuring import Sample, peak_mb, take_turns
from .operation import Operation, Shape, first_line, made_inputs
from .operations import operation
from .roofline import Rates, busy, contenders, rates, roofline_rows
from .rows import Row, place, rows

OURS = "refine_fast"


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        op: the operation.
        shape: all of its sizes.
        dtype: of its inputs.
        device: cpu or cuda.
        rounds: samples of each contender.
        quick: whether the slow contenders are left out, and memory is that of ours and of the peer.
        only: the contenders that take part besides ours; empty: all.

    Raises:
        RefineFastError: if the operation has no contender of a name in ``only``.
    """

    op: Operation
    shape: Shape
    dtype: str
    device: str
    rounds: int
    quick: bool = False
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [one.name for one in self.op.contenders]
        if unknown := set(self.only) - set(names):
            raise RefineFastError(
                f"--only: {self.op.title} has no contender {sorted(unknown)[0]!r}; "
                f"it has {', '.join(names)}."
            )


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        task: what was asked.
        samples: by contender.
        peaks: MiB by contender.
        rates: those of this machine, in the same run.
        absent: why other contenders did not take part, or not in full.
    """

    task: Task
    samples: dict[str, list[Sample]]
    peaks: dict[str, float]
    rates: Rates
    absent: dict[str, str]

    def middle(self, name: str) -> Sample:
        """The medians of a contender."""
        seconds, cpu = zip(*self.samples[name], strict=True)
        return Sample(statistics.median(seconds), statistics.median(cpu))

    def fraction(self, name: str) -> float:
        """Of the roofline; of the floor where the operation has one."""
        floor = self.task.op.floor
        if floor:
            return (
                self.middle(floor).seconds / self.middle(name).seconds
                if floor in self.samples
                else 0
            )
        ideal = self.rates.seconds(self.task.op.work(self.task.shape, self.task.dtype))
        return ideal / busy(self.middle(name), self.task.device)


def measure(task: Task, progress: Callable[[str], None] | None = None) -> Measured:
    """Runs the task.

    A peer that fails, such as for want of memory, is named in ``absent``; one that fails only where
    its memory is measured keeps its times.

    Raises:
        RefineFastError: the inputs cannot be made.
    """
    place()
    op = task.op
    there, absent = op.present(task.device, task.dtype, quick=task.quick)
    if task.only:
        there = [one for one in there if one.name in (OURS, *task.only)]
    with ExitStack() as stack:
        inputs = stack.enter_context(made_inputs(op, task.shape, task.dtype, task.device))
        before = None if op.before is None else partial(op.before, inputs)
        calls: dict[str, Callable[[], object]] = {}
        for one in there:
            if (why := failure(op, one.run, task, before, inputs)) is None:
                calls[one.name] = partial(one.run, inputs)
            elif one.name == OURS:
                raise why
            else:
                absent[one.name] = f"failed: {first_line(why)}"
        failures: dict[str, Exception] = {}
        samples = take_turns(
            calls | contenders(task.device, task.dtype),
            rounds=task.rounds,
            warm=not op.own_process,
            before=before,
            progress=progress,
            failures=failures,
        )
        for name, why in failures.items():
            if name == OURS or name not in calls:
                raise why
            del calls[name]
            absent[name] = f"failed: {first_line(why)}"
        peaks = {}
        for name in [name for name in calls if op.measures_memory]:
            if task.quick and name not in (OURS, op.peer):
                continue
            if progress is not None:
                progress(f"memory of {name}")
            try:
                if task.device == "cuda":
                    peaks[name] = cuda_peak_mb(calls[name], before)
                else:
                    here = (rf.isa(), torch.get_num_threads())
                    peaks[name] = peak_mb(partial(ready, _names(task), name, *here))
            except Exception as why:  # such as a peer's process that was killed for memory
                if name == OURS:
                    raise
                absent[name] = f"memory not measured: {first_line(why)}"
    machine = {name: samples.pop(name) for name in list(samples) if name not in calls}
    return Measured(task, samples, peaks, rates(machine, task.device), absent)


def failure(
    op: Operation,
    run: Callable[[Any], object],
    task: Task,
    before: Callable[[], None] | None,
    inputs: Any,
) -> Exception | None:
    """What a contender raises on tiny inputs, which also takes its imports out of the figures."""
    if op.own_process:
        return None
    try:
        with op.inputs({**op.shape, **op.tiny}, task.dtype, task.device) as tiny:
            if op.before is not None:
                op.before(tiny)
            run(tiny)
    except Exception as error:
        return error
    return None


def _names(task: Task) -> tuple[str, str, dict[str, int | float], str, str]:
    return task.op.name, task.op.mode, dict(task.shape), task.dtype, task.device


def ready(
    what: tuple[str, str, dict[str, int | float], str, str], contender: str, isa: str, threads: int
) -> Callable[[], object]:
    """A call of one contender, in a fresh process: the inputs are made and imports are done."""
    name, mode, shape, dtype, device = what
    op = operation(name, mode)
    torch.set_num_threads(threads)
    rf.force_isa(isa)
    run = op.contender(contender).run
    if not op.own_process:
        with op.inputs({**op.shape, **op.tiny}, dtype, device) as tiny:
            run(tiny)
    stack = ExitStack()
    # the inputs live as long as the process; one that was forked runs no other exit functions
    Finalize(None, stack.close, exitpriority=0)
    inputs = stack.enter_context(op.inputs(shape, dtype, device))
    if op.before is not None:
        op.before(inputs)
    return partial(run, inputs)


def cuda_peak_mb(run: Callable[[], object], before: Callable[[], None] | None) -> float:
    """MiB of GPU memory beyond what is held before."""
    if before is not None:
        before()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def rows_of(found: Measured) -> list[Row]:
    """All rows: times and memory of every contender, rates and fractions, ours beside each peer,
    the work, the machine's rates."""
    task, op = found.task, found.task.op
    about = {"op": op.name, "mode": op.mode, "dtype": task.dtype, "shape": task.shape}
    values: dict[str, dict[str, list[float]]] = {
        "seconds": {n: [one.seconds for one in s] for n, s in found.samples.items()},
        "cpu_seconds": {n: [one.cpu_seconds for one in s] for n, s in found.samples.items()},
        "peak_mb": {name: [peak] for name, peak in found.peaks.items()},
    }
    made: list[Row] = []
    for metric, taken in values.items():
        made += rows(taken, metric=metric, peer=op.peer, **about)  # type: ignore[arg-type]
        others: Sequence[str] = [name for name in taken if name not in (OURS, op.peer)]
        for peer in others if OURS in taken else ():
            both = {OURS: taken[OURS], peer: taken[peer]}
            made += rows(both, metric=metric, peer=peer, **about)[:1]  # type: ignore[arg-type]
    work = op.work(task.shape, task.dtype)
    if work.flops or work.bytes:
        for metric, size in (("gflop", work.flops / 1e9), ("gb", work.bytes / 1e9)):
            made += rows({"least work": [size]}, metric=metric, peer="", **about)  # type: ignore[arg-type]
        rate, amount = ("gb_per_s", work.bytes / 1e9) if op.floor else ("tflops", work.flops / 1e12)
        speeds: dict[str, list[float]] = {}
        for name, taken_ in found.samples.items():
            spent = [one.seconds if op.floor else busy(one, task.device) for one in taken_]
            speeds[name] = [amount / seconds for seconds in spent]
        made += rows(speeds, metric=rate, peer="", **about)  # type: ignore[arg-type]
        fractions = {name: [found.fraction(name)] for name in found.samples}
        made += rows(fractions, metric="fraction_of_roofline", peer="", **about)  # type: ignore[arg-type]
    return made + roofline_rows(found.rates, task.dtype, task.device)
