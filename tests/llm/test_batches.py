"""OpenAI's batch endpoint, and addresses as Azure and gateways have them, on a real server."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from batch_server import Server
from forked import fork_script
from reply_files import accepted

from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.preflight import try_language_model
from refine_fast.pipeline.queries.llm import (
    Candidates,
    LLMSettings,
    estimate,
    generate_queries,
    grade_passages,
)
from refine_fast.pipeline.queries.llm.coverage import spread
from refine_fast.pipeline.queries.llm.trial import try_models

KEY = "sk-secret-of-the-test"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("refine_fast.pipeline.queries.llm.batch.POLL_SECONDS", 0.01)
    monkeypatch.setattr("refine_fast.pipeline.queries.llm.batch.delay", lambda *_: 0.01)
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def settings(url: str, **changes: Any) -> LLMSettings:
    given = {"models": ("tiny",), "mix": {"question": 1.0}, "per_chunk": 1, "batch": True}
    return LLMSettings(url, **{**given, **changes})


def test_a_reply_a_chunk_in_one_batch(server: Server, chunks: list[Chunk], tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    priced = settings(server.root + "/v1", price_in=10.0, price_out=20.0)
    full = settings(server.root + "/v1", price_in=10.0, price_out=20.0, batch=False)
    assert estimate(chunks, priced, store).cost == estimate(chunks, full, store).cost / 2
    queries, account = generate_queries(chunks, priced, store)
    assert {query.chunk_id for query in queries} == {chunk.id for chunk in chunks}
    assert accepted(store) == {chunk.id: 1 for chunk in chunks}
    assert len(server.batches) == 1
    assert set(server.asked.values()) == {1}
    assert account.calls == len(chunks)
    # the first one is asked alone, at the full price
    spent = pytest.approx((len(chunks) - 1 + 2) * (100 * 10 + 20 * 20) / 1e6 / 2)
    assert account.cost == spent
    again, _ = generate_queries(chunks, priced, store)
    assert again == queries
    assert len(server.batches) == 1
    for later in (full, settings(server.root + "/v1", price_in=1.0, price_out=2.0)):
        assert generate_queries(chunks, later, store)[1].cost == spent


def test_what_was_paid_in_full_stays_so_in_batches(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    """Their limit counts it so, too."""
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    prices = {"price_in": 10.0, "price_out": 20.0}
    _, account = generate_queries(chunks[:60], settings(url, batch=False, **prices), store)
    _, rest = generate_queries(chunks[:60], settings(url, **prices), store)
    assert rest.cost == account.cost == pytest.approx(60 * (100 * 10 + 20 * 20) / 1e6)
    limited = settings(url, max_cost=account.cost, **prices)
    assert estimate(chunks, limited, store).stops_after == 0
    _, rest = generate_queries(chunks, limited, store)
    assert (rest.replied, rest.stopped, rest.calls) == (60, "max_cost", 60)


def test_grades_in_one_batch(server: Server, chunks: list[Chunk], tmp_path: Path) -> None:
    """The first query is asked alone, to find the form; the rest are in the batch."""
    asked = [Candidates(f"query {i}", (chunks[i], chunks[i + 1])) for i in range(9)]
    batched = settings(server.root + "/v1", price_in=10.0, price_out=20.0)
    grades, account = grade_passages(asked, batched, tmp_path / "replies.jsonl")
    assert {tuple(sorted(each)) for each in grades} == {(0, 3)}
    assert account.cost == pytest.approx((8 + 2) * (100 * 10 + 20 * 20) / 1e6 / 2)
    [batch] = server.batches.values()
    assert server.files[batch["input_file_id"]].count("\n") == 8


def test_each_model_has_its_own_batch(server: Server, chunks: list[Chunk], tmp_path: Path) -> None:
    two = settings(server.root + "/v1", models=("one", "two"))
    generate_queries(chunks, two, tmp_path / "replies.jsonl")
    files = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
    models = [{json.loads(line)["body"]["model"] for line in file.splitlines()} for file in files]
    assert sorted(map(list, models)) == [["one"], ["two"]]


CODE = """
import json, sys
from pathlib import Path
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import LLMSettings, generate_queries
chunks = [Chunk(*row) for row in json.loads(Path(sys.argv[2]).read_text())]
given = LLMSettings(sys.argv[1], ("tiny",), {"question": 1.0}, 1, batch=True)
generate_queries(chunks, given, Path(sys.argv[3]))
"""


def killed_while_the_batch_runs(server: Server, chunks: list[Chunk], tmp_path: Path) -> Path:
    """The store of a start that was killed."""
    server.finished = False
    rows = [[c.id, c.text, c.title, c.source, c.start, c.end] for c in chunks]
    (tmp_path / "chunks.json").write_text(json.dumps(rows))
    store = tmp_path / "replies.jsonl"
    url = server.root + "/v1"
    process = fork_script(CODE, url, str(tmp_path / "chunks.json"), str(store))
    journal = store.with_suffix(".batches.json")
    while not (journal.exists() and any(b["id"] for b in json.loads(journal.read_text()))):
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    server.finished = True
    return store


@pytest.mark.parametrize("batch", [True, False])
def test_a_kill_while_the_batch_runs_sends_nothing_twice(
    server: Server, chunks: list[Chunk], tmp_path: Path, batch: bool
) -> None:
    """Nor where the next start sends no batches, which is said."""
    store = killed_while_the_batch_runs(server, chunks, tmp_path)
    journal = store.with_suffix(".batches.json")
    again = settings(f"{server.root}/v1/chat/completions", batch=batch)
    said = rf"waiting for the batch .* delete {re.escape(str(journal))}\.$"
    waits = pytest.warns(RefineFastWarning, match=said)
    with nullcontext() if batch else waits:
        queries, _ = generate_queries(chunks, again, store)
    assert len({query.chunk_id for query in queries}) == len(chunks)
    assert len(server.batches) == 1
    assert set(server.asked.values()) == {1}
    assert json.loads(journal.read_text()) == []


def test_a_batch_at_another_url_is_not_paid_for_again(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    store = killed_while_the_batch_runs(server, chunks, tmp_path)
    own, other = server.root + "/v1", server.root + "/v2"
    said = f"batches.json: a batch of 119 requests is open at {own}; use --llm {own} until it is"
    for start in (
        generate_queries,
        lambda _, *rest: try_models(*rest),
        lambda _, *rest: try_language_model(*rest, keep=False),
    ):
        for batch in (True, False):
            with pytest.raises(RefineFastError, match=said):
                start(chunks, settings(other, batch=batch), store)
    with pytest.raises(RefineFastError, match=said):
        generate_queries(chunks, settings("transformers", batch=False), store)
    assert generate_queries(chunks, settings(own), store)[1].replied == len(chunks)
    assert set(server.asked.values()) == {1}
    generate_queries(chunks, settings(other), store)  # nothing is open any more


def test_verdicts_in_an_open_batch_are_not_asked_twice(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    generate_queries(chunks, settings(url), store)
    server.drop_created = True
    with pytest.raises(RefineFastError, match="the connection failed"):
        generate_queries(chunks, settings(url, judge=True), store)
    _, account = generate_queries(chunks, settings(url, judge=True), store)
    assert (account.unjudged, account.calls) == (0, 2 * len(chunks))
    assert len(server.batches) == 2


def test_a_batch_whose_id_was_never_told_is_found_by_its_name(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    server.drop_created = True
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    with pytest.raises(RefineFastError, match="the connection failed"):
        generate_queries(chunks, settings(url), store)
    _, account = generate_queries(chunks, settings(url), store)
    assert account.replied == len(chunks)
    assert len(server.batches) == 1
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("lost", ["batches", "files"])
def test_a_batch_that_the_server_has_no_more_is_sent_again(
    server: Server, chunks: list[Chunk], tmp_path: Path, lost: str
) -> None:
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    server.drop_created = True
    with pytest.raises(RefineFastError, match="the connection failed"):
        generate_queries(chunks, settings(url), store)
    journal = store.with_suffix(".batches.json")
    (entry,) = json.loads(journal.read_text())
    journal.write_text(json.dumps([entry | {"id": "batch-0"}]))
    if lost == "batches":
        server.batches = {"another": server.batches.pop("batch-0")}
    else:
        server.batches["batch-0"] |= {"status": "completed", "output_file_id": "gone"}
    with pytest.warns(RefineFastWarning, match="no longer has the batch batch-0"):
        _, account = generate_queries(chunks, settings(url), store)
    assert (account.replied, account.failed) == (len(chunks), 0)
    assert json.loads(journal.read_text()) == []


def test_batches_shrink_to_what_the_account_may_queue(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    server.most = 31
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    _, account = generate_queries(chunks, settings(url, max_calls=120), store)
    assert (account.replied, account.failed, account.calls) == (120, 0, 120)
    assert set(server.asked.values()) == {1}
    sizes = [server.files[b["input_file_id"]].count("\n") for b in server.batches.values()]
    assert sizes == [119, 59, 29, 29, 29, 29, 3]
    server.most = 0
    with pytest.raises(RefineFastError, match="failed: Enqueued token limit reached"):
        generate_queries(chunks[:5], settings(url, models=("other",)), store)


def test_the_first_request_is_rejected_for_good_too(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    server.wrong = {f"Harbour {i} " for i in spread(chunks[:3], seed=0)[:2]}
    store = tmp_path / "replies.jsonl"
    _, account = generate_queries(chunks[:3], settings(server.root + "/v1"), store)
    assert (account.replied, account.failed, account.rejected) == (1, 2, 2)
    assert not server.batches


def test_requests_that_fail_are_asked_again_by_the_next_start(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    server.wrong = {"Harbour 7 ", "Harbour 8 "}
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    _, account = generate_queries(chunks, settings(url), store)
    # as from a single call: no reason to run the stage again
    assert (account.replied, account.failed, account.rejected) == (len(chunks) - 2, 2, 2)
    assert account.failures == {"HTTP 400: content filter": 2}
    server.wrong = set()
    _, account = generate_queries(chunks, settings(url), store)
    assert account.replied == len(chunks)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line[:-20],
        lambda line: "[1]",
        lambda line: "{}",
        lambda line: line.replace(re.search(r'"body": (.*)}}', line)[1], '"busy"'),
        lambda line: line.replace(re.search(r'"body": (.*)}}', line)[1], "{}"),
        lambda line: line.replace(re.search(r'"response": (.*)}', line)[1], "null"),
    ],
)
def test_a_damaged_line_is_a_request_without_a_reply(
    server: Server, chunks: list[Chunk], tmp_path: Path, spoil: Callable[[str], str]
) -> None:
    """The next start asks it again."""
    store, batched, places = tmp_path / "replies.jsonl", settings(server.root + "/v1"), count()
    server.spoil = lambda line: line if next(places) else spoil(line)
    _, account = generate_queries(chunks, batched, store)
    assert account.replied == len(chunks) - 1
    server.spoil = str
    _, account = generate_queries(chunks, batched, store)
    assert account.replied == len(chunks)
    assert server.asked.total() == len(chunks) + 1


def test_what_an_open_batch_lacks_is_asked_again_and_counts_once(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    server.drop_created, server.wrong = True, {"Harbour 7 ", "Harbour 8 "}
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    with pytest.raises(RefineFastError, match="the connection failed"):
        generate_queries(chunks, settings(url), store)
    _, account = generate_queries(chunks, settings(url), store)
    assert (account.replied, account.failed, account.rejected) == (len(chunks) - 2, 2, 2)


@pytest.mark.filterwarnings("ignore:llm. waiting for the batch")
def test_a_start_without_batches_outlives_the_failure_of_an_earlier_ones(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    server.drop_created, server.status = True, "failed"
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    with pytest.raises(RefineFastError, match="the connection failed"):
        generate_queries(chunks, settings(url), store)
    said = "batch-0 failed: the file is no JSONL; 119 requests of it are asked again"
    with pytest.warns(RefineFastWarning, match=said):
        _, account = generate_queries(chunks, settings(url, batch=False), store)
    assert (account.replied, account.failed) == (len(chunks), 0)


def test_a_batch_from_before_its_url_was_written(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    """Of several servers, none can be asked: one that does not know it would have it forgotten."""
    store, url = tmp_path / "replies.jsonl", server.root + "/v1"
    server.drop_created = True
    with pytest.raises(RefineFastError, match="the connection failed"):
        generate_queries(chunks, settings(url), store)
    journal = store.with_suffix(".batches.json")
    (entry,) = json.loads(journal.read_text())
    del entry["url"]
    journal.write_text(json.dumps([entry]))
    for others in ("transformers", f"{url},{server.root}/v2"):
        with pytest.raises(RefineFastError, match="use --llm with its URL alone until"):
            generate_queries(chunks, settings(others, batch=False), store)
    assert generate_queries(chunks, settings(url), store)[1].replied == len(chunks)
    assert len(server.batches) == 1


def test_a_limit_is_kept(server: Server, chunks: list[Chunk], tmp_path: Path) -> None:
    limited = settings(server.root + "/v1", max_calls=10)
    _, account = generate_queries(chunks, limited, tmp_path / "replies.jsonl")
    assert (account.replied, account.stopped) == (10, "max_calls")
    assert server.asked.total() == 10


def test_a_limit_is_shared_out(server: Server, chunks: list[Chunk], tmp_path: Path) -> None:
    """Verdicts cost less than queries: half of a limit for each leaves most of the judge's."""
    url, own = server.root + "/v1", {"judge": True, "max_reply_tokens": 20}
    _, whole = generate_queries(chunks[:30], settings(url, **own), tmp_path / "whole.jsonl")
    own["max_tokens"] = int(1.1 * (whole.tokens_in + whole.tokens_out)) + 1000  # reserved
    _, account = generate_queries(chunks[:30], settings(url, **own), tmp_path / "replies.jsonl")
    assert (account.replied, account.unjudged, account.stopped) == (30, 0, None)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("status", "failed", "batch-0 failed: the file is no JSONL"),
        ("status", "expired", "batch-0 expired"),
        ("has_batches", False, "the server has no batches; omit --llm-batch"),
    ],
)
def test_what_cannot_work_is_said(
    server: Server, chunks: list[Chunk], tmp_path: Path, attribute: str, value: Any, message: str
) -> None:
    setattr(server, attribute, value)
    with pytest.raises(RefineFastError, match=message):
        generate_queries(chunks, settings(server.root + "/v1"), tmp_path / "replies.jsonl")


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("end", ["", "/chat/completions"])
def test_azure_and_gateways(
    server: Server, chunks: list[Chunk], tmp_path: Path, end: str, batch: bool
) -> None:
    """A path before the API, the version in the query, and the key in Azure's header."""
    url = f"{server.root}/gate/openai/deployments/tiny{end}?api-version=2024-10-21"
    store = tmp_path / "replies.jsonl"
    _, account = generate_queries(chunks[:5], settings(url, batch=batch), store)
    assert account.replied == 5
    assert {header.get("api-key") for header in server.headers} == {KEY}
    for path in server.paths:
        assert urlsplit(path).path.startswith("/gate/openai/deployments/tiny/")
        assert parse_qs(urlsplit(path).query) == {"api-version": ["2024-10-21"]}
    assert KEY not in store.read_text()


def test_other_servers_get_no_azure_header(
    server: Server, chunks: list[Chunk], tmp_path: Path
) -> None:
    url = f"{server.root}/gate/v1/chat/completions"
    generate_queries(chunks[:5], settings(url, batch=False), tmp_path / "replies.jsonl")
    assert {header.get("api-key") for header in server.headers} == {None}
    assert {urlsplit(path).path for path in server.paths} == {"/gate/v1/chat/completions"}


def test_a_url_with_a_secret_is_refused() -> None:
    with pytest.raises(RefineFastError, match="credentials or parameters"):
        settings("https://host/openai/deployments/x?api-version=1&key=secret")
    with pytest.raises(RefineFastError, match="llm_batch: --llm smollm2 runs in this process"):
        settings("smollm2", models=("SmolLM2-135M-Instruct",))
    with pytest.raises(RefineFastError, match=r"llm_batch: batches go to one endpoint \(got 'http"):
        settings("http://one/v1,http://two/v1")
