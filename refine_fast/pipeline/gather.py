"""What the stages left, gathered for the report."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .evaluate import Scores
from .job import Job
from .jsonl import read_records
from .llm_queries import ACCOUNT
from .queries import Query
from .report import write_report
from .report_data import Documents, Judged, Mining, Queries, ReportData, Training, Triple
from .work import (
    base_embeddings,
    base_name,
    chosen_weight,
    learnable,
    query_source,
    read_json,
    read_negatives,
    read_scores,
    relevant_rows,
)

PACKAGES = ("torch", "transformers", "sentence-transformers", "refine-fast")

SAMPLE = 20_000
"""Pairs of query and random passage whose similarities draw the histogram."""


TRIPLES = 20
"""Queries that the report shows with their passages."""


def make_report(job: Job, to: Path) -> None:
    write_report(to, gather(job))


def gather(job: Job) -> ReportData:
    config = job.config
    chunks, mining, training = (read_json(job.path(name)) for name in ("chunks.json", "mining.json", "training.json"))
    queries = read_records(job.path("queries.jsonl"), Query)
    loss = [value for _, value in training["loss"]]
    tenth = max(1, len(loss) // 10)
    random_scores, answer_scores = _similarities(job)
    judged = _judged(job)
    return ReportData(
        documents=Documents(str(config.docs or f"the documentation of Python {platform.python_version()}"), **chunks),
        queries=Queries(
            source=query_source(job),
            without_llm=config.queries is None and config.llm is None,
            kinds=dict(Counter(query.kind for query in queries)),
            held_out_by_document=job.judged is None,
            account=None if config.llm is None else read_json(job.path(ACCOUNT)),
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
            triples=_triples(job),
        ),
        training=Training(
            base=base_name(job),
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
        weight=chosen_weight(job),
        weight_chosen_on="queries of documents that were neither trained on nor tested with" if config.weight == "auto" else None,
        in_domain=judged.pop("in_domain"),
        out_of_domain=list(judged.values()),
        fusion=config.fusion,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    )


def _judged(job: Job) -> dict[str, Judged]:
    """Set -> every system on it, without the set that only chooses a weight."""
    bm25 = read_scores(job, None)
    at_weight: dict[float, dict[str, Scores]] = {weight: read_scores(job, weight) for weight in job.weights}
    passages = read_json(job.path("sets.json"))
    return {
        name: Judged(name.removeprefix("ood:"), passages[name], scores, {weight: sets[name] for weight, sets in at_weight.items()})
        for name, scores in bm25.items()
        if name != "dev"
    }


def _similarities(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Cosines under the base between queries and random passages, and between queries and the passages that answer them."""
    q, d = base_embeddings(job)
    random = np.random.default_rng(job.config.seed)
    rows, columns = random.integers(len(q), size=SAMPLE), random.integers(len(d), size=SAMPLE)
    pairs = [(row, column) for row, answers in enumerate(relevant_rows(*learnable(job)).values()) for column in answers]
    answered = np.array(pairs)
    return np.einsum("nd,nd->n", q[rows], d[columns]), np.einsum("nd,nd->n", q[answered[:, 0]], d[answered[:, 1]])


def _triples(job: Job) -> tuple[Triple, ...]:
    q, d = base_embeddings(job)
    chunks, queries = learnable(job)
    relevant = list(relevant_rows(chunks, queries).items())
    passage = {chunk.id: chunk.passage for chunk in chunks}
    negatives = read_negatives(job)
    drawn = np.random.default_rng(job.config.seed).permutation(len(relevant))[:TRIPLES]
    return tuple(
        Triple(
            text,
            (chunks[rows[0]].passage, float(q[i] @ d[rows[0]])),
            tuple((passage[negative["chunk_id"]], negative["score"]) for negative in negatives[text]),
        )
        for i, (text, rows) in ((i, relevant[i]) for i in drawn)
    )
