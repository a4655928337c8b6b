"""How fast a model in this process writes, measured on a few of the run's own requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .event_loop import run
from .request import Failure, Request
from .transformers_backend import LocalBackend

SAMPLE = 8
"""Replies that are timed, besides one that loads the model."""


@dataclass(frozen=True)
class LocalSpeed:
    """The speed of a model in this process."""

    tokens_per_second: float
    """Of all replies that are written together; reading the prompts is included."""
    seconds_per_reply: float


def local_speed(requests: Sequence[Request]) -> LocalSpeed | None:
    """Times a few of the requests, from all parts of the collection. The replies are not kept.

    Returns:
        None without requests, or if the model fails on one: the run will say why.

    Raises:
        RefineFastError: if the model cannot be loaded.
    """
    drawn = requests[:: max(1, len(requests) // (SAMPLE + 1))][: SAMPLE + 1]
    if not drawn:
        return None
    try:
        return run(_timed(drawn))
    except Failure:
        return None


async def _timed(requests: Sequence[Request]) -> LocalSpeed:
    first, *rest = requests
    backend = LocalBackend()
    try:
        await backend.complete(first)
        start = time.perf_counter()
        replies = await asyncio.gather(*map(backend.complete, rest or [first]))
        seconds = max(time.perf_counter() - start, 1e-9)
    finally:
        await backend.close()
    written = sum(reply.tokens_out for reply in replies)
    return LocalSpeed(written / seconds, seconds / len(replies))
