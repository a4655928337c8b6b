"""``band_topk`` for queries on a GPU (csrc/cuda/band_topk.cu): blocks of queries that fit the workspace, each against all documents.

Documents on the same GPU are read where they are. Others come through two pinned buffers: a thread fills one and copies it on a stream of
its own while the other block is searched.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import workspace
from .._native import DTYPES, cuda_module
from .band_inputs import Block, Progress, Rule, address, check, outputs, ranges, upper_edges

PANEL = 256
"""Rows that are packed together (csrc/cuda/band_topk.cu)."""
STREAMED = 64 << 20
"""Most bytes of documents that are brought to the GPU at a time."""


def search(queries: Tensor, docs: Any, rule: Rule, progress: Progress | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The search of ``band_topk`` on the device of ``queries``."""
    rows, count, width = check(queries, docs, rule)
    k, lo, _, skip, offsets, excluded, _, random, seed, band_first, normalize = rule
    device = queries.device
    cuda = _module(device)
    if queries.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"queries are {queries.dtype}; give float32, bfloat16 or float16")
    budget = workspace.workspace_bytes()
    resident = isinstance(docs, Tensor) and docs.device == device
    _, stride, queries = address(queries)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
            edges = upper_edges(rows, rule).to(device)
            offsets, excluded = (None if x is None else x.to(device) for x in (offsets, excluded))
            ids, scores, in_band = found = outputs(rows, k, device)
            block = _block(count, width, budget, resident)
            band = cuda.BandSearch(width, k, skip, lo, random, seed % 2**64, band_first, normalize, block)
            step = _queries(band, rows, budget - (0 if resident else 2 * min(STREAMED, block * width * 4)))
            room = torch.empty(band.bytes(min(step, rows)), dtype=torch.uint8, device=device)
            for first in range(0, rows, step):
                last = min(first + step, rows)
                band.begin(
                    first, last - first, edges[first:].data_ptr(), 0 if offsets is None else offsets[first:].data_ptr(),
                    0 if excluded is None else excluded.data_ptr(), room.data_ptr(), stream,
                    queries[first:].data_ptr(), DTYPES[queries.dtype], stride,
                )  # fmt: skip
                for begin, end, rows_there in _resident(docs, block) if resident else _streamed(docs, count, block, device):
                    pointer, row_stride, kept = address(rows_there)
                    band.push(pointer, DTYPES[kept.dtype], row_stride, end - begin, begin)  # returns when the GPU is done with them
                    if progress is not None:
                        progress(first * count + (last - first) * end, rows * count)
                band.finish(ids[first:].data_ptr(), scores[first:].data_ptr(), in_band[first:].data_ptr())
            return found
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"band_topk found no room for {budget >> 20} MB of workspace beside queries, documents and outputs; "
            f"lower {workspace.VARIABLE} (at least {workspace.LEAST >> 20}), k, or the number of queries, or leave the documents on the CPU"
        ) from error


def _module(device: torch.device) -> ModuleType:
    cuda = cuda_module()
    if cuda is None:
        raise ValueError(f"queries are on {device}, but refine_fast was built without nvcc: pass queries.cpu(), or build it with nvcc")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"band_topk needs compute capability 8.0, and {torch.cuda.get_device_name(device)} is older; pass queries.cpu()")
    return cuda


def _block(count: int, width: int, budget: int, resident: bool) -> int:
    """Documents at a time, in whole panels: packed in a quarter of the budget, and where they are streamed twice more in float32."""
    bytes_each = 2 * -(-width // 64) * 64
    most = budget // 4 // bytes_each if resident else min(STREAMED // (4 * width), budget // 2 // (bytes_each + 8 * width))
    return max(PANEL, min(most // PANEL * PANEL, -(-count // PANEL) * PANEL))


def _queries(band: Any, rows: int, budget: int) -> int:
    """Queries at a time: equal shares that keep the workspace, which grows evenly, within the budget; whole panels of them unless k or skip
    is huge."""
    least, more = (PANEL, 2 * PANEL) if band.bytes(PANEL) <= budget else (1, PANEL)
    most = least + (budget - band.bytes(least)) * (more - least) // (band.bytes(more) - band.bytes(least))
    most = max(1, most // least * least)
    return max(1, -(-rows // max(1, -(-rows // most))))


def _resident(docs: Tensor, block: int) -> Iterator[tuple[int, int, Tensor]]:
    if docs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"docs are {docs.dtype}; give float32, bfloat16 or float16")
    return ((begin, end, docs[begin:end]) for begin, end in ranges(len(docs), block))


def _streamed(docs: Any, count: int, block: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, rows on the device), the next of them on the way meanwhile. What is yielded holds until the generator is resumed."""
    on_gpu = device.type == "cuda"
    copies = torch.cuda.Stream(device) if on_gpu else None
    lanes: dict[int, tuple[Tensor, Tensor]] = {}  # a buffer in pinned memory and one on the device each

    def bring(turn: int, begin: int, end: int) -> tuple[int, int, Tensor]:
        with Block(docs, begin, end, "docs") as source:
            rows = source.rows
            if turn not in lanes:
                dtype = next(dtype for dtype, code in DTYPES.items() if code == source.dtype)
                host = torch.empty((block, rows.shape[1]), dtype=dtype, pin_memory=on_gpu)
                with torch.cuda.stream(copies):
                    lanes[turn] = host, torch.empty(host.shape, dtype=dtype, device=device)
            host, there = (buffer[: end - begin] for buffer in lanes[turn])
            if isinstance(rows, Tensor):
                host.copy_(rows)
            else:
                np.copyto(host.numpy(), rows)
        with torch.cuda.stream(copies):
            there.copy_(host, non_blocking=True)
        if copies is not None:
            copies.synchronize()  # of this thread alone
        return begin, end, there

    with ThreadPoolExecutor(1) as pool:
        coming: Future[tuple[int, int, Tensor]] | None = None
        for turn, (begin, end) in enumerate(ranges(count, block)):
            ready, coming = coming, pool.submit(bring, turn % 2, begin, end)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
