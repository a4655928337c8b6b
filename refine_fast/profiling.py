"""Where the time of an operation goes, by stage: pack, multiply, select, ...

The C++ core opens its stages itself (csrc/core/stages.h). The paths in Python open theirs with
``stage``; on a GPU each one is an NVTX range too, and the GPU is waited for at its end, so that its
time is that of the kernels. Unless ``recorded`` is active, a stage is the test of a flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from . import _core

P = ParamSpec("P")
R = TypeVar("R")

EVENTS = 1 << 19
"""Events that a recording keeps for a trace; the times by stage count all of them."""

_NOTHING = nullcontext()
_recording = False


@dataclass
class Recording:
    """What ``recorded`` found, once its block has ended.

    Attributes:
        caller: seconds by stage of the thread that recorded. They exclude each other, so they add
            up to the time that it spent in stages.
        others: seconds by stage of all other threads together.
        events: (stage, thread, begin, end), thread 0 being the caller's, in nanoseconds of
            ``time.monotonic_ns``.
        dropped: the number of events beyond ``EVENTS``.
    """

    caller: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    events: list[tuple[str, int, int, int]] = field(default_factory=list)
    dropped: int = 0


@contextmanager
def recorded() -> Iterator[Recording]:
    """Records the stages of its block. One recording at a time; no operation may run elsewhere."""
    global _recording
    record = Recording()
    _core.start_stages(EVENTS)
    _recording = True
    try:
        yield record
    finally:
        _recording = False
        stages, record.events, record.dropped = _core.stop_stages()
        record.caller = {name: own / 1e9 for name, own, _ in stages if own}
        record.others = {name: others / 1e9 for name, _, others in stages if others}


def stage(name: str) -> AbstractContextManager[None]:
    """A stage of an operation, as a context.

    Args:
        name: one of the names in csrc/core/stages.cc.
    """
    return _stage(name) if _recording else _NOTHING


@contextmanager
def _stage(name: str) -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.nvtx.range_push(f"refine_fast: {name}")
    scope = _core.StageScope(name)
    try:
        yield
    finally:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_pop()
        scope.close()


def in_stage(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function whose calls are the stage ``name``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def staged(*args: P.args, **kwargs: P.kwargs) -> R:
            with stage(name):
                return function(*args, **kwargs)

        return staged

    return decorate
