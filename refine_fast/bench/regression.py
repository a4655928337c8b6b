"""``--check``: whether an operation lost a fifth of its lead over a peer.

The lead is the peer's CPU seconds over ours, each sample beside one of the other in the same
round, so the speed of the machine cancels out; CPU time does not count what neighbours take. The
median of these ratios is compared with the recorded lead. Rounds go on until the 95% interval of
the median lies on one side of the limit: a quiet machine needs few, a busy one many.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .measuring import sample
from .operation import Contender, Operation
from .operations import OPERATIONS
from .rows import Row, load, rows
from .suite import OURS

KEPT = 0.8
"""The share of a recorded lead that must be left."""
MIN_ROUNDS, MAX_ROUNDS = 7, 41
RECORDED_ROUNDS = 25
MODE = "check"
"""The mode of the rows that record leads."""

Costs = Callable[[], tuple[float, float]]
"""One round: CPU seconds of ours and of the peer."""


@dataclass(frozen=True)
class Lead:
    """A measured lead.

    Attributes:
        ratios: the peer's time over ours, by round.
        low: the lower end of the 95% interval of their median.
        high: the upper one.
    """

    ratios: tuple[float, ...]
    low: float
    high: float

    @property
    def median(self) -> float:
        """The lead."""
        return statistics.median(self.ratios)


def lead_of(ratios: Sequence[float]) -> Lead:
    """The interval is that of the sign test: order statistics at rank n/2 -+ 0.98 sqrt(n)."""
    ranked, n = sorted(ratios), len(ratios)
    k = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return Lead(tuple(ratios), ranked[k], ranked[n - 1 - k])


def measure_lead(costs: Costs, limit: float | None) -> Lead:
    """Rounds until the lead is known to be above or below the limit.

    Args:
        costs: measures one round.
        limit: the least lead that passes; None: ``RECORDED_ROUNDS`` rounds.
    """
    ratios: list[float] = []
    while True:
        ours, peer = costs()
        ratios.append(peer / ours)
        if len(ratios) < MIN_ROUNDS:
            continue
        lead = lead_of(ratios)
        if limit is None:
            if len(ratios) >= RECORDED_ROUNDS:
                return lead
        elif lead.low > limit or lead.high < limit or len(ratios) >= MAX_ROUNDS:
            return lead


@dataclass(frozen=True)
class Verdict:
    """On one operation.

    Attributes:
        op: the operation.
        lead: what was measured.
        recorded: the lead on record; None where this kind of machine has none.
    """

    op: Operation
    lead: Lead
    recorded: float | None

    @property
    def passed(self) -> bool:
        """Whether enough of the lead is left, or there is nothing to compare with."""
        return self.recorded is None or self.lead.median >= KEPT * self.recorded


def recorded_lead(known: Sequence[Row], op: Operation, isa: str, device: str) -> float | None:
    """The lead on record for this level: of this device, else of another one, the smallest."""
    found = [
        row
        for row in known
        if (row.op, row.mode, row.provider, row.isa) == (op.name, MODE, OURS, isa)
        and row.ratio_to_peer
    ]
    own = [row for row in found if row.device == device] or found
    return min((1 / row.ratio_to_peer for row in own if row.ratio_to_peer), default=None)


def checked_operations() -> list[Operation]:
    """Those that have a check."""
    return [op for modes in OPERATIONS.values() for op in modes if op.check is not None]


def check(
    op: Operation,
    recorded: float | None,
    slowed: Callable[[Contender], Contender] = lambda one: one,
) -> Verdict:
    """Measures the lead of one operation in float32 on one thread.

    Args:
        op: the operation.
        recorded: the lead on record, if any.
        slowed: replaces ours, for the tests.
    """
    shape = {**op.shape, **(op.check or {})}
    ours, peer = slowed(op.contender(OURS)), op.contender(op.check_peer)
    with op.inputs(shape, "fp32", "cpu") as inputs:
        turn = 0

        def cost(contender: Contender) -> float:
            if op.before is not None:
                op.before(inputs)
            return sample(partial(contender.run, inputs)).cpu_seconds

        def costs() -> tuple[float, float]:
            nonlocal turn
            turn += 1
            if turn % 2:
                mine = cost(ours)
                return mine, cost(peer)
            theirs = cost(peer)
            return cost(ours), theirs

        costs()  # not counted: imports, first touches
        limit = None if recorded is None else KEPT * recorded
        return Verdict(op, measure_lead(costs, limit), recorded)


def lead_rows(verdict: Verdict) -> list[Row]:
    """The row that records a lead."""
    op, lead = verdict.op, verdict.lead
    samples = {OURS: [1 / ratio for ratio in lead.ratios], op.check_peer: [1.0]}
    found = rows(
        samples, op=op.name, mode=MODE, dtype="fp32", shape={**op.shape, **(op.check or {})},
        metric="cpu_seconds", peer=op.check_peer,
    )  # fmt: skip
    return found[:1]


def known_rows(folder: Path) -> list[Row]:
    """The rows of every machine in a folder of results."""
    names = (
        path for path in sorted(folder.glob("*.csv")) if path.name not in ("recipe.csv", "runs.csv")
    )
    return [row for path in names for row in load(path)]
