"""pytest-benchmark over the suite's contenders: every operation beside its peers.

    pytest benchmarks/ [-k "info_nce and chunks"] [--benchmark-json FILE] [--benchmark-compare]
        [--benchmark-histogram]

Shapes are those of ``refine-fast bench --quick``, on all threads; REFINE_FAST_BENCH_SHAPE changes
sizes, such as "B=4096,D=768", in the operations that have them. Contenders of one operation are one
group. ``refine-fast bench`` takes them in turns and measures memory, which pytest-benchmark does
not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch

from refine_fast.bench.operation import Contender, Operation, Shape, parse_shape
from refine_fast.bench.operations import OPERATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (op, dtype, contender)
    for modes in OPERATIONS.values()
    for op in modes
    if op.by_default and op.name != "run"
    for dtype in (op.dtypes[0],)
    for contender in op.contenders
]


@cache
def shape_of(op: Operation) -> Shape:
    given = os.environ.get("REFINE_FAST_BENCH_SHAPE", "")
    pairs = [pair for pair in given.split(",") if pair.partition("=")[0] in op.shape]
    return op.shape | op.quick | (parse_shape(",".join(pairs), op.shape) if pairs else {})


@pytest.fixture(scope="module")
def inputs_of() -> Iterator[dict[str, Any]]:
    """The inputs of the operation that runs; those of the one before are gone."""
    yield (held := {})
    close(held)


def close(held: dict[str, Any]) -> None:
    if held:
        held.pop("context").__exit__(None, None, None)
    held.clear()


@pytest.mark.parametrize(
    ("op", "dtype", "contender"),
    CASES,
    ids=[f"{op.name}-{op.mode}-{one.name}".replace(" ", "_") for op, _, one in CASES],
)
def test_operation(
    op: Operation, dtype: str, contender: Contender, inputs_of: dict[str, Any], benchmark: Any
) -> None:
    if why := contender.missing(DEVICE, dtype) or (contender.slow and "slow"):
        pytest.skip(f"{contender.name} {why}")
    if inputs_of.get("op") is not op:
        close(inputs_of)
        context = op.inputs(shape_of(op), dtype, DEVICE)
        inputs_of.update(op=op, context=context, inputs=context.__enter__())
    inputs = inputs_of["inputs"]
    sizes = " ".join(f"{name}={size}" for name, size in shape_of(op).items())
    benchmark.group = f"{op.name} {op.mode} {dtype} {sizes}"  # also the name of a histogram's file
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "device": DEVICE}
    prepare = None if op.before is None else partial(op.before, inputs)
    benchmark.pedantic(
        partial(contender.run, inputs), setup=prepare, rounds=op.rounds, warmup_rounds=1
    )
