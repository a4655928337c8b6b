"""The stages of a run, in order, and what each depends on.

    chunk -> query -> embed -> mine -> train -> score (each system) -> fuse -> report

One module per stage. A stage may read only what is declared here: files, settings and facts. Its
code needs no declaration (see ``code_version``).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..artifacts import (
    ACCOUNT,
    ADAPTER,
    CHUNK_FACTS,
    CHUNKS,
    DEV,
    EMBEDDINGS,
    FORGETTING_CHUNKS,
    FORGETTING_QUERIES,
    FUSION_FACTS,
    HELD_OUT,
    MINING_FACTS,
    MODEL,
    NEGATIVES,
    QUERIES,
    SETS,
    TRAINING_FACTS,
    TUNED,
    TWINS,
    score_file,
)
from ..context import RunContext
from ..engine import Stage

NAMES = "model queries llm llm_model"
"""Settings that the model card and the report quote."""

LLM_SETTINGS = (
    "llm llm_model llm_mix llm_temperature llm_reply_tokens llm_extra max_calls max_tokens "
    "max_cost price_in price_out duplicates round_trip judge"
)


def run_stages(context: RunContext) -> Iterator[Stage]:
    """Every stage of the run, in order."""
    # Imported here because the stages import torch, transformers and more.
    from . import chunk, embed, forgetting_set, fuse, llm_query, mine, query, report, score, train

    config = context.config

    def stage(
        name: str,
        module: ModuleType,
        outputs: tuple[str, ...],
        files: dict[str, Path],
        settings: str = "",
        *,
        facts: dict[str, str] | None = None,
        unfinished: Callable[[], list[str]] = list,
        **arguments: Any,
    ) -> Stage:
        return Stage(
            name,
            outputs,
            partial(module.run, context, **arguments),
            files=files,
            facts=facts or {},
            settings={field: getattr(config, field) for field in settings.split()} | arguments,
            module=module.__name__,
            unfinished=unfinished,
        )

    def made(*names: str) -> dict[str, Path]:
        return {name: context.path(name) for name in names}

    def given(**paths: Path | None) -> dict[str, Path]:
        return {name.replace("_", " "): path for name, path in paths.items() if path is not None}

    encoder = {"encoder": context.encoder}
    judged = given(docs=context.judged_corpus)
    documentation = {"docs": f"the documentation of Python {platform.python_version()}"}
    choice = {"choose": "a weight"} if context.chooses_weight else {}
    scored_weights = (None, *context.weights)
    scores = made(*map(score_file, scored_weights))
    split = (QUERIES, DEV, HELD_OUT)

    yield stage(
        "chunk",
        chunk,
        (CHUNKS, CHUNK_FACTS, TWINS),
        encoder | given(docs=config.docs, queries=config.queries),
        "chunk_tokens limit seed encoding text_column title_column id_column dedup model",
        facts=documentation if config.docs is None else None,
    )
    if config.llm is None:
        yield stage(
            "query",
            query,
            split,
            made(CHUNKS, TWINS) | given(queries=config.queries) | judged,
            "queries_per_chunk held_out seed encoding",
            facts=choice,
        )
    else:
        yield stage(
            "query",
            llm_query,
            (*split, ACCOUNT),
            made(CHUNKS)
            | judged
            | encoder
            | given(prompt=config.prompt, judge_prompt=config.judge_prompt),
            f"queries_per_chunk held_out seed precision {LLM_SETTINGS}",
            facts=choice,
            unfinished=lambda: llm_query.unanswered(context),
        )
    yield stage("embed", embed, (EMBEDDINGS,), made(CHUNKS, *split) | encoder, "precision")
    yield stage(
        "mine",
        mine,
        (NEGATIVES, MINING_FACTS),
        made(CHUNKS, *split, EMBEDDINGS),
        "band skip negatives select seed",
    )
    yield stage(
        "train",
        train,
        (TUNED, TRAINING_FACTS, *([ADAPTER] if config.lora is not None else [])),
        made(CHUNKS, *split, NEGATIVES, EMBEDDINGS) | encoder,
        "negatives epochs max_steps batch_size lr warmup temperature precision memory seed fusion "
        "lora" + (" weight" if context.twin else ""),
    )
    sets = made(CHUNKS, DEV, HELD_OUT) | judged
    sets |= {f"ood {folder.name}": folder for folder in config.ood or ()}
    if context.checks_forgetting:
        yield stage(
            "forgetting set",
            forgetting_set,
            (FORGETTING_CHUNKS, FORGETTING_QUERIES),
            encoder,
            "chunk_tokens ood_passages seed",
            facts=documentation,
        )
        sets |= made(FORGETTING_CHUNKS, FORGETTING_QUERIES)
    for weight in scored_weights:
        models: dict[str, Path] = {}
        settings = "ood_passages seed"
        if weight is not None:
            models |= encoder
            settings += " precision"
        if weight:
            models |= made(TUNED)
        if weight and weight < 1:
            settings += " fusion"
        yield stage(
            "score BM25" if weight is None else f"score {weight!r}",
            score,
            (score_file(weight), SETS) if weight is None else (score_file(weight),),
            sets | models,
            settings,
            facts=choice,
            weight=weight,
        )
    recipe = made(MINING_FACTS, TRAINING_FACTS)
    yield stage(
        "fuse",
        fuse,
        (MODEL, FUSION_FACTS),
        encoder | made(TUNED, EMBEDDINGS) | recipe | scores,
        f"weight fusion skip negatives select batch_size lr warmup temperature seed {NAMES}",
    )
    account = made(ACCOUNT) if config.llm is not None else {}
    yield stage(
        "report",
        report,
        ("report.md", "report.json", "report.html", "figures"),
        made(CHUNKS, CHUNK_FACTS, *split, EMBEDDINGS, NEGATIVES, SETS, FUSION_FACTS)
        | recipe
        | scores
        | account,
        "weight curve fusion band skip negatives select batch_size lr temperature epochs seed "
        f"docs {NAMES}",
    )
