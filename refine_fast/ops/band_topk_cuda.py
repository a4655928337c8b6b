"""``band_topk`` for queries on a GPU (csrc/cuda/band_topk.cu): blocks of queries that fit the
workspace, each against all documents.

Documents on the same GPU are read in place. Others pass through two pinned buffers: a thread fills
one and copies it on a stream of its own while the GPU searches the block before.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import workspace
from .._native import DTYPES, cuda_module, missing_cuda
from ..profiling import stage
from .band_inputs import (
    DOC_DTYPES,
    Block,
    Chosen,
    Output,
    Progress,
    Rule,
    address,
    check,
    ranges,
    upper_edges,
)

PANEL = 256
"""Rows that are packed together (csrc/cuda/band_topk.cu)."""
STREAMED = 64 << 20
"""The most bytes of documents that are copied to the GPU at a time."""


def missing_requirement(device: torch.device) -> str | None:
    """What to do before ``search`` can run on this GPU, as a sentence; None where it can."""
    return missing_cuda(device, (8, 0))


def search(
    queries: Tensor,
    docs: Any,
    rule: Rule,
    progress: Progress | None = None,
    first_id: int = 0,
    output: Output = Chosen,
) -> tuple[Tensor, ...]:
    """The search of ``band_topk`` on the device of ``queries``, where ``missing_requirement`` is
    None.

    Args:
        queries: (B, D), float32, bfloat16 or float16.
        docs: (N, D), on the same device or in any CPU container.
        rule: which documents to take.
        progress: called after each block of documents.
        first_id: the id of the first document.
        output: what to return.

    Returns:
        The tensors of ``output`` on the device.

    Raises:
        ValueError, TypeError: as ``band_topk``.
        torch.OutOfMemoryError: no room for the workspace.
    """
    rows, count, width = check(queries, docs, rule)
    device = queries.device
    cuda: Any = cuda_module()
    _check_dtype(queries, "queries")
    budget = workspace.workspace_bytes()
    resident = isinstance(docs, Tensor) and docs.device == device
    if resident:
        _check_dtype(docs, "docs")
    _, stride, queries = address(queries)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
            edges = upper_edges(rows, rule).to(device)
            offsets, excluded = (
                None if x is None else x.to(device) for x in (rule.offsets, rule.excluded)
            )
            found = output(rows, rule, device)
            block = _block(count, width, budget, resident)
            band = cuda.BandSearch(
                width, rule.k, rule.skip, rule.lo, rule.random, rule.seed % 2**64,
                rule.band_first, rule.normalize, block,
            )  # fmt: skip
            buffers = 0 if resident else 2 * min(STREAMED, block * width * 4)
            step = _queries(band, rows, budget - buffers)
            room = torch.empty(band.bytes(min(step, rows)), dtype=torch.uint8, device=device)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                with stage("pack"):
                    band.begin(
                        first, last - first, edges[first:].data_ptr(),
                        0 if offsets is None else offsets[first:].data_ptr(),
                        0 if excluded is None else excluded.data_ptr(), room.data_ptr(), stream,
                        queries[first:].data_ptr(), DTYPES[queries.dtype], stride,
                    )  # fmt: skip
                if resident:
                    blocks = _resident(docs, block)
                else:
                    blocks = _streamed(docs, count, block, device)
                for begin, end, rows_there in blocks:
                    pointer, row_stride, kept = address(rows_there)
                    with stage("multiply"):
                        # returns when the GPU has read them
                        band.push(
                            pointer, DTYPES[kept.dtype], row_stride, end - begin, first_id + begin
                        )
                    if progress is not None:
                        progress(first * count + (last - first) * end, rows * count)
                with stage("finish"):
                    found.write(band, first)
            return found.tensors
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"band_topk found no room for {budget >> 20} MB of workspace besides queries, documents"
            f" and outputs; lower {workspace.VARIABLE} (at least {workspace.MIN_BYTES >> 20}), k or"
            " the number of queries, or leave the documents on the CPU"
        ) from error


def _check_dtype(rows: Tensor, name: str) -> None:
    if rows.dtype not in DOC_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16 (got {rows.dtype})")


def _block(count: int, width: int, budget: int, resident: bool) -> int:
    """Documents at a time, in whole panels: packed in a quarter of the budget and, where they are
    streamed, twice more in float32."""
    bytes_each = 2 * -(-width // 64) * 64
    if resident:
        most = budget // 4 // bytes_each
    else:
        most = min(STREAMED // (4 * width), budget // 2 // (bytes_each + 8 * width))
    return max(PANEL, min(most // PANEL * PANEL, -(-count // PANEL) * PANEL))


def _queries(band: Any, rows: int, budget: int) -> int:
    """Queries at a time: equal shares that keep the workspace, which grows linearly, within the
    budget; whole panels of them unless k or skip is huge."""
    least, more = (PANEL, 2 * PANEL) if band.bytes(PANEL) <= budget else (1, PANEL)
    bytes_of_extra = band.bytes(more) - band.bytes(least)
    most = least + (budget - band.bytes(least)) * (more - least) // bytes_of_extra
    most = max(1, most // least * least)
    return max(1, -(-rows // max(1, -(-rows // most))))


def _resident(docs: Tensor, block: int) -> Iterator[tuple[int, int, Tensor]]:
    return ((begin, end, docs[begin:end]) for begin, end in ranges(len(docs), block))


def _streamed(
    docs: Any, count: int, block: int, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, rows on the device) while the next block is being copied. The rows stay valid
    until the generator is resumed."""
    on_gpu = device.type == "cuda"
    copies = torch.cuda.Stream(device) if on_gpu else None
    lanes: dict[int, tuple[Tensor, Tensor]] = {}  # a pinned buffer and one on the device

    def bring(turn: int, begin: int, end: int) -> tuple[int, int, Tensor]:
        with Block(docs, begin, end, "docs") as source:
            rows = source.rows
            if turn not in lanes:
                dtype = next(name for name, code in DTYPES.items() if code == source.dtype)
                shape = (block, rows.shape[1])
                host = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=on_gpu)
                with torch.cuda.stream(copies):
                    lanes[turn] = host, torch.empty(host.shape, dtype=dtype, device=device)
            host, there = (buffer[: end - begin] for buffer in lanes[turn])
            if isinstance(rows, Tensor):
                host.copy_(rows.detach())
            else:
                np.copyto(host.numpy(), rows)
        with torch.cuda.stream(copies):
            there.copy_(host, non_blocking=True)
        if copies is not None:
            copies.synchronize()  # blocks this thread only
        return begin, end, there

    with ThreadPoolExecutor(1) as pool:
        coming: Future[tuple[int, int, Tensor]] | None = None
        for turn, (begin, end) in enumerate(ranges(count, block)):
            ready, coming = coming, pool.submit(bring, turn % 2, begin, end)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
