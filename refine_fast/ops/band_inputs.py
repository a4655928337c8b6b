"""Argument checks, row access and output buffers shared by the CPU and CUDA searches."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._native import DTYPES

Progress = Callable[[int, int], None]
"""Called with (done, total)."""
DOC_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What queries and documents may be stored in."""


class Rule(NamedTuple):
    """Which documents each query takes: the arguments of ``refine_fast::band_topk`` after queries
    and docs, in their order."""

    k: int
    lo: float
    hi: float
    skip: int
    offsets: Tensor | None
    """(B + 1,) int64: where each query's ids begin in ``excluded``."""
    excluded: Tensor | None
    """int64, ascending within each query."""
    ceiling: Tensor | None
    """(B,) float64."""
    random: bool
    seed: int
    band_first: bool
    normalize: bool


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive blocks of ``step`` among ``count``."""
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


def outputs(rows: int, k: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized ids (rows, k) int64, scores (rows, k) float32 and in_band (rows,) int64."""
    return (
        torch.empty((rows, k), dtype=torch.int64, device=device),
        torch.empty((rows, k), dtype=torch.float32, device=device),
        torch.empty((rows,), dtype=torch.int64, device=device),
    )


def shape(x: Any, name: str) -> tuple[int, int]:
    """The (rows, columns) of a tensor, array or safetensors slice.

    Raises:
        ValueError: anything but two dimensions and at least one column.
    """
    sizes = tuple(x.get_shape() if hasattr(x, "get_shape") else x.shape)
    if len(sizes) != 2 or sizes[1] == 0:
        raise ValueError(
            f"{name} must have two dimensions and at least one column (got shape {sizes})"
        )
    return sizes


def check(queries: Any, docs: Any, rule: Rule) -> tuple[int, int, int]:
    """Checks shapes and the rule's numbers; reads no row.

    Returns:
        B, N and D.

    Raises:
        ValueError: what does not fit, by name.
    """
    (rows, width), (count, docs_width) = shape(queries, "queries"), shape(docs, "docs")
    if width != docs_width:
        raise ValueError(
            f"queries have {width} columns and docs {docs_width}; embed both with the same model"
        )
    for name, value in (("k", rule.k), ("skip", rule.skip)):
        if not 0 <= value < 2**31:
            raise ValueError(f"{name} must be an integer from 0 to 2**31 - 1 (got {value})")
    if not rule.lo <= rule.hi:
        raise ValueError(f"band must be (lo, hi) with lo <= hi (got ({rule.lo}, {rule.hi}))")
    if rule.ceiling is not None and tuple(rule.ceiling.shape) != (rows,):
        raise ValueError(
            f"ceiling must have one value for each of the {rows} queries"
            f" (got shape {tuple(rule.ceiling.shape)})"
        )
    return rows, count, width


def upper_edges(rows: int, rule: Rule) -> Tensor:
    """(rows,) float64 on the CPU: the upper edge of each query's band.

    Raises:
        ValueError: a ceiling that is NaN.
    """
    edges = torch.full((rows,), rule.hi, dtype=torch.float64)
    if rule.ceiling is None:
        return edges
    if torch.isnan(rule.ceiling).any():
        row = int(torch.isnan(rule.ceiling).nonzero()[0])
        raise ValueError(f"ceiling of query {row} is NaN; give a number, or inf for no ceiling")
    return edges.minimum(rule.ceiling.to("cpu", torch.float64))


def address(rows: Tensor) -> tuple[int, int, Tensor]:
    """The pointer and row stride of a matrix with adjacent columns, and the matrix: ``rows``, or
    a copy where its columns are apart."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows.data_ptr(), rows.stride(0), rows


class Block:
    """Rows begin .. end of a source as an address, valid while the context lasts.

    Raises:
        TypeError: a dtype other than float32, bfloat16 and float16.
        ValueError: rows that are not on the CPU.
    """

    def __init__(self, source: Any, begin: int, end: int, name: str) -> None:
        rows = source[begin:end]
        if not isinstance(rows, Tensor):
            rows = np.asarray(rows)
        dtype = rows.dtype if isinstance(rows, Tensor) else _NUMPY.get(rows.dtype)
        if dtype not in DOC_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 (got {rows.dtype})")
        if isinstance(rows, Tensor):
            if rows.device.type != "cpu":
                raise ValueError(
                    f"{name} are on {rows.device}; they must be on the CPU or on the queries' GPU:"
                    f" pass {name}.cpu()"
                )
            self.pointer, self.row_stride, rows = address(rows)
        else:
            item = rows.itemsize
            reach = [(n - 1) * s for n, s in zip(rows.shape, rows.strides, strict=True)]
            # the bytes of the source, whatever the order of its rows
            self._first = rows.ctypes.data + sum(min(r, 0) for r in reach)
            self._last = rows.ctypes.data + sum(max(r, 0) for r in reach) + item
            if rows.strides[1] != item or rows.strides[0] % item:
                rows = np.ascontiguousarray(rows)
            self.pointer, self.row_stride = rows.ctypes.data, rows.strides[0] // item
        self.dtype, self.rows, self._source = DTYPES[dtype], rows, source

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        """Returns the pages of a memory map to the page cache; they would count as this process's
        until the system runs short of memory. A fault also maps the pages around it, so those
        before the block, which were returned with the block before, are returned again."""
        mapping = getattr(self._source, "_mmap", None)
        mapped = isinstance(self._source, np.memmap) and self._source.mode == "r"
        if mapped and mapping is not None and self.rows.size:
            start = np.frombuffer(mapping, np.uint8).ctypes.data
            begin = max(0, self._first - start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, begin, self._last - start - begin)


class CopiedToCPU:
    """A tensor on any device whose slices are copied to the CPU, for ``Block``."""

    def __init__(self, rows: Tensor) -> None:
        self.shape, self._rows = rows.shape, rows

    def __getitem__(self, rows: slice) -> Tensor:
        return self._rows[rows].cpu()


_AROUND = 2 << 20
"""The most bytes of a file that one fault maps."""
_NUMPY = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}
