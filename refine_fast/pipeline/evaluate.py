"""How well a model retrieves: held-out sets, exact ranking, the usual metrics, and intervals for what changed.

The metrics are those of BEIR, with binary relevance: recall@k = found / relevant, nDCG@10, MRR@10; each is kept per query, so that two
systems can be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ops.band_topk import band_topk
from .embed import Progress, encode
from .encoder import encoder_folder, load_encoder
from .retrieval_set import RetrievalSet, load_beir

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEPTH = 10
"""No metric looks further down a ranking."""
RECALL_AT = (1, 3, 5, 10)
METRICS = (*(f"recall@{k}" for k in RECALL_AT), f"ndcg@{DEPTH}", f"mrr@{DEPTH}")


@dataclass(frozen=True)
class Scores:
    """One system on one retrieval set: the value of each metric for every query, in the order of the set."""

    per_query: dict[str, np.ndarray]

    @property
    def metrics(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.per_query.items()}

    @classmethod
    def pooled(cls, parts: Sequence[Scores]) -> Scores:
        """The queries of several sets as one set: each query counts the same."""
        return cls({name: np.concatenate([part.per_query[name] for part in parts]) for name in METRICS})


def score_ranking(ranked: np.ndarray, relevant: Sequence[set[int]]) -> Scores:
    """``ranked`` (Q, 10): per query the rows of the documents found, best first, -1 where there is none."""
    hits = np.array([[doc in found for doc in row] for row, found in zip(ranked.tolist(), relevant, strict=True)], float).reshape(-1, DEPTH)
    total = np.array([len(found) for found in relevant])
    discount = 1 / np.log2(np.arange(2, DEPTH + 2))
    ideal = np.concatenate([[0], discount.cumsum()])[np.minimum(total, DEPTH)]
    per_query = {f"recall@{k}": hits[:, :k].sum(1) / total for k in RECALL_AT}
    per_query[f"ndcg@{DEPTH}"] = hits @ discount / ideal
    per_query[f"mrr@{DEPTH}"] = (hits / np.arange(1, DEPTH + 1)).max(1)
    return Scores(per_query)


def rank(queries: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """The exact 10 nearest rows of ``docs`` (N, d) for each row of ``queries`` (Q, d) by inner product, ties by lower row: (Q, 10) int64,
    -1 beyond N."""
    return band_topk(queries, docs, DEPTH, band=(-float("inf"), float("inf")), skip=0).ids.numpy()


def score(
    model: SentenceTransformer, data: RetrievalSet, *, batch_size: int = 32, bf16: bool | None = None, progress: Progress | None = None
) -> Scores:
    """Encodes both sides with the model's own prompts (``encode``) and ranks every document for every query, exactly. ``progress`` counts
    texts."""
    total = len(data.docs) + len(data.queries)
    in_docs = progress and (lambda done, _: progress(done, total))
    in_queries = progress and (lambda done, _: progress(len(data.docs) + done, total))
    docs = encode(model, data.docs, role="document", batch_size=batch_size, bf16=bf16, progress=in_docs)
    queries = encode(model, data.queries, role="query", batch_size=batch_size, bf16=bf16, progress=in_queries)
    return score_ranking(rank(queries, docs), data.relevant)


def score_bm25(data: RetrievalSet) -> Scores:
    """BM25 (bm25s, Lucene's variant, k1 = 1.5, b = 0.75) over English stems without stop words. A document that shares no term with the
    query is not retrieved."""
    import bm25s
    import Stemmer

    def tokens(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False)

    ranked = np.full((len(data.queries), DEPTH), -1)
    docs = tokens(data.docs)
    if not any(docs):  # bm25s takes no empty vocabulary
        return score_ranking(ranked, data.relevant)
    index = bm25s.BM25()
    index.index(docs, show_progress=False)
    for row, terms in zip(ranked, tokens(data.queries), strict=True):
        if not terms:
            continue
        scores = index.get_scores(terms)
        best = np.argsort(-scores, kind="stable")[:DEPTH]
        best = best[scores[best] > 0]
        row[: len(best)] = best
    return score_ranking(ranked, data.relevant)


@dataclass(frozen=True)
class Gain:
    """``mean(after - before)`` over queries, with a 95% interval, in the unit of the metric (1 = 100 points)."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "improved" if self.low > 0 else "got worse" if self.high < 0 else "no measurable change"


def gain(before: np.ndarray, after: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Gain:
    """Paired bootstrap: the 2.5 and 97.5 percentiles of the mean difference over ``resamples`` draws of the queries with replacement.

    before, after: (Q,) one metric of two systems, per query. The interval covers the choice of queries, not the randomness of training.
    """
    change = after - before
    # A draw matters by how often it takes each distinct change, and those are few: a multinomial in place of resamples * Q indices.
    values, counts = np.unique(change, return_counts=True)
    means = np.random.default_rng(seed).multinomial(len(change), counts / len(change), size=resamples) @ values / len(change)
    low, high = np.percentile(means, [2.5, 97.5])
    return Gain(float(change.mean()), float(low), float(high))


def choose_weight(dev: dict[float, Scores], *, metric: str = "ndcg@10") -> float:
    """``--weight auto``: the smallest fusion weight that is as good, within one standard error, as the best one on held-out dev queries.

    dev: weight -> scores of the fused model on queries that are neither trained on nor in any test set. Let w* maximise the mean of
    ``metric``; the answer is the least w whose paired mean shortfall against w* is at most the standard error of that shortfall (the
    one-standard-error rule of Breiman et al. 1984, Section 3.4.3). Small weights are preferred because what is forgotten out of domain
    grows with the weight. If tuning does not help, the answer is the smallest weight given: include 0.
    """
    best = max(sorted(dev), key=lambda weight: dev[weight].metrics[metric])
    for weight in sorted(dev):
        shortfall = dev[best].per_query[metric] - dev[weight].per_query[metric]
        error = shortfall.std(ddof=1) / len(shortfall) ** 0.5 if len(shortfall) > 1 else 0.0
        if shortfall.mean() <= error:
            return weight
    raise AssertionError("the best weight falls short of itself by nothing")


def evaluate_models(models: Sequence[str], data: Path, split: str = "test", *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """The rows of ``refine-fast eval``: BM25, then each model (named as for ``encoder_folder``), on the BEIR set ``data``.

    A row: system, data, split, passages, queries, one key per metric and, for the models after the first,
    ``gain`` = {metric: {"mean", "low", "high"}} against the first.
    """
    folders = [encoder_folder(name) for name in models]
    held = load_beir(data, split)
    about = {"data": held.name, "split": split, "passages": len(held.docs), "queries": len(held.queries)}
    rows: list[dict[str, Any]] = [{"system": "BM25", **about, **score_bm25(held).metrics}]
    first: Scores | None = None
    for name, folder in zip(models, folders, strict=True):
        scores = score(load_encoder(folder), held, progress=progress)
        rows.append({"system": name, **about, **scores.metrics})
        if first is None:
            first = scores
        else:
            rows[-1]["gain"] = {metric: vars(gain(first.per_query[metric], scores.per_query[metric])) for metric in METRICS}
    return rows
