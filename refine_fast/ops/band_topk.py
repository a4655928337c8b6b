"""Exact hard negatives in a similarity band, without the similarity matrix.

Kernels: csrc/core/band_topk.h on CPUs, band_topk_cuda.py on GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _core
from ..errors import warn_once
from . import band_topk_cuda
from .band_inputs import (
    Block,
    Chosen,
    CopiedToCPU,
    Excluded,
    Output,
    Progress,
    Rule,
    blocks_of_groups,
    check,
    checked_offsets,
    integer,
    outputs,
    ranges,
    shape,
    upper_edges,
)

MEMORY = 48 << 20
"""Bytes that one search takes besides its outputs; more queries than fit are searched in turn."""
BLOCK = 8 << 20
"""Bytes of documents that are read at a time."""


class BandTopK(NamedTuple):
    """The negatives of B queries.

    ids (B, k) int64, most similar first, -1 where the band has too few; scores (B, k) float32, NaN
    there; in_band (B,) int64, how many documents qualified.
    """

    ids: Tensor
    scores: Tensor
    in_band: Tensor


def band_topk(
    queries: Any,
    docs: Any,
    k: int,
    *,
    band: tuple[float, float] = (0.5, 0.7),
    skip: int = 5,
    exclude: Sequence[Any] | None = None,
    ceiling: Any = None,
    select: str = "hardest",
    seed: int = 0,
    order: str = "skip_then_band",
    normalize: bool = False,
    groups: Any = None,
    progress: Progress | None = None,
) -> BandTopK:
    """Per query: leaves out the excluded documents, drops the ``skip`` most similar, keeps those in
    the band, takes k. Replaces::

        s = queries.double() @ docs.double().T                                # (B, N), never built
        for i in range(B):
            ranked = s[i].sort(descending=True, stable=True).indices
            ranked = [j for j in ranked if j not in exclude[i]][skip:]
            hi = min(band[1], ceiling[i])
            qualified = [j for j in ranked if band[0] <= s[i, j] <= hi]
            ids[i], in_band[i] = qualified[:k], len(qualified)

    Memory beyond the outputs: 64 MiB, whatever B, N and k, with up to 40 threads, and 1 MiB for
    each further one; with ``groups`` also the rows of a group of more than 8 MiB, in float32; on a
    GPU the workspace that REFINE_FAST_WORKSPACE_MB allows. The pages of a numpy memory map are
    given back as they are read, but for one of mode "c"; those of a file that another library maps
    (a safetensors slice) stay mapped until the system runs short of memory.

    After fork() the CPU kernel runs on one thread in the child. torch's own parallel operations
    hang there if the parent has used them, unless the child calls ``torch.set_num_threads(1)``
    first, as the workers of a DataLoader do.

    Args:
        queries: (B, D), float32, bfloat16 or float16: a torch tensor, a numpy array or memory map,
            or anything with a shape whose slices are one of these
            (``safe_open(...).get_slice(name)``). A tensor on a GPU is searched there; on a GPU
            older than compute capability 8.0, or in a build without nvcc, it is searched on the
            CPU after a RefineFastWarning that says what to install.
        docs: (N, D), likewise. Read in blocks of 8 MiB, so it may be larger than memory. For
            queries on a GPU: on the same GPU, or on the CPU in any of these containers, from where
            it is streamed through pinned buffers.
        k: documents per query.
        band: lo and hi, both inclusive, on the inner product: on the cosine if the rows are unit
            vectors or ``normalize`` is set. Rows of other lengths are taken as they are.
        skip: how many of the most similar documents to drop.
        exclude: per query the ids that take no part (its positives): a list, set or array of any
            length. They do not count as skipped.
        ceiling: (B,), a further upper bound per query, e.g. 0.95 times the similarity of its
            positive.
        select: "hardest" takes the k most similar; "random" takes k at random, those with the
            smallest ``reference.hash64(seed, query, document)``.
        seed: of "random".
        order: "skip_then_band" is REFINE's rule (arXiv 2410.12890, section 3.2) and skips the most
            similar of all; "band_then_skip" is sentence-transformers' and skips the most similar
            in the band.
        normalize: divides each row by its norm first. A zero row stays zero, as in
            ``torch.nn.functional.normalize``.
        groups: (N + 1,) offsets of documents that are groups of consecutive rows, as for
            ``best_of_groups``: document i is ``docs[groups[i]:groups[i + 1]]``, its score that of
            its best row. ids, exclude, skip and in_band then count documents. Searched on the CPU.
        progress: called with (done, total), in documents times queries.

    Returns:
        BandTopK(ids, scores, in_band) on the queries' device: the same as a float64 sort of the
        given values, whatever the ISA level, the number of threads (``torch.set_num_threads``),
        the device and the container.

    Raises:
        ValueError: shapes that do not fit; k or skip below 0; lo above hi; an excluded id without a
            document; NaN in ceiling; NaN, infinity or a norm above 1e18 in a row, which is named.
        TypeError: another dtype; an excluded id that is not an integer.
        torch.OutOfMemoryError: a GPU without room for the workspace.
    """
    rows, count = shape(queries, "queries")[0], shape(docs, "docs")[0]
    ends = None
    if groups is not None:
        ends = torch.from_numpy(checked_offsets(groups, count, "groups", "docs"))
        count = len(ends) - 1
    excluded = None if exclude is None else Excluded.of(exclude, rows)
    if excluded is not None:
        excluded.check(count)
    rule = rule_of(k, band, skip, excluded, ceiling, select, seed, order, normalize)
    # the search allocates room for as many
    rule = rule._replace(skip=min(rule.skip, count), groups=ends)
    if isinstance(queries, Tensor) and isinstance(docs, Tensor) and progress is None:
        together = queries.device == docs.device
        if together and queries.device.type in ("cuda", "cpu"):
            return BandTopK(*_band_topk(queries.detach(), docs.detach(), *rule))
    return BandTopK(*search(queries, docs, rule, progress))


def rule_of(
    k: int,
    band: tuple[float, float],
    skip: int,
    excluded: Excluded | None,
    ceiling: Any,
    select: str,
    seed: int,
    order: str,
    normalize: bool,
) -> Rule:
    """The arguments of ``band_topk`` in the form of its op.

    Raises:
        ValueError: another word for ``select`` or ``order``; a band that is not two numbers.
        TypeError: k, skip or seed is not an integer.
    """
    try:
        lo, hi = (float(edge) for edge in band)
    except (TypeError, ValueError):
        raise ValueError(f"band must be two numbers, lo and hi (got {band!r})") from None
    if select not in ("hardest", "random"):
        raise ValueError(f'select must be "hardest" or "random" (got {select!r})')
    if order not in ("skip_then_band", "band_then_skip"):
        raise ValueError(f'order must be "skip_then_band" or "band_then_skip" (got {order!r})')
    k, skip, seed = integer(k, "k"), integer(skip, "skip"), integer(seed, "seed")
    if ceiling is not None:  # may be made of embeddings in training
        ceiling = torch.as_tensor(ceiling, dtype=torch.float64, device="cpu").detach()
    return Rule(
        k, lo, hi, skip,
        None if excluded is None else torch.from_numpy(excluded.offsets),
        None if excluded is None else torch.from_numpy(excluded.ids),
        ceiling,
        select == "random",
        (seed + 2**63) % 2**64 - 2**63,  # the op takes 64 bits, signed
        order == "band_then_skip", bool(normalize),  # also of numpy
    )  # fmt: skip


def search(
    queries: Any,
    docs: Any,
    rule: Rule,
    progress: Progress | None = None,
    first_id: int = 0,
    output: Output = Chosen,
) -> tuple[Tensor, ...]:
    """Searches on the GPU that holds the queries, else on the CPU.

    Args:
        queries: (B, D).
        docs: (N, D), documents ``first_id`` to ``first_id + N - 1``.
        rule: which documents to take.
        progress: called with (done, total), in documents times queries.
        first_id: the id of the first document.
        output: what to return.

    Returns:
        The tensors of ``output`` on the queries' device.
    """
    on_gpu = isinstance(queries, Tensor) and queries.device.type == "cuda"
    by = _search_on_gpu if on_gpu else _search
    return by(queries, docs, rule, progress, first_id, output)


@torch.library.custom_op("refine_fast::band_topk", mutates_args=(), device_types="cpu")
def _band_topk(
    queries: Tensor,
    docs: Tensor,
    k: int,
    lo: float,
    hi: float,
    skip: int,
    offsets: Tensor | None,
    excluded: Tensor | None,
    ceiling: Tensor | None,
    random: bool,
    seed: int,
    band_first: bool,
    normalize: bool,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = Rule(
        k, lo, hi, skip, offsets, excluded, ceiling, random, seed, band_first, normalize, groups
    )  # fmt: skip
    ids, scores, in_band = _search(queries, docs, rule)
    return ids, scores, in_band


@_band_topk.register_kernel("cuda")
def _(queries: Tensor, docs: Tensor, *rule: Any) -> tuple[Tensor, Tensor, Tensor]:
    ids, scores, in_band = _search_on_gpu(queries, docs, Rule(*rule))
    return ids, scores, in_band


@_band_topk.register_fake
def _(queries: Tensor, docs: Tensor, *rule: Any) -> tuple[Tensor, Tensor, Tensor]:
    asked = Rule(*rule)
    rows, _, _ = check(queries, docs, asked)
    return outputs(rows, asked.k, queries.device)


def _search_on_gpu(
    queries: Tensor,
    docs: Any,
    rule: Rule,
    progress: Progress | None = None,
    first_id: int = 0,
    output: Output = Chosen,
) -> tuple[Tensor, ...]:
    """On the GPU of ``queries``, or on the CPU where the GPU cannot search."""
    missing = band_topk_cuda.missing_requirement(queries.device)
    if rule.groups is not None:
        missing = "only the CPU's kernel takes groups"
    if missing is None:
        return band_topk_cuda.search(queries, docs, rule, progress, first_id, output)
    warn_once(f"band_topk searches {queries.device} tensors on the CPU: {missing}")
    copied = CopiedToCPU(docs) if isinstance(docs, Tensor) else docs
    found = _search(queries.cpu(), copied, rule, progress, first_id, output)
    return tuple(x.to(queries.device) for x in found)


def _search(
    queries: Any,
    docs: Any,
    rule: Rule,
    progress: Progress | None = None,
    first_id: int = 0,
    output: Output = Chosen,
) -> tuple[Tensor, ...]:
    """On the CPU."""
    rows, count, width = check(queries, docs, rule)
    ends = None if rule.groups is None else rule.groups.numpy()
    largest = 1 if ends is None else int(np.diff(ends).max(initial=1))
    at_a_time = max(1, BLOCK // (4 * width))
    edges = upper_edges(rows, rule)
    found = output(rows, rule, "cpu")
    spec = _core.BandSpec(
        width, rule.k, rule.skip, rule.lo, rule.random, rule.seed % 2**64, rule.band_first,
        rule.normalize, torch.get_num_threads(), largest,
    )  # fmt: skip
    step = _core.BandSearch.queries_within(spec, MEMORY)
    step = -(-rows // max(1, -(-rows // step)))  # equal shares
    for first in range(0, rows, max(step, 1)):
        last = min(first + step, rows)
        row_offsets = 0 if rule.offsets is None else rule.offsets[first:].data_ptr()
        row_ids = 0 if rule.excluded is None else rule.excluded.data_ptr()
        hi = edges[first:].data_ptr()
        band = _core.BandSearch(spec, first, last - first, hi, row_offsets, row_ids)
        with Block(queries, first, last, "queries") as block:
            band.set_queries(block.pointer, block.dtype, block.row_stride)
        spans = ranges(count, at_a_time) if ends is None else blocks_of_groups(ends, at_a_time)
        for begin, end in spans:
            inside = (begin, end) if ends is None else (int(ends[begin]), int(ends[end]))
            with Block(docs, *inside, "docs") as block:
                band.push(
                    block.pointer, block.dtype, block.row_stride, end - begin, first_id + begin,
                    0 if ends is None else ends[begin:].ctypes.data,
                )  # fmt: skip
            if progress is not None:
                progress(first * count + (last - first) * end, rows * count)
        found.write(band, first)
        del band  # frees its memory before the next one allocates
    return found.tensors
