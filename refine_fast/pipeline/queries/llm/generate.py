"""Chunks in, queries out, with an account of every call, token and dropped candidate."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ....errors import RefineFastError
from ...corpus.chunk import Chunk
from ..query import Query
from . import filters
from .coverage import spread
from .dispatch import CallProgress, Watch
from .estimate import Calls, Estimate
from .event_loop import run
from .judge import holds_verdicts, judge_requests
from .prompt import query_schema, wanted
from .reply_log import ReplyStore, Spent
from .reply_parser import parse_numbers, parse_queries
from .request import Request, count_tokens
from .send import send
from .settings import LLMSettings
from .small_models import TOKENS_PER_LINE, example_for

_TOKENS_OF_VERDICTS = 20

Encode = Callable[[list[str], Literal["query", "document"]], np.ndarray]
"""The base encoder: (n texts, role) -> (n, d) float32, unit rows."""


@dataclass
class Account:
    """What the report says about the stage.

    Calls, tokens and cost are those of the run folder, over all its starts.
    """

    models: tuple[str, ...]
    chunks: int
    replied: int = 0
    reused: int = 0
    failed: int = 0
    """Requests of queries and of verdicts without a reply; those that a limit left out do not
    count."""
    rejected: int = 0
    """Of those failed, the requests that cannot succeed: no reason to run the stage again."""
    stopped: str | None = None
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    """None without prices."""
    seconds: float = 0.0
    replies_per_second: float = 0.0
    structured_output: str | None = None
    """The form in which each endpoint's model accepted the request, such as "json_schema"."""
    parsed: dict[str, int] = field(default_factory=dict)
    candidates: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    unjudged: int = 0
    """Of those kept, the queries on which the judge gave no verdict."""
    failures: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON values."""
        return dataclasses.asdict(self)


def query_requests(
    chunks: list[Chunk], order: list[int], settings: LLMSettings
) -> Iterator[Request]:
    """One request per chunk, in ``order``, made as it is drawn.

    The same chunk, prompt, model and parameters make the same request.
    """
    template = settings.template
    schema = {} if template.asks_for_lines else query_schema(list(settings.mix))
    for i in order:
        chunk = chunks[i]
        digest = hashlib.sha256(chunk.text.encode()).hexdigest()
        texts: dict[str, Any] = {"passage": chunk.text, "title": chunk.title}
        form: dict[str, Any] = {}
        longest = settings.max_reply_tokens
        total = settings.per_chunk
        if template.asks_for_lines:
            example = example_for(chunk.text)
            texts |= {"example": example, "total": total}
            form = {"shots": (template.shot(**texts),), "lines": total}
            form["starts"] = tuple(example["starts"])
        else:
            wish = wanted(settings.mix, total, f"{settings.seed} {digest}")
            texts |= {"wanted": wish, "total": total}
        if settings.in_process:
            form["seed"] = settings.seed
            if template.asks_for_lines:  # a server's model may reason first
                longest = min(longest, TOKENS_PER_LINE * total)
        system, user = template.render(**texts)
        model = settings.models[int(digest[:8], 16) % len(settings.models)]
        yield Request(
            chunk.id,
            model,
            system,
            user,
            schema,
            longest,
            settings.temperature,
            settings.extra,
            **form,
        )


def _rows_by_key(
    chunks: list[Chunk], settings: LLMSettings, order: Iterable[int] = ()
) -> dict[str, int]:
    """Key of each request for queries -> the row of its chunk; as the rows are in ``order``."""
    requests = query_requests(chunks, list(range(len(chunks))), settings)
    rows = {request.key: i for i, request in enumerate(requests)}
    turn = {i: turn for turn, i in enumerate(order)}
    return dict(sorted(rows.items(), key=lambda item: turn.get(item[1], 0)))


def estimate(
    chunks: list[Chunk],
    settings: LLMSettings,
    store: Path,
    *,
    others: Calls | None = None,
) -> Estimate:
    """Calls, tokens and cost of the requests without a reply in the store, before one is sent, and
    of ``others``, which follow.

    A reply counts 30 tokens per query and 20 around them. With ``judge`` there is a second call per
    chunk: its prompt, the queries and a short list of numbers. For chunks with a reply, these
    requests are made from the queries in it. They are an upper bound: a chunk whose queries are all
    dropped needs none, and which ``round_trip`` drops is not known before every chunk is encoded.
    (Which of two duplicates is kept depends on that too where a limit is set, so that a chunk more
    or less may need one.)
    """
    missing = _rows_by_key(chunks, settings)
    spent = Spent()
    own = Calls(0, 0, 0, 0)
    if store.exists():
        with ReplyStore(store, settings.prices, settings.share) as replies:
            spent = replies.spent
            if settings.judge:
                found = _found(chunks, missing, settings, replies)
                own = _verdicts_to_come(chunks, found, settings, replies)
            missing = {key: i for key, i in missing.items() if key not in replies}
    calls = len(missing)
    requests = query_requests(chunks, list(missing.values()), settings)
    own += Calls(
        calls,
        sum(request.tokens_in for request in requests),
        calls * (30 * settings.per_chunk + 20),
        calls * settings.max_reply_tokens,
    )
    if settings.judge:
        passages = sum(count_tokens(chunk.text) for chunk in chunks) // max(len(chunks), 1) + 100
        own += Calls(
            calls,
            calls * (passages + 30 * settings.per_chunk),
            calls * _TOKENS_OF_VERDICTS,
            calls * settings.max_reply_tokens,
            calls,
        )
    return Estimate.of(own if others is None else own + others, settings, spent)


def _verdicts_to_come(
    chunks: list[Chunk], found: Found, settings: LLMSettings, replies: ReplyStore
) -> Calls:
    """The calls for verdicts on queries that are written, as far as the store has none."""
    requests = judge_requests(_by_chunk(chunks, found), settings)
    missing = [request for request in requests if request.key not in replies]
    return Calls(
        len(missing),
        sum(request.tokens_in for request in missing),
        len(missing) * _TOKENS_OF_VERDICTS,
        len(missing) * settings.max_reply_tokens,
        len(missing),
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
    """Asks the model about every chunk, and turns its replies into queries.

    Args:
        chunks: n chunks.
        settings: endpoint, models, request, limits and filters.
        store: the JSONL file of replies; a request that has a reply there is not sent again.
        embeddings: (n, d) float32 of the chunks, to spread the sample when a limit is set.
        encode: the base encoder, which ``settings.round_trip`` needs.
        watch: called with the progress after every reply.

    Returns:
        Queries of kind "llm:<kind>", in the order of the chunks, and the account.

    Raises:
        RefineFastError: if the endpoint is declared dead, its replies are useless, or no chunk got
            a reply. Replies so far stay in the store.
    """
    if settings.round_trip and encode is None:
        raise ValueError("round_trip needs encode, the base encoder")
    order = spread(chunks, seed=settings.seed, embeddings=embeddings)
    with ReplyStore(store, settings.prices, settings.share) as replies:
        shares = settings.judge and settings.is_limited
        # Of duplicates the one that was asked for first is kept: what a later round finds does not
        # take the place of what is judged, and paid, already.
        keys = _rows_by_key(chunks, settings, order if shares else ())
        reused = sum(key in replies for key in keys)
        progress = CallProgress(len(keys), reused, reused)
        account = Account(settings.models, len(chunks), reused=reused)
        found_of = partial(
            _found, chunks, keys, settings, replies, embeddings=embeddings, encode=encode
        )
        unjudged = found_of() if shares else []
        while True:
            within, written = settings, len(replies)
            if shares:
                verdicts = _verdicts_to_come(chunks, unjudged, settings, replies)
                within = _leaving_verdicts(settings, replies.spent, verdicts)
            requests = zip(order, query_requests(chunks, order, settings), strict=True)
            missing = (
                request
                for i, request in requests
                if keys[request.key] == i and replies.lacks(request.key)
            )
            progress.stopped, start = None, time.monotonic()
            form = run(send(missing, progress, within, replies, holds_queries, watch))
            account.seconds += time.monotonic() - start
            account.stopped = progress.stopped
            account.structured_output = form or account.structured_output
            wrote = len(replies) > written
            found = unjudged = found_of(account)
            if settings.judge:
                found = run(_judged(chunks, unjudged, settings, replies, account, watch))
            # Verdicts took less than their half: what is left is shared again.
            if not (shares and progress.stopped and wrote):
                break
        account.replied = sum(key in replies for key in keys)
        account.failed += progress.failed
        account.rejected += progress.rejected
        account.replies_per_second = (progress.done - reused) / max(account.seconds, 1e-9)
        account.calls, account.tokens_in, account.tokens_out = (
            replies.spent.calls,
            replies.spent.tokens_in,
            replies.spent.tokens_out,
        )
        account.cost = replies.spent.cost if settings.has_prices else None
        account.failures = dict(
            Counter(error for key, error in replies.failures.items() if key in keys).most_common(5)
        )
    account.kept = len(found)
    if chunks and not account.replied:
        why = next(iter(account.failures), "no call was made")
        remedy = "check the endpoint with 'refine-fast doctor --llm URL'"
        if account.stopped:
            why, remedy = f"stopped by {account.stopped}", "raise the limit"
        raise RefineFastError(f"llm: no chunk got a reply from {settings.url} ({why}); {remedy}.")
    found.sort(key=lambda each: each[0])
    return [Query(text, chunks[i].id, f"llm:{kind}") for i, kind, text in found], account


def holds_queries(text: str) -> bool:
    """Whether queries can be read from a reply; under the schema, it may hold none."""
    parsed = parse_queries(text)
    return bool(parsed.candidates) or parsed.how == "schema"


Found = list[tuple[int, str, str]]
"""(row of the chunk, kind, text) of each remaining candidate."""


def _found(
    chunks: list[Chunk],
    keys: dict[str, int],
    settings: LLMSettings,
    replies: ReplyStore,
    account: Account | None = None,
    *,
    embeddings: np.ndarray | None = None,
    encode: Encode | None = None,
) -> Found:
    """What remains of the replies before it is judged; counted in the account, if there is one.
    Without ``encode``, what the round trip would drop remains."""
    account = account or Account(settings.models, len(chunks))
    found = _candidates(chunks, keys, settings, replies, account)
    found = _deduplicated(found, settings.duplicates, account)
    if settings.round_trip and encode is not None:
        found = _round_trip(chunks, found, settings.round_trip, embeddings, encode, account)
    return found


def _by_chunk(chunks: list[Chunk], found: Found) -> list[tuple[Chunk, list[str]]]:
    """Each chunk that has queries, with them."""
    own: dict[int, list[str]] = {}
    for i, _, text in found:
        own.setdefault(i, []).append(text)
    return [(chunks[i], texts) for i, texts in own.items()]


def _leaving_verdicts(settings: LLMSettings, spent: Spent, verdicts: Calls) -> LLMSettings:
    """The settings with the limits up to which queries are written: what the verdicts on those
    that are there need is left, and half of the rest, for the verdicts on those to come. As these
    mostly cost less, writing and judging alternate."""

    def most(limit: float | None, used: float, needed: float) -> float | None:
        return None if limit is None else used + max(0.0, limit - used - needed) / 2

    calls = most(settings.max_calls, spent.calls, verdicts.calls)
    tokens = most(
        settings.max_tokens,
        spent.tokens_in + spent.tokens_out,
        verdicts.tokens_in + verdicts.tokens_out_most,
    )
    cost = settings.cost(verdicts.tokens_in, verdicts.tokens_out_most) or 0.0
    return dataclasses.replace(
        settings,
        max_calls=None if calls is None else math.ceil(calls),
        max_tokens=None if tokens is None else math.ceil(tokens),
        max_cost=most(settings.max_cost, spent.cost, cost),
    )


def _candidates(
    chunks: list[Chunk],
    keys: dict[str, int],
    settings: LLMSettings,
    replies: ReplyStore,
    account: Account,
) -> Found:
    found: Found = []
    candidates = 0
    parsed_by: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    prompt = _prompt_without_passage(chunks[0], settings) if chunks else ""
    for record in replies.replies(list(keys)):
        i = keys[record["key"]]
        parsed = parse_queries(record["text"], cut=record["finish"] == "length")
        accepted = filters.accept(parsed, chunks[i].text, settings.mix, settings.per_chunk, prompt)
        parsed_by[accepted.how] += 1
        dropped.update(accepted.dropped)
        candidates += len(accepted.queries) + accepted.dropped.total()
        found += [(i, kind, text) for kind, text in accepted.queries]
    account.candidates = candidates
    account.parsed = dict(parsed_by)
    account.dropped = dict(dropped)
    return found


def _prompt_without_passage(chunk: Chunk, settings: LLMSettings) -> str:
    """The instructions and examples of a request."""
    (request,) = query_requests([chunk], [0], settings)
    text = " ".join(message["content"] for message in request.messages)
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
    own = np.array([i for i, _, _ in found])
    hits = filters.found_by_retriever(queries, documents, own, top_n)
    leads = filters.lead_over_neighbours(queries, documents, own)
    verdicts = [
        f"not found in the top {top_n}" if not hit else "vague" if lead < filters.MIN_LEAD else None
        for hit, lead in zip(hits, leads, strict=True)
    ]
    return _keep(found, verdicts, account)


async def _judged(
    chunks: list[Chunk],
    found: Found,
    settings: LLMSettings,
    replies: ReplyStore,
    account: Account,
    watch: Watch | None,
) -> Found:
    """Drops the queries that, by the model's own verdict, the chunk does not answer.

    Without a usable verdict a query is kept and counted as unjudged. What has failed in this start
    is not asked again.
    """
    own: dict[int, list[int]] = {}
    for position, (i, _, _) in enumerate(found):
        own.setdefault(i, []).append(position)
    asked = _by_chunk(chunks, found)
    keys = [request.key for request in judge_requests(asked, settings)]
    reused = sum(key in replies for key in keys)
    progress = CallProgress(len(keys), reused, reused)
    missing = (each for each in judge_requests(asked, settings) if replies.lacks(each.key))
    await send(missing, progress, settings, replies, holds_verdicts, watch)
    account.failed += progress.failed
    account.rejected += progress.rejected
    account.stopped = account.stopped or progress.stopped
    account.unjudged = 0
    verdicts: list[str | None] = [None] * len(found)
    for key, positions in zip(keys, own.values(), strict=True):
        record = next(replies.replies([key]), None)
        passed = parse_numbers(record["text"]) if record else None
        if passed is None:
            account.unjudged += len(positions)
            continue
        for number, position in enumerate(positions, 1):
            if number not in passed:
                verdicts[position] = "judged unanswerable"
    return _keep(found, verdicts, account)
