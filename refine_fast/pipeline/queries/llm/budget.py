"""Spending limits for calls to a language model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass
class Limits:
    """Most calls, tokens (prompts and replies) and cost; None: no limit."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None


class Budget:
    """Spending that never passes its limits.

    A call reserves the most that it can cost before it is made, and settles afterwards.

    Args:
        limits: the limits.
        price_in: price of a million prompt tokens.
        price_out: price of a million reply tokens.
        calls: calls that were made before; likewise ``tokens_in``, ``tokens_out`` and ``cost``.
    """

    def __init__(
        self,
        limits: Limits,
        price_in: float,
        price_out: float,
        calls: int = 0,
        tokens_in: int = 0,
        tokens_out: int = 0,
        cost: float = 0.0,
    ) -> None:
        self.limits = limits
        self._prices = price_in / 1e6, price_out / 1e6
        self.calls, self.tokens_in, self.tokens_out = calls, tokens_in, tokens_out
        self.cost = cost
        self._held = [0, 0]  # calls in flight, and their tokens
        self._held_cost = 0.0
        self._settled = asyncio.Condition()

    def hold(self, tokens_in: int, tokens_out: int, share: float = 1.0) -> str | None:
        """Reserves like ``reserve``, without waiting for calls in flight.

        ``share``: the part of the price that the call costs.
        """
        if reason := self._exceeded(tokens_in, tokens_out, share):
            return reason
        self._hold(tokens_in, tokens_out, share)
        return None

    def hold_sent(self) -> None:
        """Counts a call that was sent by an earlier start, whatever the limits."""
        self._hold(0, 0)

    async def reserve(self, tokens_in: int, tokens_out: int) -> str | None:
        """Reserves a call with these tokens, or returns the name of the limit that forbids it.

        Waits while calls in flight may still leave room.
        """
        async with self._settled:
            while reason := self._exceeded(tokens_in, tokens_out):
                if self._held[0] == 0:
                    return reason
                await self._settled.wait()
            self._hold(tokens_in, tokens_out)
        return None

    def _hold(self, tokens_in: int, tokens_out: int, share: float = 1.0) -> None:
        self._held[0] += 1
        self._held[1] += tokens_in + tokens_out
        self._held_cost += share * self._price(tokens_in, tokens_out)

    async def settle(
        self,
        reserved: tuple[int, int],
        used: tuple[int, int],
        calls: int = 1,
        share: float = 1.0,
    ) -> None:
        """Replaces what a call had reserved, (tokens in, tokens out), by what it used; ``calls`` is
        0 if it was never made."""
        async with self._settled:
            self._held[0] -= 1
            self._held[1] -= sum(reserved)
            self._held_cost -= share * self._price(*reserved)
            self.calls += calls
            self.tokens_in += used[0]
            self.tokens_out += used[1]
            self.cost += share * self._price(*used)
            self._settled.notify_all()

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return tokens_in * self._prices[0] + tokens_out * self._prices[1]

    def _exceeded(self, tokens_in: int, tokens_out: int, share: float = 1.0) -> str | None:
        calls = self.calls + self._held[0] + 1
        tokens = self.tokens_in + self.tokens_out + self._held[1] + tokens_in + tokens_out
        cost = self.cost + self._held_cost + share * self._price(tokens_in, tokens_out)
        if self.limits.calls is not None and calls > self.limits.calls:
            return "max_calls"
        if self.limits.tokens is not None and tokens > self.limits.tokens:
            return "max_tokens"
        if self.limits.cost is not None and cost > self.limits.cost:
            return "max_cost"
        return None
