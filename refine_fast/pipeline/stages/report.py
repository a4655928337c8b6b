"""report: what the other stages left, collected and rendered."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...files import read_json
from ..artifacts import (
    ACCOUNT,
    CHUNK_FACTS,
    MINING_FACTS,
    QUERIES,
    SETS,
    TRAINING_FACTS,
    base_embeddings,
    fused_weight,
    read_negatives,
    read_scores,
    relevant_rows,
    training_view,
)
from ..corpus.jsonl import read_records
from ..queries.query import Query
from ..reporting.data import Documents, Judged, Mining, Queries, ReportData, Training, Triple
from ..reporting.render import write_report

if TYPE_CHECKING:
    from ..context import RunContext

PACKAGES = ("torch", "transformers", "sentence-transformers", "refine-fast")


SAMPLE = 20_000
"""Pairs of query and random passage whose similarities draw the histogram."""


TRIPLES = 20
"""Queries that the report shows with their passages."""


def run(context: RunContext, folder: Path) -> None:
    write_report(folder, gather(context))


def gather(context: RunContext) -> ReportData:
    config = context.config
    chunks, mining, training = (
        read_json(context.path(name)) for name in (CHUNK_FACTS, MINING_FACTS, TRAINING_FACTS)
    )
    queries = read_records(context.path(QUERIES), Query)
    loss = [value for _, value in training["loss"]]
    tenth = max(1, len(loss) // 10)
    random_scores, answer_scores = _similarities(context)
    judged = _judged(context)
    return ReportData(
        documents=Documents(
            str(config.docs or f"the documentation of Python {platform.python_version()}"), **chunks
        ),
        queries=Queries(
            source=context.query_source,
            without_llm=config.queries is None and config.llm is None,
            kinds=dict(Counter(query.kind for query in queries)),
            held_out_by_document=context.judged_corpus is None,
            account=None if config.llm is None else read_json(context.path(ACCOUNT)),
        ),
        mining=Mining(
            band=(mining["band"][0], mining["band"][1]),
            calibrated=config.band == "auto",
            skip=config.skip,
            per_query=config.negatives,
            select=config.select,
            queries=mining["queries"],
            empty=mining["empty"],
            random_scores=random_scores,
            answer_scores=answer_scores,
            triples=_triples(context),
        ),
        training=Training(
            base=context.base_name,
            temperature=config.temperature,
            learning_rate=config.lr,
            batch_size=config.batch_size,
            epochs=config.epochs,
            steps=training["steps"],
            examples=training["examples"],
            precision=training["precision"],
            seed=config.seed,
            loss=(float(np.mean(loss[:tenth])), float(np.mean(loss[-tenth:]))),
        ),
        weight=fused_weight(context.out),
        weight_chosen_on="queries of documents that were neither trained on nor tested with"
        if context.chooses_weight
        else None,
        in_domain=judged.pop("in_domain"),
        out_of_domain=list(judged.values()),
        fusion=config.fusion,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    )


def _judged(context: RunContext) -> dict[str, Judged]:
    """Set -> every system on it, without the set that only chooses a weight."""
    bm25 = read_scores(context.out, None)
    at_weight = {weight: read_scores(context.out, weight) for weight in context.weights}
    passages = read_json(context.path(SETS))
    return {
        name: Judged(
            name.removeprefix("ood:"),
            passages[name],
            scores,
            {weight: sets[name] for weight, sets in at_weight.items()},
        )
        for name, scores in bm25.items()
        if name != "dev"
    }


def _similarities(context: RunContext) -> tuple[np.ndarray, np.ndarray]:
    """Cosines under the base between queries and random passages, and between queries and the passages that answer them."""
    q, d = base_embeddings(context.out)
    random = np.random.default_rng(context.config.seed)
    rows, columns = random.integers(len(q), size=SAMPLE), random.integers(len(d), size=SAMPLE)
    pairs = [
        (row, column)
        for row, answers in enumerate(relevant_rows(*training_view(context.out)).values())
        for column in answers
    ]
    answered = np.array(pairs)
    return np.einsum("nd,nd->n", q[rows], d[columns]), np.einsum(
        "nd,nd->n", q[answered[:, 0]], d[answered[:, 1]]
    )


def _triples(context: RunContext) -> tuple[Triple, ...]:
    q, d = base_embeddings(context.out)
    chunks, queries = training_view(context.out)
    relevant = list(relevant_rows(chunks, queries).items())
    passage = {chunk.id: chunk.passage for chunk in chunks}
    negatives = read_negatives(context.out)
    drawn = np.random.default_rng(context.config.seed).permutation(len(relevant))[:TRIPLES]
    return tuple(
        Triple(
            text,
            (chunks[rows[0]].passage, float(q[i] @ d[rows[0]])),
            tuple(
                (passage[negative["chunk_id"]], negative["score"]) for negative in negatives[text]
            ),
        )
        for i, (text, rows) in ((i, relevant[i]) for i in drawn)
    )
