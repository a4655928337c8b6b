"""What goes to a backend and what comes back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One prompt for one model."""

    chunk_id: str
    model: str
    system: str
    user: str
    schema: dict[str, Any]
    max_tokens: int
    temperature: float | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More request fields that the user set."""
    shots: tuple[tuple[str, str], ...] = ()
    """Worked examples, (user, assistant), as earlier turns of the conversation."""
    lines: int | None = None
    """The reply is so many questions, one per line; None: what the prompt says."""
    starts: tuple[str, ...] = ()
    """Words that a line may begin with; empty: any. Only a model in this process can be held to
    it."""
    seed: int | None = None
    """Of sampling in this process; None: the server's own."""

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the reply: prompt, model and the user's parameters.

        The form in which the server accepts the request does not count; it is found at run time.
        """
        parts: list[Any] = [self.model, self.system, self.user, self.schema]
        parts += [self.max_tokens, self.temperature]
        if self.extra:  # replies that were paid for before this field existed keep their key
            parts.append(dict(self.extra))
        later = (self.shots, self.lines, self.starts, self.seed)
        if any(value not in ((), None) for value in later):
            parts.append(later)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat messages; an empty system message is left out."""
        system = [("system", self.system)] if self.system else []
        return _messages([*system, *self._turns])

    @property
    def messages_without_system(self) -> list[dict[str, str]]:
        """The same with the system message in the first of the user's, for models without a system
        role."""
        (_, first), *rest = self._turns
        return _messages([("user", "\n\n".join(filter(None, (self.system, first)))), *rest])

    @property
    def _turns(self) -> list[tuple[str, str]]:
        """(role, text) without the system message."""
        shots = [
            turn for asked, reply in self.shots for turn in (("user", asked), ("assistant", reply))
        ]
        return [*shots, ("user", self.user)]

    @property
    def tokens_in(self) -> int:
        """Estimated tokens of the prompt."""
        return sum(count_tokens(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Sent:
    """What is known of a request that an earlier start sent."""

    key: str
    chunk_id: str
    model: str


@dataclass(frozen=True)
class Reply:
    """One reply of a model; ``finish`` is "stop", "length" or what the server calls it."""

    text: str
    finish: str
    tokens_in: int
    tokens_out: int


class Failure(Exception):
    """A call without a reply.

    kind:
        "busy": 429 or 503; send less, later.
        "late": no reply in time; it may have been written, and paid for, all the same.
        "broken": 5xx, a lost connection or half a reply; try again.
        "wrong": this request cannot succeed.
        "fatal": no request can succeed.
    retry_after: seconds that the server asks to wait.
    status: of the HTTP answer, or of the error in it; None: nothing came back.
    """

    def __init__(
        self,
        kind: Literal["busy", "late", "broken", "wrong", "fatal"],
        message: str,
        retry_after: float | None = None,
        *,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
        self.status = status


class Backend(Protocol):
    """A model that answers requests: over HTTP, or in this process."""

    async def complete(self, request: Request) -> Reply:
        """The reply to the request.

        Raises:
            Failure: if there is none.
        """
        ...

    async def close(self) -> None:
        """Releases connections, or the model."""
        ...


def _messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns if text]


def count_tokens(text: str) -> int:
    """An upper estimate where the model's tokenizer is not at hand: 3.5 bytes per token.

    English has 4 to 4.5, German and source code about 3.5, Chinese 3 to 4. The server's own count
    replaces it with the first reply.
    """
    return math.ceil(len(text.encode()) / 3.5) + 4
