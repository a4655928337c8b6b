"""What the stages that ask a language model show while it replies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import RefineFastWarning
from ..queries.llm import Account, CallProgress, GradingAccount, LLMSettings
from ..queries.llm.dispatch import Watch

if TYPE_CHECKING:
    from ..console import Console


@contextmanager
def calls_shown(console: Console, settings: LLMSettings, label: str) -> Iterator[Watch]:
    """Shows the progress that the function it yields is called with. After Ctrl-C, it says which
    replies are kept."""
    latest: list[CallProgress] = []
    with console.progress(label) as advance:

        def watch(state: CallProgress) -> None:
            latest[:] = [state]
            cost = f", cost {state.cost:.4f}" if settings.price_in or settings.price_out else ""
            reused = f", {state.reused} reused" if state.reused else ""
            note = f"{state.rate:.1f}/s{cost}, {state.failed} failed, {state.concurrency} at a time"
            # Reused replies would make the remaining time look short.
            done = state.done + state.failed - state.reused
            advance(done, state.total - state.reused, note + reused)

        try:
            yield watch
        except KeyboardInterrupt:
            for state in latest:
                console.say(
                    f"  {state.done:,} of {state.total:,} replies are on disk "
                    "and will not be requested again"
                )
            raise


def spent_in_words(account: Mapping[str, Any]) -> str:
    """Calls, tokens and cost of an account."""
    cost = "" if account["cost"] is None else f", cost {account['cost']:,.4f}"
    return (
        f"{account['calls']:,} calls, {account['tokens_in']:,} tokens in and "
        f"{account['tokens_out']:,} out{cost}"
    )


def to_ask_again(account: Mapping[str, Any]) -> int:
    """How many requests without a reply another run may get one for."""
    return int(account.get("failed", 0)) - int(account.get("rejected", 0))


def show_missing(
    console: Console, account: Account | GradingAccount, *, asked: str, done: str, lack: str
) -> None:
    """Says what a limit left out, and warns of what got no reply.

    Args:
        console: where the limit is said.
        account: of the calls.
        asked: what a request is about, such as "chunks".
        done: how many of how many have a reply, such as "3 of 4".
        lack: what the others lack, such as "reply".
    """
    if account.stopped:
        console.say(
            f"  stopped by {account.stopped} after {done} {asked}; raise the limit to resume"
        )
    if account.failures:
        reason, count = next(iter(account.failures.items()))
        again = account.failed - account.rejected
        warnings.warn(
            f"{account.failed} {asked} got no {lack} (most often, {count} times: {reason}); "
            + (
                f"the next run asks for {again} of them again."
                if again
                else "asked again they would fail again."
            ),
            RefineFastWarning,
            stacklevel=3,
        )
