"""faiss, for corpora too large for brute force and for serving: an approximate ``band_topk``, and
the index of a corpus as a file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import RefineFastError
from ..files import atomic
from ..ops.band_inputs import Excluded, shape
from ..ops.band_topk import BandTopK, band_topk

CHUNK = 64
"""Queries whose candidates are held at a time."""


class Approximate(NamedTuple):
    """found: as from ``band_topk``; in_band counts the candidates. recall: the share of the exact
    ids that were found, over the queries that were also searched exactly; 1 if there are none."""

    found: BandTopK
    recall: float


def build_index(docs: Any, *, lists: int | None = None, seed: int = 0) -> Any:
    """A faiss index by inner product: exact (IndexFlatIP) or, with ``lists``, of inverted lists
    around k-means centres (IndexIVFFlat).

    Args:
        docs: (N, D), float32 after conversion.
        lists: the number of centres, 1 to N; about 4 sqrt(N) is usual.
        seed: of k-means.

    Raises:
        RefineFastError: lists out of range.
        ValueError: docs that do not have two dimensions.
    """
    import faiss

    rows = _in_float32(docs, "docs")
    index: Any = faiss.IndexFlatIP(rows.shape[1])
    if lists is not None:
        if not 1 <= lists <= len(rows):
            raise RefineFastError(
                f"lists must be from 1 to the number of documents, {len(rows)} (got {lists})"
            )
        index = faiss.IndexIVFFlat(index, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.train(rows)
    index.add(rows)
    return index


def write_index(docs: Any, path: str | os.PathLike[str], *, lists: int | None = None) -> None:
    """Writes ``build_index(docs)`` to ``path``, completely or not at all, for
    ``faiss.read_index``. Row i of docs has id i."""
    import faiss

    with atomic(Path(path)) as temporary:
        faiss.write_index(build_index(docs, lists=lists), str(temporary))


def approximate_band_topk(
    index: Any,
    queries: Any,
    docs: Any,
    k: int,
    *,
    probes: int,
    band: tuple[float, float] = (0.5, 0.7),
    skip: int = 5,
    exclude: Sequence[Sequence[int]] | None = None,
    ceiling: Any = None,
    order: str = "skip_then_band",
    sample: int = 64,
    seed: int = 0,
) -> Approximate:
    """``band_topk`` among the documents in the ``probes`` nearest inverted lists of each query,
    instead of all.

    The candidates of a query are what the index finds at or above the band's lower edge; the band,
    the skip and the order are then exact on them.

    Args:
        index: as from ``build_index(docs, lists=...)``.
        queries: (B, D), float32 after conversion. docs: (N, D), the rows of the index; a tensor or
            an array as for ``band_topk``. Rows are taken as they are: unit vectors for a band of
            cosines. What is on a GPU is copied to the CPU.
        probes: inverted lists to search per query.
        k, band, skip, exclude, ceiling, order: as for ``band_topk``.
        sample: how many queries, drawn with ``seed``, are also searched exactly, for ``recall``.
        seed: of the sample.

    Raises:
        RefineFastError: an index without inverted lists by inner product, or of other documents;
            probes below 1.
        ValueError, TypeError: as ``band_topk``.
    """
    import faiss

    if not isinstance(index, faiss.IndexIVF) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RefineFastError(
            f"index is a faiss {type(index).__name__}; give one with inverted lists by inner"
            " product, as from build_index(docs, lists=...)"
        )
    if probes < 1:
        raise RefineFastError(f"probes must be an integer >= 1 (got {probes})")
    rows = _in_float32(queries, "queries")
    texts = docs.detach().cpu() if isinstance(docs, torch.Tensor) else np.asarray(docs)
    if shape(texts, "docs") != (index.ntotal, index.d):
        raise RefineFastError(
            f"index holds {index.ntotal} vectors of {index.d} numbers, but docs have shape"
            f" {tuple(texts.shape)}; give the index of these docs"
        )
    if ceiling is not None:
        ceiling = torch.as_tensor(ceiling, dtype=torch.float64, device="cpu")
    # raises what a search of one query would say of its row 0
    nothing = band_topk(rows, texts[:0], k, band=band, skip=skip, ceiling=ceiling, order=order)
    nearest = faiss.SearchParametersIVF()
    nearest.nprobe = probes
    excluded = None
    if exclude is not None:
        excluded = Excluded.of(exclude, len(rows))
        excluded.check(len(texts))
    parts = [BandTopK(*(column[:0] for column in nothing))]
    for first in range(0, len(rows), CHUNK):
        chunk = rows[first : first + CHUNK]
        # a float32 score may fall just below an edge that the exact one reaches
        limits, _, ids = index.range_search(chunk, band[0] - 1e-4, params=nearest)
        for i, query in enumerate(chunk):
            own = np.sort(ids[limits[i] : limits[i + 1]])
            left_out = None
            if excluded is not None:
                ids_of = slice(*excluded.offsets[first + i : first + i + 2])
                left_out = [np.flatnonzero(np.isin(own, excluded.ids[ids_of]))]
            found = band_topk(
                query[None],
                texts[own],
                k,
                band=band,
                skip=skip,
                exclude=left_out,
                ceiling=None if ceiling is None else ceiling[first + i : first + i + 1],
                order=order,
            )
            parts.append(
                found._replace(
                    ids=torch.where(
                        found.ids < 0, found.ids, torch.from_numpy(np.append(own, -1))[found.ids]
                    )
                )
            )
    found = BandTopK(*(torch.cat(column) for column in zip(*parts, strict=True)))

    checked = np.sort(np.random.default_rng(seed).permutation(len(rows))[:sample])
    exact = band_topk(
        rows[checked],
        texts,
        k,
        band=band,
        skip=skip,
        exclude=None if exclude is None else [exclude[i] for i in checked],
        ceiling=None if ceiling is None else ceiling[checked],
        order=order,
    )
    wanted = [set(ids.tolist()) - {-1} for ids in exact.ids]
    hit = sum(
        len(want & set(ids.tolist())) for want, ids in zip(wanted, found.ids[checked], strict=True)
    )
    total = sum(map(len, wanted))
    return Approximate(found, hit / total if total else 1.0)


def _in_float32(rows: Any, name: str) -> np.ndarray:
    """(N, D) on the CPU, without a gradient: a tensor, or what numpy reads."""
    if isinstance(rows, torch.Tensor):
        rows = rows.detach().float().numpy(force=True)
    found = np.ascontiguousarray(rows, dtype=np.float32)
    shape(found, name)
    return found
