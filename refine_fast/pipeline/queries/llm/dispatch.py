"""Sends requests to one or more endpoints until each has a reply on disk.

Ends early when a limit is reached. An endpoint that is declared dead, or whose replies are of no
use, is left out, and the others take its requests; the last one ends the stage.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....errors import RefineFastWarning
from .budget import Budget
from .reply_log import ReplyStore, is_failure
from .reply_parser import strip_reasoning
from .request import Backend, Failure, Reply, Request, Sent
from .throttle import MAX_TRIES, MAX_WAIT, Throttle, delay

MAX_USELESS_FIRST, MAX_USELESS = 8, 30
"""The stage stops after this many useless replies in a row: before the first useful one of this
start, and later. A model that spends every reply on reasoning is found before all are paid."""


@dataclass
class CallProgress:
    """Progress counters. The rate is that of this start."""

    total: int
    done: int
    """Replies, ``reused`` of which were there before."""
    reused: int
    failed: int = 0
    rejected: int = 0
    """Of those failed, the requests that cannot succeed."""
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

    def count(self, record: Mapping[str, Any], budget: Budget) -> None:
        """Counts a request by its record in the store, and what was spent so far."""
        self.failed += is_failure(record)
        self.rejected += record.get("rejected", False)
        self.done += "error" not in record
        self.calls, self.cost = budget.calls, budget.cost
        self.tokens_in, self.tokens_out = budget.tokens_in, budget.tokens_out


Watch = Callable[[CallProgress], None]

IsUseful = Callable[[str], bool]
"""Whether the text of a reply holds what was asked for."""


@dataclass(frozen=True)
class Endpoint:
    """Who answers, and how many calls at a time it takes."""

    name: str
    backend: Backend
    throttle: Throttle


@dataclass
class _Task:
    """A request on its way to a reply."""

    request: Request
    calls: int = 0
    """Made for it so far, at all endpoints."""
    late: int = 0
    """Of those, the ones whose reply did not come in time."""
    tried: set[str] = field(default_factory=set)
    """Endpoints that did not answer it."""
    error: str = ""
    """Of its last call."""

    @property
    def lost(self) -> tuple[int, int]:
        """Tokens in and out that the late calls took at most: they may be paid all the same."""
        return self.late * self.request.tokens_in, self.late * self.request.max_tokens


class _Tasks:
    """The requests that nobody works on yet: those given back first, then the stream."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._stream = iter(requests)
        self.returned: list[_Task] = []

    def take(self, name: str) -> _Task | None:
        """The next task that the endpoint has not tried; None if there is none now."""
        for i, task in enumerate(self.returned):
            if name not in task.tried:
                return self.returned.pop(i)
        request = next(self._stream, None)
        return None if request is None else _Task(request)

    def give_back(self, task: _Task, name: str, error: str) -> None:
        """Leaves the task to the other endpoints."""
        task.tried.add(name)
        task.error = error
        self.returned.append(task)

    def remain_for(self, names: Iterable[str]) -> bool:
        """Whether one of the endpoints could still take a task that was given back."""
        return any(name not in task.tried for name in names for task in self.returned)


async def ask(
    requests: Iterable[Request],
    state: CallProgress,
    endpoints: Sequence[Endpoint],
    store: ReplyStore,
    budget: Budget,
    is_useful: IsUseful,
    watch: Watch | None = None,
) -> None:
    """Draws requests as they are needed and puts every reply into the store.

    Returns when there are no more requests, or when a limit stops the stage; ``state`` then names
    it.

    Raises:
        Failure: a fatal one, when no request can succeed or the replies are useless, at the last
            endpoint that was left. Every reply so far is in the store, and what late calls may have
            cost; after any other error, the replies alone.
    """
    tasks = _Tasks(requests)
    live: dict[str, _Dispatcher] = {}
    for endpoint in endpoints:
        live[endpoint.name] = _Dispatcher(
            endpoint, tasks, live, state, store, budget, is_useful, watch
        )
    try:
        # A dead endpoint's requests may come back when the others have nothing left to do.
        while not state.stopped:
            await _together([dispatcher.run() for dispatcher in live.values()])
            if not tasks.remain_for(live):
                break
        for task in tasks.returned:
            record = _limit_record(task, state.stopped) if state.stopped else _failure_record(task)
            await next(iter(live.values())).put(record)
    except Failure:
        for task in tasks.returned:
            if task.late:  # what it may have cost counts
                await store.append(_failure_record(task))
        raise
    finally:
        await store.drain()


async def _together(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Waits for all jobs. If one fails, the others are cancelled."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Dispatcher:
    """What the workers of one endpoint share."""

    def __init__(
        self,
        endpoint: Endpoint,
        tasks: _Tasks,
        live: dict[str, _Dispatcher],
        state: CallProgress,
        store: ReplyStore,
        budget: Budget,
        is_useful: IsUseful,
        watch: Watch | None,
    ) -> None:
        self._name = endpoint.name
        self._backend = endpoint.backend
        self.throttle = endpoint.throttle
        self._tasks = tasks
        self._live = live
        self._state = state
        self._store = store
        self._budget = budget
        self._is_useful = is_useful
        self._watch = watch
        self._useless = 0  # replies in a row
        self._useful = False
        self._useless_failure: Failure | None = None

    async def run(self) -> None:
        """Works until there are no tasks or the stage is stopped. A fatal failure takes this
        endpoint out.

        Raises:
            Failure: the fatal one, if no other endpoint is left.
        """
        # Calls that wait for a Retry-After hold a worker but no slot: three per slot keep all busy.
        try:
            await _together([self._work() for _ in range(3 * self.throttle.ceiling)])
        except Failure as failure:
            if len(self._live) == 1:
                raise
            del self._live[self._name]
            warnings.warn(
                f"llm: {self._name} is left out ({failure}); the other endpoints take its requests",
                RefineFastWarning,
                stacklevel=2,
            )

    async def _work(self) -> None:
        while not self._state.stopped and (task := self._tasks.take(self._name)) is not None:
            try:
                record = await self._until_replied(task)
            except BaseException as error:  # the endpoint is dead, as this or another call found
                self._tasks.give_back(task, self._name, str(error) or task.error)
                raise
            if record is None:
                return
            if "error" in record and not self._state.stopped and self._others_may_try(task):
                self._tasks.give_back(task, self._name, record["error"])
                continue
            await asyncio.shield(self.put(record))
            if self._useless_failure is not None:
                raise self._useless_failure

    def _others_may_try(self, task: _Task) -> bool:
        return bool(self._live.keys() - task.tried - {self._name})

    async def put(self, record: dict[str, Any]) -> None:
        """Stores and counts a record."""
        await self._store.append(record)
        self._state.count(record, self._budget)
        self._state.concurrency = sum(int(each.throttle.limit) for each in self._live.values())
        if self._watch:
            self._watch(self._state)

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

    async def _until_replied(self, task: _Task) -> dict[str, Any] | None:
        """The record of a reply, or of the failure that remained.

        None when a limit allows no further call.
        """
        failures: Counter[str] = Counter()
        while True:
            outcome, stopped = await self._call(task.request)
            if stopped:
                self._state.stopped = self._state.stopped or stopped
                return _limit_record(task, stopped) if task.calls else None
            task.calls += 1
            if isinstance(outcome, Reply):
                self._judge(outcome)
                return reply_record(task.request, outcome, task.calls, task.lost)
            assert outcome is not None
            if outcome.kind == "fatal":
                raise outcome
            if (outcome.retry_after or 0.0) > MAX_WAIT:
                raise Failure(
                    "fatal",
                    f"the server asks to come back in {outcome.retry_after:.0f} s ({outcome})",
                )
            task.late += outcome.kind == "late"
            task.error = str(outcome)
            failures[outcome.kind] += 1
            if failures[outcome.kind] >= MAX_TRIES[outcome.kind]:
                record = _failure_record(task)
                return record | ({"rejected": True} if outcome.kind == "wrong" else {})
            await asyncio.sleep(delay(failures.total() - 1, outcome))

    async def _call(self, request: Request) -> tuple[Reply | Failure | None, str | None]:
        """(the outcome of one call, None), or (None, the limit that forbade it)."""
        async with self.throttle.slot():
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
                elif outcome is not None and outcome.kind == "late":
                    used = reserved
                await self._budget.settle(reserved, used)
            self.throttle.record(None if isinstance(outcome, Reply) else outcome)
        return outcome, None


def _failure_record(task: _Task) -> dict[str, Any]:
    return failure_record(task.request, task.error, task.calls, task.lost)


def _limit_record(task: _Task, limit: str) -> dict[str, Any]:
    """Of a request that failed and whose next try a limit forbids."""
    record = failure_record(task.request, f"stopped by {limit}", task.calls, task.lost)
    return record | {"limit": limit}


def failure_record(
    request: Request | Sent, error: str, calls: int = 1, lost: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """What the store keeps of a request without a reply.

    ``lost``: tokens in and out of calls whose reply did not come in time.
    """
    return {
        "key": request.key,
        "chunk": request.chunk_id,
        "model": request.model,
        "error": error,
        "calls": calls,
        "tokens_in": lost[0],
        "tokens_out": lost[1],
    }


def reply_record(
    request: Request | Sent, reply: Reply, calls: int, lost: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """What the store keeps of a reply, and of late calls before it.

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
        "tokens_in": reply.tokens_in + lost[0],
        "tokens_out": reply.tokens_out + lost[1],
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
