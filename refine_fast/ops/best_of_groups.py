"""The best row of each group for each query, without the matrix of all products.

Kernel: csrc/core/best_of_groups.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _core, reference
from ..workspace import workspace_bytes
from .band_inputs import DOC_DTYPES, Block, checked_offsets, ranges, shape

BLOCK = 32 << 20
"""Bytes of rows that are read at a time."""
QUERIES = 4096
"""Queries that are compared at a time."""


def best_of_groups(queries: Any, rows: Any, offsets: Any) -> Tensor:
    """The highest inner product of each query in each group of consecutive rows: the best sentence
    of each passage, or of each document the best passage (MaxP; Dai and Callan, SIGIR 2019).
    Replaces::

        s = queries @ rows.T                                        # (Q, S), never built
        best = [s[:, a:b].amax(1) for a, b in itertools.pairwise(offsets)]

    Memory beyond the output: 32 MiB for a source that is copied as it is read, the queries and
    1 MiB for each thread, whatever S and the size of a group; on a GPU the workspace that
    REFINE_FAST_WORKSPACE_MB allows. NaN in a row gives NaN for its group. No gradient.

    Args:
        queries: (Q, D), float32, bfloat16 or float16, in one of the containers that ``band_topk``
            takes.
        rows: (S, D), likewise; read in blocks, so it may be larger than memory. With queries on a
            GPU, on the same GPU.
        offsets: (G + 1,) integers, a list, array or tensor: group g is
            ``rows[offsets[g]:offsets[g + 1]]``, at least one row. The first is 0, the last S.

    Returns:
        (Q, G) float32 on the queries' device, as accurate as a product in float32, under
        torch.autocast too; on a GPU where torch.backends allows TF32, as a product in TF32, whose
        factors have 11 bits of 24.

    Raises:
        ValueError: shapes that do not fit; offsets that do not rise from 0 to S.
        TypeError: another dtype.
    """
    width, (total, rows_width) = shape(queries, "queries")[1], shape(rows, "rows")
    if width != rows_width:
        raise ValueError(
            f"queries have {width} columns and rows {rows_width}; embed both with the same model"
        )
    ends = checked_offsets(offsets, total, "offsets", "rows")
    on_cpu = not isinstance(queries, Tensor) or queries.device.type == "cpu"
    return (_on_cpu if on_cpu else _in_torch)(queries, rows, ends)


def _on_cpu(queries: Any, rows: Any, offsets: np.ndarray) -> Tensor:
    """Over the kernels of this machine's level."""
    count, width = shape(queries, "queries")
    best = torch.empty((count, len(offsets) - 1), dtype=torch.float32, device="cpu")
    for first, last in ranges(count, QUERIES):
        with Block(queries, first, last, "queries") as block:
            asked = _in_float32(block.rows)
        for piece in _pieces(offsets, max(1, BLOCK // (4 * width))):
            found = best[first:last, piece.groups]
            before = found[:, 0].clone()
            with Block(rows, piece.begin, piece.end, "rows") as block:
                _core.best_of_groups(
                    asked.data_ptr(), last - first, width,
                    block.pointer, block.dtype, block.row_stride,
                    piece.offsets.ctypes.data, len(piece.offsets) - 1,
                    found.data_ptr(), found.stride(0), torch.get_num_threads(),
                )  # fmt: skip
            if piece.goes_on:
                found[:, 0] = found[:, 0].maximum(before)
    return best


class _Piece(NamedTuple):
    """Consecutive rows."""

    begin: int
    end: int
    groups: slice
    """Those of its rows."""
    offsets: np.ndarray
    """Of these groups, within the piece."""
    goes_on: bool
    """Whether earlier rows of its first group are in the piece before."""


def _pieces(offsets: np.ndarray, most: int) -> Iterator[_Piece]:
    """All rows, ``most`` at a time."""
    for begin, end in ranges(int(offsets[-1]), most):
        first = int(np.searchsorted(offsets, begin, side="right")) - 1
        last = int(np.searchsorted(offsets, end))
        inside = offsets[first : last + 1].clip(begin, end) - begin
        yield _Piece(begin, end, slice(first, last), inside, bool(offsets[first] < begin))


def _in_float32(rows: Tensor | np.ndarray) -> Tensor:
    """Adjacent rows."""
    if isinstance(rows, Tensor):
        return rows.detach().float().contiguous()
    return torch.from_numpy(np.array(rows, np.float32, order="C"))  # torch shares no read-only map


def _in_torch(queries: Tensor, rows: Any, offsets: np.ndarray) -> Tensor:
    """On the device of the queries, in blocks of groups."""
    if not isinstance(rows, Tensor) or rows.device != queries.device:
        place = rows.device if isinstance(rows, Tensor) else "the CPU"
        raise ValueError(
            f"rows are on {place} and queries on {queries.device}; move both to one device"
        )
    for name, given in (("queries", queries), ("rows", rows)):
        if given.dtype not in DOC_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 (got {given.dtype})")
    asked = queries.detach().float()
    best = asked.new_empty((len(asked), len(offsets) - 1))
    # of each row: its scores twice, its group's indices, and itself in float32
    row_bytes = 16 * min(len(asked), QUERIES) + 4 * rows.shape[1]
    for piece in _pieces(offsets, max(1, workspace_bytes() // row_bytes)):
        block = rows[piece.begin : piece.end].detach().float()
        inside = torch.from_numpy(piece.offsets).to(asked.device)
        for first, last in ranges(len(asked), QUERIES):
            found = reference.best_of_groups(asked[first:last], block, inside)
            if piece.goes_on:
                found[:, 0] = found[:, 0].maximum(best[first:last, piece.groups.start])
            best[first:last, piece.groups] = found
    return best
