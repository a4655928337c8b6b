"""Training examples and how they become batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..encoder.encode import Role, prompt_of
from .teachers import Teachers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TARGETS = "targets_"
"""Prefix of a teacher's name among the features of the queries."""


@dataclass(frozen=True)
class Example:
    """A query with one of its positives and its mined negatives, as rows of the documents."""

    query: str
    positive: int
    negatives: tuple[int, ...]
    relevant: frozenset[int]
    """All positives of the query."""
    row: int
    """Index of the query among the distinct queries."""


@dataclass(frozen=True)
class Twin:
    """The frozen encoder's side of ``fuse_embeddings``.

    It reads the same texts that were embedded for mining, so those embeddings serve: no second
    encoder in memory, no second forward pass.
    """

    weight: float
    """Share of the tuned embeddings."""
    queries: np.ndarray
    """(Q, d) float32: the distinct queries."""
    documents: np.ndarray
    """(N, d) float32."""


@dataclass(frozen=True)
class Collator:
    """Turns rows of the examples into a batch.

    A document that several queries share is encoded once and is never a false negative. Documents
    relevant to one query of the batch share a group, so that none counts as its negative.

    Of a batch that ``ranks`` processes share, ``rank`` encodes every ``ranks``-th query and
    document. The columns are those of the whole batch: the documents of rank 0, of rank 1, ...
    """

    model: SentenceTransformer
    examples: Sequence[Example]
    documents: Sequence[str]
    twin: Twin | None = None
    teachers: Teachers | None = None
    rank: int = 0
    ranks: int = 1
    valid_label_columns: tuple[str, ...] = ("label",)  # the Trainer asks for it

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        """Makes the batch of B queries and the N distinct documents among their positives and
        negatives.

        Args:
            rows: B records {"row": index of an example}, at least one for each rank.

        Returns:
            ``query_*`` and ``document_*``: what the encoder reads of this rank's B' queries and
            N' documents; ``document_group`` (N,) int64; ``label`` (B',) int64: the column of each
            query's positive; with a twin ``query_frozen`` (B', d) and ``document_frozen`` (N', d)
            float32; with teachers ``query_targets_*`` (B', N) float32, one for each teacher; with
            several ranks the number ``query_share``, B' relative to the mean of the ranks.
            Alone, B' = B and N' = N. With fewer documents than ranks, a rank without any encodes
            one that is no column.
        """
        # Longest first on both sides: the texts of a mini-batch have similar lengths.
        examples = sorted(
            (self.examples[row["row"]] for row in rows), key=lambda example: -len(example.query)
        )
        distinct = self._distinct_documents(examples)
        parts = [distinct[rank :: self.ranks] for rank in range(self.ranks)]
        documents = [document for part in parts for document in part]
        column = {document: i for i, document in enumerate(documents)}
        asked = examples[self.rank :: self.ranks]
        encoded = parts[self.rank] or distinct[:1]
        batch = {
            **self._features("query", [example.query for example in asked]),
            **self._features("document", [self.documents[document] for document in encoded]),
            "document_group": torch.tensor(_groups(examples, column)),
            "label": torch.tensor([column[example.positive] for example in asked]),
        }
        queries = [example.row for example in asked]
        if self.ranks > 1:
            batch["query_share"] = len(asked) * self.ranks / len(examples)
        if self.teachers is not None:
            for name, targets in self.teachers.targets(queries, documents).items():
                batch[f"query_{TARGETS}{name}"] = targets
        if self.twin is not None:
            batch["query_frozen"] = torch.from_numpy(self.twin.queries[queries])
            batch["document_frozen"] = torch.from_numpy(self.twin.documents[encoded])
        return batch

    def _distinct_documents(self, examples: Sequence[Example]) -> list[int]:
        distinct = dict.fromkeys(
            document for example in examples for document in (example.positive, *example.negatives)
        )
        return sorted(distinct, key=lambda document: -len(self.documents[document]))

    def _features(self, role: Role, texts: list[str]) -> dict[str, Any]:
        features = features_of(self.model, role, texts)
        return {f"{role}_{name}": value for name, value in features.items()}


def features_of(model: SentenceTransformer, role: Role, texts: Sequence[str]) -> dict[str, Any]:
    """What the model reads of ``texts``, with its prompt, length limit and route for the role."""
    return model.preprocess(list(texts), prompt=prompt_of(model, role), task=role)


def _groups(examples: Sequence[Example], column: dict[int, int]) -> list[int]:
    """A group for each column: columns that are relevant to one query share theirs."""
    groups = list(range(len(column)))
    for example in examples:
        merged = {groups[column[document]] for document in example.relevant if document in column}
        if len(merged) > 1:
            groups = [min(merged) if group in merged else group for group in groups]
    return groups
