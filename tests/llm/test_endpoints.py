"""What an endpoint accepts: the form of a request, found by probe or by the first calls."""

import re
from pathlib import Path
from typing import Any

import pytest
from reply_files import spent

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import (
    generate_queries,
    probe,
)
from refine_fast.pipeline.queries.llm.throttle import Throttle

Endpoint = Any  # conftest's


@pytest.mark.parametrize("rejection", [400, 422, 500])
@pytest.mark.parametrize("strictest", ["json_schema", "json_object", "plain"])
def test_the_strictest_structured_output_that_the_server_takes(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, strictest: str, rejection: int
) -> None:
    endpoint.set(structured=strictest, rejection=rejection)
    _, account = generate_queries(chunks[:20], endpoint.settings(), tmp_path / "replies.jsonl")
    stats = endpoint.stats()
    assert account.structured_output == strictest
    assert account.replied == stats["served"] == 20
    steps = ["json_schema", "json_object", "plain"].index(strictest)
    assert stats["calls"].get("rejected", 0) == steps * (
        2 if rejection == 500 else 1
    )  # a 500 may be chance: asked twice


@pytest.mark.parametrize(
    ("status", "calls", "message"),
    [
        (401, 1, "HTTP 401"),
        (404, 1, "mostly in /v1"),
        (400, 6 * 3, "rejects every form of the request: HTTP 400"),  # six forms, three requests
        (429, None, "waiting did not help"),
    ],
)
def test_an_endpoint_that_never_works(
    endpoint: Endpoint,
    chunks: list[Chunk],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    calls: int | None,
    message: str,
) -> None:
    monkeypatch.setattr(
        "refine_fast.pipeline.queries.llm.send.Throttle",
        lambda ceiling: Throttle(ceiling, pause=0.01, openings=3),
    )
    endpoint.set(status=status)
    with pytest.raises(RefineFastError, match=f"stopped asking .*{message}"):
        generate_queries(chunks[:5], endpoint.settings(), tmp_path / "replies.jsonl")
    assert calls is None or endpoint.stats()["received"] == calls


@pytest.mark.parametrize("total", [100, 120, 700])
def test_tokens_that_only_the_total_tells_of_count(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, total: int
) -> None:
    """Some servers leave what was thought out of the reply's tokens; some totals are too small."""
    endpoint.set(usage={"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": total})
    _, account = generate_queries(chunks[:5], endpoint.settings(), tmp_path / "replies.jsonl")
    assert (account.tokens_in, account.tokens_out) == (5 * 100, 5 * max(20, total - 100))


def test_json_that_the_server_finds_invalid_is_asked_again(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """Groq's json_validate_failed, with status 400, is about this reply, not about the form."""
    endpoint.set(faults=0.3, kinds=["json_validate_failed"])
    _, account = generate_queries(chunks[:30], endpoint.settings(), tmp_path / "replies.jsonl")
    stats = endpoint.stats()
    assert (account.replied, account.rejected, account.structured_output) == (30, 0, "json_schema")
    assert account.calls == stats["received"] == 30 + stats["calls"]["json_validate_failed"] > 30


def test_a_bare_list_of_models_is_none(endpoint: Endpoint) -> None:
    endpoint.set(bare_list=True)
    (report,) = probe(endpoint.settings())
    assert (report.reachable, report.served, report.problem) == (True, None, None)
    assert report.form == "json_schema"


@pytest.mark.parametrize("structured", ["json_schema", "json_object", "plain"])
def test_probe(endpoint: Endpoint, structured: str) -> None:
    endpoint.set(structured=structured, reply='{"queries": []}', rejection=400)
    served, missing = probe(endpoint.settings(models=("tiny", "large")))
    assert (served.reachable, served.served, missing.served, served.context, served.problem) == (
        True,
        True,
        False,
        4096,
        None,
    )
    order = ["json_schema", "json_object", "plain"]
    expected = {
        mode: "rejected" if order.index(mode) < order.index(structured) else "honoured"
        for mode in order[:2]
    }
    assert served.structured == {**expected, "plain": "answers"}
    assert served.tokens_per_second
    endpoint.set(reply="What river is it?", structured="json_schema")
    assert probe(endpoint.settings())[0].structured == {
        "json_schema": "ignored",
        "json_object": "ignored",
        "plain": "answers",
    }


@pytest.mark.parametrize(
    ("card", "pages", "context"),
    [
        ({"context_length": 8192}, {"/props": {"default_generation_settings": {"n_ctx": 1}}}, 8192),
        (
            {"meta": {"n_ctx_train": 131072}},
            {"/props": {"default_generation_settings": {"n_ctx": 2048}}},
            2048,
        ),
        (
            {},
            {
                "/api/ps": {
                    "models": [
                        {"name": "big", "context_length": 1},
                        {"name": "tiny:latest", "context_length": 4096},
                    ]
                }
            },
            4096,
        ),
        (
            {},
            {
                "/api/v0/models": {
                    "data": [
                        {"id": "tiny", "max_context_length": 32768, "loaded_context_length": 1024}
                    ]
                }
            },
            1024,
        ),
        ({}, {"/props": ["?"], "/api/ps": {"models": [None]}}, None),
        ({}, {}, None),
    ],
    ids=["in the list", "llama.cpp", "Ollama", "LM Studio", "nonsense", "nobody tells"],
)
def test_probe_finds_the_context_length(
    endpoint: Endpoint, card: dict[str, Any], pages: dict[str, Any], context: int | None
) -> None:
    endpoint.set(card=card, pages=pages)
    assert probe(endpoint.settings())[0].context == context


def test_probe_of_nobody(endpoint: Endpoint) -> None:
    (report,) = probe(endpoint.settings(url="http://127.0.0.1:9/v1"))
    assert not report.reachable
    assert "connection failed" in (report.problem or "")


@pytest.mark.parametrize(
    ("rules", "form"),
    [
        (["max_completion_tokens"], "json_schema, max_completion_tokens"),
        (["no system role"], "json_schema, no system role"),
        (
            ["max_completion_tokens", "no system role"],
            "json_schema, max_completion_tokens, no system role",
        ),
        (["no name for the system role"], "plain, no system role"),
        (["parts"], "json_schema"),
        (["only reasoning"], "json_schema"),
    ],
    ids=lambda value: "; ".join(value) if isinstance(value, list) else "",
)
def test_the_form_that_the_model_accepts(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, rules: list[str], form: str
) -> None:
    """Found by the first request; the others are not rejected again."""
    endpoint.set(rules=rules)
    _, account = generate_queries(chunks[:20], endpoint.settings(), tmp_path / "replies.jsonl")
    stats = endpoint.stats()
    assert (account.structured_output, account.replied, account.kept) == (form, 20, 20)
    assert stats["calls"].get("rejected", 0) <= 3
    assert account.calls == stats["served"] == 20
    (report,) = probe(endpoint.settings())
    assert (report.form, report.problem) == (form, None)


@pytest.mark.parametrize(
    ("rules", "changes", "message", "most"),
    [
        (["reasoning to the limit"], {}, r"length.*on reasoning; raise --llm-reply-tokens", 12),
        (["inline reasoning to the limit"], {}, r"length.*turn reasoning off with --llm-extra", 12),
        (
            ["no extra"],
            {"extra": {"enable_thinking": False}},
            "correct or remove 'enable_thinking' in --llm-extra",
            0,
        ),
        (["error with status 200"], {}, r"HTTP 402: The provider has no credits left", 0),
        ([], {"reply": "{}"}, r"\d+ replies in a row are useless: nothing usable in the reply", 12),
    ],
    ids=lambda value: "; ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_stops_before_all_are_paid(
    endpoint: Endpoint,
    chunks: list[Chunk],
    tmp_path: Path,
    rules: list[str],
    changes: dict[str, Any],
    message: str,
    most: int,
) -> None:
    """Four calls at a time: the eighth useless reply comes with at most four more in flight."""
    endpoint.set(rules=rules, reply=changes.pop("reply", ""))
    store = tmp_path / "replies.jsonl"
    with pytest.raises(RefineFastError, match=message):
        generate_queries(chunks, endpoint.settings(**changes), store)
    assert spent(store) <= most
    assert endpoint.stats()["received"] <= max(most, 1)
    assert re.search(
        message.partition(": ")[2] or message, probe(endpoint.settings(**changes))[0].problem or ""
    )


def test_useless_replies_now_and_then_do_not_stop_it(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    endpoint.set(empty=0.4)
    _, account = generate_queries(chunks, endpoint.settings(), tmp_path / "replies.jsonl")
    assert 0 < account.failed < len(chunks)
    assert account.replied + account.failed == len(chunks)


@pytest.mark.parametrize(
    "flag",
    [
        {"code": 403, "message": "tiny requires moderation and your input was flagged"},
        {"code": 403, "message": "No", "metadata": {"flagged_input": "Harbour"}},
    ],
    ids=["in the message", "in the metadata"],
)
def test_a_passage_that_moderation_refuses_stops_nothing_else(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, flag: dict[str, Any]
) -> None:
    endpoint.set(flagged="Harbour 0 ", flag=flag)
    _, account = generate_queries(chunks[:5], endpoint.settings(), tmp_path / "replies.jsonl")
    assert (account.replied, account.failed, account.calls) == (4, 1, 5)


def test_extra_fields_are_sent(endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_p": 0.9}
    generate_queries(chunks[:2], endpoint.settings(extra=extra), tmp_path / "replies.jsonl")
    for body in endpoint.stats()["bodies"]:
        assert {name: body[name] for name in extra} == extra
        assert body["response_format"]["type"] == "json_schema"


def test_a_temperature_that_the_model_refuses_is_left_out(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    endpoint.set(rules=["no temperature"])
    settings = endpoint.settings(temperature=0.2)
    _, account = generate_queries(chunks[:20], settings, tmp_path / "replies.jsonl")
    assert (account.structured_output, account.replied) == ("json_schema, no temperature", 20)
    assert endpoint.stats()["calls"]["rejected"] == 1
