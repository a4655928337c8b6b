"""Teachers: what retrieves better than the encoder, or must not be forgotten, gives soft targets.

The first two cost no forward pass: the embeddings of the frozen encoder were made for mining, and
BM25 reads the texts. The others have scored their pairs beforehand.

    frozen: softmax(s / temperature), the base encoder's own distribution over the columns of the
        batch. Matching it is what keeps the encoder from forgetting (listwise distillation, CADET,
        arXiv 2502.19712).
    hybrid: softmax(z(BM25) + z(s)), z over the columns of the row, at twice the temperature.
        Words that the base encoder overlooks become part of what it knows (SPAR, arXiv 2110.06918;
        LED, arXiv 2208.13661).
    cross-encoder, llm: softmax(logit / its temperature) over the columns that it has scored for the
        query, its positive and mined passages; 0 for the others. A query that it has not scored has
        the targets of the frozen encoder. The frozen encoder teaches beside it, since it covers
        every column and prevents forgetting. The hybrid does not, since both read the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ..corpus.bm25 import bm25_index
from ..corpus.terms import search_terms

if TYPE_CHECKING:
    import bm25s

HYBRID_TEMPERATURE = 2.0
"""The student's temperature for the hybrid teacher, relative to that of the loss."""

SAMPLE = 500
"""Training queries that decide whether BM25 may teach."""


BLOCK = 32
"""Queries that are compared with every document at a time: the documents may be on the disk."""


@dataclass(frozen=True)
class Teachers:
    """Soft targets over the columns of a batch."""

    queries: np.ndarray
    """(Q, d) float32: the distinct queries under the frozen encoder."""
    documents: np.ndarray
    """(N, d) float32."""
    temperature: float
    """Of the frozen encoder's scores."""
    lexical: Lexical | None
    """None: BM25 does not teach."""
    judged: Judged | None = None
    """A teacher that the user named; None: there is none."""

    @property
    def names(self) -> list[str]:
        """The teachers that ``targets`` has."""
        lexical = [] if self.lexical is None else ["hybrid"]
        return ["frozen", *lexical, *([] if self.judged is None else [self.judged.kind])]

    def targets(self, queries: Sequence[int], documents: Sequence[int]) -> dict[str, Tensor]:
        """Teacher -> (B, N) float32, the targets of B queries over N documents, given by row."""
        scores = torch.from_numpy(self.queries[queries] @ self.documents[documents].T)
        targets = {"frozen": (scores / self.temperature).softmax(1)}
        if self.lexical is not None:
            hybrid = _standardized(self.lexical.scores(queries, documents)) + _standardized(scores)
            targets["hybrid"] = hybrid.softmax(1)
        if self.judged is not None:
            judged = self.judged.targets(queries, documents)
            scored = judged.any(1, keepdim=True)
            targets[self.judged.kind] = torch.where(scored, judged, targets["frozen"])
        return targets


@dataclass(frozen=True)
class Judged:
    """The logits of each query's positives and mined passages, by a cross-encoder or a language
    model."""

    logits: Sequence[Mapping[int, float]]
    """Of each query: row of a document -> its logit; empty if it was not scored."""
    temperature: float
    """Divides the logits."""
    kind: Literal["cross-encoder", "llm"] = "cross-encoder"

    def targets(self, queries: Sequence[int], documents: Sequence[int]) -> Tensor:
        """(B, N) float32: softmax(logit / temperature) over the documents of each query that have a
        logit; 0 for the others."""
        column = {document: i for i, document in enumerate(documents)}
        logits = np.full((len(queries), len(documents)), -np.inf, np.float32)
        for row, query in zip(logits, queries, strict=True):
            for document, logit in self.logits[query].items():
                if document in column:
                    row[column[document]] = logit
        # a row without any logit becomes NaN
        return (torch.from_numpy(logits) / self.temperature).softmax(1).nan_to_num(0.0)


@dataclass(frozen=True)
class Lexical:
    """BM25 between the training queries and the documents."""

    index: bm25s.BM25
    terms: Sequence[list[str]]
    """Of each query."""

    @classmethod
    def of(cls, queries: Sequence[str], documents: Sequence[str]) -> Lexical | None:
        """An index of the documents; None where they have no terms."""
        index = bm25_index(documents)
        return None if index is None else cls(index, search_terms(queries))

    def scores(self, queries: Sequence[int], documents: Sequence[int] | np.ndarray) -> Tensor:
        """(B, N) float32."""
        found = np.zeros((len(queries), len(documents)), np.float32)
        for row, query in zip(found, queries, strict=True):
            if self.terms[query]:
                row[:] = self.index.get_scores(self.terms[query])[documents]
        return torch.from_numpy(found)


def lexical_teacher(
    queries: Sequence[str],
    relevant: Sequence[Sequence[int]],
    documents: Sequence[str],
    embeddings: tuple[np.ndarray, np.ndarray],
    *,
    seed: int,
) -> Lexical | None:
    """BM25 if it adds to the frozen encoder on these documents, else None.

    On the training queries (a sample), the hybrid must rank the positives higher than the frozen
    encoder does alone. It does on Wikipedia, where BM25 beats MiniLM; it does not where queries and
    passages share few words.

    Args:
        queries: the distinct training queries.
        relevant: per query the rows of its positives.
        documents: the passages.
        embeddings: queries (Q, d) and documents (N, d) under the frozen encoder.
        seed: of the sample.
    """
    lexical = Lexical.of(queries, documents)
    if lexical is None:
        return None
    every = np.arange(len(documents))
    gain = 0.0
    sample = np.random.default_rng(seed).permutation(len(queries))[:SAMPLE].tolist()
    for start in range(0, len(sample), BLOCK):
        block = sample[start : start + BLOCK]
        dense = torch.from_numpy(embeddings[0][block] @ embeddings[1].T)
        hybrid = _standardized(lexical.scores(block, every)) + _standardized(dense)
        for query, alone, both in zip(block, dense, hybrid, strict=True):
            gain += _reciprocal_rank(both, relevant[query]) - _reciprocal_rank(
                alone, relevant[query]
            )
    return lexical if gain > 0 else None


def _standardized(scores: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1; a row of equal scores becomes 0."""
    spread = scores.std(1, keepdim=True, correction=0)
    return (scores - scores.mean(1, keepdim=True)) / spread.clamp(min=1e-6)


def _reciprocal_rank(scores: Tensor, relevant: Sequence[int]) -> float:
    best = scores[list(relevant)].max()
    return 1 / (1 + int((scores > best).sum()))
