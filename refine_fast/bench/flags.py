"""The flags of ``refine-fast bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import RefineFastError

NAMES = ("info_nce", "band_topk", "fuse", "encode", "train", "run")
"""The operations, in the order in which they are measured."""

_MEASURED = (
    *("operations", "quick", "full", "shape", "dtype", "mode"),
    *("threads", "rounds", "only"),
)
_IGNORED = {
    "check": ("compares each operation at its own shape, on one thread", _MEASURED),
    "report": ("measures nothing", (*_MEASURED, "isa")),
    "profile": ("runs our contender once", ("rounds", "only")),
}
"""What a flag does, and the flags that say nothing beside it."""


def add_bench_flags(command: argparse.ArgumentParser) -> None:
    """Adds them to the command's parser."""
    add = command.add_argument
    add(
        "operations",
        nargs="*",
        metavar="OPERATION",
        help=f"{', '.join(NAMES)} (default: all but run, which --full adds)",
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes")
    size.add_argument("--full", action="store_true", help="more shapes, for the plots; long")
    add("--shape", metavar="N=V,...", help="sizes, such as B=8192,D=768; the rest is the default")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="of the inputs (default fp32)")
    add("--mode", metavar="NAME", help="another form of the operation, such as cold (of fuse)")
    add("--isa", metavar="LEVEL", help="the CPU level of our kernels (default: the best)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: those of torch)")
    add("--rounds", type=int, metavar="N", help="samples of each contender (default 5; --quick 3)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="of the peers, measure this one alone; repeatable",
    )
    purpose = command.add_mutually_exclusive_group()  # what to do with measurements, or instead
    purpose.add_argument(
        "--profile",
        nargs="?",
        const="trace.json",
        type=Path,
        metavar="TRACE",
        help="show where the time goes, by stages, instead of measuring; write a trace for "
        "Perfetto to TRACE (default trace.json)",
    )
    purpose.add_argument(
        "--compare", type=Path, metavar="FILE", help="show the change from an earlier csv file"
    )
    purpose.add_argument(
        "--check",
        action="store_true",
        help="fail (exit code 1) if an operation lost a fifth of its recorded lead over a peer",
    )
    add("--record", action="store_true", help="with --check: record the leads instead")
    purpose.add_argument(
        "--report",
        action="store_true",
        help="write the tables of README.md and the plots from the results, and measure nothing",
    )
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where rows are kept, a csv file for each device (default benchmarks/results if that "
        "exists, else refine-fast-bench)",
    )


def refuse_ignored(options: argparse.Namespace) -> None:
    """Raises RefineFastError for a flag that has no effect beside another one."""
    if options.record and not options.check:
        raise RefineFastError("--record says what --check does with the leads; add --check.")
    given = {
        name
        for name, value in vars(options).items()
        if value is not None and value is not False and value != []
    }
    for name, (does, ignored) in _IGNORED.items():
        found = [other for other in ignored if other in given] if name in given else []
        if found:
            first = options.operations[0] if found[0] == "operations" else f"--{found[0]}"
            raise RefineFastError(f"--{name} {does}; leave out {first}.")
