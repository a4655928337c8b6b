"""The operations of the suite, one module each; every module imports its peers where it uses
them."""

from __future__ import annotations

from ..operation import Operation
from . import band_topk, encode, fuse, info_nce, run, train

OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "info_nce": info_nce.OPERATIONS,
    "band_topk": band_topk.OPERATIONS,
    "fuse": fuse.OPERATIONS,
    "encode": encode.OPERATIONS,
    "train": train.OPERATIONS,
    "run": run.OPERATIONS,
}
"""By the command line's name, in its modes; the first mode is the default one."""


def operation(name: str, mode: str) -> Operation:
    """One operation in one mode."""
    return next(one for one in OPERATIONS[name] if one.mode == mode)
