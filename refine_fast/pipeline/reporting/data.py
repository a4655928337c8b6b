"""The content of a report: filled by the report stage, read by the renderers and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..evaluation.choice import Choice
from ..evaluation.scores import Scores
from ..evaluation.significance import Gain, gain
from ..queries.query import Made


@dataclass(frozen=True)
class Documents:
    """The collection that was adapted to."""

    source: str
    """The folder, file or built-in collection, as the user would name it."""
    documents: int
    chunks: int
    duplicates: Mapping[str, int] = field(default_factory=dict)
    """Kind of duplicate -> chunks removed."""


@dataclass(frozen=True)
class Queries:
    """The training queries and their origin."""

    source: str
    """In words: "made from the documents without an LLM", "from questions.jsonl", "written by
    <LLM>"."""
    made: Made
    """How many of them refine_fast made itself; the report then recommends better ones."""
    kinds: Mapping[str, int]
    """Kind -> training queries."""
    held_out_by_document: bool
    """True: the in-domain test queries are held out by whole documents; other answers of theirs may
    have been trained on. False: they are the collection's own test queries."""
    account: Mapping[str, Any] | None = None
    """``llm.Account`` of the LLM that wrote them: calls, cost, drops. None without an LLM."""


@dataclass(frozen=True)
class Triple:
    """The passages that training saw for one query, each with its similarity to the query under
    the base model."""

    query: str
    positive: tuple[str, float]
    negatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Relabelled:
    """Mined negatives that a teacher scores above a positive, and that are left out."""

    by: str
    """The teacher that the user named."""
    count: int
    mined: int


@dataclass(frozen=True)
class Mining:
    """The hard negatives, and the similarities that they were chosen by."""

    similarity: str
    """What all similarities here are, in words: "cosine"."""
    band: tuple[float, float]
    calibrated: bool
    """True: the band was fitted to the encoder's scores. False: it was given."""
    skip: int
    per_query: int
    select: str
    mine_by: str
    """What a negative's similarity is that of: "passage", or "sentence", its best one."""
    relative_margin: float | None
    """None: the band alone bounds it. Else it is at most 1 - this of that of the query's answer."""
    queries: int
    empty: int
    """Queries without any passage in the band: they train on in-batch negatives alone."""
    random_scores: np.ndarray
    """(S,) similarities under the base model between queries and random passages."""
    answer_scores: np.ndarray
    """(P,) similarities under the base model between queries and the passages that answer them."""
    relabelled: Relabelled | None = None
    """None: no teacher was named."""
    grading: Mapping[str, Any] | None = None
    """``llm.GradingAccount`` of the language model that graded the passages; None: none did."""
    triples: tuple[Triple, ...] = ()
    """A random sample for the reader."""


@dataclass(frozen=True)
class Training:
    """The settings and the loss of the fine-tune."""

    base: str
    temperature: float
    learning_rate: float
    batch_size: int
    similar_batches: bool
    """Whether queries with similar documents share batches."""
    epochs: float
    steps: int
    examples: int
    precision: str
    seed: int
    loss_function: str
    """In words."""
    loss: tuple[float, float]
    """Mean loss over the first and over the last tenth of the steps."""
    share: Mapping[str, Any] | None = None
    """How the teachers' share of the loss was chosen (``ShareChoice``, and the fusion "weights" of
    each share); None: it was not."""


@dataclass(frozen=True)
class Moved:
    """A test query whose answer changed its rank."""

    query: str
    answer: str
    """The passage that answers it best."""
    before: int | None
    """Rank of the first passage that answers it, under the base model; None: not in the first
    ten."""
    after: int | None
    """The same under the product."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The scores on one retrieval set at several fusion weights."""

    name: str
    at_weight: Mapping[float, Scores]
    """Fusion weight -> scores. Must hold 0 (the base model)."""

    @property
    def queries(self) -> int:
        """The number of queries in the set."""
        return len(self.at_weight[0])

    def gain(self, weight: float, metric: str) -> Gain:
        """Gain of the model fused at ``weight`` over the base model."""
        return gain(self.at_weight[0].per_query[metric], self.at_weight[weight].per_query[metric])


@dataclass(frozen=True, kw_only=True)
class SetScores(Curve):
    """The scores of every system on one test set: at 0, at the weight of the product and at 1 (the
    fine-tuned model)."""

    passages: int
    bm25: Scores


@dataclass(frozen=True)
class Served:
    """The systems that can be served, on a sample of the test queries."""

    passages: int
    systems: Mapping[str, Mapping[str, Scores]]
    """"base" and "fused" -> system -> scores; without "fused" where the product is the base."""
    choices: Mapping[str, Mapping[str, Any]]
    """"base" and "fused" -> how its blend was chosen (``BlendChoice.facts``)."""
    name: str = "blend"
    """The system that is served."""

    @property
    def queries(self) -> int:
        """The number of test queries."""
        return len(self.systems["base"][self.name])

    def gain(self, metric: str) -> Gain:
        """Gain of the product over the base, both served."""
        before, after = (self.systems[side][self.name] for side in ("base", "fused"))
        return gain(before.per_query[metric], after.per_query[metric])


@dataclass(frozen=True)
class ReportData:
    """Everything that a report states or draws."""

    documents: Documents
    queries: Queries
    mining: Mining
    training: Training
    weight: float
    """The fusion weight of the product; a key of every ``at_weight``."""
    choice: Choice | None
    """How it was chosen; None where the user gave it."""
    curves: tuple[Curve, Curve]
    """Every weight that was tried, on queries about held-out documents and on general
    knowledge."""
    in_domain: SetScores
    out_of_domain: list[SetScores]
    versions: Mapping[str, str]
    """Package -> version, python among them."""
    gained: Sequence[Moved] = ()
    """The in-domain queries whose answers rose most."""
    lost: Sequence[Moved] = ()
    """Those whose answers fell most."""
    costs: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Stage -> seconds, and peak memory in MiB."""
    fusion: str = "weights"
    """"weights"; or "embeddings": a frozen twin beside the tuned encoder, in the loss and when
    serving."""
    served: Served | None = None
    """None where ``--served no`` was given."""

    @property
    def pooled(self) -> SetScores | None:
        """All out-of-domain sets as one, in which each query counts the same: the interval of a
        single small set is too wide. None if there is no such set."""
        sets = self.out_of_domain
        if len(sets) < 2:
            return sets[0] if sets else None
        return SetScores(
            name=f"{len(sets)} sets pooled",
            passages=sum(data.passages for data in sets),
            bm25=Scores.pooled([data.bm25 for data in sets]),
            at_weight={
                weight: Scores.pooled([data.at_weight[weight] for data in sets])
                for weight in sets[0].at_weight
            },
        )
