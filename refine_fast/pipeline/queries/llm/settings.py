"""What is asked of which model, and what it may cost: one immutable value, checked when it is made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ....errors import RefineFastError

IN_PROCESS = "transformers"
"""The ``url`` that means: generate in this process with transformers, on the GPU if there is one."""


DEFAULT_MIX = {"question": 0.5, "keywords": 0.2, "claim": 0.15, "how-to": 0.15}


@dataclass(frozen=True)
class LLMSettings:
    """The limits count everything that the store of replies has recorded, so a command that is repeated never spends more than it says.
    Prices are in any currency per million tokens. The key is read from the environment when it is used, and is in no field."""

    url: str
    models: tuple[str, ...]
    """More than one: the chunks are split between them, by a hash of the chunk."""
    key_env: str = "OPENAI_API_KEY"
    prompt: Path | None = None
    mix: Mapping[str, float] = field(default_factory=lambda: DEFAULT_MIX)
    per_chunk: int = 4
    temperature: float | None = None
    """None: what the server does by itself."""
    max_reply_tokens: int = 512
    concurrency: int = 64
    timeout: float = 120.0
    """Seconds that one call may take in all."""
    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    duplicates: Literal["near", "exact", "keep"] = "near"
    """Which queries that say what an earlier one says are dropped: near ones and exact ones, exact ones, none."""
    round_trip: int = 0
    """Keep a query only if the base encoder finds its chunk within this many; 0 turns the filter off."""
    judge: bool = False
    """Ask the model whether the chunk answers the query, one further call for each chunk."""
    judge_prompt: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.url != IN_PROCESS:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise RefineFastError(
                    f"llm: {self.url!r} is no endpoint; give a URL such as http://localhost:8000/v1, or {IN_PROCESS}."
                )
            if parts.username or parts.password or parts.query:
                remedy = f"put the key in the environment variable {self.key_env}"
                raise RefineFastError(
                    f"llm: the URL of {parts.hostname} carries credentials or parameters; {remedy}."
                )
        if not re.fullmatch(
            r"[A-Za-z_]\w*", self.key_env
        ):  # most likely the key itself: not to be repeated
            raise RefineFastError(
                "llm_key_env: this is no environment variable's name; give one, and keep the key in the variable."
            )
        if not self.models or not all(self.models):
            raise RefineFastError("llm_model: no model named; add --llm-model NAME.")
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise RefineFastError(
                f"llm_mix: {dict(self.mix)} is no mix; give weights such as question=0.6,claim=0.4."
            )
        for name in ("per_chunk", "max_reply_tokens", "concurrency", "timeout"):
            if getattr(self, name) <= 0:
                raise RefineFastError(
                    f"{name}: {getattr(self, name)} is too small; give a positive number."
                )
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise RefineFastError(
                "max_cost: a cost limit needs prices; give --price-in and --price-out per million tokens."
            )

    def key(self) -> str | None:
        key = os.environ.get(self.key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", key):  # an HTTP library would quote it in its error
            raise RefineFastError(
                f"{self.key_env}: its value holds spaces or other characters that no key has; set it anew."
            )
        return key or None

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """None where no prices are given."""
        return (
            (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
            if self.price_in or self.price_out
            else None
        )
