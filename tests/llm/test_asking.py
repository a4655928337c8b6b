"""The whole stage over HTTP, against a server that misbehaves."""

import asyncio
import concurrent.futures
import json
import logging
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import fork_script
from reply_files import accepted, records

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import (
    CallProgress,
    default_prompt,
    estimate,
    generate_queries,
    probe,
)

Endpoint = Any  # conftest's


def test_one_reply_a_chunk_whatever_happens_on_the_way(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    endpoint.set(faults=0.3, latency=0.01, kinds=["429", "500", "503", "drop", "half", "garbage"])
    store = tmp_path / "replies.jsonl"
    queries, account = generate_queries(chunks, endpoint.settings(concurrency=16), store)
    stats = endpoint.stats()
    assert accepted(store) == {chunk.id: 1 for chunk in chunks}
    assert stats["served"] == stats["distinct"] == account.replied == len(chunks)
    assert account.calls == sum(stats["calls"].values())
    assert stats["peak"] <= 16 + 1  # and this look at the statistics
    assert [query.chunk_id for query in queries] == [chunk.id for chunk in chunks]
    assert {query.kind for query in queries} == {"llm:question"}


@pytest.mark.parametrize("kind", ["429", "500", "503", "drop", "half", "garbage", "stall"])
def test_each_fault_is_outlived(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, kind: str
) -> None:
    endpoint.set(faults=0.3, kinds=[kind], once=kind == "stall")  # a third one would be the last
    # A stalled call is given up after a second; a slow one may be too, and is repeated.
    settings = endpoint.settings(concurrency=8, **({"timeout": 1.0} if kind == "stall" else {}))
    _, account = generate_queries(chunks[:30], settings, tmp_path / "replies.jsonl")
    assert account.replied == 30
    assert endpoint.stats()["calls"][kind] > 0


def test_a_second_start_asks_only_for_what_is_new(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store, prompt = tmp_path / "replies.jsonl", tmp_path / "mine.jinja"
    some = chunks[:20]
    generate_queries(some[:15], endpoint.settings(), store)
    queries, account = generate_queries(some, endpoint.settings(), store)
    assert (account.replied, account.reused, endpoint.stats()["served"]) == (20, 15, 20)
    prompt.write_text(default_prompt().replace("Ask about different facts.", "Ask about numbers."))
    changed = generate_queries(some, endpoint.settings(prompt=prompt), store)[1]
    assert (changed.reused, endpoint.stats()["served"]) == (0, 40)
    other = generate_queries(some, endpoint.settings(models=("other",)), store)[1]
    assert (other.reused, endpoint.stats()["served"]) == (0, 60)
    again, back = generate_queries(some, endpoint.settings(), store)
    assert (back.reused, endpoint.stats()["served"]) == (20, 60)
    assert again == queries


def test_two_models_share_the_chunks(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    generate_queries(chunks, endpoint.settings(models=("small", "large")), store)
    share = Counter(record["model"] for record in records(store))
    assert share.keys() == {"small", "large"}
    assert min(share.values()) > 40


def test_failures_are_recorded_and_asked_again_by_the_next_start(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    endpoint.set(reply=" ")
    with pytest.raises(RefineFastError, match=r"no chunk got a reply.*empty reply"):
        generate_queries(chunks[:5], endpoint.settings(), store)
    assert {record["error"] for record in records(store)} == {"empty reply (stop)"}
    endpoint.set(reply="")
    _, account = generate_queries(chunks[:5], endpoint.settings(), store)
    assert (account.replied, account.failures, account.calls) == (5, {}, 10)


@pytest.mark.parametrize(
    ("limit", "reason", "replies"),
    [
        ({"max_calls": 7}, "max_calls", 7),
        ({"max_tokens": 12_000}, "max_tokens", None),
        ({"max_cost": 0.012}, "max_cost", None),
    ],
)
def test_a_limit_stops_cleanly_and_a_repeated_command_spends_no_more(
    endpoint: Endpoint,
    chunks: list[Chunk],
    tmp_path: Path,
    limit: dict[str, Any],
    reason: str,
    replies: int | None,
) -> None:
    store = tmp_path / "replies.jsonl"
    settings = endpoint.settings(price_in=1.0, price_out=1.0, **limit)
    queries, account = generate_queries(chunks, settings, store)
    assert account.stopped == reason
    assert len(queries) == account.replied == (replies or account.replied)
    assert 0 < account.replied < len(chunks)
    assert account.tokens_in + account.tokens_out <= 12_000
    _, again = generate_queries(chunks, settings, store)
    assert (again.calls, again.reused, again.stopped) == (account.calls, account.replied, reason)
    assert len({query.chunk_id[:-1] for query in queries}) >= min(
        7, len(queries)
    )  # spread over the documents, ten chunks each


@pytest.mark.parametrize("told", ["12", -12, None, [1]])
def test_a_server_that_miscounts_tokens(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, told: Any
) -> None:
    """Its replies count at their estimate, or a limit would mean nothing."""
    endpoint.set(usage={"prompt_tokens": told, "completion_tokens": told})
    _, account = generate_queries(chunks[:5], endpoint.settings(), tmp_path / "replies.jsonl")
    assert (
        account.tokens_in
        == estimate(chunks[:5], endpoint.settings(), tmp_path / "none.jsonl").tokens_in
    )
    assert account.tokens_out > 5 * 10


def test_the_estimate_holds(endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    settings = endpoint.settings(price_in=1.0, price_out=2.0)
    plan = estimate(chunks, settings, store)
    assert endpoint.stats()["served"] == 0
    _, account = generate_queries(chunks, settings, store)
    assert plan.calls == account.calls == len(chunks)
    assert account.cost <= plan.cost_most
    assert plan.cost == pytest.approx((plan.tokens_in + 2 * plan.tokens_out) / 1e6)
    assert estimate(chunks, settings, store).calls == 0


def test_the_estimate_says_where_a_limit_stops(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    prices = {"price_in": 1.0, "price_out": 2.0}
    generate_queries(chunks[:20], endpoint.settings(**prices), store)
    plan = estimate(chunks, endpoint.settings(**prices), store)
    assert (plan.calls, plan.stops_after) == (100, None)
    assert estimate(chunks, endpoint.settings(max_calls=50), store).stops_after == 30
    assert estimate(chunks, endpoint.settings(max_calls=10), store).stops_after == 0
    assert estimate(chunks, endpoint.settings(max_calls=500), store).stops_after is None
    spent = generate_queries(chunks[:20], endpoint.settings(**prices), store)[1]
    half = estimate(chunks, endpoint.settings(**prices, max_cost=spent.cost + plan.cost / 2), store)
    assert half.stops_after in (49, 50)
    most = spent.tokens_in + spent.tokens_out + (plan.tokens_in + plan.tokens_out) // 2
    assert estimate(chunks, endpoint.settings(max_tokens=most), store).stops_after in (49, 50)


def test_the_prompts_own_examples_are_no_queries(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """Weak models answer with them, whatever the passage."""
    example = next(
        line
        for line in default_prompt().splitlines()
        if line.startswith('{"queries": [{"kind": "question"')
    )
    endpoint.set(reply=example)
    _, account = generate_queries(chunks[:2], endpoint.settings(), tmp_path / "replies.jsonl")
    assert (account.kept, account.dropped) == (0, {"copy of the prompt": 2 * 4})


def test_nobody_listens(chunks: list[Chunk], tmp_path: Path, endpoint: Endpoint) -> None:
    with pytest.raises(RefineFastError, match="the connection failed"):
        generate_queries(
            chunks[:3], endpoint.settings(url="http://127.0.0.1:9/v1"), tmp_path / "replies.jsonl"
        )


def test_the_key_stays_secret(
    endpoint: Endpoint,
    chunks: list[Chunk],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that echoes the key in its errors; every log at its most talkative."""
    key = f"sk-{uuid.uuid4().hex}"
    monkeypatch.setenv("MY_KEY", key)
    caplog.set_level(logging.DEBUG)
    settings = endpoint.settings(key_env="MY_KEY")
    queries, account = generate_queries(chunks[:3], settings, tmp_path / "replies.jsonl")
    assert endpoint.stats()["served"] == 3
    endpoint.set(status=401)
    with pytest.raises(RefineFastError, match=r"Bearer \*\*\*") as caught:
        generate_queries(chunks, settings, tmp_path / "replies.jsonl")
    reports = probe(settings)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    trace = "".join(traceback.format_exception(caught.value))
    for text in (
        repr(settings),
        repr(queries),
        repr(account),
        trace,
        repr(reports),
        written,
        caplog.text,
    ):
        assert key not in text


def test_a_placeholder_for_a_key_leaves_replies_as_they_are(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "test")
    endpoint.set(reply="1. How do I test the crane?")
    settings = endpoint.settings(key_env="MY_KEY")
    queries, _ = generate_queries(chunks[:1], settings, tmp_path / "replies.jsonl")
    assert [query.text for query in queries] == ["How do I test the crane?"]


def test_half_a_surrogate_pair_in_a_servers_body_is_paid_once(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    endpoint.set(reply="1. How long is the \ud83d quay?")
    queries, account = generate_queries(chunks[:1], endpoint.settings(), tmp_path / "replies.jsonl")
    assert [query.text for query in queries] == ["How long is the \ufffd quay?"]
    assert account.calls == endpoint.stats()["served"] == 1


def test_judge_and_round_trip(endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path) -> None:
    some = chunks[:20]
    endpoint.set(
        reply=json.dumps([f"How long is the {n} quay?" for n in ("first", "second", "third")])
    )
    unit = np.eye(32, dtype=np.float32)

    def encode(texts: list[str], role: str) -> np.ndarray:
        """Every query lies nearest to chunk 3."""
        return (
            unit[: len(texts)] if role == "document" else np.repeat(unit[3:4], len(texts), axis=0)
        )

    queries, account = generate_queries(
        some,
        endpoint.settings(mix={"question": 1}, round_trip=1),
        tmp_path / "a.jsonl",
        encode=encode,
    )
    assert account.dropped == {"exact duplicate": 57, "not found in the top 1": 3}
    assert queries == []
    endpoint.set(reply="")
    queries, account = generate_queries(some, endpoint.settings(judge=True), tmp_path / "b.jsonl")
    assert (len(queries), account.calls, account.dropped, account.unjudged) == (20, 40, {}, 0)
    endpoint.set(flagged="Queries:", flag={"message": "your input was flagged"})
    refused = endpoint.settings(judge=True, models=("strict",))
    account = generate_queries(some, refused, tmp_path / "d.jsonl")[1]
    assert (account.replied, account.failed, account.rejected, account.unjudged) == (20,) * 4
    endpoint.set(verdict=[], flagged="")
    asked = generate_queries(
        some, endpoint.settings(judge=True, models=("other",)), tmp_path / "b.jsonl"
    )[1]
    assert asked.kept == 0


@pytest.mark.parametrize(("duplicates", "kept"), [("near", 1), ("exact", 2), ("keep", 6)])
def test_duplicates_are_dropped_as_asked(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, duplicates: Any, kept: int
) -> None:
    long = (
        "In which year was the old lighthouse of the harbour at Stettin lit for the first time "
        "by its keeper"
    )
    endpoint.set(reply=json.dumps([f"{long}?", f"{long}, please?"]))
    settings = endpoint.settings(duplicates=duplicates)
    assert generate_queries(chunks[:3], settings, tmp_path / "replies.jsonl")[1].kept == kept


def test_progress_is_told(endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(state: CallProgress) -> None:
        seen.append((state.done, state.tokens_in))

    generate_queries(chunks, endpoint.settings(), tmp_path / "replies.jsonl", watch=watch)
    assert [done for done, _ in seen] == list(range(1, len(chunks) + 1))
    assert seen[0][1] < seen[-1][1]


STAGE = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import make_chunks
from refine_fast.pipeline.queries.llm import LLMSettings, generate_queries
settings = LLMSettings(sys.argv[2], ("tiny",), {"question": 1}, 4, concurrency=32)
generate_queries(make_chunks(int(sys.argv[4])), settings, Path(sys.argv[3]))
"""


def test_kill_9_loses_and_repeats_only_what_was_in_flight(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.set(faults=0.2, latency=0.1, kinds=["429", "500", "503", "drop", "half", "garbage"])
    store, count, kills = tmp_path / "replies.jsonl", 160, 2
    stage = [STAGE, str(Path(__file__).parent), endpoint.url, str(store), str(count)]
    for kill in range(1, kills + 1):
        process = fork_script(*stage)
        _wait(
            lambda kill=kill: (
                store.exists() and store.read_bytes().count(b"\n") >= kill * count // 4
            )
        )
        process.kill()
        process.join()
    process = fork_script(*stage)
    process.join(300)
    assert process.exitcode == 0
    stats = endpoint.stats()
    assert accepted(store) == {f"c{i}": 1 for i in range(count)}
    assert stats["distinct"] == count
    assert stats["served"] - count <= kills * 32


def _wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_inside_a_running_event_loop(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """As in a notebook, where asyncio.run is refused."""
    store = tmp_path / "replies.jsonl"

    async def cell() -> tuple[int, bool]:
        account = generate_queries(chunks[:5], endpoint.settings(judge=True), store)[1]
        return account.replied, probe(endpoint.settings())[0].reachable

    assert asyncio.run(cell()) == (5, True)
    assert not [thread for thread in threading.enumerate() if thread.name == "llm"]


def test_an_interrupt_inside_a_running_event_loop_ends_the_calls(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "replies.jsonl"
    endpoint.set(hold_after=3)
    real = concurrent.futures.Future.result

    def interrupted(future: concurrent.futures.Future[Any], timeout: float | None = None) -> Any:
        if threading.current_thread() is threading.main_thread() and not future.done():
            monkeypatch.undo()
            _wait(lambda: store.exists() and store.read_bytes().count(b"\n") >= 3)
            raise KeyboardInterrupt
        return real(future, timeout)

    async def cell() -> None:
        generate_queries(chunks, endpoint.settings(concurrency=1), store)

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert len(accepted(store)) == 3
    assert not [thread for thread in threading.enumerate() if thread.name == "llm"]
