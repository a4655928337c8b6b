"""``refine-fast bench``: what the flags ask for, as tables that a person can read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.table import Table

import refine_fast as rf

from ..errors import RefineFastError
from ..profiling import EVENTS
from . import machine, regression, rows
from .compare import Change, compare
from .flags import refuse_ignored
from .measuring import percentiles
from .operation import Operation, Shape, parse_shape
from .operations import OPERATIONS
from .profile import Profile, profile
from .roofline import Rates
from .suite import OURS, Measured, Task, measure, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..pipeline.console import Console

RESULTS = Path("benchmarks/results")
FAILED = 1
MAX_THREADS = 1024
QUICK_ROUNDS = 3
"""Also the most rounds of an operation that --quick gives."""


def bench(options: argparse.Namespace, console: Console) -> int:
    """Runs the command and returns its exit code."""
    refuse_ignored(options)
    folder: Path = options.out or (RESULTS if RESULTS.is_dir() else Path("refine-fast-bench"))
    if options.report:
        from .report import write_report

        for path in write_report(Path(), folder):
            console.say(f"wrote {path}")
        return 0
    with settings(options):
        if options.check:
            return check(folder, console, record=options.record)
        tasks = tasks_of(options)
        if options.profile is not None:
            return show_profiles(tasks, options.profile, console)
        return run(tasks, folder, options.compare, console)


@contextmanager
def settings(options: argparse.Namespace) -> Iterator[None]:
    """The threads and the CPU level that the flags name, for the time of the command."""
    threads, level = torch.get_num_threads(), rf.isa()
    asked = 1 if options.check else options.threads
    if asked is not None and asked < 1:
        raise RefineFastError(f"--threads must be an integer >= 1 (got {asked}).")
    if asked is not None and asked > MAX_THREADS:
        raise RefineFastError(f"--threads must be at most {MAX_THREADS} (got {asked}).")
    if options.rounds is not None and options.rounds < 1:
        raise RefineFastError(f"--rounds must be an integer >= 1 (got {options.rounds}).")
    if options.isa is not None and options.isa not in rf.available_isas():
        raise RefineFastError(
            f"--isa must be one of {', '.join(rf.available_isas())} on this machine "
            f"(got {options.isa!r})."
        )
    torch.set_num_threads(asked or threads)
    rf.force_isa(options.isa or level)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        rf.force_isa(level)


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """What the flags ask for.

    Raises:
        RefineFastError: a flag names what does not exist or does not go together.
    """
    names: Sequence[str] = options.operations
    for name in names:
        if name not in OPERATIONS:
            raise RefineFastError(
                f"bench: unknown operation {name!r}; the operations are {', '.join(OPERATIONS)}."
            )
    if (options.shape, options.mode) != (None, None) and len(names) != 1:
        raise RefineFastError("--shape and --mode need exactly one operation, such as info_nce.")
    names = names or [name for name in OPERATIONS if name != "run" or options.full]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tasks = []
    for name in names:
        for op in modes(OPERATIONS[name], options.mode, full=options.full):
            dtype = options.dtype or op.dtypes[0]
            if dtype not in op.dtypes:
                raise RefineFastError(
                    f"--dtype: {op.title} takes {', '.join(op.dtypes)} (got {dtype!r})."
                )
            rounds = options.rounds or (
                min(op.rounds, QUICK_ROUNDS) if options.quick else op.rounds
            )
            only = tuple(options.only)
            tasks += [
                Task(op, shape, dtype, device, rounds, options.quick, only)
                for shape in shapes(op, options)
            ]
    return tasks


def modes(all_modes: Sequence[Operation], mode: str | None, *, full: bool) -> list[Operation]:
    """The modes of an operation that take part."""
    if mode is None:
        return [op for op in all_modes if full or op.by_default]
    found = [op for op in all_modes if op.mode == mode]
    if not found:
        known = ", ".join(repr(op.mode) for op in all_modes)
        raise RefineFastError(f"--mode: {all_modes[0].name} has the modes {known} (got {mode!r}).")
    return found


def shapes(op: Operation, options: argparse.Namespace) -> list[Shape]:
    """The shapes to measure."""
    whole: Shape = {**op.shape, **op.quick} if options.quick else op.shape
    if options.shape is not None:
        given = parse_shape(options.shape, op.shape)
        if op.square and "B" in given and "N" not in given:
            given["N"] = given["B"]
        asked = {**whole, **given}
        if op.square and asked["N"] < asked["B"]:
            raise RefineFastError(
                f"--shape: N must be at least B={asked['B']}, a document for each query "
                f"(got {asked['N']})."
            )
        return [asked]
    return [whole, *({**whole, **change} for change in op.full if options.full)]


def run(tasks: list[Task], folder: Path, earlier: Path | None, console: Console) -> int:
    """Measures the tasks, shows each one and keeps its rows."""
    then = rows.load(earlier) if earlier is not None else []
    rows.check_folder(folder)
    tables: list[Table] = []
    made: list[rows.Row] = []
    for i, task in enumerate(tasks):
        if task.op.needs and find_spec(task.op.needs.replace("-", "_")) is None:
            console.say(
                f"{task.op.title} is left out: it needs the package {task.op.needs}; "
                f"pip install {task.op.needs}"
            )
            continue
        where = f"{task.op.title}, {i + 1} of {len(tasks)}"
        with status(console, where) as say:
            found = measure(task, progress=lambda name, say=say: say(name))  # type: ignore[misc]
        new = rows_of(found)
        made += new
        path = rows.save(new, folder)
        tables.append(measured_table(found))
        if not console.json and not console.quiet:
            console.out.print(machine_line(found.rates, task))
            console.out.print(tables[-1])
            for sentence in verdicts(found):
                console.out.print(sentence)
            console.out.print()
    if made:
        console.say(f"rows: {path}")
    changes = compare(made, then)
    result = {"rows": [asdict(row) for row in made]}
    if earlier is not None:
        console.result(result, changes_table(changes, earlier))
    elif console.json:
        console.result(result)
    return 0


@contextmanager
def status(console: Console, where: str) -> Iterator[Any]:
    """A spinner on a terminal that names what runs; yields the function that changes the name."""
    err: RichConsole = console.err
    if console.quiet or not err.is_terminal:
        yield lambda name: None
        return
    with err.status(where) as spinner:
        yield lambda name: spinner.update(f"{where}: {name}")


def machine_line(found: Rates, task: Task) -> str:
    """The machine and its roofline."""
    threads = torch.get_num_threads()
    return (
        f"{machine.device_name()} · {rf.isa()} · {threads} thread{'s' if threads > 1 else ''} · "
        f"torch {torch.__version__} · roofline in {task.dtype}: {found.matrix / 1e9:,.0f} GFLOP/s, "
        f"copy {found.copy / 1e9:.1f} GB/s"
    )


def shown_shape(shape: Shape) -> str:
    """``B=2,048 N=2,048 D=384``."""
    return " ".join(f"{name}={value:,}" for name, value in shape.items())


def measured_table(found: Measured) -> Table:
    """The contenders, fastest first; ± is half of the distance from p20 to p80, and roof the
    fraction of the roofline."""
    task, op = found.task, found.task.op
    title = f"{op.title} · {task.dtype} · {shown_shape(task.shape)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    work = op.work(task.shape, task.dtype)
    has_rate = bool(work.flops or work.bytes)
    table.add_column("contender", min_width=28)
    headers = ("seconds", "±", "CPU s", "MiB", "roof", "to ours")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    ours = found.middle(OURS).seconds
    for name in sorted(found.samples, key=lambda name: found.middle(name).seconds):
        middle = found.middle(name)
        p20, _, p80 = percentiles([one.seconds for one in found.samples[name]])
        peak = f"{found.peaks[name]:,.0f}" if name in found.peaks else ""
        fraction = f"{found.fraction(name):.0%}" if has_rate else ""
        floor = " (floor)" if name == op.floor else "" if op.contender(name).exact else " *"
        table.add_row(
            f"{name}{floor}",
            f"{middle.seconds:.4g}",
            f"{(p80 - p20) / 2 / middle.seconds:.0%}",
            f"{middle.cpu_seconds:.4g}",
            peak,
            fraction,
            f"{middle.seconds / ours:.2f}x",
            style="bold" if name == OURS else "",
        )
    return table


def verdicts(found: Measured) -> list[str]:
    """Who was faster, what the marks mean, and who did not take part."""
    op = found.task.op
    ours = found.middle(OURS).seconds
    peers = [name for name in found.samples if name not in (OURS, op.floor)]
    said = []
    for faster, words in ((True, "faster than"), (False, "slower than")):
        ratios = {name: found.middle(name).seconds / ours for name in peers}
        chosen = {n: r if faster else 1 / r for n, r in ratios.items() if (r >= 1) == faster}
        if chosen:
            listed = ", ".join(f"{name} ({r:.1f}x)" for name, r in chosen.items())
            said.append(f"refine_fast was {words} {listed}")
    starred = [n for n in peers if not op.contender(n).exact]
    said += [f"* {name}: {op.contender(name).about}" for name in starred]
    if found.absent:
        listed = "; ".join(f"{name} ({why})" for name, why in found.absent.items())
        said.append(f"not measured: {listed}")
    return said


def changes_table(changes: Sequence[Change], earlier: Path) -> Table:
    """Now and then."""
    table = Table(title=f"beside {earlier} ({len(changes)} rows in both)", title_justify="left")
    for header in ("what", "contender", "metric"):
        table.add_column(header)
    for header in ("then", "now", "now / then", "ratio to peer, now / then"):
        table.add_column(header, justify="right")
    for change in changes:
        now, lead = change.now, change.of_lead
        table.add_row(
            f"{now.op} ({now.mode}) {now.dtype} {now.shape}",
            now.provider,
            now.metric,
            f"{change.then.p50:.4g}",
            f"{now.p50:.4g}",
            f"{change.ratio:.2f}",
            "" if lead is None or now.provider == now.peer else f"{lead:.2f} ({now.peer})",
        )
    return table


def show_profiles(tasks: list[Task], trace: Path, console: Console) -> int:
    """Profiles each task; with several, the trace's name gets the operation's."""
    if trace.is_dir():
        raise RefineFastError(f"--profile: {trace} is a folder; give a file.")
    if not trace.parent.is_dir():
        raise RefineFastError(f"--profile: the folder of {trace} does not exist; create it.")
    found: dict[str, Any] = {}
    tables: list[Table] = []
    for task in tasks:
        several = len(tasks) > 1
        path = trace.with_stem(f"{trace.stem}-{task.op.name}-{len(tables)}") if several else trace
        done = profile(task.op, task.shape, task.dtype, task.device, path)
        tables.append(profile_table(task, done))
        what = f"{task.op.title} {task.dtype} {shown_shape(task.shape)}"
        found[what] = {
            "seconds": done.seconds,
            "stages": {name: own for name, own, _, _ in done.table()},
            "other_threads": done.stages.others,
            "covered": done.covered,
            "trace": str(path),
        }
        console.say(f"trace of {task.op.title}: {path} (open it at https://ui.perfetto.dev)")
        if done.dropped:
            console.say(f"it has the first {EVENTS:,} stages and lacks the last {done.dropped:,}")
    console.result(found, *tables)
    return 0


def profile_table(task: Task, done: Profile) -> Table:
    """The stages of a call."""
    title = f"{task.op.title} · {task.dtype} · {shown_shape(task.shape)} · {done.seconds:.4g} s"
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    for header in ("seconds", "share", "in other threads, s"):
        table.add_column(header, justify="right")
    for name, own, share, others in done.table():
        table.add_row(name, f"{own:.4f}", f"{share:.1%}", f"{others:.4f}" if others else "")
    table.add_section()
    table.add_row("the call", f"{done.seconds:.4f}", "100%", "")
    return table


def check(folder: Path, console: Console, *, record: bool) -> int:
    """Checks, or records, the leads."""
    known = regression.known_rows(folder)
    device, failed = machine.device_name(), False
    table = Table(title="lead over the peer, CPU seconds on one thread", title_justify="left")
    table.add_column("operation")
    table.add_column("peer")
    for header in ("recorded", "limit", "now", "95% interval", "rounds", "verdict"):
        table.add_column(header, justify="right")
    result = {}
    for op in regression.checked_operations():
        recorded = None if record else regression.recorded_lead(known, op, rf.isa(), device)
        with status(console, op.title):
            verdict = regression.check(op, recorded)
        if record:
            rows.save(regression.lead_rows(verdict), folder)
        lead = verdict.lead
        failed |= not verdict.passed
        said = "recorded" if record else "ok" if verdict.passed else "LOST"
        if recorded is None and not record:
            said = "no record"
        result[op.name] = {"recorded": recorded, "now": lead.median, "verdict": said}
        table.add_row(
            op.title,
            op.check_peer,
            "" if recorded is None else f"{recorded:.2f}",
            "" if recorded is None else f"{regression.KEPT * recorded:.2f}",
            f"{lead.median:.2f}",
            f"{lead.low:.2f} - {lead.high:.2f}",
            str(len(lead.ratios)),
            said,
        )
    console.result(result, table)
    if any(found["verdict"] == "no record" for found in result.values()):
        console.warn(
            f"no lead is recorded for {rf.isa()}: nothing was compared; record it with "
            "refine-fast bench --check --record"
        )
    if failed:
        console.error("an operation lost a fifth of its lead over its peer.")
    return FAILED if failed else 0
