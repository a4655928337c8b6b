"""The stage: chunks in, queries out, with an account of every call, token and dropped candidate."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import RefineFastError
from ...corpus.chunk import Chunk
from ..query import Query
from . import filters
from .budget import Budget, Limits
from .coverage import spread
from .dispatch import Progress, Watch, ask
from .http_backend import HttpBackend
from .prompt import Template, judge_schema, query_schema, wanted
from .reply_log import ReplyStore, Spent
from .reply_parser import parse_numbers, parse_queries
from .request import Backend, Failure, Request, count_tokens
from .settings import IN_PROCESS, LLMSettings
from .throttle import Throttle
from .transformers_backend import LocalBackend

Encode = Callable[[list[str], str], np.ndarray]
"""Texts and their role, "query" or "document", to unit rows (n, d) float32: the base encoder."""


@dataclass
class Account:
    """What the report says about the stage. Calls, tokens and cost are those of the run folder over all its starts."""

    models: tuple[str, ...]
    chunks: int
    replied: int = 0
    reused: int = 0
    failed: int = 0
    stopped: str | None = None
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """None where no prices are given."""
    seconds: float = 0.0
    replies_per_second: float = 0.0
    structured_output: str | None = None
    parsed: dict[str, int] = field(default_factory=dict)
    candidates: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    unjudged: int = 0
    """Of those kept: the judge was asked for and gave no verdict."""
    failures: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked. Tokens by :func:`count_tokens`; ``tokens_out_most`` is the limit set for the replies."""

    calls: int
    tokens_in: int
    tokens_out: int
    tokens_out_most: int
    cost: float | None
    """None where no prices are given."""
    cost_most: float | None
    stops_after: int | None = None
    """About how many of the calls a limit allows; None where no limit is in the way."""


def query_requests(
    chunks: list[Chunk], order: list[int], settings: LLMSettings
) -> Iterator[Request]:
    """One request a chunk, in ``order``, made as it is drawn. The same chunk, prompt, model and parameters make the same request."""
    template = Template(settings.prompt)
    schema = query_schema(list(settings.mix))
    for i in order:
        chunk = chunks[i]
        digest = hashlib.sha256(chunk.text.encode()).hexdigest()
        wish = wanted(settings.mix, settings.per_chunk, f"{settings.seed} {digest}")
        system, user = template.render(
            passage=chunk.text, title=chunk.title, wanted=wish, total=settings.per_chunk
        )
        model = settings.models[int(digest[:8], 16) % len(settings.models)]
        yield Request(
            chunk.id, model, system, user, schema, settings.max_reply_tokens, settings.temperature
        )


def estimate(chunks: list[Chunk], settings: LLMSettings, store: Path) -> Estimate:
    """Before a token is spent: calls, tokens and cost of what the store has no reply to. A reply is taken to be 30 tokens a query and 20
    around them. With ``judge`` there is a second call for each chunk: its prompt, the queries, and a short list of numbers."""
    known: set[str] = set()
    spent = Spent()
    if store.exists():
        with ReplyStore(store) as replies:
            spent = replies.spent
            known = {
                request.key
                for request in query_requests(chunks, list(range(len(chunks))), settings)
                if request.key in replies
            }
    calls = tokens_in = 0
    for request in query_requests(chunks, list(range(len(chunks))), settings):
        if request.key not in known:
            calls += 1
            tokens_in += request.tokens_in
    tokens_out = calls * (30 * settings.per_chunk + 20)
    most = calls * settings.max_reply_tokens
    if settings.judge:
        passages = sum(count_tokens(chunk.text) for chunk in chunks) // max(len(chunks), 1) + 100
        tokens_in += calls * (passages + 30 * settings.per_chunk)
        tokens_out += calls * 20
        most += calls * settings.max_reply_tokens
        calls *= 2
    cost = settings.cost(tokens_in, tokens_out)
    limits = (
        (settings.max_calls, spent.calls, calls),
        (settings.max_tokens, spent.tokens_in + spent.tokens_out, tokens_in + tokens_out),
        (settings.max_cost, settings.cost(spent.tokens_in, spent.tokens_out), cost),
    )
    shares = [
        max(0.0, limit - (used or 0)) / wanted
        for limit, used, wanted in limits
        if limit is not None and wanted
    ]
    stops_after = int(calls * min(shares)) if shares and min(shares) < 1 else None
    return Estimate(
        calls, tokens_in, tokens_out, most, cost, settings.cost(tokens_in, most), stops_after
    )


def generate_queries(
    chunks: list[Chunk],
    settings: LLMSettings,
    store: Path,
    *,
    embeddings: np.ndarray | None = None,
    encode: Encode | None = None,
    watch: Watch | None = None,
) -> tuple[list[Query], Account]:
    """Queries of kind "llm:<kind>", in the order of the chunks. ``store``: the JSONL file of replies; what it holds is not asked again.

    embeddings: the chunks' (n, d), to spread the sample when a limit is set; encode: needed where ``settings.round_trip`` is. Raises
    RefineFastError when the endpoint is given up or when nothing at all was replied; the replies so far stay in the store.
    """
    if settings.round_trip and encode is None:
        raise RefineFastError("round_trip: the filter needs the base encoder; pass encode.")
    order = spread(chunks, seed=settings.seed, embeddings=embeddings)
    with ReplyStore(store) as replies:
        keys = {
            request.key: i
            for i, request in enumerate(query_requests(chunks, list(range(len(chunks))), settings))
        }
        reused = sum(key in replies for key in keys)
        requests = zip(order, query_requests(chunks, order, settings), strict=True)
        missing = (
            request
            for i, request in requests
            if keys[request.key] == i and request.key not in replies
        )
        state, mode = asyncio.run(
            _ask(missing, Progress(len(keys), reused, reused), settings, replies, watch)
        )
        account = Account(
            settings.models,
            len(chunks),
            sum(key in replies for key in keys),
            reused,
            state.failed,
            state.stopped,
        )
        account.seconds, account.replies_per_second, account.structured_output = (
            state.seconds,
            state.rate,
            mode,
        )
        found = _candidates(chunks, keys, settings, replies, account)
        found = _deduplicated(found, settings.duplicates, account)
        if settings.round_trip and encode is not None:
            found = _round_trip(chunks, found, settings.round_trip, embeddings, encode, account)
        if settings.judge:
            found = asyncio.run(_judged(chunks, found, settings, replies, account, watch))
        account.calls, account.tokens_in, account.tokens_out = (
            replies.spent.calls,
            replies.spent.tokens_in,
            replies.spent.tokens_out,
        )
        account.cost = settings.cost(account.tokens_in, account.tokens_out)
        account.failures = dict(
            Counter(error for key, error in replies.failures.items() if key in keys).most_common(5)
        )
    account.kept = len(found)
    if chunks and not account.replied:
        why = (
            next(iter(account.failures), account.stopped and f"stopped by {account.stopped}")
            or "no call was made"
        )
        raise RefineFastError(
            f"llm: no chunk got a reply from {settings.url} ({why}); run 'refine-fast doctor' on the endpoint."
        )
    return [Query(text, chunks[i].id, f"llm:{kind}") for i, kind, text in found], account


def backend_for(settings: LLMSettings) -> Backend:
    if settings.url == IN_PROCESS:
        return LocalBackend()
    return HttpBackend(settings.url, settings.key(), settings.timeout)


async def _ask(
    requests: Iterator[Request],
    state: Progress,
    settings: LLMSettings,
    replies: ReplyStore,
    watch: Watch | None,
) -> tuple[Progress, str | None]:
    """How far it came, and which structured output the server took."""
    backend = backend_for(settings)
    spent = replies.spent
    budget = Budget(
        Limits(settings.max_calls, settings.max_tokens, settings.max_cost),
        settings.price_in,
        settings.price_out,
        calls=spent.calls,
        tokens_in=spent.tokens_in,
        tokens_out=spent.tokens_out,
    )
    try:
        await ask(requests, state, backend, replies, Throttle(settings.concurrency), budget, watch)
    except Failure as failure:
        kept = (
            f"{len(replies)} replies are kept, start again to go on"
            if len(replies)
            else "'refine-fast doctor --llm URL' probes it"
        )
        raise RefineFastError(f"llm: {settings.url} was given up: {failure}; {kept}.") from None
    finally:
        await backend.close()
    return state, getattr(backend, "mode", None)


Found = list[tuple[int, str, str]]
"""(chunk, kind, text) of what is still a candidate."""


def _candidates(
    chunks: list[Chunk],
    keys: dict[str, int],
    settings: LLMSettings,
    replies: ReplyStore,
    account: Account,
) -> Found:
    found: Found = []
    parsed_by: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    prompt = _said(chunks[0], settings) if chunks else ""
    for record in replies.replies(list(keys)):
        i = keys[record["key"]]
        parsed = parse_queries(record["text"], cut=record["finish"] == "length")
        accepted = filters.accept(parsed, chunks[i].text, settings.mix, settings.per_chunk, prompt)
        parsed_by[accepted.how] += 1
        dropped.update(accepted.dropped)
        account.candidates += len(accepted.queries) + accepted.dropped.total()
        found += [(i, kind, text) for kind, text in accepted.queries]
    account.parsed = dict(parsed_by)
    account.dropped = dict(dropped)
    return found


def _said(chunk: Chunk, settings: LLMSettings) -> str:
    """What a request says besides its passage: instructions and examples."""
    (request,) = query_requests([chunk], [0], settings)
    text = f"{request.system} {request.user}"
    for own in filter(None, (chunk.text, chunk.title)):
        text = text.replace(own, "")
    return text


def _keep(found: Found, verdicts: list[str | None], account: Account) -> Found:
    for reason, count in Counter(verdict for verdict in verdicts if verdict).items():
        account.dropped[reason] = account.dropped.get(reason, 0) + count
    return [item for item, verdict in zip(found, verdicts, strict=True) if verdict is None]


def _deduplicated(found: Found, which: str, account: Account) -> Found:
    if which != "keep":
        found = _keep(found, filters.exact_duplicates([text for _, _, text in found]), account)
    if which == "near":
        found = _keep(found, filters.near_duplicates([text for _, _, text in found]), account)
    return found


def _round_trip(
    chunks: list[Chunk],
    found: Found,
    top_n: int,
    embeddings: np.ndarray | None,
    encode: Encode,
    account: Account,
) -> Found:
    if not found:
        return found
    documents = (
        encode([chunk.passage for chunk in chunks], "document")
        if embeddings is None
        else embeddings
    )
    queries = encode([text for _, _, text in found], "query")
    hits = filters.found_by_retriever(queries, documents, np.array([i for i, _, _ in found]), top_n)
    return _keep(found, [None if hit else f"not found in the top {top_n}" for hit in hits], account)


async def _judged(
    chunks: list[Chunk],
    found: Found,
    settings: LLMSettings,
    replies: ReplyStore,
    account: Account,
    watch: Watch | None,
) -> Found:
    """Drops what the model itself says the chunk does not answer; without a usable verdict a query stays, and is counted as unjudged."""
    own: dict[int, list[int]] = {}
    for position, (i, _, _) in enumerate(found):
        own.setdefault(i, []).append(position)
    template = Template(settings.judge_prompt, name="judge")

    def request(i: int) -> Request:
        texts = [found[position][2] for position in own[i]]
        system, user = template.render(passage=chunks[i].text, title=chunks[i].title, queries=texts)
        return Request(
            chunks[i].id,
            settings.models[0],
            system,
            user,
            judge_schema(),
            settings.max_reply_tokens,
            settings.temperature,
        )

    missing = [i for i in own if request(i).key not in replies]
    reused = len(own) - len(missing)
    state, _ = await _ask(
        (request(i) for i in missing), Progress(len(own), reused, reused), settings, replies, watch
    )
    account.stopped = account.stopped or state.stopped
    verdicts: list[str | None] = [None] * len(found)
    for i, positions in own.items():
        record = next(replies.replies([request(i).key]), None)
        passed = parse_numbers(record["text"]) if record else None
        if passed is None:
            account.unjudged += len(positions)
            continue
        for number, position in enumerate(positions, 1):
            if number not in passed:
                verdicts[position] = "judged unanswerable"
    return _keep(found, verdicts, account)
