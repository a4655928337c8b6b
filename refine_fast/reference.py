"""The three operations in plain torch: what the kernels must equal.

Gold for the tests (in float64), baseline for the benchmarks, and the path for devices without a
kernel. Every function here may build the matrix that its kernel must not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    q: Tensor,
    d: Tensor,
    *,
    temperature: float | Tensor = 0.02,
    positives: Tensor | None = None,
    doc_ids: Tensor | None = None,
    hard: Tensor | None = None,
    hard_mask: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    widths: Sequence[int] | None = None,
    width_weights: Sequence[float] | None = None,
    weight: Tensor | None = None,
    soft_columns: Tensor | None = None,
    soft_targets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``cross_entropy(q @ d.T / temperature, positives)`` over the columns that are negatives of
    the row, plus its own hard negatives.

    Args:
        q: (B, D). d: (N, D).
        positives: (B,), default arange(B).
        doc_ids: (N,), default arange(N): a column with the id of the row's positive is not a
            negative.
        hard: (B, K, D). hard_mask: (B, K), True where used.
        margin: a negative with s > s_positive + margin is dropped.
        symmetric: the mean with the direction from each row's positive to the queries. There, a
            query whose positive has the same id is not a negative, and hard negatives take no part.
        widths: the sum over them, weighted by width_weights (default 1), of the loss of q[:, :w],
            d[:, :w] and hard[..., :w].
        weight: (B,); the mean divides by its sum.
        soft_columns: (B, T), -1 where unused; N + k is the row's hard negative k. soft_targets:
            (B, T). The target distribution: these shares, and the rest of 1 for the positive. A
            column that is not in the softmax counts as the positive.

    Returns:
        () or, with reduction "none", (B,).
    """
    widths = [q.shape[1]] if widths is None else widths
    width_weights = [1.0] * len(widths) if width_weights is None else width_weights
    loss = torch.zeros(len(q), dtype=q.dtype, device=q.device)
    for width, width_weight in zip(widths, width_weights, strict=True):
        losses = info_nce_losses(
            q[:, :width], d[:, :width], temperature=temperature, positives=positives,
            doc_ids=doc_ids, hard=None if hard is None else hard[..., :width],
            hard_mask=hard_mask, margin=margin, symmetric=symmetric, normalize=normalize,
            soft_columns=soft_columns, soft_targets=soft_targets,
        )  # fmt: skip
        loss = loss + width_weight * losses.mean(0)
    loss = loss if weight is None else loss * weight
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else len(q) if weight is None else weight.sum())


def info_nce_losses(
    q: Tensor,
    d: Tensor,
    *,
    temperature: float | Tensor = 0.02,
    positives: Tensor | None = None,
    doc_ids: Tensor | None = None,
    hard: Tensor | None = None,
    hard_mask: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    soft_columns: Tensor | None = None,
    soft_targets: Tensor | None = None,
) -> Tensor:
    """(1, B), or (2, B) if symmetric: each row's loss from the query's side and from its
    positive's."""
    if hard is not None and hard_mask is not None:  # 0 * NaN would reach the gradient
        hard = hard.masked_fill(~hard_mask[..., None], 0)
    if normalize:
        q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
        hard = None if hard is None else F.normalize(hard, dim=-1)
    rows = torch.arange(len(q), device=q.device)
    positives = rows if positives is None else positives
    ids = torch.arange(len(d), device=d.device) if doc_ids is None else doc_ids
    s = q @ d.T
    s_pos = s[rows, positives]
    ceiling = float("inf") if margin is None else (s_pos.detach() + margin)[:, None]

    def loss_over(
        scores: Tensor, dropped: Tensor, own: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of the columns that are not dropped with the targets; None: all of 1 for
        column ``own``."""
        dropped = (dropped | (scores.detach() > ceiling)).scatter(1, own[:, None], False)
        logits = (scores / temperature).masked_fill(dropped, float("-inf"))
        loss = torch.logsumexp(logits, dim=1) - s_pos / temperature
        if targets is None:
            return loss
        taken = targets.masked_fill(dropped, 0)
        return loss + (taken * (s_pos[:, None] - scores)).sum(1) / temperature

    scores, dropped = s, ids == ids[positives][:, None]
    if hard is not None:
        scores = torch.cat([s, torch.einsum("bd,bkd->bk", q, hard)], dim=1)
        unused = dropped.new_zeros(hard.shape[:2]) if hard_mask is None else ~hard_mask
        dropped = torch.cat([dropped, unused], dim=1)
    targets = None
    if soft_columns is not None and soft_targets is not None:
        used = soft_targets.detach().to(s.dtype).masked_fill(soft_columns < 0, 0)
        targets = torch.zeros_like(scores).scatter_add(1, soft_columns.clamp(min=0), used)
    loss = loss_over(scores, dropped, positives, targets)
    if not symmetric:
        return loss[None]
    same = ids[positives] == ids[positives][:, None]
    return torch.stack([loss, loss_over(s[:, positives].T, same, rows)])


def hash64(seed: int, query: Tensor, doc: Tensor) -> Tensor:
    """The order of ``select="random"``: splitmix64's finalizer over (seed, query, doc), as int64
    that compares like the unsigned value. int64 arithmetic wraps as uint64 does; a mask makes >>
    logical."""

    def mix(x: Tensor) -> Tensor:
        x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
        x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94D049BB133111EB
        return x ^ ((x >> 31) & ((1 << 33) - 1))

    golden = -7046029254386353131  # 0x9E3779B97F4A7C15
    start = mix(query.new_tensor(seed, dtype=torch.int64) + golden)
    return mix(mix(start + query * golden) + doc * golden) ^ torch.iinfo(torch.int64).min


def band_topk(
    queries: Tensor,
    docs: Tensor,
    k: int,
    *,
    band: tuple[float, float] = (0.5, 0.7),
    skip: int = 5,
    exclude: list[list[int]] | None = None,
    ceiling: Tensor | None = None,
    select: str = "hardest",
    seed: int = 0,
    order: str = "skip_then_band",
    normalize: bool = False,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per query: ranks the documents by similarity (ties by lower id), leaves out the excluded,
    drops the ``skip`` most similar, keeps ``lo <= s <= min(hi, ceiling)``, takes k. Scores are
    float64 inside.

    Args:
        queries: (B, D). docs: (N, D).
        exclude: per query the excluded ids.
        ceiling: (B,).
        select: "hardest": the k most similar; "random": the k smallest
            ``hash64(seed, query, doc)``.
        order: "band_then_skip" applies the band first, then the skip.
        groups: (N + 1,) offsets of documents that are groups of rows of ``docs``, as in
            ``best_of_groups``.

    Returns:
        ids (B, k) int64, most similar first, -1 where there are too few; scores (B, k) float32, NaN
        there; in_band (B,) int64, how many documents qualified.
    """
    queries, docs = queries.double(), docs.double()
    if normalize:
        queries, docs = F.normalize(queries, dim=-1), F.normalize(docs, dim=-1)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64)
    scores = torch.full((len(queries), k), float("nan"), dtype=torch.float32)
    in_band = torch.zeros(len(queries), dtype=torch.int64)
    if groups is None:
        groups = torch.arange(len(docs) + 1)
    for i, s in enumerate(best_of_groups(queries, docs, groups)):
        ranked = torch.sort(s, descending=True, stable=True).indices
        if exclude is not None and len(exclude[i]):
            ranked = ranked[~torch.isin(ranked, torch.as_tensor(exclude[i], dtype=torch.int64))]
        hi = band[1] if ceiling is None else min(band[1], float(ceiling[i]))
        if order == "skip_then_band":
            ranked = ranked[skip:]
        ranked = ranked[(s[ranked] >= band[0]) & (s[ranked] <= hi)]
        if order == "band_then_skip":
            ranked = ranked[skip:]
        in_band[i] = len(ranked)
        if select == "random":
            chosen = torch.sort(hash64(seed, torch.tensor(i), ranked), stable=True).indices[:k]
            ranked = ranked[torch.sort(chosen).values]
        ranked = ranked[:k]
        ids[i, : len(ranked)] = ranked
        scores[i, : len(ranked)] = s[ranked].float()
    return ids, scores, in_band


def best_of_groups(queries: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """The highest inner product of each query in each group of consecutive rows.

    Args:
        queries: (Q, D). rows: (S, D).
        offsets: (G + 1,) int64: group g is ``rows[offsets[g]:offsets[g + 1]]``, at least one row.

    Returns:
        (Q, G) in the dtype of ``queries``.
    """
    groups = torch.arange(len(offsets) - 1, device=queries.device)
    of = torch.repeat_interleave(groups, offsets.diff()).expand(len(queries), -1)
    best = queries.new_full((len(queries), len(groups)), -torch.inf)
    with torch.autocast(queries.device.type, enabled=False):  # in the dtype of the result
        products = queries @ rows.T
    return best.scatter_reduce(1, of, products, "amax")


def lerp(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """``base + weight * (tuned - base)`` in the dtype of ``base``: ``torch.lerp``, in float32 for
    the smaller types, and one rounding. Values equal in both stay as they are, and a weight of 0 or
    1 gives one input back; ``torch.lerp`` would turn a mask's -inf into NaN and -0 into +0."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    a, b = base.to(wide), tuned.to(wide)
    if (own := float(torch.tensor(weight, dtype=wide))) in (0, 1):
        return (b if own else a).to(base.dtype)
    return torch.where(a == b, a, torch.lerp(a, b, weight)).to(base.dtype)
