"""Ctrl-C, and SIGTERM, which stops a command as Ctrl-C does. Imports no slow module: the package
imports this one first."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

RETRY_SECONDS = 0.1


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers and containers end a process."""


def _end_at_once(number: int, _: object) -> None:
    """Ends the process, which has nothing to clean up yet."""
    if os.environ.get("RANK", "0") == "0":  # one sentence ends a run, not one a rank
        os.write(2, b"error: stopped.\n")
    os._exit(128 + number)


_BY_DEFAULT = {
    signal.SIGINT: (signal.default_int_handler, _end_at_once),
    signal.SIGTERM: (signal.SIG_DFL, _end_at_once),
}
"""Signal -> its handlers before a command begins; another is somebody else's, and stays."""


def end_commands_at_once() -> None:
    """Lets Ctrl-C and SIGTERM end a process that is the command, until ``terminable`` takes over:
    its imports take seconds, and would end with a traceback. Elsewhere nothing changes."""
    if not _is_command():
        return
    for number, handlers in _BY_DEFAULT.items():
        if signal.getsignal(number) in handlers:
            signal.signal(number, _end_at_once)


def _is_command() -> bool:
    """Whether this process is ``refine-fast`` or ``python -m refine_fast``, and not one that such a
    process started."""
    started = sys.orig_argv
    if sys.argv[:1] == ["-m"]:  # Python has not found the module yet
        named = (*started, *map("".join, pairwise(started)))  # -mrefine_fast, -um refine_fast
        return any(re.fullmatch(f"-[a-zA-Z]*m{__package__}", each) for each in named)
    return any(each in started and Path(each).name == "refine-fast" for each in sys.argv[:1])


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM stop the command as Ctrl-C does: otherwise its temporary files, as large as a
    model, and the processes that it started would stay. Either is sent anew where Python drops the
    exception, such as in a destructor."""
    if threading.current_thread() is not threading.main_thread():  # which gets no signal
        yield
        return
    shown = sys.unraisablehook
    timers: list[threading.Timer] = []

    told: list[int] = []

    def terminate(number: int, _: object) -> None:
        told.append(number)
        raise Terminated

    def send_anew(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            shown(dropped)
            return
        sent = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
        timers.append(threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), sent)))
        timers[-1].daemon = True
        timers[-1].start()

    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) in _BY_DEFAULT[signal.SIGTERM]:
        signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = send_anew
    try:
        yield
    except KeyboardInterrupt:
        if told:  # Ray raises a KeyboardInterrupt of its own instead
            raise Terminated from None
        raise
    finally:
        sys.unraisablehook = shown
        for timer in timers:
            timer.cancel()
        if signal.getsignal(signal.SIGTERM) is terminate:  # a rank has its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
