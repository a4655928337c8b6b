"""What a report is made of: filled by the run, rendered by ``report`` and ``figures``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..evaluation.metrics import Scores
from ..evaluation.significance import Gain, gain


@dataclass(frozen=True)
class Documents:
    source: str
    """The folder, file or built-in collection, as the user would name it."""
    documents: int
    chunks: int
    duplicates: Mapping[str, int] = field(default_factory=dict)
    """kind -> chunks removed."""


@dataclass(frozen=True)
class Queries:
    source: str
    """In words: "made from the documents without an LLM", "from questions.jsonl", "written by <LLM>"."""
    without_llm: bool
    """True where refine_fast made them by itself: the report then says that an LLM does better."""
    kinds: Mapping[str, int]
    """kind -> training queries."""
    held_out_by_document: bool
    """True: the in-domain queries are held out by whole documents. False: they are the collection's own judged test queries."""
    account: Mapping[str, Any] | None = None
    """Where a language model wrote them: ``llm.Account``, what was asked, paid and dropped."""


@dataclass(frozen=True)
class Triple:
    """What training was shown for one query: passages with their cosine to it under the base model."""

    query: str
    positive: tuple[str, float]
    negatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Mining:
    band: tuple[float, float]
    calibrated: bool
    """True: the band was fitted to the encoder's scores. False: it was given."""
    skip: int
    per_query: int
    select: str
    queries: int
    empty: int
    """Queries without any passage in the band: they train on in-batch negatives alone."""
    random_scores: np.ndarray
    """Cosine of the base model between a query and a random passage; a sample of thousands draws the histogram."""
    answer_scores: np.ndarray
    """... between a query and a passage that answers it."""
    triples: tuple[Triple, ...] = ()
    """A few drawn at random, for the eye."""


@dataclass(frozen=True)
class Training:
    base: str
    temperature: float
    learning_rate: float
    batch_size: int
    epochs: float
    steps: int
    examples: int
    precision: str
    seed: int
    loss: tuple[float, float]
    """Mean loss over the first and over the last tenth of the steps."""


@dataclass(frozen=True)
class Judged:
    """One retrieval set and every system on it."""

    name: str
    passages: int
    bm25: Scores
    at_weight: Mapping[float, Scores]
    """Fusion weight -> scores; 0 is the base model and 1 the fine-tuned one, both needed."""

    @property
    def queries(self) -> int:
        return len(self.bm25.per_query["mrr@10"])

    def gain(self, weight: float, metric: str) -> Gain:
        """Of the model fused at ``weight`` over the base."""
        return gain(self.at_weight[0].per_query[metric], self.at_weight[weight].per_query[metric])


@dataclass(frozen=True)
class ReportData:
    documents: Documents
    queries: Queries
    mining: Mining
    training: Training
    weight: float
    """The fusion weight of the product; a key of every ``at_weight``."""
    weight_chosen_on: str | None
    """Which queries chose it under ``--weight auto``; None where the user gave it."""
    in_domain: Judged
    out_of_domain: list[Judged]
    versions: Mapping[str, str]
    """package -> version, python among them."""
    fusion: str = "weights"
    """"weights", or "embeddings": a frozen twin beside the tuned encoder, in the loss and when serving."""

    @property
    def pooled(self) -> Judged | None:
        """All out-of-domain sets as one, each query counting the same: a single small set has too wide an interval."""
        sets = self.out_of_domain
        if len(sets) < 2:
            return sets[0] if sets else None
        return Judged(
            f"{len(sets)} sets pooled",
            sum(data.passages for data in sets),
            Scores.pooled([data.bm25 for data in sets]),
            {
                weight: Scores.pooled([data.at_weight[weight] for data in sets])
                for weight in sets[0].at_weight
            },
        )
