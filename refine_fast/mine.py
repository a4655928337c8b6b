"""Hard negatives for queries whose positives are known, in a band that can be fitted to the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops.band_topk import Progress, band_topk


class Mined(NamedTuple):
    """ids (B, k), scores (B, k) and in_band (B,) as ``BandTopK``; band: the edges that were used."""

    ids: Tensor
    scores: Tensor
    in_band: Tensor
    band: tuple[float, float]


def mine(
    query_embeddings: Any,
    doc_embeddings: Any,
    positives: Sequence[Sequence[int]],
    *,
    k: int,
    band: tuple[float, float] | Literal["auto"] = (0.5, 0.7),
    skip: int = 5,
    select: str = "hardest",
    seed: int = 0,
    normalize: bool = True,
    progress: Progress | None = None,
) -> Mined:
    """k negatives per query by REFINE's rule (arXiv 2410.12890, section 3.2) on the cosine: without the positives, drop the ``skip`` most
    similar documents, keep the band. ``band="auto"`` is ``calibrate_band``. Without ``normalize``, on the inner product. Arguments otherwise
    as ``band_topk``."""
    edges = calibrate_band(query_embeddings, doc_embeddings, positives, k=k, skip=skip, seed=seed, normalize=normalize) if band == "auto" else (band[0], band[1])
    found = band_topk(
        query_embeddings,
        doc_embeddings,
        k,
        band=edges,
        skip=skip,
        exclude=positives,
        select=select,
        seed=seed,
        normalize=normalize,
        progress=progress,
    )
    return Mined(*found, edges)


def calibrate_band(
    query_embeddings: Any,
    doc_embeddings: Any,
    positives: Sequence[Sequence[int]],
    *,
    skip: int = 5,
    k: int = 5,
    coverage: float = 0.9,
    sample: int = 1024,
    seed: int = 0,
    normalize: bool = True,
) -> tuple[float, float]:
    """A band for this encoder, whose cosines may lie anywhere: [0.5, 0.7] is empty for three queries in four under MiniLM.

    hi is the lower quartile of the similarity of a query to its positives: what lies above is as similar as a quarter of the true answers,
    and may be one that nobody marked. lo is the highest edge that leaves ``coverage`` of the queries k negatives below hi, after
    ``skip``. Both from ``sample`` queries that have a positive, drawn with ``seed``.

    Args: query_embeddings (B, D), doc_embeddings (N, D), positives: per query its rows of doc_embeddings.
    Raises: ValueError if no query has a positive, too few have k other documents below hi, or a row holds NaN or Inf.
    """
    if k < 1:
        raise ValueError(f"k is {k}; a band is fitted to at least 1 negative for each query")
    known = np.array([i for i, rows in enumerate(positives) if len(rows)])
    if not known.size:
        raise ValueError("no query has a positive, so there is nothing to calibrate the band on; give the band as two numbers")
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[:sample])
    queries = _picked(query_embeddings, chosen, "queries", normalize)
    rows = [list(positives[i]) for i in chosen]
    repeated = np.repeat(np.arange(len(chosen)), [len(r) for r in rows])
    similarity = (queries[repeated] * _picked(doc_embeddings, np.concatenate(rows), "docs", normalize)).sum(1)
    hi = float(similarity.quantile(0.25))
    lowest = -1.0 if normalize else float(torch.finfo(torch.float32).min)
    hardest = band_topk(
        queries, doc_embeddings, k, band=(lowest, hi), skip=skip, exclude=rows, normalize=normalize
    )
    found = hardest.scores[:, -1].nan_to_num(lowest)
    # With an unbounded similarity, "none found" is too far from the others to interpolate.
    between = "linear" if normalize else "lower"
    lo = float(found.quantile(1 - coverage, interpolation=between))
    if lo <= lowest:
        raise ValueError(
            f"only {float((found > lowest).float().mean()):.0%} of the queries have {k} documents below {hi:.3f} after skipping {skip}, "
            f"and coverage asks for {coverage:.0%}; give the band as two numbers, or lower k or coverage"
        )
    return lo, hi


def _picked(source: Any, rows: np.ndarray, name: str, normalize: bool) -> Tensor:
    """The given rows in float32, as unit vectors with ``normalize``."""
    if isinstance(source, Tensor):
        picked = source[rows].float()
    else:
        picked = torch.cat([torch.as_tensor(source[int(i) : int(i) + 1]) for i in rows]).float()
    if normalize:
        picked = torch.nn.functional.normalize(picked, dim=1)
    if (bad := rows[~picked.isfinite().all(1).numpy(force=True)]).size:
        raise ValueError(f"row {bad[0]} of {name} holds NaN or Inf; leave such rows out")
    return picked
