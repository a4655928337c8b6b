"""SIGTERM, which stops a command as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers and containers end a process."""


def _terminate(*_: object) -> None:
    raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM stop the command as Ctrl-C does: otherwise its temporary files, as large as a
    model, and the processes that it started would stay."""
    by_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not by_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:  # a rank has its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
