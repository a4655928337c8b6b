"""``--profile``: where the time of one call goes, by stages, and a trace of it.

The stages of the calling thread exclude each other, so they add up to the call; what they leave out
is shown as "outside the stages" (Python, autograd, allocation). Stages of other threads run
meanwhile. Two calls are made: one whose stages are counted, with nothing else watching, and one
under torch.profiler for the trace, in which every stage is a slice of its thread. Perfetto
(https://ui.perfetto.dev) and chrome://tracing open the file.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files import atomic
from ..profiling import Recording, recorded
from .measuring import synchronize
from .operation import Operation, Shape, made_inputs
from .suite import OURS

MARK = "refine_fast call"
"""The slice of the trace that is the whole call."""


@dataclass(frozen=True)
class Profile:
    """Of one call.

    Attributes:
        seconds: the whole.
        stages: the recording of its stages.
        dropped: how many stages the trace lacks, the last ones of the call; see ``EVENTS``.
    """

    seconds: float
    stages: Recording
    dropped: int = 0

    @property
    def covered(self) -> float:
        """The share of the whole that is in the caller's stages."""
        return sum(self.stages.caller.values()) / self.seconds

    def table(self) -> list[tuple[str, float, float, float]]:
        """(stage, seconds of the caller, their share of the whole, seconds of other threads), the
        longest first."""
        names = dict.fromkeys((*self.stages.caller, *self.stages.others))
        found = [
            (name, own, own / self.seconds, self.stages.others.get(name, 0.0))
            for name in names
            for own in (self.stages.caller.get(name, 0.0),)
        ]
        rest = self.seconds - sum(self.stages.caller.values())
        found.append(("outside the stages", rest, rest / self.seconds, 0.0))
        return sorted(found, key=lambda row: -row[1])


def profile(op: Operation, shape: Shape, dtype: str, device: str, trace: Path | None) -> Profile:
    """Profiles ours.

    Args:
        op: the operation.
        shape: all of its sizes.
        dtype: of its inputs.
        device: cpu or cuda.
        trace: a file for the trace, or None.
    """
    run = op.contender(OURS).run
    with made_inputs(op, shape, dtype, device) as inputs:
        call = partial(run, inputs)
        watched = nullcontext() if op.watched is None else op.watched(inputs)
        prepare(op, inputs)
        call()  # first touches, thread pools
        prepare(op, inputs)
        with watched, recorded() as stages:
            synchronize()
            start = time.perf_counter()
            returned = call()
            synchronize()
            seconds = time.perf_counter() - start
        if op.stages_of is not None:
            stages.caller = op.stages_of(returned)
        dropped = 0
        if trace is not None:
            prepare(op, inputs)
            dropped = write_trace(op, inputs, call, trace)
    return Profile(seconds, stages, dropped)


def prepare(op: Operation, inputs: Any) -> None:
    """Does what the operation needs before a call."""
    if op.before is not None:
        op.before(inputs)


def write_trace(op: Operation, inputs: Any, call: Any, trace: Path) -> int:
    """torch.profiler's trace of a call with the stages as slices; the number of stages that it
    lacks."""
    # 6 is above every level: else torch prints when a profile starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    watched = nullcontext() if op.watched is None else op.watched(inputs)
    with (
        watched,
        recorded() as stages,
        torch.profiler.profile(activities=activities) as profiler,
        torch.profiler.record_function(MARK),
    ):
        begin = time.monotonic_ns()
        call()
        synchronize()
    with atomic(trace) as temporary:
        profiler.export_chrome_trace(str(temporary))
        content = json.loads(temporary.read_text())
        content["traceEvents"] += slices(stages, content["traceEvents"], begin)
        content["refine_fast"] = {"stages dropped from the trace": stages.dropped}
        temporary.write_text(json.dumps(content))
    return stages.dropped


def slices(stages: Recording, events: list[dict[str, Any]], begin: int) -> list[dict[str, Any]]:
    """The stages as events of a Chrome trace, on the clock of its own events.

    Args:
        stages: the recording.
        events: those of the trace; one of them is called ``MARK``.
        begin: nanoseconds of ``time.monotonic_ns`` when that one began.
    """
    mark = next(event for event in events if event.get("name") == MARK and event["ph"] == "X")
    process = mark["pid"]
    rows = rows_of_threads(stages)
    first = 1 + max(event["tid"] for event in events if isinstance(event.get("tid"), int))
    named = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": process,
            "tid": first + row,
            "args": {"name": f"stages of {'other threads' if row else 'the caller'}"},
        }
        for row in sorted(set(rows.values()))
    ]
    return named + [
        {
            "ph": "X",
            "cat": "refine_fast",
            "name": name,
            "pid": process,
            "tid": first + rows[thread],
            "ts": mark["ts"] + (start - begin) / 1e3,
            "dur": (end - start) / 1e3,
        }
        for name, thread, start, end in stages.events
    ]


def rows_of_threads(stages: Recording) -> dict[int, int]:
    """Thread -> row of the trace: 0 is the caller's; other threads share a row if one begins after
    the other has ended, so that threads that live for one shard or block take few rows."""
    spans: dict[int, tuple[int, int]] = {}
    for _, thread, start, end in stages.events:
        low, high = spans.get(thread, (start, end))
        spans[thread] = min(low, start), max(high, end)
    rows, ends = {0: 0}, [0]
    for thread, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if thread == 0:
            continue
        row = next((i for i, last in enumerate(ends) if i and last <= start), len(ends))
        ends[row:] = [end, *ends[row + 1 :]]
        rows[thread] = row
    return rows
