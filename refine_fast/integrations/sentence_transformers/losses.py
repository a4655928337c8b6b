"""sentence-transformers' in-batch negatives losses over `refine_fast.info_nce`, which never builds
the score matrix.

Subclasses, so that every constructor argument, default and error is sentence-transformers' own
(6.x). info_nce covers ``cos_sim`` or ``dot_score``, no hardness weighting, and the directions
("query_to_doc",), ("query_to_doc", "query_to_query") joint or ("query_to_doc", "doc_to_query") per
direction. Any other setting runs the parent's code, at the parent's cost.

They add distillation: with ``distill`` above 0, that share of the loss is the cross-entropy with a
teacher's distribution over the row's own documents, softmax(labels / distill_temperature). The
labels, (B, 1 + negatives), are the teacher's scores of (query, positive), (query, negative 1) and
so on, as for sentence-transformers' DistillKLDivLoss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import RandContext
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from ...collectives import gather_rows, ranks, row_counts
from ...ops.info_nce import info_nce
from ..attention import wide_backward

COVERED = {
    ("joint", ("query_to_doc",)),
    ("per_direction", ("query_to_doc",)),
    ("joint", ("query_to_doc", "query_to_query")),
    ("per_direction", ("doc_to_query", "query_to_doc")),
}
"""(partition mode, sorted directions) that info_nce computes."""


def _loss(settings: Any, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor | None:
    """The loss over (queries, positives, negatives, ...), each (B, D), or None where info_nce does
    not cover the settings.

    Raises:
        ValueError: distill without settings or labels that it needs.
    """
    directions = tuple(sorted(settings.directions))
    normalize = {cos_sim: True, dot_score: False}.get(settings.similarity_fct)
    hardened = settings.hardness_mode is not None and settings.hardness_strength > 0
    covered = (settings.partition_mode, directions) in COVERED
    if normalize is None or hardened or len(embeddings) < 2 or not covered:
        if settings.distill:
            raise ValueError(
                "distill needs cos_sim or dot_score, no hardness weighting, and the directions of"
                " refine_fast.info_nce; change these settings or set distill=0"
            )
        return None
    queries, *documents = embeddings
    own = torch.arange(len(queries), device=queries.device)
    shares = _teacher_shares(settings, labels, (len(queries), len(documents)))
    rank, size = ranks() if settings.gather_across_devices else (0, 1)
    if size > 1:
        counts = row_counts(queries)
        own = own + sum(counts[:rank])
        queries, *documents = (gather_rows(x, counts) for x in embeddings)
    columns = torch.cat(documents)
    options: dict[str, Any] = {
        "temperature": 1 / settings.scale,
        "normalize": normalize,
        "positives": own,
    }
    if shares is not None:
        starts = len(documents[0]) * torch.arange(len(documents), device=own.device)
        options |= {"soft_columns": own[:, None] + starts, "soft_targets": shares}
    # the other queries are columns too; a query shares its positive's id, so that it is not a
    # negative of itself
    if "query_to_query" in directions:
        options["doc_ids"] = torch.cat(
            [torch.arange(len(x), device=own.device) for x in (columns, queries)]
        )
        columns = torch.cat([columns, queries])
    both = "doc_to_query" in directions
    forward_only = {"soft_columns": None, "soft_targets": None}
    if size == 1:
        return info_nce(queries, columns, symmetric=both, **options)
    # this device's queries against everyone's documents
    loss = info_nce(queries[own], columns, **options)
    if both:
        loss = (loss + info_nce(documents[0][own], queries, **{**options, **forward_only})) / 2
    return loss * (size * len(own) / len(queries))  # 1 if every device has as many rows


def _teacher_shares(settings: Any, labels: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The teacher's shares of the target of each row, (B, documents of a row); None: no teacher."""
    if not settings.distill:
        return None
    if labels is None or labels.shape != shape:
        found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
        raise ValueError(
            f"distill needs the teacher's scores as labels of shape {shape}, one for each document"
            f" of a row (got {found})"
        )
    return settings.distill * (labels.float() / settings.distill_temperature).softmax(1)


def _device(features: dict[str, Tensor]) -> torch.device:
    return next(x.device for x in features.values() if isinstance(x, Tensor))


class _Distilling:
    """The arguments of distillation, beside those of the loss that is the other parent."""

    def __init__(
        self, *args: Any, distill: float = 0.0, distill_temperature: float = 1.0, **kwargs: Any
    ) -> None:
        if not 0 <= distill <= 1:
            raise ValueError(f"distill must be between 0 and 1 (got {distill})")
        if not 0 < distill_temperature < float("inf"):
            raise ValueError(
                f"distill_temperature must be a positive number (got {distill_temperature})"
            )
        super().__init__(*args, **kwargs)
        self.distill, self.distill_temperature = distill, distill_temperature

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card; those of the teacher where there is one."""
        teacher = {"distill": self.distill, "distill_temperature": self.distill_temperature}
        own = super().get_config_dict()  # type: ignore[misc]  # of the other parent
        return {**own, **teacher} if self.distill else own


class FusedMultipleNegativesRankingLoss(_Distilling, MultipleNegativesRankingLoss):
    """``sentence_transformers.losses.MultipleNegativesRankingLoss`` without its score matrix: same
    arguments, loss and gradients.

    Args:
        distill: share of the loss that the teacher's scores in the labels set.
        distill_temperature: positive; of the teacher's scores.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        columns = list(sentence_features)
        with wide_backward(_device(columns[0])):
            return super().forward(columns, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss over (queries, positives, negatives, ...), each (B, D)."""
        loss = _loss(self, embeddings, labels)
        return super().compute_loss_from_embeddings(embeddings, labels) if loss is None else loss


class CachedFusedMultipleNegativesRankingLoss(_Distilling, CachedMultipleNegativesRankingLoss):
    """``sentence_transformers.losses.CachedMultipleNegativesRankingLoss`` (GradCache, Gao et al.,
    arXiv 2101.06983), with one fused step over the batch where the parent scores
    ``mini_batch_size`` rows at a time: same arguments, loss and gradients. ``mini_batch_size``
    only bounds the encoder's activations.

    Args:
        distill: share of the loss that the teacher's scores in the labels set.
        distill_temperature: positive; of the teacher's scores.
    """

    def embed_minibatch(
        self, sentence_feature: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, RandContext | None]:
        """The embeddings of one mini-batch, with what repeats its random numbers."""
        with wide_backward(_device(sentence_feature)):
            return super().embed_minibatch(sentence_feature, *args, **kwargs)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss over the mini-batches of each column; with_backward also fills their
        gradients."""
        loss = _loss(self, [torch.cat(chunks) for chunks in reps], labels)
        if loss is None:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss
