"""Requests to the endpoints that the settings name, within the limits of the run folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ....errors import RefineFastError
from .batch import ask_in_batches
from .budget import Budget, Limits
from .dispatch import CallProgress, Endpoint, IsUseful, Watch, ask
from .http_backend import HttpBackend
from .reply_log import ReplyStore
from .request import Failure, Request
from .settings import LLMSettings
from .throttle import MAX_OPENINGS_AMONG_SEVERAL, Throttle
from .transformers_backend import LocalBackend


def endpoints_of(settings: LLMSettings) -> list[Endpoint]:
    """The endpoints that the settings name, each with its own throttle."""
    if settings.in_process:
        # Replies in this process are written together; a server is approached carefully.
        throttle = Throttle(settings.concurrency, first=settings.concurrency)
        return [Endpoint(settings.url, LocalBackend(), throttle)]
    patience = {} if len(settings.urls) == 1 else {"openings": MAX_OPENINGS_AMONG_SEVERAL}
    return [
        Endpoint(
            url,
            HttpBackend(url, settings.key(), settings.timeout),
            Throttle(settings.concurrency, **patience),
        )
        for url in settings.urls
    ]


async def send(
    requests: Iterator[Request],
    progress: CallProgress,
    settings: LLMSettings,
    replies: ReplyStore,
    is_useful: IsUseful,
    watch: Watch | None,
) -> str | None:
    """Sends the requests, alone or in batches, and puts every reply into the store.

    Returns:
        The form in which the server accepted them, None in this process.

    Raises:
        RefineFastError: if the endpoint is declared dead or its replies are useless. Replies so far
            stay in the store.
    """
    endpoints = endpoints_of(settings)
    spent = replies.spent
    budget = Budget(
        Limits(settings.max_calls, settings.max_tokens, settings.max_cost),
        *settings.prices,
        calls=spent.calls,
        tokens_in=spent.tokens_in,
        tokens_out=spent.tokens_out,
    )
    try:
        only = endpoints[0].backend
        if settings.batch and isinstance(only, HttpBackend):
            await ask_in_batches(requests, progress, only, replies, budget, watch)
        else:
            await ask(requests, progress, endpoints, replies, budget, is_useful, watch)
    except Failure as failure:
        remedy = (
            f"{len(replies)} replies are kept; run the same command to resume"
            if len(replies)
            else "check the endpoint with 'refine-fast doctor --llm URL'"
        )
        raise RefineFastError(f"llm: stopped asking {settings.url}: {failure}; {remedy}.") from None
    finally:
        await asyncio.gather(*(endpoint.backend.close() for endpoint in endpoints))
    forms = [
        str(form)
        for endpoint in endpoints
        if isinstance(endpoint.backend, HttpBackend)
        for form in endpoint.backend.forms.values()
    ]
    return "; ".join(dict.fromkeys(forms)) or None
