"""How many calls run at a time, when to wait and when to give up.

Concurrency starts low, doubles with each window of accepted calls (slow start), and grows by an
eighth after the first cut. Occasional 429s are expected near the limit and are free: up to a tenth
of a window is ignored, more than a quarter cuts the concurrency by a quarter. A refused call waits
for its own Retry-After without a slot, so that a refusal now and then holds up nobody else. When
half of a window has failed, the circuit opens: every call waits, at least for the longest
Retry-After, and longer with each opening.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from .request import Failure

MAX_TRIES = {"wrong": 1, "late": 3, "broken": 8, "busy": 30}
"""Give up on a request after this many failures of a kind, until the next run.

Each late call lasts as long as the time limit, and may be paid for. Where a seventh of all calls
break at random, five tries leave one of 15,000 requests without a reply, eight leave one of five
million. The waits between eight add up to a minute.
"""

MAX_WAIT = 120.0
"""A Retry-After of more seconds than this is a quota, not a rate: the run stops with a message."""

MAX_OPENINGS, MAX_OPENINGS_UNANSWERED = 12, 3
"""Openings of the circuit in a row before the server is declared dead: about eight minutes for one
that may be restarting, a few seconds for one that neither replied nor refused a call by 429 or 503:
it is most likely misnamed, or hangs."""

MAX_OPENINGS_AMONG_SEVERAL = 5
"""The same, about half a minute, where other endpoints can take the requests."""


def delay(attempt: int, failure: Failure, first: float = 0.5) -> float:
    """Seconds before the next try of a request.

    The server's Retry-After, or else, also where that is 0, 0.5, 1, 2, ... up to 30; with jitter,
    so that calls that failed together do not return together.
    """
    if failure.retry_after:
        return failure.retry_after + random.uniform(0, 0.1)
    return min(30.0, first * 2**attempt) * random.uniform(0.5, 1.5)


@dataclass
class _Window:
    """The calls since the last decision."""

    seen: int = 0
    refused: int = 0
    hung: int = 0
    failed: int = 0
    retry_after: float = 0.0


class Throttle:
    """A semaphore whose size follows the server.

    Args:
        ceiling: most calls at a time.
        first: calls at a time at the start.
        openings: of the circuit in a row, before a server that is there is declared dead.
        pause: seconds of the circuit breaker's first pause.
    """

    def __init__(
        self, ceiling: int, *, first: int = 4, pause: float = 1.0, openings: int = MAX_OPENINGS
    ) -> None:
        self.ceiling = ceiling
        self.limit = float(min(first, ceiling))
        self._slow_start = True
        self._pause = pause
        self._resume = 0.0
        self._openings = 0
        self._max_openings = openings
        self._is_there = False
        self._hangs = 0  # windows in a row whose calls all hung
        self._busy = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._window = _Window()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for a place among the calls that run, in the order of asking, and holds it."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._busy -= 1
                self._wake()

    def _wake(self) -> None:
        """Gives the free places to those who wait: theirs at once, so that nobody overtakes."""
        if time.monotonic() < self._resume:
            return
        while self._waiting and self._busy < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self._busy += 1
                turn.set_result(None)

    def record(self, failure: Failure | None) -> None:
        """Learns from a call that ended; None is a reply.

        Raises:
            Failure: a fatal one, when the circuit has opened too often.
        """
        window = self._window
        if failure is None or failure.kind == "wrong":  # the server works
            self._openings = 0
            self._is_there = True
        elif failure.kind in ("busy", "late"):
            window.refused += 1
            hangs = failure.kind == "late" and failure.status is None
            window.hung += hangs
            self._is_there |= not hangs
            window.retry_after = max(window.retry_after, failure.retry_after or 0.0)
        else:
            window.failed += 1
        window.seen += 1
        if window.seen >= max(16, int(self.limit)):
            self._window = _Window()
            self._decide(window, failure)
            self._wake()

    def _decide(self, window: _Window, last: Failure | None) -> None:
        self._hangs = self._hangs + 1 if window.hung == window.seen else 0
        if window.refused + window.failed >= window.seen / 2:
            self._open(window.retry_after, last)
        elif window.refused > window.seen / 4:
            self._cut(0.75)
        elif window.refused <= window.seen / 10:
            step = self.limit if self._slow_start else max(1.0, self.limit / 8)
            self.limit = min(self.ceiling, self.limit + step)

    def _cut(self, factor: float) -> None:
        self.limit = max(1.0, self.limit * factor)
        self._slow_start = False

    def _open(self, retry_after: float, last: Failure | None) -> None:
        self._openings += 1
        most = self._max_openings if self._is_there else MAX_OPENINGS_UNANSWERED
        if self._openings > most or self._hangs > MAX_OPENINGS_UNANSWERED:
            raise Failure(
                "fatal", f"half of the calls fail, and waiting did not help (last: {last})"
            )
        pause = max(retry_after, min(60.0, self._pause * 2 ** (self._openings - 1)))
        self._resume = time.monotonic() + pause
        self._cut(0.5)
        asyncio.get_running_loop().call_later(pause + 0.01, self._wake)
