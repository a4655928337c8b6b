"""What both searches of ``band_topk`` make of their arguments: shapes, rows of any container, room for the answer."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._native import DTYPES

Progress = Callable[[int, int], None]


class Rule(NamedTuple):
    """What is asked of each row of scores: the arguments of ``refine_fast::band_topk`` after queries and docs, in their order."""

    k: int
    lo: float
    hi: float
    skip: int
    offsets: Tensor | None
    """(B + 1,) int64: where each query's ids begin in ``excluded``."""
    excluded: Tensor | None
    """int64, ascending within each query."""
    ceiling: Tensor | None
    random: bool
    seed: int
    band_first: bool
    normalize: bool


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


def outputs(rows: int, k: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty((rows, k), dtype=torch.int64, device=device),
        torch.empty((rows, k), dtype=torch.float32, device=device),
        torch.empty((rows,), dtype=torch.int64, device=device),
    )


def shape(x: Any, name: str) -> tuple[int, int]:
    sizes = tuple(x.get_shape() if hasattr(x, "get_shape") else x.shape)
    if len(sizes) != 2 or sizes[1] == 0:
        raise ValueError(f"{name} must have two dimensions, rows and at least one column, not the shape {sizes}")
    return sizes


def check(queries: Any, docs: Any, rule: Rule) -> tuple[int, int, int]:
    (rows, width), (count, docs_width) = shape(queries, "queries"), shape(docs, "docs")
    if width != docs_width:
        raise ValueError(f"queries have {width} columns and docs {docs_width}; embed both with the same model")
    for name, value in (("k", rule.k), ("skip", rule.skip)):
        if not 0 <= value < 2**31:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    if not rule.lo <= rule.hi:
        raise ValueError(f"the band ({rule.lo}, {rule.hi}) is empty: the lower edge comes first, and neither is NaN")
    if rule.ceiling is not None and tuple(rule.ceiling.shape) != (rows,):
        raise ValueError(f"ceiling must have one value for each of the {rows} queries, not the shape {tuple(rule.ceiling.shape)}")
    return rows, count, width


def upper_edges(rows: int, rule: Rule) -> Tensor:
    """(rows,) float64 on the CPU: the upper edge of each query's band."""
    edges = torch.full((rows,), rule.hi, dtype=torch.float64)
    if rule.ceiling is None:
        return edges
    if torch.isnan(rule.ceiling).any():
        raise ValueError(f"ceiling of query {int(torch.isnan(rule.ceiling).nonzero()[0])} is NaN; give a number, or inf for none")
    return edges.minimum(rule.ceiling.to("cpu", torch.float64))


def address(rows: Tensor) -> tuple[int, int, Tensor]:
    """The pointer and row stride of a matrix whose columns are neighbours, and that matrix: ``rows``, or a copy."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows.data_ptr(), rows.stride(0), rows


class Block:
    """Rows begin .. end of a source as an address, while the context lasts."""

    def __init__(self, source: Any, begin: int, end: int, name: str) -> None:
        rows = source[begin:end]
        if not isinstance(rows, Tensor):
            rows = np.asarray(rows)
        dtype = rows.dtype if isinstance(rows, Tensor) else _NUMPY.get(rows.dtype)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} are {rows.dtype}; give float32, bfloat16 or float16")
        if isinstance(rows, Tensor):
            if rows.device.type != "cpu":
                raise ValueError(f"{name} are on {rows.device}; they must be on the CPU, or on the queries' GPU: pass {name}.cpu()")
            self.pointer, self.row_stride, rows = address(rows)
        else:
            item, reach = rows.itemsize, [(n - 1) * stride for n, stride in zip(rows.shape, rows.strides, strict=True)]
            self._first = rows.ctypes.data + sum(min(r, 0) for r in reach)  # where the source lies, in whatever order
            self._last = rows.ctypes.data + sum(max(r, 0) for r in reach) + item
            if rows.strides[1] != item or rows.strides[0] % item:
                rows = np.ascontiguousarray(rows)
            self.pointer, self.row_stride = rows.ctypes.data, rows.strides[0] // item
        self.dtype, self.rows, self._source = DTYPES[dtype], rows, source

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the pages of a memory map back to the page cache, which would count as ours until the system is short of memory. The kernel
        maps pages around a fault too: those before the block, which were given back with the block before, go once more."""
        mapping = getattr(self._source, "_mmap", None)
        if isinstance(self._source, np.memmap) and self._source.mode == "r" and mapping is not None and self.rows.size:
            start = np.frombuffer(mapping, np.uint8).ctypes.data
            begin = max(0, self._first - start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, begin, self._last - start - begin)


_AROUND = 2 << 20
"""The largest piece of a file that one fault maps."""
_NUMPY = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}
