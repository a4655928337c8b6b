"""What this machine can do: the rates of a matrix product and of a copy, by dtype.

They are contenders like the others and take their turns with them, since the speed of a machine
drifts. On a CPU the matrix rate is that of the faster of torch's product and the product in our
kernels: neither is the best on every machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from .. import _core
from .measuring import Sample
from .operation import DTYPES, Work
from .rows import Row, rows

SIDE = {"cpu": 1280, "cuda": 8192}
"""Of the matrices."""
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Bytes of the copy; more than any cache."""


@dataclass(frozen=True)
class Rates:
    """Of a machine, for one dtype.

    Attributes:
        matrix: FLOP/s of a matrix product.
        copy: bytes read and written a second.
    """

    matrix: float
    copy: float

    def seconds(self, work: Work) -> float:
        """The least time for that work: of its FLOPs or of its bytes, whichever takes longer."""
        return max(work.flops / self.matrix, work.bytes / self.copy)


def contenders(device: str, dtype: str) -> dict[str, Callable[[], object]]:
    """The products and the copy. A CPU without instructions for 16-bit floats multiplies them
    slower than float32, to which a kernel may convert them: both are measured."""
    side, threads = SIDE[device], torch.get_num_threads()
    found: dict[str, Callable[[], object]] = {}
    for name in dict.fromkeys(("fp32", dtype) if device == "cpu" else (dtype,)):
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[name]) for _ in range(2))
        found[f"torch.mm {name}"] = partial(torch.mm, a, b)
    if device == "cpu":
        rows_ = side // threads  # of one thread's share
        a, b, out = torch.randn(rows_, side), torch.randn(side, side), torch.empty(rows_, side)
        pointers = (a.data_ptr(), side, 1, b.data_ptr(), 1, side, rows_, side, side)
        bf16 = dtype == "bf16"
        found["refine_fast tile"] = partial(tile, pointers, bf16, (a, b, out))
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    found["copy"] = lambda: target.copy_(source)
    return found


def tile(
    pointers: tuple[int, int, int, int, int, int, int, int, int],
    bf16: bool,
    tensors: tuple[torch.Tensor, ...],
) -> None:
    """The product in our kernels, on one thread; ``tensors`` hold the memory, the last the
    result."""
    _core.matmul(*pointers, bf16, tensors[-1].data_ptr())


def busy(sample: Sample, device: str) -> float:
    """The time of a sample that counts: CPU seconds a thread, so that neighbours do not; wall
    seconds on a GPU."""
    return sample.seconds if device == "cuda" else sample.cpu_seconds / torch.get_num_threads()


def rates(samples: Mapping[str, list[Sample]], device: str) -> Rates:
    """From the samples of ``contenders``."""
    side, threads = SIDE[device], torch.get_num_threads()
    flops = {
        name: 2 * side**3 / statistics.median(busy(one, device) for one in taken)
        for name, taken in samples.items()
        if name.startswith("torch.mm")
    }
    if "refine_fast tile" in samples:
        middle = statistics.median(one.cpu_seconds for one in samples["refine_fast tile"])
        flops["refine_fast tile"] = 2 * (side // threads) * side**2 * threads / middle
    copied = statistics.median(busy(one, device) for one in samples["copy"])
    return Rates(max(flops.values()), 2 * COPIED[device] / copied)


def roofline_rows(found: Rates, dtype: str, device: str) -> list[Row]:
    """The rates as rows of the operation ``roofline``."""
    common = {"op": "roofline", "dtype": dtype, "peer": ""}
    shape = {"side": SIDE[device], "bytes": COPIED[device]}
    return [
        *rows(
            {"machine": [found.matrix / 1e12]},
            mode="matrix",
            metric="tflops",
            shape=shape,
            **common,
        ),
        *rows(
            {"machine": [found.copy / 1e9]}, mode="copy", metric="gb_per_s", shape=shape, **common
        ),
    ]
