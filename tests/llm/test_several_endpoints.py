"""Several endpoints share the requests, and outlive one another."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from reply_files import accepted, records

from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import CallProgress, generate_queries, probe, send
from refine_fast.pipeline.queries.llm.throttle import Throttle
from refine_fast.pipeline.queries.llm.trial import try_models

Endpoint = Any  # conftest's


@pytest.fixture
def endpoints(
    serve: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Endpoint]]:
    """Two servers; the pauses of the circuit are short."""
    monkeypatch.setattr(
        send, "Throttle", lambda ceiling, **options: Throttle(ceiling, pause=0.01, **options)
    )
    with ExitStack() as stack:
        yield [stack.enter_context(serve()) for _ in range(2)]


def both(endpoints: list[Endpoint], **changes: Any) -> Any:
    return endpoints[0].settings(url=",".join(each.url for each in endpoints), **changes)


def replies(store: Path) -> dict[str, str]:
    """Key -> text of the reply."""
    return {record["key"]: record["text"] for record in records(store) if "text" in record}


def test_they_share_the_calls_and_write_what_one_writes(
    endpoints: list[Endpoint], chunks: list[Chunk], tmp_path: Path
) -> None:
    """Each within its own limit."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    alone, _ = generate_queries(chunks, endpoints[0].settings(concurrency=8), one)
    before = endpoints[0].stats()["served"]
    for each, kinds in zip(endpoints, (["429", "500"], ["drop", "half"]), strict=True):
        each.set(latency=0.02, faults=0.2, kinds=kinds)
    seen: list[CallProgress] = []
    queries, account = generate_queries(
        chunks, both(endpoints, concurrency=8), two, watch=seen.append
    )
    assert queries == alone
    assert replies(two) == replies(one)
    assert accepted(two) == {chunk.id: 1 for chunk in chunks}
    served = [each.stats()["served"] for each in endpoints]
    assert served[0] - before + served[1] == len(chunks)
    assert min(served[0] - before, served[1]) > 10
    assert max(each.stats()["peak"] for each in endpoints) <= 8 + 1
    assert account.calls == sum(record["calls"] for record in records(two))


@pytest.mark.parametrize(
    ("fault", "left_out"),
    [
        ({"status": 401}, True),
        ({"status": 404}, True),
        ({"reply": "I cannot help with that."}, True),
        # each request may have moved on before the endpoint is declared dead
        ({"faults": 1.0, "kinds": ["500"]}, None),
        ({"faults": 1.0, "kinds": ["drop"]}, None),
    ],
    ids=["401", "404", "useless", "500", "drop"],
)
def test_one_that_dies_is_left_out_and_its_requests_go_to_the_other(
    endpoints: list[Endpoint],
    chunks: list[Chunk],
    tmp_path: Path,
    fault: dict[str, Any],
    left_out: bool | None,
) -> None:
    """In mid-run: after a third of the replies."""
    store = tmp_path / "replies.jsonl"
    for each in endpoints:
        each.set(latency=0.02)
    first = endpoints[0]
    failing = threading.Event()

    def watch(state: CallProgress) -> None:
        if state.done >= 40 and not failing.is_set():
            failing.set()
            first.set(**fault)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RefineFastWarning)
        queries, account = generate_queries(
            chunks, both(endpoints, concurrency=4), store, watch=watch
        )
    messages = [str(each.message) for each in said if each.category is RefineFastWarning]
    assert all(message.startswith(f"llm: {first.url} is left out (") for message in messages)
    assert len(messages) == 1 or (left_out is None and not messages)
    assert accepted(store) == {chunk.id: 1 for chunk in chunks}
    assert account.failed == 0
    if "reply" not in fault:  # a useless reply is a reply, as it is from one endpoint
        assert {query.chunk_id for query in queries} == {chunk.id for chunk in chunks}


def test_one_that_is_not_there_loses_nothing(
    endpoints: list[Endpoint], chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    settings = endpoints[1].settings(url=f"http://127.0.0.1:9/v1,{endpoints[1].url}")
    with pytest.warns(RefineFastWarning, match="127.0.0.1:9/v1 is left out"):
        _, account = generate_queries(chunks[:30], settings, store)
    assert accepted(store) == {chunk.id: 1 for chunk in chunks[:30]}
    assert account.failed == 0


@pytest.mark.parametrize("refusing", [1, 2])
def test_a_request_that_is_refused_is_tried_at_the_other(
    endpoints: list[Endpoint], chunks: list[Chunk], tmp_path: Path, refusing: int
) -> None:
    """Such as a passage that is too long for its context. The endpoint stays; what both refuse is
    given up until the next start."""
    store = tmp_path / "replies.jsonl"
    for each in endpoints:
        each.set(latency=0.02)
    told = threading.Event()

    def watch(state: CallProgress) -> None:
        if state.done >= 20 and not told.is_set():
            told.set()
            for each in endpoints[:refusing]:
                each.set(status=400)

    _, account = generate_queries(chunks[:60], both(endpoints, concurrency=2), store, watch=watch)
    given_up = [record for record in records(store) if "error" in record]
    assert account.replied + len(given_up) == 60
    assert account.failed == len(given_up)
    assert bool(given_up) == (refusing == 2)
    assert all(record["calls"] == 2 for record in given_up)


def test_when_all_die_the_stage_ends_and_resumes(
    endpoints: list[Endpoint], chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    for each in endpoints:
        each.set(status=401)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RefineFastError, match=r"stopped asking .*,.*: HTTP 401"):
            generate_queries(chunks[:20], both(endpoints), store)
    for each in endpoints:
        each.set(status=200)
    _, account = generate_queries(chunks[:20], both(endpoints), store)
    assert account.replied == 20


def test_a_limit_counts_all_endpoints(
    endpoints: list[Endpoint], chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    _, account = generate_queries(chunks, both(endpoints, max_calls=25), store)
    assert account.stopped == "max_calls"
    assert account.calls == sum(sum(each.stats()["calls"].values()) for each in endpoints) == 25


def test_each_endpoint_is_probed(endpoints: list[Endpoint]) -> None:
    endpoints[1].set(status=401)
    first, second = probe(both(endpoints))
    assert first.problem is None
    assert second.problem is not None
    assert "401" in second.problem


def test_one_that_works_is_enough_to_start(endpoints: list[Endpoint], tmp_path: Path) -> None:
    endpoints[0].set(status=401)
    try_models(both(endpoints), tmp_path / "some.jsonl")
    assert len(accepted(tmp_path / "some.jsonl")) == 1
    endpoints[1].set(status=401)
    with pytest.raises(RefineFastError, match=f"tiny at {endpoints[0].url} writes no queries"):
        try_models(both(endpoints), tmp_path / "none.jsonl")


def test_what_is_no_list_of_endpoints_is_refused(endpoints: list[Endpoint]) -> None:
    url = endpoints[0].url
    with pytest.raises(RefineFastError, match="several of them separated by commas"):
        endpoints[0].settings(url=f"{url},smollm2")
    with pytest.raises(RefineFastError, match="names an endpoint twice"):
        endpoints[0].settings(url=f"{url}, {url}")
