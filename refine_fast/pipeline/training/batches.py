"""Training examples and how they become batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..encoder.encode import prompt_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Example:
    """A query with one of its positives and its mined negatives, as rows of the documents; ``relevant`` are all of its positives."""

    query: str
    positive: int
    negatives: tuple[int, ...]
    relevant: frozenset[int]
    row: int
    """Of the query among the distinct queries."""


@dataclass(frozen=True)
class Twin:
    """The frozen twin's side of ``fuse_embeddings``. It reads the very texts that were embedded to mine from, so those rows stand for it:
    no second encoder in memory, no second forward pass."""

    weight: float
    """Of the tuned embeddings."""
    queries: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class Collator:
    """Rows of the examples to one batch: the queries' tokens, the tokens of the *distinct* documents among positives and negatives, the row
    of each query's positive, and document ids. A document that several queries share is encoded once and is nobody's false negative;
    documents relevant to one query of the batch share an id, so that none of them counts as its negative."""

    model: SentenceTransformer
    examples: Sequence[Example]
    documents: Sequence[str]
    twin: Twin | None = None
    valid_label_columns: tuple[str, ...] = ("label",)  # the Trainer asks for it

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        # Longest first on both sides: mini-batches of one length are little padded.
        examples = sorted(
            (self.examples[row["row"]] for row in rows), key=lambda example: -len(example.query)
        )
        distinct = dict.fromkeys(
            document for example in examples for document in (example.positive, *example.negatives)
        )
        columns = {
            document: column
            for column, document in enumerate(
                sorted(distinct, key=lambda row: -len(self.documents[row]))
            )
        }
        groups = list(range(len(columns)))
        for example in examples:
            merged = {
                groups[columns[document]] for document in example.relevant if document in columns
            }
            if len(merged) > 1:
                groups = [min(merged) if group in merged else group for group in groups]
        texts = {
            "query": ([example.query for example in examples], prompt_for(self.model, "query")),
            "document": (
                [self.documents[document] for document in columns],
                prompt_for(self.model, "document"),
            ),
        }
        batch: dict[str, Any] = {
            f"{role}_{name}": value
            for role, (inputs, prompt) in texts.items()
            for name, value in self.model.preprocess(inputs, prompt=prompt).items()
        }
        if self.twin is not None:
            batch["query_frozen"] = torch.from_numpy(
                self.twin.queries[[example.row for example in examples]]
            )
            batch["document_frozen"] = torch.from_numpy(self.twin.documents[list(columns)])
        batch["document_group"] = torch.tensor(groups)
        batch["label"] = torch.tensor([columns[example.positive] for example in examples])
        return batch


def prompt_for(model: SentenceTransformer, role: Literal["query", "document"]) -> str | None:
    """The model's own prompt for queries or documents; None where it has none."""
    name = prompt_name(model, role)
    return None if name is None else model.prompts[name]
