"""A csv file of results whose rows have a key: a re-run overwrites its own rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, ...], dict[str, Any]]


def read(path: Path, key: Sequence[str]) -> Rows:
    """The rows by the values of the columns ``key``; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[name] for name in key): dict(row) for row in csv.DictReader(file)}


def save(
    path: Path, key: Sequence[str], columns: Sequence[str], new: Iterable[Mapping[str, Any]]
) -> None:
    """Adds rows; those of equal keys are overwritten."""
    rows: dict[tuple[str, ...], Mapping[str, Any]] = dict(read(path, key))
    rows |= {tuple(str(row[name]) for name in key): row for row in new}
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows[one] for one in sorted(rows))
    temporary.replace(path)
