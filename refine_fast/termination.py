"""SIGTERM, which stops a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RETRY_SECONDS = 0.1


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers and containers end a process."""


def _terminate(*_: object) -> None:
    raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM stop the command as Ctrl-C does: otherwise its temporary files, as large as a
    model, and the processes that it started would stay. Either is sent anew where Python drops the
    exception, such as in a destructor."""
    by_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not by_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    shown = sys.unraisablehook
    timers: list[threading.Timer] = []

    def send_anew(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            shown(dropped)
            return
        sent = signal.SIGTERM if issubclass(dropped.exc_type, Terminated) else signal.SIGINT
        timers.append(threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), sent)))
        timers[-1].daemon = True
        timers[-1].start()

    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = send_anew
    try:
        yield
    finally:
        sys.unraisablehook = shown
        for timer in timers:
            timer.cancel()
        if signal.getsignal(signal.SIGTERM) is _terminate:  # a rank has its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
