"""One real request to each model, before a run spends anything on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ....errors import RefineFastError
from ...corpus.chunk import Chunk
from .dispatch import why_useless
from .event_loop import run
from .generate import holds_queries, query_requests
from .http_backend import HttpBackend
from .reply_log import ReplyStore
from .request import Failure
from .settings import IN_PROCESS, LLMSettings

_PASSAGES = (
    "The harbour's old crane lifts 12 tonnes. It was built in 1908 and is inspected every spring; "
    "during inspections, ships are unloaded at the northern quay.",
    "A sourdough starter is fed once a day with equal weights of flour and water. Kept in a "
    "refrigerator, it needs to be fed only once a week.",
    "The library lends up to eight books for four weeks. Loans are renewed online unless another "
    "reader has reserved the book.",
)
"""A model that writes queries may fail for one passage by chance, but hardly for three."""


def try_models(settings: LLMSettings, store: Path) -> None:
    """Sends each model a request as it will be sent for every chunk; at most three, until a reply
    holds a query.

    A model in this process is not tried: it costs nothing, and is loaded soon enough.

    Args:
        settings: the models, and what is asked of them.
        store: the file of replies. The replies are kept there, so that they count for the limits,
            and a run that is resumed does not pay for them again.

    Raises:
        RefineFastError: if a model cannot be asked, or no reply holds a query.
    """
    if settings.url != IN_PROCESS:
        run(_try_all(settings, store))


async def _try_all(settings: LLMSettings, store: Path) -> None:
    backend = HttpBackend(settings.url, settings.key(), settings.timeout)
    try:
        with ReplyStore(store) as replies:
            for model in settings.models:
                own = replace(settings, models=(model,))
                if problem := await _problem(backend, own, replies):
                    raise RefineFastError(
                        f"llm: {model} at {settings.url} writes no queries: {problem}; try "
                        f"refine-fast doctor --llm {settings.url} --llm-model {model}."
                    )
    finally:
        await backend.close()


async def _problem(backend: HttpBackend, settings: LLMSettings, replies: ReplyStore) -> str | None:
    """Why the model of the settings cannot write queries; None if it can, or a limit is reached."""
    chunks = [
        Chunk(f"trial-{i}", text, "", "trial", 0, len(text)) for i, text in enumerate(_PASSAGES)
    ]
    problem = None
    for request in query_requests(chunks, list(range(len(chunks))), settings):
        if request.key in replies or _limit_is_reached(settings, replies):
            return None
        try:
            reply = await backend.complete(request)
        except Failure as failure:
            if failure.kind == "busy":
                return None  # the server works; the stage waits for it
            problem = str(failure)
            if failure.kind == "fatal":
                break
            continue
        problem = why_useless(reply, holds_queries)
        await replies.append(
            {
                "key": request.key,
                "chunk": request.chunk_id,
                "model": request.model,
                # An error is asked for again at the next start.
                **({"text": reply.text} if problem is None else {"error": problem}),
                "finish": reply.finish,
                "calls": 1,
                "tokens_in": reply.tokens_in,
                "tokens_out": reply.tokens_out,
            }
        )
        if problem is None:
            return None
    return problem


def _limit_is_reached(settings: LLMSettings, replies: ReplyStore) -> bool:
    spent = replies.spent
    used = (
        (settings.max_calls, spent.calls),
        (settings.max_tokens, spent.tokens_in + spent.tokens_out),
        (settings.max_cost, settings.cost(spent.tokens_in, spent.tokens_out)),
    )
    return any(limit is not None and (value or 0) >= limit for limit, value in used)
