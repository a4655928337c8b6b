"""A server that hangs: asked a few times, counted as if it were paid, and named."""

from pathlib import Path
from typing import Any

import pytest
from reply_files import records, spent

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import generate_queries
from refine_fast.pipeline.queries.llm.trial import try_models

Endpoint = Any  # conftest's

LONGEST = 512
"""The longest reply of the settings, in tokens."""


@pytest.fixture
def hanging(endpoint: Endpoint) -> Endpoint:
    endpoint.set(faults=1.0, kinds=["stall"])
    return endpoint


def test_a_request_is_given_up_after_three_time_outs(
    hanging: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    said = r"no chunk got a reply from .* \(no reply within 0.2 s \(raise --llm-timeout if"
    with pytest.raises(RefineFastError, match=said):
        generate_queries(chunks[:1], hanging.settings(timeout=0.2), store)
    assert hanging.stats()["received"] == 3
    (given_up,) = records(store)
    assert (given_up["calls"], given_up["tokens_out"]) == (3, 3 * LONGEST)
    assert given_up["tokens_in"] > 0


@pytest.mark.parametrize("status", [504, 524])
def test_the_time_limit_of_a_gateway_is_one_too(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, status: int
) -> None:
    store = tmp_path / "replies.jsonl"
    endpoint.set(status=status)
    with pytest.raises(RefineFastError, match=rf"no chunk got a reply from .* \(HTTP {status}"):
        generate_queries(chunks[:1], endpoint.settings(), store)
    assert endpoint.stats()["received"] == spent(store) == 3
    assert records(store)[0]["tokens_out"] == 3 * LONGEST


def test_one_that_never_replies_ends_the_stage_at_once(
    hanging: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """What its calls may cost is on disk, whichever requests they were for."""
    store = tmp_path / "replies.jsonl"
    with pytest.raises(RefineFastError, match=r"the first 3 requests got no reply within 0\.2 s"):
        generate_queries(chunks, hanging.settings(timeout=0.2), store)
    assert hanging.stats()["received"] == spent(store) == 3
    assert sum(record["tokens_out"] for record in records(store)) == 3 * LONGEST


def test_one_that_never_replies_is_found_out_first(hanging: Endpoint, tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    with pytest.raises(RefineFastError, match=r"tiny at .* writes no queries: no reply within"):
        try_models(hanging.settings(timeout=0.2), store)
    assert hanging.stats()["received"] == spent(store) == 3


def test_late_calls_count_for_the_limits(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """As the longest reply: a server may charge for what nobody waited for."""
    store = tmp_path / "replies.jsonl"
    generate_queries(chunks[:1], endpoint.settings(), store)
    endpoint.set(faults=1.0, kinds=["stall"])
    settings = endpoint.settings(timeout=0.2, max_tokens=4 * LONGEST)
    _, account = generate_queries(chunks, settings, store)
    assert (account.replied, account.stopped) == (1, "max_tokens")
    assert endpoint.stats()["received"] > 1
    assert LONGEST < account.tokens_in + account.tokens_out <= 4 * LONGEST
