"""``--compare``: the rows of a run beside those of an earlier file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import COLUMNS, VALUES, VERSIONS, Row, as_text

COMPARED = ("seconds", "cpu_seconds", "peak_mb")


@dataclass(frozen=True)
class Change:
    """A row now and then.

    Attributes:
        now: the row of this run.
        then: the earlier one.
    """

    now: Row
    then: Row

    @property
    def ratio(self) -> float:
        """The median now over the median then."""
        return self.now.p50 / self.then.p50 if self.then.p50 else float("nan")

    @property
    def of_lead(self) -> float | None:
        """The ratio to the peer now over that then: above 1, ours lost ground. It means something
        across machines and days, where ``ratio`` does not."""
        if not self.now.ratio_to_peer or not self.then.ratio_to_peer:
            return None
        return self.now.ratio_to_peer / self.then.ratio_to_peer


def subject(row: Row) -> tuple[str, ...]:
    """What a row is about: its key without the versions."""
    text = as_text(row)
    left_out = VALUES | VERSIONS
    return tuple(text[name] for name in COLUMNS if name not in left_out)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of the rows about one subject, by several versions, the one that was measured last, in
    their order."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.timestamp >= found.setdefault(subject(row), row).timestamp:
            found[subject(row)] = row
    return list(found.values())


def compare(now: Sequence[Row], then: Sequence[Row]) -> list[Change]:
    """The rows of time and memory that both have; of several versions, the latest one counts."""
    before = {subject(row): row for row in latest(then)}
    return [
        Change(row, before[subject(row)])
        for row in now
        if row.metric in COMPARED and subject(row) in before
    ]
