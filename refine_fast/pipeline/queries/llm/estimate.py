"""What calls to come cost, before one is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .reply_log import Spent
from .settings import LLMSettings


@dataclass(frozen=True)
class Calls:
    """Calls to come. Tokens are those of ``count_tokens``."""

    calls: int
    tokens_in: int
    tokens_out: int
    tokens_out_most: int
    """If every reply has its longest length."""
    verdicts: int = 0
    """Of the calls, verdicts on queries; a chunk whose queries are all dropped needs none, so that
    this is the most there can be."""

    def __add__(self, others: Calls) -> Calls:
        return Calls(
            self.calls + others.calls,
            self.tokens_in + others.tokens_in,
            self.tokens_out + others.tokens_out,
            self.tokens_out_most + others.tokens_out_most,
            self.verdicts + others.verdicts,
        )


@dataclass(frozen=True, kw_only=True)
class Estimate(Calls):
    """The calls that remain, and what they cost."""

    cost: float | None
    """None without prices."""
    cost_most: float | None
    stops_after: int | None = None
    """About how many of the calls the limits allow; None if they allow all."""

    @classmethod
    def of(cls, calls: Calls, settings: LLMSettings, spent: Spent) -> Estimate:
        """The cost of calls at the settings' prices, within what their limits leave.

        Args:
            calls: the calls to come.
            settings: prices and limits.
            spent: what the run folder has spent already.
        """
        cost = settings.cost(calls.tokens_in, calls.tokens_out)
        limits = (
            (settings.max_calls, spent.calls, calls.calls),
            (
                settings.max_tokens,
                spent.tokens_in + spent.tokens_out,
                calls.tokens_in + calls.tokens_out,
            ),
            (settings.max_cost, spent.cost, cost),
        )
        shares = [
            max(0.0, limit - used) / needed
            for limit, used, needed in limits
            if limit is not None and needed
        ]
        return cls(
            **asdict(calls),
            cost=cost,
            cost_most=settings.cost(calls.tokens_in, calls.tokens_out_most),
            stops_after=int(calls.calls * min(shares)) if shares and min(shares) < 1 else None,
        )
