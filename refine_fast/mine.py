"""Hard negatives for queries with known positives, in a band that can be fitted to the encoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import RefineFastWarning
from .ops.band_inputs import Excluded, Progress, checked_offsets, shape
from .ops.band_topk import BandTopK, band_topk

Search = Callable[..., BandTopK]
"""``band_topk``, or what gives the same for the same arguments."""

NO_LOWER_EDGE = float(torch.finfo(torch.float32).min)
"""The lower edge of a fitted band that has none, where the similarity has no lowest value."""

CEILINGS = 4096
"""Queries whose positives are compared at a time."""


class Mined(NamedTuple):
    """ids (B, k), scores (B, k) and in_band (B,) as in ``BandTopK``; band: the edges used."""

    ids: Tensor
    scores: Tensor
    in_band: Tensor
    band: tuple[float, float]


def mine(
    query_embeddings: Any,
    doc_embeddings: Any,
    positives: Sequence[Any],
    *,
    k: int,
    band: tuple[float, float] | Literal["auto"] = (0.5, 0.7),
    skip: int = 5,
    relative_margin: float | None = None,
    select: str = "hardest",
    seed: int = 0,
    normalize: bool = True,
    groups: Any = None,
    progress: Progress | None = None,
    search: Search = band_topk,
) -> Mined:
    """k negatives per query by REFINE's rule (arXiv 2410.12890, section 3.2) on the cosine: leaves
    out the positives, drops the ``skip`` most similar documents, keeps the band.

    Args:
        query_embeddings: (B, D).
        doc_embeddings: (N, D).
        positives: per query its rows of doc_embeddings, a list, set or array; with ``groups``, its
            groups.
        band: lo and hi, or "auto" for ``calibrate_band``.
        relative_margin: leaves out what is more similar than ``s - relative_margin * |s|``, s the
            similarity of the query's least similar positive; such documents are often answers that
            nobody marked (NV-Retriever, arXiv 2407.15831, has 0.05).
        normalize: uses the cosine; without it, the inner product.
        groups: (N + 1,) offsets of documents that are groups of rows of doc_embeddings, such
            as sentences; a document is then as similar as its best row.
        k, skip, select, seed, progress: as for ``band_topk``.
        search: does the search, such as one in shards (``band_topk_part``).

    Raises:
        ValueError, TypeError: as ``band_topk``, and as ``calibrate_band`` for "auto".
    """
    positives, groups = _checked(query_embeddings, doc_embeddings, positives, groups)
    if band == "auto":
        edges = calibrate_band(
            query_embeddings,
            doc_embeddings,
            positives,
            k=k,
            skip=skip,
            seed=seed,
            normalize=normalize,
            groups=groups,
            search=search,
        )
    elif np.shape(band) != (2,):
        raise ValueError(f'band must be two numbers or "auto" (got {band!r})')
    else:
        edges = band[0], band[1]
    found = search(
        query_embeddings,
        doc_embeddings,
        k,
        band=edges,
        skip=skip,
        exclude=positives,
        ceiling=None
        if relative_margin is None
        else _ceiling(
            query_embeddings, doc_embeddings, positives, relative_margin, normalize, groups
        ),
        select=select,
        seed=seed,
        normalize=normalize,
        groups=groups,
        progress=progress,
    )
    return Mined(*found, edges)


def band_in_words(band: Sequence[float]) -> str:
    """Its edges: "0.50 to 0.70"; "up to -2.00" where it has no lower edge."""
    low, high = band
    return f"up to {high:.2f}" if low == NO_LOWER_EDGE else f"{low:.2f} to {high:.2f}"


def calibrate_band(
    query_embeddings: Any,
    doc_embeddings: Any,
    positives: Sequence[Any],
    *,
    skip: int = 5,
    k: int = 5,
    coverage: float = 0.9,
    sample: int = 1024,
    seed: int = 0,
    normalize: bool = True,
    groups: Any = None,
    search: Search = band_topk,
) -> tuple[float, float]:
    """Fits a band to an encoder: the range of cosines differs between encoders, and [0.5, 0.7] is
    empty for three queries in four under MiniLM.

    hi is the lower quartile of the similarity of a query to its positives: documents above it are
    as similar as a quarter of the true answers, and may be answers that nobody marked. lo is the
    highest edge that leaves ``coverage`` of the queries k negatives below hi, after ``skip``; if
    none does, the lowest similarity, with a warning.

    Args:
        query_embeddings: (B, D).
        doc_embeddings: (N, D).
        positives: as for ``mine``.
        skip: how many of the most similar documents to drop.
        k: negatives per query, at least 1.
        coverage: the share of queries that must have k negatives.
        sample: how many of the queries that have a positive to use, drawn with ``seed``.
        seed: of the sample.
        normalize: uses the cosine; without it, the inner product.
        groups, search: as for ``mine``.

    Returns:
        lo and hi.

    Raises:
        ValueError: no query has a positive, one has a positive that is no document, or a row
            holds NaN or infinity.
        TypeError: a positive that is not an integer.
    """
    positives, groups = _checked(query_embeddings, doc_embeddings, positives, groups)
    if k < 1:
        raise ValueError(f"k must be an integer >= 1 (got {k})")
    if sample < 1:
        raise ValueError(f"sample must be an integer >= 1 (got {sample})")
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage must be a share from 0 to 1 (got {coverage})")
    known = np.array([i for i, rows in enumerate(positives) if len(rows)])
    if not known.size:
        raise ValueError(
            "no query has a positive, so there is nothing to calibrate the band on; give the band"
            " as two numbers"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[:sample])
    queries = _picked(query_embeddings, chosen, "queries", normalize)
    rows = [positives[i] for i in chosen]
    repeated = np.repeat(np.arange(len(chosen)), [len(r) for r in rows])
    similar = _similarity(
        queries[repeated], doc_embeddings, np.concatenate(rows), normalize, groups
    )
    hi = float(similar.quantile(0.25))
    lowest = -1.0 if normalize else NO_LOWER_EDGE
    hardest = search(
        queries,
        doc_embeddings,
        k,
        band=(lowest, hi),
        skip=skip,
        exclude=rows,
        normalize=normalize,
        groups=groups,
    )
    found = hardest.scores[:, -1].nan_to_num(lowest)
    # with an unbounded similarity, "none found" is too far from the others to interpolate
    between = "linear" if normalize else "lower"
    lo = float(found.quantile(1 - coverage, interpolation=between))
    if lo <= lowest:
        share = float((found > lowest).float().mean())
        warnings.warn(
            f"only {share:.0%} of the queries have {k} documents below {hi:.3f} after skipping"
            f" {skip}, fewer than {coverage:.0%}; the band has no lower edge",
            RefineFastWarning,
            stacklevel=2,
        )
        lo = lowest
    return lo, hi


def _checked(
    queries: Any, docs: Any, positives: Sequence[Any], groups: Any
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The positives and the offsets of groups as arrays, after a check of both."""
    count = shape(docs, "docs")[0]
    if groups is not None:
        groups = checked_offsets(groups, count, "groups", "docs")
        count = len(groups) - 1
    found = Excluded.of(positives, shape(queries, "queries")[0], "positives")
    found.check(count, "positives")
    return [found.ids[a:b] for a, b in pairwise(found.offsets.tolist())], groups


def _ceiling(
    queries: Any,
    docs: Any,
    positives: list[np.ndarray],
    margin: float,
    normalize: bool,
    groups: np.ndarray | None,
) -> Tensor:
    """(B,) float64: what a negative's similarity may be; infinity for a query without positives."""
    ceiling = torch.full((len(positives),), torch.inf, dtype=torch.float64, device="cpu")
    for start in range(0, len(positives), CEILINGS):
        block = range(start, min(start + CEILINGS, len(positives)))
        pairs = [(i, row) for i in block for row in positives[i]]
        if not pairs:
            continue
        of, rows = np.array(pairs, np.int64).T
        asked = _picked(queries, of, "queries", normalize)
        similar = _similarity(asked, docs, rows, normalize, groups).double().cpu()
        ceiling.scatter_reduce_(0, torch.from_numpy(of), similar, "amin")
    return ceiling - ceiling.abs().nan_to_num(posinf=0.0) * margin


def _similarity(
    asked: Tensor, docs: Any, documents: np.ndarray, normalize: bool, groups: np.ndarray | None
) -> Tensor:
    """(P,) of each row of ``asked`` (P, D) to one document."""
    if groups is None:
        return (asked * _picked(docs, documents, "docs", normalize).to(asked.device)).sum(1)
    sizes = groups[documents + 1] - groups[documents]
    ends = np.cumsum(sizes)
    rows = np.arange(ends[-1]) + np.repeat(groups[documents] - (ends - sizes), sizes)
    of = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(asked.device)
    similar = (asked[of] * _picked(docs, rows, "docs", normalize).to(asked.device)).sum(1)
    return similar.new_full((len(sizes),), -torch.inf).scatter_reduce(0, of, similar, "amax")


def _row(source: Any, i: int) -> Tensor:
    """(1, D); torch shares no read-only map, and no bfloat16 of numpy."""
    row = source[i : i + 1]
    return row if isinstance(row, Tensor) else torch.from_numpy(np.array(row, np.float32))


def _picked(source: Any, rows: np.ndarray, name: str, normalize: bool) -> Tensor:
    """The given rows in float32, as unit vectors with ``normalize``."""
    if isinstance(source, Tensor):
        picked = source[rows]
    else:
        picked = torch.cat([_row(source, int(i)) for i in rows])
    picked = picked.detach().float()
    if normalize:
        picked = torch.nn.functional.normalize(picked, dim=1)
    if (bad := rows[~picked.isfinite().all(1).numpy(force=True)]).size:
        raise ValueError(f"row {bad[0]} of {name} holds NaN or Inf; leave such rows out")
    return picked
