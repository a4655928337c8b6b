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

from ..ops.band_inputs import Progress
from ..ops.band_parts import BandPart, band_topk_part, merge_band_parts, merge_band_topk
from ..ops.band_topk import BandTopK
from .workers import Spread, Work

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
    progress: Progress | None = None,
    **rule: Any,
) -> BandTopK:
    """What ``band_topk`` with the same arguments gives, to the last bit.

    Args:
        spread: the workers, which must see the file of ``docs``.
        queries: (B, D), a tensor or an array.
        docs: (N, D), a map of a whole .npy file.
        k: documents per query.
        exclude: per query ids of documents.
        ceiling: (B,), a further upper bound per query.
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
    key = digest.hexdigest()
    folder = spread.folder / f"search-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "queries.npy", asked)
    prepare = partial(_searcher, folder / "queries.npy", Path(str(docs.filename)), k, rule)
    size = ROWS_PER_SHARD
    count = max(1, -(-len(docs) // size))

    def item(i: int) -> list[int]:
        return [i * size, min((i + 1) * size, len(docs))]

    merged: BandPart | None = None
    for _, path in spread.workers.map(folder, key, prepare, count, item):
        part = BandPart.load(path)
        merged = part if merged is None else merge_band_parts([merged, part])
        if progress is not None:
            done = sum(end - begin for begin, end in merged.spans)
            progress(len(asked) * done, len(asked) * len(docs))
    assert merged is not None
    return merge_band_topk([merged])


def _searcher(queries: Path, docs: Path, k: int, rule: dict[str, Any]) -> Work:
    asked, every = (np.load(path, mmap_mode="r") for path in (queries, docs))

    def work(item: list[int], path: Path) -> None:
        begin, end = item
        part = band_topk_part(asked, every[begin:end], k, id_offset=begin, **rule)
        part.save(path)

    return work
