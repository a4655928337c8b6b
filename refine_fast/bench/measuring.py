"""Samples: one call each, wall and CPU time, contenders in turn; peak memory in a process of its
own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import resource
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

COUNTED = 16.0
"""MiB."""
IMPORTED = ["refine_fast.bench.suite", "sentence_transformers"]
"""What a process that measures memory has imported: the slow imports of the contenders."""


class Sample(NamedTuple):
    """What one call cost."""

    seconds: float
    cpu_seconds: float


def cpu_seconds() -> float:
    """CPU time of this process, all threads, and of its children that have ended: the clock to
    trust where neighbours take the cores."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def sample(run: Callable[[], object]) -> Sample:
    """What one call of ``run`` costs; a GPU is waited for on both sides."""
    synchronize()
    cpu, wall = cpu_seconds(), time.perf_counter()
    run()
    synchronize()
    return Sample(time.perf_counter() - wall, cpu_seconds() - cpu)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm: bool = True,
    before: Callable[[], None] | None = None,
    progress: Callable[[str], None] | None = None,
    failures: dict[str, Exception] | None = None,
) -> dict[str, list[Sample]]:
    """``rounds`` samples of each contender, each round starting with another one.

    Args:
        contenders: by name.
        rounds: at least 1.
        warm: whether an uncounted round comes first.
        before: called before each call, uncounted.
        progress: called with the name of the contender that is next.
        failures: gets the exception of each contender that raises one, which then takes no further
            turn and has no samples; None: the exception is raised.
    """
    names = list(contenders)
    failed: dict[str, Exception] = {} if failures is None else failures
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(-1 if warm else 0, rounds):
        for i in range(len(names)):
            name = names[(max(turn, 0) + i) % len(names)]
            if name in failed:
                continue
            if progress is not None:
                progress(name)
            if before is not None:
                before()
            try:
                cost = sample(contenders[name])
            except Exception as error:
                if failures is None:
                    raise
                failures[name] = error
                continue
            if turn >= 0:
                samples[name].append(cost)
    return {name: taken for name, taken in samples.items() if name not in failed}


def measure(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, list[float]]:
    """Wall seconds, as ``take_turns``."""
    turns = take_turns(contestants, rounds=rounds)
    return {name: [one.seconds for one in samples] for name, samples in turns.items()}


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def peak_mb(build: Callable[[], Callable[[], object]]) -> float:
    """MiB by which one call raises the peak resident size, in a fresh process, or the peak of a
    child process if that is more.

    Args:
        build: makes the inputs and returns what is measured. It must be picklable: a function of a
            module, or a functools.partial of one.
    """
    # forked from a process that has done the slow imports once, and has used none of them
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_in_child, args=(build, sender))
    try:
        child.start()
        sender.close()
        receiver.recv()  # it has begun
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {build} died") from None
    except KeyboardInterrupt:
        receiver.close()  # a child that has not begun does not
        if child.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGINT)
        raise
    finally:
        if child.pid is not None:
            child.join()


def _peak_in_child(build: Callable[[], Callable[[], object]], pipe: Connection) -> None:
    try:
        pipe.send(None)
        pipe.send(_peak_of(build))
    except (KeyboardInterrupt, BrokenPipeError):  # the parent says that it was stopped
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # else a second one stops the cleaning up


def _peak_of(build: Callable[[], Callable[[], object]]) -> float:
    def peak() -> float:
        found = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found[0]) / 1024

    run = build()
    # else what building freed is used again, and hides as much of the run's own
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    before = peak()
    run()
    # a child starts as a copy of this process: only one that grew beyond it counts, by more than
    # the kernel's counters may be off
    children, own = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)
    )
    return max(peak() - before, children if children > own + COUNTED else 0.0)
