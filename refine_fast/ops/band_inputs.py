"""Argument checks, row access and output buffers shared by the CPU and CUDA searches."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from operator import index
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
    groups: Tensor | None = None
    """(N + 1,) int64 on the CPU: where each document's rows begin."""


class Excluded(NamedTuple):
    """Per query the ids that take no part."""

    offsets: np.ndarray
    """(B + 1,) int64: where each query's ids begin in ``ids``."""
    ids: np.ndarray
    """int64, ascending within each query."""

    @classmethod
    def of(cls, exclude: Sequence[Any], rows: int, name: str = "exclude") -> Excluded:
        """From a list, set, array or tensor of ids for each of the ``rows`` queries; ``name``: of
        the argument.

        Raises:
            ValueError: another number of lists. TypeError: an id that is not an integer; a
                dictionary.
        """
        if isinstance(exclude, Mapping):
            raise TypeError(f"{name} must be a sequence with one list for each query, in order")
        if len(exclude) != rows:
            raise ValueError(
                f"{name} must have one list for each of the {rows} queries (got {len(exclude)})"
            )
        lists = [_ids(ids, row, name) for row, ids in enumerate(exclude)]
        lengths = np.array([len(ids) for ids in lists], dtype=np.int64)
        flat = np.concatenate(lists) if lists else np.empty(0, np.int64)
        flat = flat[np.lexsort((flat, np.repeat(np.arange(rows), lengths)))]
        return cls(np.concatenate(([0], np.cumsum(lengths))), flat)

    def check(self, count: int | None, name: str = "exclude") -> None:
        """Raises ValueError for an id outside 0 .. count - 1; None: below 0."""
        wrong = self.ids < 0 if count is None else (self.ids < 0) | (self.ids >= count)
        if (at := np.flatnonzero(wrong)).size:
            row = np.searchsorted(self.offsets, at[0], side="right") - 1
            ids = "start at 0" if count is None else f"are 0 to {count - 1}"
            raise ValueError(
                f"{name} of query {row} names document {self.ids[at[0]]}, but the ids {ids}"
            )

    def within(self, begin: int, end: int) -> Excluded:
        """Those from ``begin`` to ``end - 1``."""
        inside = (self.ids >= begin) & (self.ids < end)
        before = np.concatenate(([0], np.cumsum(inside)))
        return Excluded(before[self.offsets], self.ids[inside])


def _ids(ids: Any, row: int, name: str) -> np.ndarray:
    """A list, tuple, set, array or tensor of ids."""
    found = np.asarray([*ids] if isinstance(ids, Set) else ids).reshape(-1)
    if found.size and found.dtype.kind not in "iu":
        raise TypeError(f"{name} of query {row} must hold integer document ids (got {found[0]!r})")
    return found.astype(np.int64)


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive blocks of ``step`` among ``count``."""
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


def outputs(
    rows: int, k: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized ids (rows, k) int64, scores (rows, k) and in_band (rows,) int64."""
    return (
        torch.empty((rows, k), dtype=torch.int64, device=device),
        torch.empty((rows, k), dtype=dtype, device=device),
        torch.empty((rows,), dtype=torch.int64, device=device),
    )


class Chosen:
    """The output of ``band_topk``: what the search chose."""

    def __init__(self, rows: int, rule: Rule, device: torch.device | str) -> None:
        self.tensors: tuple[Tensor, ...] = outputs(rows, rule.k, device)

    def write(self, search: Any, first: int) -> None:
        """Has a finished search of the queries from ``first`` write its rows."""
        search.finish(*(x[first:].data_ptr() for x in self.tensors))


class Kept:
    """The output of ``band_topk_part``: what the search would choose from."""

    def __init__(self, rows: int, rule: Rule, device: torch.device | str) -> None:
        similar, drawn = rule.k + rule.skip, 0
        if rule.random:
            similar, drawn = rule.skip, similar
        self.tensors: tuple[Tensor, ...] = (
            *outputs(rows, similar, device, torch.float64)[:2],
            *outputs(rows, drawn, device, torch.float64)[:2],
            torch.empty((rows,), dtype=torch.int64, device=device),
            torch.empty((rows,), dtype=torch.int64, device=device),
        )

    def write(self, search: Any, first: int) -> None:
        """Has a finished search of the queries from ``first`` write its rows."""
        search.finish_part(*(x[first:].data_ptr() for x in self.tensors))


Output = type[Chosen] | type[Kept]
"""What a search returns."""


def integer(value: Any, name: str) -> int:
    """The value of an integer of Python, numpy or torch.

    Raises:
        TypeError: anything else, such as 5.0.
    """
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer (got {value!r})") from None


def shape(x: Any, name: str) -> tuple[int, int]:
    """The (rows, columns) of a tensor, array or safetensors slice.

    Raises:
        ValueError: anything but two dimensions and at least one column.
        TypeError: anything else, such as a list, a sparse tensor or a masked array.
    """
    if not hasattr(x, "get_shape") and not hasattr(x, "shape"):
        raise TypeError(
            f"{name} must be a torch tensor, a numpy array, a memory map or a safetensors slice"
            f" (got {type(x).__name__})"
        )
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(f"{name} must be dense (got {x.layout}); pass {name}.to_dense()")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} has a mask, which would be ignored; pass {name}.filled(0)")
    sizes = tuple(x.get_shape() if hasattr(x, "get_shape") else x.shape)
    if len(sizes) != 2 or sizes[1] == 0:
        raise ValueError(
            f"{name} must have two dimensions and at least one column (got shape {sizes})"
        )
    return sizes


def checked_offsets(offsets: Any, count: int, name: str, of: str) -> np.ndarray:
    """(G + 1,) int64 offsets of groups of ``count`` rows.

    Args:
        offsets: a list, array or tensor of integers.
        count: the number of rows.
        name, of: what the offsets and the rows are called in a message.

    Raises:
        ValueError: offsets that do not rise from 0 to ``count``. TypeError: no integers.
    """
    if isinstance(offsets, Tensor):
        offsets = offsets.numpy(force=True)
    ends = np.asarray(offsets)
    if ends.ndim != 1 or not len(ends):
        raise ValueError(
            f"{name} must have one dimension and at least one entry (got shape {ends.shape})"
        )
    if ends.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers (got {ends.dtype})")
    ends = np.ascontiguousarray(ends, np.int64)
    if ends[0] != 0 or ends[-1] != count:
        raise ValueError(
            f"{name} must rise from 0 to {count}, the number of {of} (got {ends[0]} to {ends[-1]})"
        )
    if (falls := np.flatnonzero(ends[1:] <= ends[:-1])).size:
        group = int(falls[0])
        raise ValueError(
            f"{name} must rise at each step, but those of group {group} are {ends[group]} and"
            f" {ends[group + 1]}; leave out groups without rows"
        )
    return ends


def blocks_of_groups(offsets: np.ndarray, rows: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive blocks of groups, each of at most ``rows`` rows or one group."""
    begin, count = 0, len(offsets) - 1
    while begin < count:
        end = int(np.searchsorted(offsets, offsets[begin] + rows, side="right")) - 1
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def check(queries: Any, docs: Any, rule: Rule) -> tuple[int, int, int]:
    """Checks shapes and the rule's numbers; reads no row.

    Returns:
        B, N and D.

    Raises:
        ValueError: what does not fit, by name.
    """
    (rows, width), (count, docs_width) = shape(queries, "queries"), shape(docs, "docs")
    if rule.groups is not None:
        checked_offsets(rule.groups, count, "groups", "docs")
        count = len(rule.groups) - 1
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
    edges = torch.full((rows,), rule.hi, dtype=torch.float64, device="cpu")
    if rule.ceiling is None:
        return edges
    if torch.isnan(rule.ceiling).any():
        row = int(torch.isnan(rule.ceiling).nonzero()[0])
        raise ValueError(f"ceiling of query {row} is NaN; give a number, or inf for no ceiling")
    return edges.minimum(rule.ceiling.to("cpu", torch.float64))


def address(rows: Tensor) -> tuple[int, int, Tensor]:
    """The pointer and row stride of a matrix with adjacent columns, and the matrix: ``rows``, or
    a copy where its columns are apart or its memory holds the negative (``x.conj().imag``)."""
    rows = rows.resolve_neg()
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
        expected = (end - begin, shape(source, name)[1])
        if tuple(rows.shape) != expected:  # a file may have become shorter
            raise ValueError(
                f"rows {begin} to {end} of {name} have shape {tuple(rows.shape)}, where its own"
                f" shape promises {expected}"
            )
        dtype: torch.dtype | None = None
        if isinstance(rows, Tensor):
            dtype = rows.dtype
        elif rows.dtype.isnative:
            dtype = _NUMPY.get(rows.dtype.name)
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
        # what was written to a map of mode "c" is in its pages only
        mapped = isinstance(self._source, np.memmap) and self._source.mode != "c"
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
_NUMPY = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Names of numpy's types; bfloat16 is that of ml_dtypes."""
