"""What a run would do and take, before it does it: the documents are read and cut, a few passages are timed, nothing is written."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np

from .config import RunConfig
from .console import Console, facts_table
from .embed import encode, has_fast_bf16
from .encoder import encoder_folder, load_encoder
from .job import Job
from .llm_queries import estimate_rows, still_to_ask
from .memory import fit_training
from .retrieval_set import load_beir
from .train import steps_of
from .work import cut_documents, own_queries, require_enough, split_queries

SAMPLE = 64
"""Chunks that are encoded to time the encoder on this machine."""

TRAINING_OVER_ENCODING = 3.0
"""Time of forward and backward over that of the forward alone: the backward has twice its products."""


@dataclass(frozen=True)
class Plan:
    documents: int
    chunks: int
    duplicates_removed: int
    training_queries: int
    test_queries: int
    steps: int
    passages_encoded: int
    """By all stages but training."""
    precision: str
    mini_batch: int
    """Sequences that training encodes at a time."""
    training_gb: float
    """Peak memory of training, in GiB as --memory."""
    training_minutes: float
    encoding_minutes: float
    disk_mb: float
    llm: dict[str, float | None] | None
    """What is still to be asked of the language model, and what it takes; None without one."""


def make_plan(config: RunConfig) -> Plan:
    job = Job(config, encoder_folder(config.model), Console(quiet=True))
    documents, chunks, duplicates = cut_documents(job)
    queries = split_queries(job, chunks, own_queries(job, chunks))  # as many as a model would be asked for
    if config.llm is None:
        require_enough(queries["train"])
    examples = len(queries["train"])
    batch = min(config.batch_size, max(examples, 1))
    steps = steps_of(examples, batch_size=batch, epochs=config.epochs, max_steps=config.max_steps) if examples else 0

    sets = [load_beir(folder) for folder in config.ood or ()]
    own = load_beir(job.judged) if job.judged else None
    judged = len(own.queries) if own else len(queries["held_out"])
    evaluated = (len(own.docs) if own else len(chunks)) + judged + sum(min(len(s.docs), config.ood_passages) + len(s.queries) for s in sets)
    encoders = sum(2 if job.twin and 0 < weight < 1 else 1 for weight in job.weights)
    passages = len(chunks) + examples + encoders * evaluated

    model = load_encoder(job.encoder)
    bf16 = has_fast_bf16(model.device) if job.bf16 is None else job.bf16
    drawn = np.random.default_rng(config.seed).permutation(len(chunks))[:SAMPLE]
    encode(model, [chunks[drawn[0]].passage], role="document", bf16=bf16)  # the first call allocates
    start = time.perf_counter()
    encode(model, [chunks[i].passage for i in drawn], role="document", bf16=bf16)
    seconds = (time.perf_counter() - start) / len(drawn)
    trained = steps * batch * (1 + config.negatives)  # queries are short: the passages decide
    texts = [query.text for query in queries["train"]], [chunk.passage for chunk in chunks]
    fit = fit_training(config, model, *texts, examples, bf16=bf16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Plan(
        documents=documents,
        chunks=len(chunks),
        duplicates_removed=duplicates.exact + duplicates.near,
        training_queries=examples,
        test_queries=judged,
        steps=steps,
        passages_encoded=passages,
        precision="bf16" if bf16 else "fp32",
        mini_batch=fit.at_once,
        training_gb=round(fit.peak / 2**30, 2),
        training_minutes=round(trained * seconds * TRAINING_OVER_ENCODING / 60, 1),
        encoding_minutes=round(passages * seconds / 60, 1),
        llm=None if config.llm is None else still_to_ask(job, chunks),
        # tuned and fused, or tuned twice and its twin; two checkpoints with Adam's two moments while training
        disk_mb=round((2 + job.twin + 2 * 3) * weights / 1e6),
    )


def show_plan(config: RunConfig, console: Console) -> None:
    plan = asdict(make_plan(config))
    asked = plan.pop("llm")
    table = facts_table(plan)
    for row in estimate_rows(asked) if asked else ():
        table.add_row(*row)
    console.result(plan | {f"llm_{name}": value for name, value in (asked or {}).items()}, table)
