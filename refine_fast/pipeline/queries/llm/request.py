"""What goes to a backend and what comes back."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One question to one model. ``key`` is a hash of all that decides the reply: the rendered prompt with the chunk in it, the model and
    the parameters that the user set. The form in which the server is asked for JSON is no part of it, for it is found out at run time."""

    chunk_id: str
    model: str
    system: str
    user: str
    schema: dict[str, Any]
    max_tokens: int
    temperature: float | None

    @cached_property
    def key(self) -> str:
        parts = [self.model, self.system, self.user, self.schema, self.max_tokens, self.temperature]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": role, "content": text}
            for role, text in (("system", self.system), ("user", self.user))
            if text
        ]

    @property
    def tokens_in(self) -> int:
        return count_tokens(self.system) + count_tokens(self.user)


@dataclass(frozen=True)
class Reply:
    text: str
    finish: str
    tokens_in: int
    tokens_out: int


class Failure(Exception):
    """A call without a reply. ``busy``: 429, 503, a time-out: ask less, later. ``broken``: 5xx, a lost connection, half a reply: ask again.
    ``wrong``: this request will never do. ``fatal``: no request will."""

    def __init__(
        self,
        kind: Literal["busy", "broken", "wrong", "fatal"],
        message: str,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class Backend(Protocol):
    """A model that answers requests: over HTTP, or in this process."""

    async def complete(self, request: Request) -> Reply:
        """The reply, or a :class:`Failure`."""
        ...

    async def close(self) -> None: ...


def count_tokens(text: str) -> int:
    """A careful estimate where the model's tokenizer is not at hand: 3.5 bytes a token. English has 4 to 4.5, German and source code about
    3.5, Chinese 3 to 4; what the server reports replaces it as soon as there is a reply."""
    return math.ceil(len(text.encode()) / 3.5) + 4
