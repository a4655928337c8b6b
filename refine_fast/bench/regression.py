"""``--check``: whether an operation lost a fifth of its lead over a peer.

The lead is the peer's CPU seconds over ours, each sample beside one of the other in the same
round, so the speed of the machine cancels out; CPU time does not count what neighbours take. The
median of these ratios is compared with the recorded lead. Rounds go on until the 95% interval of
the median lies on one side of the limit: a quiet machine needs few, a busy one many.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .compare import latest
from .measuring import sample
from .operation import Contender, Operation
from .operations import OPERATIONS
from .rows import Row, has_rows, load, place, rows
from .suite import OURS

KEPT = 0.84
"""The share of a recorded lead that must be left: above four fifths by what noise may hide, so that
the loss of a fifth fails, and so does a kernel that takes 30% longer in an operation of which it is
85%."""
MIN_ROUNDS, MAX_ROUNDS = 7, 41
RECORDED_ROUNDS = 25
MIN_SAMPLE = 0.1
"""CPU seconds."""
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
        """Whether enough of the lead may be left, or there is nothing to compare with: a machine
        too noisy to tell is no reason to fail."""
        return self.recorded is None or self.lead.high >= KEPT * self.recorded


def mode_of(op: Operation) -> str:
    """The mode of the row that records an operation's lead."""
    return f"check {op.mode}"


def recorded_lead(known: Sequence[Row], op: Operation, isa: str, device: str) -> float | None:
    """The lead on record for this level of this device, at the shape that is checked: another
    device's differs."""
    shape = {**op.shape, **(op.check or {})}
    subject = (op.name, mode_of(op), OURS, isa, device)
    found = [
        row.ratio_to_peer
        for row in known
        if (row.op, row.mode, row.provider, row.isa, row.device) == subject
        and row.sizes == shape
        and row.ratio_to_peer
    ]
    return min((1 / ratio for ratio in found), default=None)


def checked_operations() -> list[Operation]:
    """Those that have a check."""
    return [op for modes in OPERATIONS.values() for op in modes if op.check is not None]


def check(
    op: Operation,
    recorded: float | None,
) -> Verdict:
    """Measures the lead of one operation in float32 on one thread.

    Args:
        op: the operation.
        recorded: the lead on record, if any.
    """
    place()
    shape = {**op.shape, **(op.check or {})}
    ours, peer = op.contender(OURS), op.contender(op.check_peer)
    with op.inputs(shape, "fp32", "cpu") as inputs:

        def cost(contender: Contender, calls: int) -> float:
            return sample(partial(repeat, contender.run, inputs, calls)).cpu_seconds / calls

        cost(ours, 1), cost(peer, 1)  # not counted: imports, first touches
        # enough calls to last, so that neither the clock nor an interrupt decides
        calls = {one.name: math.ceil(MIN_SAMPLE / cost(one, 1)) for one in (ours, peer)}
        turns = itertools.cycle(((ours, peer), (peer, ours)))

        def costs() -> tuple[float, float]:
            taken = {one.name: cost(one, calls[one.name]) for one in next(turns)}
            return taken[ours.name], taken[peer.name]

        limit = None if recorded is None else KEPT * recorded
        return Verdict(op, measure_lead(costs, limit), recorded)


def repeat(run: Callable[[Any], object], inputs: Any, calls: int) -> None:
    """So many calls."""
    for _ in range(calls):
        run(inputs)


def lead_rows(verdict: Verdict) -> list[Row]:
    """The row that records a lead."""
    op, lead = verdict.op, verdict.lead
    samples = {OURS: [1 / ratio for ratio in lead.ratios], op.check_peer: [1.0]}
    found = rows(
        samples, op=op.name, mode=mode_of(op), dtype="fp32", shape={**op.shape, **(op.check or {})},
        metric="cpu_seconds", peer=op.check_peer,
    )  # fmt: skip
    return found[:1]


def result_files(folder: Path) -> list[Path]:
    """The files of rows in a folder of results, one for each machine; other files have other
    columns."""
    return [path for path in sorted(folder.glob("*.csv")) if has_rows(path)]


def known_rows(folder: Path) -> list[Row]:
    """The latest rows of every machine in a folder of results."""
    return latest(row for path in result_files(folder) for row in load(path))
