"""sentence-transformers' in-batch negatives losses over `refine_fast.info_nce`, which never builds
the score matrix.

Subclasses, so that every constructor argument, default and error is sentence-transformers' own
(6.x). info_nce covers ``cos_sim`` or ``dot_score``, no hardness weighting, and the directions
("query_to_doc",), ("query_to_doc", "query_to_query") joint or ("query_to_doc", "doc_to_query") per
direction. Any other setting runs the parent's code, at the parent's cost.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor

from ...ops.info_nce import info_nce

COVERED = {
    ("joint", ("query_to_doc",)),
    ("per_direction", ("query_to_doc",)),
    ("joint", ("query_to_doc", "query_to_query")),
    ("per_direction", ("doc_to_query", "query_to_doc")),
}
"""(partition mode, sorted directions) that info_nce computes."""


def _loss(settings: Any, embeddings: list[Tensor]) -> Tensor | None:
    """The loss over (queries, positives, negatives, ...), each (B, D), or None where info_nce does
    not cover the settings."""
    directions = tuple(sorted(settings.directions))
    normalize = {cos_sim: True, dot_score: False}.get(settings.similarity_fct)
    hardened = settings.hardness_mode is not None and settings.hardness_strength > 0
    covered = (settings.partition_mode, directions) in COVERED
    if normalize is None or hardened or len(embeddings) < 2 or not covered:
        return None
    queries, *documents = embeddings
    own = torch.arange(len(queries), device=queries.device)
    if settings.gather_across_devices:
        own = own + get_rank() * len(queries)
        queries, *documents = (all_gather_with_grad(x) for x in embeddings)
    columns = torch.cat(documents)
    options: dict[str, Any] = {
        "temperature": 1 / settings.scale,
        "normalize": normalize,
        "positives": own,
    }
    # the other queries are columns too; a query shares its positive's id, so that it is not a
    # negative of itself
    if "query_to_query" in directions:
        options["doc_ids"] = torch.cat(
            [torch.arange(len(x), device=own.device) for x in (columns, queries)]
        )
        columns = torch.cat([columns, queries])
    both = "doc_to_query" in directions
    if len(own) == len(queries):
        return info_nce(queries, columns, symmetric=both, **options)
    # this device's queries against everyone's documents
    loss = info_nce(queries[own], columns, **options)
    return (loss + info_nce(documents[0][own], queries, **options)) / 2 if both else loss


class FusedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """``sentence_transformers.losses.MultipleNegativesRankingLoss`` without its score matrix: same
    arguments, loss and gradients."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss over (queries, positives, negatives, ...), each (B, D)."""
        loss = _loss(self, embeddings)
        return super().compute_loss_from_embeddings(embeddings, labels) if loss is None else loss


class CachedFusedMultipleNegativesRankingLoss(CachedMultipleNegativesRankingLoss):
    """``sentence_transformers.losses.CachedMultipleNegativesRankingLoss`` (GradCache, Gao et al.,
    arXiv 2101.06983), with one fused step over the batch where the parent scores
    ``mini_batch_size`` rows at a time: same arguments, loss and gradients. ``mini_batch_size``
    only bounds the encoder's activations."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss over the mini-batches of each column; with_backward also fills their
        gradients."""
        loss = _loss(self, [torch.cat(chunks) for chunks in reps])
        if loss is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss
