"""Sends requests to a backend until each has a reply on disk.

Ends early when a limit is reached, when the server is declared dead, or when its replies are of no
use.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .budget import Budget
from .reply_log import ReplyStore
from .reply_parser import strip_reasoning
from .request import Backend, Failure, Reply, Request, Sent
from .throttle import MAX_BROKEN, MAX_REFUSALS, MAX_WAIT, Throttle, delay

MAX_USELESS_FIRST, MAX_USELESS = 8, 30
"""The stage stops after this many useless replies in a row: before the first useful one of this
start, and later. A model that spends every reply on reasoning is found before all are paid."""


@dataclass
class CallProgress:
    """Progress counters. Rate and remaining time are those of this start."""

    total: int
    done: int
    """Replies, ``reused`` of which were there before."""
    reused: int
    failed: int = 0
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    concurrency: int = 0
    stopped: str | None = None
    """The limit that stopped the stage."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Replies per second."""
        return (self.done - self.reused) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Estimated remaining time; infinite before the first reply."""
        return (self.total - self.done - self.failed) / self.rate if self.rate else float("inf")


Watch = Callable[[CallProgress], None]

IsUseful = Callable[[str], bool]
"""Whether the text of a reply holds what was asked for."""


async def ask(
    requests: Iterable[Request],
    state: CallProgress,
    backend: Backend,
    store: ReplyStore,
    throttle: Throttle,
    budget: Budget,
    is_useful: IsUseful,
    watch: Watch | None = None,
) -> None:
    """Draws requests as they are needed and puts every reply into the store.

    Returns when there are no more requests, or when a limit stops the stage; ``state`` then names
    it.

    Raises:
        Failure: a fatal one, when no request can succeed or the replies are useless. Every reply
            so far is in the store.
    """
    dispatcher = _Dispatcher(state, backend, store, throttle, budget, is_useful, watch)
    stream = iter(requests)
    # Calls that wait for a Retry-After hold a worker but no slot: three per slot keep all busy.
    workers = [asyncio.create_task(dispatcher.work(stream)) for _ in range(3 * throttle.ceiling)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await store.drain()


class _Dispatcher:
    """What the workers share."""

    def __init__(
        self,
        state: CallProgress,
        backend: Backend,
        store: ReplyStore,
        throttle: Throttle,
        budget: Budget,
        is_useful: IsUseful,
        watch: Watch | None,
    ) -> None:
        self._state = state
        self._backend = backend
        self._store = store
        self._throttle = throttle
        self._budget = budget
        self._is_useful = is_useful
        self._watch = watch
        self._useless = 0  # replies in a row
        self._useful = False
        self._useless_failure: Failure | None = None

    async def work(self, stream: Iterator[Request]) -> None:
        """Takes requests from the stream until there are none or the stage is stopped."""
        for request in stream:
            if self._state.stopped:
                return
            record = await self._until_replied(request)
            if record is None:
                return
            await self._store.append(record)
            self._count("error" in record)
            if self._useless_failure is not None:
                raise self._useless_failure

    def _count(self, failed: bool) -> None:
        state, budget = self._state, self._budget
        state.failed += failed
        state.done += not failed
        state.calls = budget.calls
        state.tokens_in, state.tokens_out = budget.tokens_in, budget.tokens_out
        state.cost, state.concurrency = budget.cost, int(self._throttle.limit)
        if self._watch:
            self._watch(state)

    def _judge(self, reply: Reply) -> None:
        """Counts useless replies. Too many in a row end the stage, once this one is stored."""
        problem = why_useless(reply, self._is_useful)
        if problem is None:
            self._useless, self._useful = 0, True
            return
        self._useless += 1
        if self._useless >= (MAX_USELESS if self._useful else MAX_USELESS_FIRST):
            self._useless_failure = Failure(
                "fatal", f"{self._useless} replies in a row are useless: {problem}"
            )

    async def _until_replied(self, request: Request) -> dict[str, Any] | None:
        """The record of a reply, or of the failure that remained.

        None when a limit allows no further call.
        """
        record: dict[str, Any] = {
            "key": request.key,
            "chunk": request.chunk_id,
            "model": request.model,
        }
        broken = refused = 0
        while True:
            outcome, stopped = await self._call(request)
            if stopped:
                self._state.stopped = self._state.stopped or stopped
                calls = broken + refused
                error = f"stopped by {stopped}"
                return {**record, "error": error, "calls": calls} if calls else None
            if isinstance(outcome, Reply):
                self._judge(outcome)
                return reply_record(request, outcome, broken + refused + 1)
            assert outcome is not None
            if outcome.kind == "fatal":
                raise outcome
            if (outcome.retry_after or 0.0) > MAX_WAIT:
                raise Failure(
                    "fatal",
                    f"the server asks to come back in {outcome.retry_after:.0f} s ({outcome})",
                )
            refused += outcome.kind == "busy"
            broken += outcome.kind != "busy"
            if outcome.kind == "wrong" or broken >= MAX_BROKEN or refused >= MAX_REFUSALS:
                return {**record, "error": str(outcome), "calls": broken + refused}
            await asyncio.sleep(delay(broken + refused - 1, outcome))

    async def _call(self, request: Request) -> tuple[Reply | Failure | None, str | None]:
        """(the outcome of one call, None), or (None, the limit that forbade it)."""
        async with self._throttle.slot():
            if self._useless_failure is not None:
                raise self._useless_failure
            reserved = request.tokens_in, request.max_tokens
            if stopped := await self._budget.reserve(*reserved):
                return None, stopped
            outcome: Reply | Failure | None = None
            try:
                outcome = await self._backend.complete(request)
            except Failure as failure:
                outcome = failure
            finally:
                used = (0, 0)
                if isinstance(outcome, Reply):
                    used = outcome.tokens_in, outcome.tokens_out
                await self._budget.settle(reserved, used)
            self._throttle.record(None if isinstance(outcome, Reply) else outcome)
        return outcome, None


def reply_record(request: Request | Sent, reply: Reply, calls: int) -> dict[str, Any]:
    """What the store keeps of a reply.

    An empty reply is an error, so that the next start requests it again.
    """
    empty = _why_empty(reply)
    return {
        "key": request.key,
        "chunk": request.chunk_id,
        "model": request.model,
        **({"error": empty} if empty else {"text": reply.text}),
        "finish": reply.finish,
        "calls": calls,
        "tokens_in": reply.tokens_in,
        "tokens_out": reply.tokens_out,
    }


def why_useless(reply: Reply, is_useful: IsUseful) -> str | None:
    """Why a reply does not hold what was asked for; None if it does."""
    if empty := _why_empty(reply):
        return empty
    return None if is_useful(reply.text) else f"nothing usable in the reply {reply.text[:80]!r}"


def _why_empty(reply: Reply) -> str | None:
    if strip_reasoning(reply.text):
        return None
    if reply.finish != "length":
        return f"empty reply ({reply.finish})"
    return (
        f"empty reply (length): the model spent its {reply.tokens_out} tokens before any text, "
        "most likely on reasoning; raise --llm-reply-tokens, or turn reasoning off with --llm-extra"
    )
