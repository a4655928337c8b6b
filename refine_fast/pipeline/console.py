"""Output of the command line: messages and progress bars on stderr, results on stdout."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
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
from .ranks import may_report
from .workers import Hear

LINE_SECONDS = 60.0
"""Time between two lines of progress where there is no terminal, as under nohup."""


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
    counted = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,}" if counted else str(value)


class Console:
    """Where a command's messages and results go."""

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        """Chooses what is shown.

        Args:
            quiet: print only warnings and errors.
            json: print the result as one JSON object instead of tables.
        """
        # "[llm]" and "llm:question:" are text.
        plain = partial(RichConsole, highlight=False, markup=False, emoji=False)
        self.err = plain(stderr=True, soft_wrap=True)
        self.out = plain()
        self.quiet = quiet
        self.json = json

    def say(self, line: str) -> None:
        """Prints a line unless quiet."""
        if not self.quiet:
            self.err.print(line)

    def warn(self, line: str) -> None:
        """Prints a warning."""
        self.err.print(f"warning: {line}", style="yellow")

    def error(self, line: str) -> None:
        """Prints an error, unless another rank of the run has reported one."""
        if not may_report():
            return
        self.err.print(f"error: {line}", style="bold red")

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Prints each RefineFastWarning as a line and silences other libraries' warnings."""

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            if issubclass(category, RefineFastWarning):
                self.warn(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RefineFastWarning)
            warnings.showwarning = show
            yield

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """A progress bar with the time left, where there is no terminal a line each
        ``LINE_SECONDS``. Both can be nested.

        Yields:
            ``advance(done, total, note="")``, which moves the bar.
        """
        if not self.err.is_terminal:
            yield _Lines(label, self.say).advance
            return
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
            disable=self.quiet,
        )
        with bar:
            task = bar.add_task(label, total=None, note="")
            yield lambda done, total, note="": bar.update(
                task, completed=done, total=total, note=note
            )

    def result(self, value: dict[str, Any], *tables: Table) -> None:
        """Prints the result of a command on stdout: ``value`` as JSON, or the tables."""
        if self.json:
            self.out.print_json(json.dumps(value, default=str))
        elif not self.quiet:
            for table in tables:
                self.out.print(table)


class _Lines:
    """Says now and then how far a task is."""

    def __init__(self, label: str, say: Callable[[str], None]) -> None:
        self.label = label
        self.say = say
        self.told = time.monotonic()
        self.first: tuple[float, int] | None = None
        """When the task was first heard of, and what was done then: a task may resume."""

    def advance(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, done)
        if now - self.told < LINE_SECONDS or done >= total:
            return
        self.told = now
        since, before = self.first
        facts = [f"{done:,} of {total:,}"]
        if done > before:
            seconds = (now - since) / (done - before) * (total - done)
            facts.append(f"about {timedelta(seconds=round(seconds))} left")
        self.say(f"  {self.label}: {', '.join([*facts, note] if note else facts)}")


class DistantConsole(Console):
    """The console of a worker: another process shows what it is told here."""

    def __init__(self, hear: Hear) -> None:
        super().__init__(quiet=True)
        self._hear = hear

    def say(self, line: str) -> None:
        """See ``Console.say``."""
        self._hear("say", line)

    def warn(self, line: str) -> None:
        """See ``Console.warn``."""
        self._hear("warn", line)

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """See ``Console.progress``."""
        yield lambda done, total, note="": self._hear("progress", done, total, note)
