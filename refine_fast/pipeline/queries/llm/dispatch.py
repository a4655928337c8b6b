"""Puts requests to a backend until each has a reply on disk, a limit is reached or the server is given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from .budget import Budget
from .reply_log import ReplyStore
from .request import Backend, Failure, Reply, Request
from .throttle import LONGEST_WAIT, REFUSALS, TRIES, Throttle, delay


@dataclass
class Progress:
    """Where a stage stands. ``reused`` of the ``done`` replies were there before; rate and time left are over those of this start."""

    total: int
    done: int
    reused: int
    failed: int = 0
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    concurrency: int = 0
    stopped: str | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Replies a second."""
        return (self.done - self.reused) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done - self.failed) / self.rate if self.rate else float("inf")


Watch = Callable[[Progress], None]


async def ask(
    requests: Iterable[Request],
    state: Progress,
    backend: Backend,
    store: ReplyStore,
    throttle: Throttle,
    budget: Budget,
    watch: Watch | None = None,
) -> None:
    """Requests are drawn as they are needed, never all at once. Returns when there are no more, or when a limit stops the run cleanly;
    raises a fatal :class:`Failure` when no request can succeed. Every reply is in the store by then; ``state`` tells how far it came.
    """
    stream = iter(requests)
    # Calls that wait for a Retry-After hold a worker but no slot: three workers a slot keep the slots busy.
    workers = [
        asyncio.create_task(_work(stream, backend, store, throttle, budget, state, watch))
        for _ in range(3 * throttle.ceiling)
    ]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await store.drain()


async def _work(
    stream: Iterator[Request],
    backend: Backend,
    store: ReplyStore,
    throttle: Throttle,
    budget: Budget,
    state: Progress,
    watch: Watch | None,
) -> None:
    for request in stream:
        if state.stopped:
            return
        record = await _until_replied(request, backend, throttle, budget, state)
        if record is None:
            return
        await store.append(record)
        if "error" in record:
            state.failed += 1
        else:
            state.done += 1
        state.calls, state.tokens_in, state.tokens_out = (
            budget.calls,
            budget.tokens_in,
            budget.tokens_out,
        )
        state.cost, state.concurrency = budget.cost, int(throttle.limit)
        if watch:
            watch(state)


async def _until_replied(
    request: Request, backend: Backend, throttle: Throttle, budget: Budget, state: Progress
) -> dict[str, str | int | float] | None:
    """The record of a reply or of the failure that remained; None when a limit allows no further call."""
    record: dict[str, str | int | float] = {
        "key": request.key,
        "chunk": request.chunk_id,
        "model": request.model,
    }
    broken = refused = 0
    while True:
        outcome, stopped = await _call(request, backend, throttle, budget)
        if stopped:
            state.stopped = state.stopped or stopped
            return (
                {**record, "error": f"stopped by {stopped}", "calls": broken + refused}
                if broken + refused
                else None
            )
        if isinstance(outcome, Reply):
            used = {"tokens_in": outcome.tokens_in, "tokens_out": outcome.tokens_out}
            calls = broken + refused + 1
            if not outcome.text.strip():
                advice = "; raise --llm-reply-tokens" if outcome.finish == "length" else ""
                return {
                    **record,
                    "error": f"empty reply ({outcome.finish}){advice}",
                    "calls": calls,
                    **used,
                }
            return {
                **record,
                "text": outcome.text,
                "finish": outcome.finish,
                "calls": calls,
                **used,
            }
        assert outcome is not None
        if outcome.kind == "fatal":
            raise outcome
        if (outcome.retry_after or 0.0) > LONGEST_WAIT:
            raise Failure(
                "fatal", f"the server asks to come back in {outcome.retry_after:.0f} s ({outcome})"
            )
        refused += outcome.kind == "busy"
        broken += outcome.kind != "busy"
        if outcome.kind == "wrong" or broken >= TRIES or refused >= REFUSALS:
            return {**record, "error": str(outcome), "calls": broken + refused}
        await asyncio.sleep(delay(broken + refused - 1, outcome))


async def _call(
    request: Request, backend: Backend, throttle: Throttle, budget: Budget
) -> tuple[Reply | Failure | None, str | None]:
    """What came of one call, or the limit that forbade it."""
    async with throttle.slot():
        reserved = request.tokens_in, request.max_tokens
        if stopped := await budget.reserve(*reserved):
            return None, stopped
        outcome: Reply | Failure | None = None
        try:
            outcome = await backend.complete(request)
        except Failure as failure:
            outcome = failure
        finally:
            used = (outcome.tokens_in, outcome.tokens_out) if isinstance(outcome, Reply) else (0, 0)
            await budget.settle(reserved, used)
        throttle.record(None if isinstance(outcome, Reply) else outcome)
    return outcome, None
