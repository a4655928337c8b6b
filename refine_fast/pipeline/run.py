"""The order of a run: chunks -> queries -> embed -> mine -> train -> scores -> fuse -> report; each stage is redone when it must be."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

from ..files import atomic
from ..integrations.sentence_transformers import twin
from . import (
    card,
    chunks,
    documents,
    embed,
    evaluate,
    figures,
    gather,
    held_out,
    llm_queries,
    memory,
    python_docs,
    queries,
    readers,
    report,
    report_data,
    retrieval_set,
    train,
    work,
)
from .config import RunConfig
from .console import Console
from .encoder import encoder_folder
from .job import Job
from .stages import RunFolder, Stage
from .work import score_file

COMMANDS = {"queries": "queries", "mine": "mine", "train": "train", "report": "report", "run": "report"}
"""Command -> the last stage that it does."""


def stages(job: Job) -> Iterator[Stage]:
    """Every stage of the run, in order. What a stage declares here is all that it may depend on."""
    config = job.config

    def stage(
        name: str,
        outputs: str,
        does: Callable[..., None],
        *,
        files: dict[str, Path],
        fields: str = "",
        code: tuple[ModuleType, ...] = (),
        **facts: str,
    ) -> Stage:
        settings = {field: getattr(config, field) for field in fields.split()}
        return Stage(name, tuple(outputs.split()), partial(does, job), files, facts, settings, (*code, work))

    def made(names: str) -> dict[str, Path]:
        return {name: job.path(name) for name in names.split()}

    encoder = {"encoder": job.encoder}
    docs = {} if config.docs is None else {"docs": config.docs}
    own = {} if config.queries is None else {"queries": config.queries}
    documentation = f"the documentation of Python {platform.python_version()}"
    no_docs = {"docs": documentation} if config.docs is None else {}
    reading = (documents, readers, python_docs)
    learnable = made("chunks.jsonl queries.jsonl dev.jsonl held_out.jsonl")
    choice = {"choose": "a weight"} if config.weight == "auto" else {}
    ood = {f"ood {folder.name}": folder for folder in config.ood or ()}
    judged = docs if job.judged else {}
    frozen = made("embeddings") if job.twin else {}

    # fmt: off
    yield stage(
        "chunks", "chunks.jsonl chunks.json", work.make_chunks, files=docs | encoder,
        fields="chunk_tokens limit seed", code=(*reading, chunks), **no_docs,
    )
    asked = stage(
        "queries", "queries.jsonl dev.jsonl held_out.jsonl", work.make_queries, files=made("chunks.jsonl") | own | judged,
        fields="queries_per_chunk held_out seed", code=(queries, held_out, retrieval_set), **choice,
    )
    yield asked if config.llm is None else llm_queries.of_a_model(asked, job)
    yield stage("embed", "embeddings", work.embed, files=learnable | encoder, fields="precision", code=(embed,))
    yield stage(
        "mine", "negatives.jsonl mining.json", work.mine, files=learnable | made("embeddings"),
        fields="band skip negatives select seed",
    )
    yield stage(
        "train", "tuned training.json", work.train_encoder, files=learnable | made("negatives.jsonl") | encoder | frozen,
        fields="epochs max_steps batch_size lr warmup temperature precision memory seed fusion" + " weight" * job.twin,
        code=(train, embed, memory, twin),
    )
    sets = made("chunks.jsonl dev.jsonl held_out.jsonl") | judged | ood
    if job.own_check:
        yield stage(
            "elsewhere", "elsewhere.jsonl elsewhere-queries.jsonl", work.make_elsewhere, files=encoder,
            fields="chunk_tokens ood_passages seed", code=(*reading, chunks, queries), docs=documentation,
        )
        sets |= made("elsewhere.jsonl elsewhere-queries.jsonl")
    judges = (evaluate, retrieval_set, held_out, embed)
    for weight in (None, *job.weights):
        models = ({} if weight is None else encoder) | (made("tuned") if weight else {})
        name = "score BM25" if weight is None else f"score {weight:g}"
        outputs = f"{score_file(weight)} sets.json" if weight is None else score_file(weight)
        fused = weight not in (None, 0, 1)
        yield stage(
            name, outputs, partial(work.score_system, weight=weight), files=sets | models,
            fields="ood_passages seed" + " fusion" * fused, code=(*judges, twin) if fused else judges, **choice,
        )
    scores = {score_file(weight): job.path(score_file(weight)) for weight in (None, *job.weights)}
    recipe = made("mining.json training.json")
    account = {} if config.llm is None else made(llm_queries.ACCOUNT)
    yield stage(
        "fuse", "model", work.fuse_encoder, files=encoder | made("tuned") | recipe | scores,
        fields="weight fusion", code=(card, twin),
    )
    yield stage(
        "report", "report.md report.json report.html figures", gather.make_report,
        files=scores | learnable | recipe | account | made("chunks.json sets.json embeddings"),
        fields="weight fusion", code=(report, report_data, figures, gather),
    )
    # fmt: on


def run(config: RunConfig, console: Console, *, until: str = "report") -> Job:
    """Does the stages up to ``until`` that are not up to date. Raises LockedError where another process is at work in the folder."""
    with RunFolder(config.out) as folder, console.warnings():
        job = Job(config, encoder_folder(config.model), console)
        with atomic(config.out / "config.yaml") as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")
        for stage in stages(job):
            reasons = folder.reasons(stage)
            if reasons:
                console.say(f"{stage.name}: {'; '.join(reasons)}")
                console.say(f"{stage.name}: done in {folder.do(stage):.1f} s")
            else:
                console.say(f"{stage.name}: up to date")
            if stage.name == until:
                break
    return job
