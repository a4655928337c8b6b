"""When to ask less, when again, when not at all; what may be spent; what survives."""

import asyncio
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.queries.llm.batch import _patiently
from refine_fast.pipeline.queries.llm.budget import Budget, Limits
from refine_fast.pipeline.queries.llm.http_backend import retry_after
from refine_fast.pipeline.queries.llm.reply_log import ReplyStore
from refine_fast.pipeline.queries.llm.request import Failure, Request
from refine_fast.pipeline.queries.llm.throttle import Throttle, delay
from refine_fast.pipeline.queries.llm.transformers_backend import LocalBackend

BUSY = Failure("busy", "HTTP 429", status=429)
BROKEN = Failure("broken", "HTTP 500")
LATE = Failure("late", "no reply within 1 s")


def feed(throttle: Throttle, *outcomes: Failure | None) -> None:
    async def run() -> None:
        for outcome in outcomes:
            throttle.record(outcome)

    asyncio.run(run())


def test_concurrency_doubles_up_to_the_ceiling() -> None:
    throttle = Throttle(64)
    limits = []
    for _ in range(6):
        feed(throttle, *[None] * max(16, int(throttle.limit)))
        limits.append(int(throttle.limit))
    assert limits == [8, 16, 32, 64, 64, 64]


def test_many_refusals_cut_it_and_few_do_not() -> None:
    throttle = Throttle(64)
    throttle.limit = 64.0
    feed(throttle, *[BUSY] * 6, *[None] * 58)
    assert throttle.limit == 64
    feed(throttle, *[BUSY] * 20, *[None] * 44)
    assert throttle.limit == 48
    feed(throttle, *[BUSY] * 8, *[None] * 40)  # between a tenth and a quarter: neither
    assert throttle.limit == 48
    feed(throttle, *[None] * 48)  # from now on in eighths
    assert throttle.limit == 54


def test_half_of_the_calls_failing_opens_the_circuit_for_as_long_as_the_server_says() -> None:
    async def run() -> tuple[float, float]:
        throttle = Throttle(8, pause=0.01)
        for outcome in [Failure("busy", "HTTP 429", 0.2, status=429), *[BROKEN] * 7, *[None] * 8]:
            throttle.record(outcome)
        start = asyncio.get_running_loop().time()
        async with throttle.slot():
            return asyncio.get_running_loop().time() - start, throttle.limit

    waited, limit = asyncio.run(run())
    assert waited >= 0.19
    assert limit == 2


@pytest.mark.parametrize(
    ("before", "openings"),
    [([], 3), ([LATE], 3), ([None], 12), ([BUSY], 12)],
    ids=["never answered", "never in time", "answered once", "refused once"],
)
def test_the_circuit_gives_up(before: list[Failure | None], openings: int) -> None:
    async def run() -> None:
        throttle = Throttle(8, pause=0.0)
        for outcome in before:
            throttle.record(outcome)
        for _ in range(16 * (openings + 1) - len(before) - 1):
            throttle.record(BROKEN)
        with pytest.raises(Failure, match="half of the calls fail") as failure:
            throttle.record(BROKEN)
        assert failure.value.kind == "fatal"

    asyncio.run(run())


def test_tries_go_by_the_kind_of_the_failure() -> None:
    calls: list[str] = []

    async def fail(kind: Any) -> None:
        calls.append(kind)
        raise Failure(kind, "no")

    for kind in ("broken", "late"):
        with pytest.raises(Failure, match="no"):
            asyncio.run(_patiently(lambda kind=kind: fail(kind), {"broken": 2}))
    assert calls == ["broken", "broken", "late"]


def test_a_window_of_late_calls_ends_no_server_that_was_busy() -> None:
    """Nor do answers of a gateway that waits for it in vain."""

    async def run() -> None:
        throttle = Throttle(8, pause=0.0)
        for outcome in [BUSY] * 64 + [LATE] * 16 + [BUSY] * 16:
            throttle.record(outcome)
        throttle = Throttle(8, pause=0.0)
        for _ in range(16 * 12):
            throttle.record(Failure("late", "HTTP 504", status=504))

    asyncio.run(run())


def test_a_server_that_hangs_after_it_answered_is_given_up_soon() -> None:
    async def run() -> None:
        throttle = Throttle(8, pause=0.0)
        for outcome in [None] * 16 + [LATE] * (16 * 4 - 1):
            throttle.record(outcome)
        with pytest.raises(Failure, match="half of the calls fail"):
            throttle.record(LATE)

    asyncio.run(run())


def test_slots_never_exceed_the_limit() -> None:
    async def run() -> int:
        throttle = Throttle(5)
        inside = peak = 0

        async def one() -> None:
            nonlocal inside, peak
            async with throttle.slot():
                inside += 1
                peak = max(peak, inside)
                await asyncio.sleep(0)
                inside -= 1
            throttle.record(None)

        await asyncio.gather(*[one() for _ in range(200)])
        return peak

    assert asyncio.run(run()) == 5


def test_slots_are_given_in_turn_and_none_is_lost_by_who_stops_waiting() -> None:
    """What a limit pays for is then the first part of the order of asking."""

    async def run() -> list[int]:
        throttle = Throttle(16)
        entered: list[int] = []

        async def one(i: int) -> None:
            async with throttle.slot():
                entered.append(i)
                for _ in range(1 + i % 3):
                    await asyncio.sleep(0)
            throttle.record(None)

        tasks = [asyncio.create_task(one(i)) for i in range(200)]
        while len(entered) < 100:
            await asyncio.sleep(0)
        for task in tasks[150:160]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return entered

    assert asyncio.run(run()) == [*range(150), *range(160, 200)]


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry-after": "3"}, 3, 3),
        ({"retry-after": "0.5"}, 0.5, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25, 0.25),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0, 0),
        ({"retry-after": "Fri, 31 Dec 2199 23:59:59 GMT"}, 1e9, 1e10),
        ({"retry-after": "-5"}, 0, 0),
    ],
)
def test_retry_after(headers: dict[str, str], low: float, high: float) -> None:
    seconds = retry_after(headers)
    assert seconds is not None
    assert low <= seconds <= high


def test_retry_after_absent_or_unreadable() -> None:
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None


def test_the_servers_wish_comes_before_our_own_waits() -> None:
    assert 7 <= delay(0, Failure("busy", "", 7.0)) <= 7.1
    assert 0.25 <= delay(0, BROKEN) <= 0.75
    assert 4 <= delay(4, Failure("busy", "", 0.0)) <= 12
    assert delay(50, BROKEN) <= 45


@pytest.mark.parametrize(
    ("limits", "calls", "reason"),
    [
        (Limits(calls=7), 7, "max_calls"),
        (Limits(tokens=1000), 6, "max_tokens"),
        (Limits(cost=0.002), 9, "max_cost"),
        (Limits(), 50, None),
    ],
)
def test_a_budget_is_never_passed(limits: Limits, calls: int, reason: str | None) -> None:
    """Calls that reserve 100 + 100 tokens and use 100 + 50, eight at a time; prices 1 and 2 per
    million."""

    async def run() -> tuple[Budget, set[str | None]]:
        budget = Budget(limits, 1.0, 2.0)
        gate = asyncio.Semaphore(8)

        async def one() -> str | None:
            async with gate:
                if stopped := await budget.reserve(100, 100):
                    return stopped
                await asyncio.sleep(0)
                await budget.settle((100, 100), (100, 50))
                return None

        return budget, set(await asyncio.gather(*[one() for _ in range(50)])) - {None}

    budget, reasons = asyncio.run(run())
    assert budget.calls == calls
    assert reasons == ({reason} - {None})
    assert limits.tokens is None or budget.tokens_in + budget.tokens_out <= limits.tokens
    assert limits.cost is None or budget.cost <= limits.cost


def record(key: str, **fields: object) -> dict[str, object]:
    reply = {
        "key": key,
        "chunk": key,
        "model": "m",
        "text": "über " + key,
        "finish": "stop",
        "calls": 1,
        "tokens_in": 3,
        "tokens_out": 2,
    }
    return {**reply, **fields}


def fill(path: Path, *records: dict[str, object]) -> None:
    async def run() -> None:
        with ReplyStore(path) as store:
            await asyncio.gather(*[store.append(item) for item in records])

    asyncio.run(run())


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    fill(path, *[record(str(i)) for i in range(500)])
    fill(path, record("x", calls=4))
    with ReplyStore(path) as store:
        assert len(store) == 501
        assert [r["text"] for r in store.replies(["7", "nobody", "x"])] == ["über 7", "über x"]
        assert (store.spent.calls, store.spent.tokens_in, store.spent.tokens_out) == (
            504,
            1503,
            1002,
        )


def test_appends_of_one_moment_share_an_fsync_and_none_returns_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, durable = os.fsync, []
    path = tmp_path / "replies.jsonl"

    def fsync(descriptor: int) -> None:
        real(descriptor)
        durable.append(path.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", fsync)

    async def run() -> None:
        with ReplyStore(path) as store:

            async def one(i: int) -> None:
                await store.append(record(str(i)))
                assert f'"key": "{i}"'.encode() in path.read_bytes()
                assert str(i) in store
                assert durable
                assert durable[-1] > i

            await asyncio.gather(*[one(i) for i in range(100)])

    asyncio.run(run())
    assert len(durable) <= 3


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk: it too cuts a line within."""
    path = tmp_path / "replies.jsonl"
    fill(path, record("a"))
    room = path.stat().st_size + 40
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def run() -> None:
        with ReplyStore(path) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            try:
                with pytest.raises(RefineFastError) as caught:
                    await store.append(record("b"))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            said = f"{path}: a reply cannot be written (File too large); free disk space and run"
            assert str(caught.value).startswith(said)
            await store.append(record("c"))

    asyncio.run(run())
    with ReplyStore(path) as store:
        assert [r["key"] for r in store.replies(["a", "b", "c"])] == ["a", "c"]


def test_a_full_disk_at_the_end_is_named_too(tmp_path: Path) -> None:
    """Nothing is left to be written when the file is closed, which would hide the sentence."""
    path = tmp_path / "replies.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def run() -> None:
        with ReplyStore(path) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
            await store.append(record("b"))

    try:
        with pytest.raises(RefineFastError, match="free disk space and run the same command again"):
            asyncio.run(run())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_spent_keeps_its_price(tmp_path: Path) -> None:
    """Under other prices, in a batch, and where it had none."""
    path = tmp_path / "replies.jsonl"

    async def run() -> None:
        with ReplyStore(path, (2.0, 4.0)) as store:
            await store.append(record("a", tokens_in=1_000_000, tokens_out=0))
            await store.append(record("b", tokens_in=0, tokens_out=1_000_000), share=0.5)
            assert store.spent.cost == 2 + 4 / 2
        with ReplyStore(path) as store:
            await store.append(record("c", tokens_in=1_000_000, tokens_out=0), share=0.5)
            assert store.spent.cost == 2 + 4 / 2

    asyncio.run(run())
    with ReplyStore(path, (20.0, 40.0)) as store:
        assert store.spent.cost == 2 + 4 / 2 + 20 / 2


def test_an_older_record_costs_the_share_that_the_settings_send(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    older = record("a", tokens_in=1_000_000, tokens_out=0)
    path.write_text(json.dumps(older) + "\n")
    with ReplyStore(path, (2.0, 4.0), share=0.5) as store:
        assert store.spent.cost == 1
        asyncio.run(store.append(record("b", tokens_in=1_000_000, tokens_out=0)))
        assert store.spent.cost == 1 + 2


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    fill(path, record("a"), record("b"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        with ReplyStore(path) as store:
            assert "a" in store
            assert "b" not in store
        assert path.read_bytes() == whole[:first]
    fill(path, record("c"))
    with ReplyStore(path) as store:
        assert [r["key"] for r in store.replies(["a", "b", "c"])] == ["a", "c"]


def test_a_failure_is_remembered_until_its_reply(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    fill(path, {"key": "a", "chunk": "a", "model": "m", "error": "HTTP 500", "calls": 5})
    with ReplyStore(path) as store:
        assert store.failures == {"a": "HTTP 500"}
        assert "a" not in store
    fill(path, record("a"))
    with ReplyStore(path) as store:
        assert store.failures == {}
        assert store.spent.calls == 6


def test_a_damaged_line_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    fill(path, record("a"))
    with (
        ReplyStore(path),
        pytest.raises(RefineFastError, match="another process is writing"),
        ReplyStore(path),
    ):
        pass
    path.write_text("no json\n" + json.dumps(record("b")) + "\n")
    with pytest.raises(RefineFastError, match=r"replies.jsonl:1 is damaged"), ReplyStore(path):
        pass


@pytest.mark.parametrize("error", [TypeError("a bug"), MemoryError(), RefineFastError("no")])
def test_any_error_of_a_model_in_process_reaches_its_callers(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """None waits for ever. The limit of time only guards against a hang."""

    def fail(*_: object) -> None:
        raise error

    async def ask() -> None:
        backend = LocalBackend()
        monkeypatch.setattr(backend, "_turn", fail)
        requests = [Request("c", "m", "", f"prompt {i}", {}, 16, None) for i in range(2)]
        replies = asyncio.gather(*map(backend.complete, requests), return_exceptions=True)
        assert await asyncio.wait_for(replies, 60) == [error, error]

    asyncio.run(ask())
