"""``band_topk`` over the workers of a run: each searches some of the documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..ops.band_inputs import Progress, blocks_of_groups, ranges
from ..ops.band_parts import BandPart, band_topk_part, merge_band_parts, merge_band_topk
from ..ops.band_topk import BandTopK
from .workers import SharedRows, Spread, Work

ROWS_PER_SHARD = 125_000
"""Documents of a shard: 192 MB of float32 at d = 384."""


def search_in_shards(
    spread: Spread,
    queries: Any,
    docs: np.memmap,
    k: int,
    *,
    exclude: Sequence[Sequence[int]],
    ceiling: Tensor | None = None,
    groups: np.ndarray | None = None,
    progress: Progress | None = None,
    **rule: Any,
) -> BandTopK:
    """What ``band_topk`` with the same arguments gives, to the last bit.

    Args:
        spread: the workers.
        queries: (B, D), a tensor or an array.
        docs: (N, D), a map of a whole .npy file.
        k: documents per query.
        exclude: per query ids of documents.
        ceiling: (B,), a further upper bound per query.
        groups: (N + 1,) offsets of documents that are groups of rows of ``docs``.
        progress: called with (done, total), in documents times queries.
        rule: the other arguments of ``band_topk``, all of them JSON.

    Raises:
        ValueError: as ``band_topk``.
    """
    asked = np.asarray(queries)
    rule["exclude"] = [[int(i) for i in ids] for ids in exclude]
    rule["ceiling"] = None if ceiling is None else ceiling.tolist()
    digest = hashlib.sha256(json.dumps([k, rule]).encode())
    digest.update(np.ascontiguousarray(asked).data)
    if groups is not None:
        digest.update(np.ascontiguousarray(groups).data)
    key = digest.hexdigest()
    folder = spread.folder / f"search-{key[:16]}"
    spans, total = ranges(len(docs), ROWS_PER_SHARD), len(docs)
    if groups is not None:
        spans, total = blocks_of_groups(groups, ROWS_PER_SHARD), len(groups) - 1
    items = [*map(list, spans)] or [[0, 0]]
    rows = [(b, e) if groups is None else (int(groups[b]), int(groups[e])) for b, e in items]
    shared = [
        spread.workers.share_rows(folder / "queries", asked, [(0, len(asked))]),
        spread.workers.share_rows(folder / "docs", docs, rows),
    ]
    if groups is not None:
        offsets = spread.workers.share_rows(folder / "groups", groups, [(0, len(groups))])
        shared.append(offsets)
    prepare = partial(_searcher, shared, k, rule)

    merged: BandPart | None = None
    for _, path in spread.workers.map(folder, key, prepare, len(items), items.__getitem__):
        part = BandPart.load(path)
        merged = part if merged is None else merge_band_parts([merged, part])
        if progress is not None:
            done = sum(end - begin for begin, end in merged.spans)
            progress(len(asked) * done, len(asked) * total)
    assert merged is not None
    return merge_band_topk([merged])


def _searcher(shared: Sequence[SharedRows], k: int, rule: dict[str, Any]) -> Work:
    queries, docs, *groups = shared
    asked, offsets = queries.read(), groups[0].read() if groups else None

    def work(item: list[int], path: Path) -> None:
        begin, end = item
        rows, inside = (begin, end), None
        if offsets is not None:
            ends = offsets[begin : end + 1]
            rows, inside = (int(ends[0]), int(ends[-1])), ends - ends[0]
        part = band_topk_part(asked, docs.read(*rows), k, id_offset=begin, groups=inside, **rule)
        part.save(path)

    return work
