"""Requests to the endpoints that the settings name, within the limits of the run folder."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator

from ....errors import RefineFastError, RefineFastWarning
from .batch import Batches, is_batch_open, journal_of, require_endpoints_of_batches
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

    An open batch of an earlier start is waited for first, so ``requests`` must leave out what has
    a reply when it is drawn.

    Returns:
        The form in which the server accepted them, None in this process.

    Raises:
        RefineFastError: if the endpoint is declared dead, its replies are useless, or a batch is
            open at another one. Replies so far stay in the store.
    """
    require_endpoints_of_batches(replies.path, settings.urls)
    endpoints = endpoints_of(settings)
    spent = replies.spent
    budget = Budget(
        Limits(settings.max_calls, settings.max_tokens, settings.max_cost),
        *settings.prices,
        calls=spent.calls,
        tokens_in=spent.tokens_in,
        tokens_out=spent.tokens_out,
        cost=spent.cost,
    )
    try:
        batches = [
            Batches(progress, endpoint.backend, replies, budget, watch)
            for endpoint in endpoints
            if isinstance(endpoint.backend, HttpBackend)
            and (settings.batch or is_batch_open(replies.path, endpoint.name))
        ]
        if batches and not settings.batch:
            warnings.warn(
                "llm: waiting for the batch that an earlier start sent with --llm-batch, so that "
                "its replies are not paid for again; to pay again instead, stop and delete "
                f"{journal_of(replies.path)}.",
                RefineFastWarning,
                stacklevel=2,
            )
        for each in batches:
            await each.collect_open()
        if settings.batch:
            await batches[0].ask(requests)
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
