"""The contrastive loss of a batch, with optional gradient caching."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from torch import Tensor, nn

from ...collectives import gather_rows, ranks
from ...integrations.attention import wide_backward
from ...integrations.sentence_transformers.twin import fuse_embeddings
from ...nn import InfoNCELoss
from ..encoder.encode import compares_by_cosine
from .batches import TARGETS
from .mini_batches import cut, longest
from .teachers import HYBRID_TEMPERATURE

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class NonFiniteEmbeddingsError(ArithmeticError):
    """The encoder returned NaN or infinity: training has diverged."""


class BatchLoss(CachedLossMixin, nn.Module):
    """InfoNCE over a batch of the collator, in the model's own similarity and dimensions.

    With ``mini_batch``, that many of the longest sequences are encoded at a time, and as many
    tokens of others. With ``cached`` as well, gradient caching (Gao et al., arXiv 2101.06983):
    encode without a graph, take the loss's gradient at the embeddings, encode again and push it
    through. The activations of one mini-batch live at a time, and the loss still sees the whole
    batch. With ``twin_weight``, the loss is that of the embeddings fused with the frozen ones in
    the batch.
    With teachers, the loss is (1 - distill) InfoNCE + distill times the mean of their
    cross-entropies.

    Where several ranks share a batch, each has the loss of its queries against the documents of
    all, scaled so that the mean over the ranks is the loss of the batch, and the mean of the ranks'
    gradients its gradient. One loss serves one way of encoding as well as another: ranks may differ
    in ``mini_batch`` and ``cached``.

    The encoder runs without dropout: drawing its masks took 37% of a step on a CPU, and with it
    attention cannot use the memory-efficient kernel.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float,
        mini_batch: int | None = None,
        cached: bool = False,
        twin_weight: float | None = None,
        distill: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.mini_batch = mini_batch
        self.uses_gradient_cache = cached
        self.mini_batch_size = sys.maxsize  # gradient caching gets its mini-batches as they are
        self.twin_weight = twin_weight
        self.distill = distill
        cosine = compares_by_cosine(model)
        self.info_nce = InfoNCELoss(temperature=temperature, normalize=cosine)
        self.hybrid = InfoNCELoss(temperature=HYBRID_TEMPERATURE * temperature, normalize=cosine)

    def forward(self, features: list[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            features: what the encoder reads of the queries and of the documents, with the rest of
                what the collator returns, by its names without the prefix.
            labels: the column of each query's positive.
        """
        self.model.eval()  # the Trainer sets train() before every step
        queries, documents = features
        self.groups = documents.pop("group")
        self.share = queries.pop("share", None)
        self.targets = {
            name.removeprefix(TARGETS): queries.pop(name)
            for name in list(queries)
            if name.startswith(TARGETS)
        }
        self.frozen = (
            [side.pop("frozen") for side in features] if self.twin_weight is not None else []
        )
        most = None if self.mini_batch is None else self.mini_batch * longest(features)
        cuts = [cut(side, most) for side in (queries, documents)]
        self.places = [places for _, places in cuts]
        self.query_parts = len(cuts[0][0])
        parts = [part for side, _ in cuts for part in side]
        if self.uses_gradient_cache:
            return self.forward_cached(parts, labels)
        with wide_backward(self.model.device):
            reps = [[self.model(part)["sentence_embedding"]] for part in parts]
        return self.calculate_loss(reps, labels)

    def embed_minibatch(
        self, sentence_feature: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, RandContext | None]:
        """The embeddings of a mini-batch, with the random state that gradient caching restores."""
        with wide_backward(self.model.device):
            return super().embed_minibatch(sentence_feature, *args, **kwargs)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the embeddings of all parts, (n, d) each: first those of the queries.

        Raises:
            NonFiniteEmbeddingsError: if an embedding holds NaN or infinity.
        """
        parts = [embeddings for column in reps for embeddings in column]
        sides = parts[: self.query_parts], parts[self.query_parts :]
        q, d = (
            torch.cat(side)[places, : self.model.truncate_dim]
            for side, places in zip(sides, self.places, strict=True)
        )
        if self.twin_weight is not None:
            q, d = (
                fuse_embeddings(tuned, frozen, self.twin_weight)
                for tuned, frozen in zip((q, d), self.frozen, strict=True)
            )
        rank, size = ranks()
        if self.share is not None:
            counts = [len(range(i, len(self.groups), size)) for i in range(size)]
            d = gather_rows(d[: counts[rank]], counts)
        try:
            loss = self._loss(q, d, positives=labels, doc_ids=self.groups)
        except ValueError:  # of the CPU kernel; elsewhere the loss is NaN
            if q.isfinite().all() and d.isfinite().all():
                raise
            raise NonFiniteEmbeddingsError from None
        if self.share is not None:
            loss = loss * self.share
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _loss(self, q: Tensor, d: Tensor, **columns: Any) -> Tensor:
        loss = torch.zeros((), device=q.device)
        if self.distill < 1:
            loss = (1 - self.distill) * self.info_nce(q, d, **columns)
        every = torch.arange(len(d), device=d.device).expand(len(q), -1)
        for name, targets in self.targets.items():
            matched = self.hybrid if name == "hybrid" else self.info_nce
            by_teacher = matched(q, d, soft_columns=every, soft_targets=targets, **columns)
            loss = loss + self.distill / len(self.targets) * by_teacher
        return loss
