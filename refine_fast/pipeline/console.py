"""What a run tells its user: lines and progress bars on stderr, results on stdout."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..errors import RefineFastWarning

Advance = Callable[[int, int], None]
"""Called with (done, total)."""


def facts_table(facts: Mapping[str, Any]) -> Table:
    """A row for each fact."""
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _fact(value))
    return table


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_fact(count)} {what}" for what, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    return f"{value:,}" if isinstance(value, int | float) else str(value)


class Console:
    """``quiet`` leaves errors and warnings only; ``json`` prints the result as one JSON object instead of tables."""

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        self.err = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.out = RichConsole(highlight=False, markup=False)  # [llm] is text
        self.quiet = quiet
        self.json = json

    def say(self, line: str) -> None:
        if not self.quiet:
            self.err.print(line, markup=False)

    def warn(self, line: str) -> None:
        self.err.print(f"warning: {line}", style="yellow", markup=False)

    def error(self, line: str) -> None:
        self.err.print(f"error: {line}", style="bold red", markup=False)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Shows each warning of ours as a line, and keeps other libraries' to themselves."""

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            if issubclass(category, RefineFastWarning):
                self.warn(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RefineFastWarning)
            warnings.showwarning = show  # type: ignore[assignment]
            yield

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """``advance(done, total, note="")`` moves a bar that shows the time left, on a terminal; elsewhere nothing is shown."""
        bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.err,
            transient=True,
            disable=self.quiet or not self.err.is_terminal,
        )
        with bar:
            task = bar.add_task(label, total=None, note="")
            yield lambda done, total, note="": bar.update(
                task, completed=done, total=total, note=note
            )

    def result(self, value: dict[str, Any], *tables: Table) -> None:
        if self.json:
            self.out.print_json(json.dumps(value, default=str))
        elif not self.quiet:
            for table in tables:
                self.out.print(table)
