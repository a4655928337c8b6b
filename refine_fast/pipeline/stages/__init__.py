"""The stages of a run, in order, and what each depends on.

    chunk -> query -> embed -> sentences (with --mine-by sentence) -> mine
          -> teach (with --teacher) -> train -> curve (each weight) -> choose
          -> score (each system) -> systems -> fuse -> report

With ``--distill choose``, training and curve are done for each share of the teachers, and "train"
chooses among them.

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

from ...files import name_of
from ..artifacts import (
    ACCOUNT,
    ADAPTER,
    CHUNK_FACTS,
    CHUNKS,
    DEV,
    DISTILL_FACTS,
    EMBEDDINGS,
    FUSION_FACTS,
    HELD_OUT,
    MINING_FACTS,
    MODEL,
    NEGATIVES,
    QUERIES,
    SENTENCES,
    SERVED,
    SETS,
    SYSTEMS,
    TAUGHT,
    TEACHING_FACTS,
    TRAINING_FACTS,
    TUNED,
    TWINS,
    at_share,
    curve_file,
    score_file,
)
from ..context import RunContext
from ..corpus.beir import read_by_beir
from ..corpus.documents import may_be_read
from ..encoder.model_files import of_the_model
from ..engine import Stage
from ..queries.user_formats import query_texts

NAMES = "model queries query_kinds llm llm_model teacher distill"
"""Settings that the model card and the report quote."""

MADE_SETTINGS = "queries_per_chunk made_per_chunk query_kinds made_kinds"
"""As given and as decided: a default that changes makes other queries."""

LLM_SETTINGS = (
    "llm llm_model llm_batch llm_mix llm_temperature llm_reply_tokens llm_extra max_calls "
    "max_tokens max_cost price_in price_out duplicates round_trip judge"
)


def run_stages(context: RunContext) -> Iterator[Stage]:
    """Every stage of the run, in order."""
    # Imported here because the stages import torch, transformers and more.
    from . import (
        choose,
        choose_share,
        chunk,
        curve,
        embed,
        fuse,
        mine,
        query,
        report,
        score,
        sentences,
        systems,
        teach,
        train,
    )

    config = context.config

    def stage(
        name: str,
        module: ModuleType,
        names: tuple[str, ...],
        files: dict[str, Path],
        settings: str = "",
        *,
        counts: dict[str, Callable[[Path], bool]] | None = None,
        facts: dict[str, str] | None = None,
        unfinished: Callable[[], list[str]] = list,
        under: str = "",
        **arguments: Any,
    ) -> Stage:
        """The stage whose files have these names in the folder ``under`` of the run folder."""
        return Stage(
            name,
            tuple(f"{under}/{each}" if under else each for each in names),
            partial(_work, module, context, under, arguments),
            files=files,
            counts={"encoder": of_the_model, "teacher": of_the_model} | (counts or {}),
            facts=facts or {},
            settings={field: getattr(config, field) for field in settings.split()} | arguments,
            module=module.__name__,
            unfinished=unfinished,
        )

    def made(*names: str) -> dict[str, Path]:
        return {name: context.path(name) for name in names}

    def given(**paths: Path | None) -> dict[str, Path]:
        return {name.replace("_", " "): path for name, path in paths.items() if path is not None}

    asked = {}
    if config.queries is not None:
        asked = given(queries=config.queries, query_texts=query_texts(config.queries))
    encoder = {"encoder": context.encoder}
    judged = given(docs=context.judged_corpus)
    as_judged = {label: read_by_beir(folder) for label, folder in judged.items()}
    built_in = {"docs": f"the language reference of Python {platform.python_version()}"}
    built_in = built_in if config.docs is None else {}
    scores = made(*map(score_file, SYSTEMS))
    curve_files = made(*map(curve_file, context.weights))
    split = (QUERIES, DEV, HELD_OUT)

    yield stage(
        "chunk",
        chunk,
        (CHUNKS, CHUNK_FACTS, TWINS),
        encoder | given(docs=config.docs) | asked,
        "chunk_tokens limit seed encoding text_column title_column id_column dedup model",
        counts={} if config.docs is None else {"docs": may_be_read(config.docs)},
        facts=built_in,
    )
    if not config.llm_writes:
        yield stage(
            "query",
            query,
            split,
            made(CHUNKS, TWINS) | asked | judged,
            f"{MADE_SETTINGS} llm held_out seed encoding",
            counts=as_judged,
            facts=built_in,
        )
    else:
        from . import llm_query  # needs the extra llm

        yield stage(
            "query",
            llm_query,
            (*split, ACCOUNT),
            made(CHUNKS)
            | judged
            | encoder
            | given(prompt=config.prompt, judge_prompt=config.judge_prompt),
            f"{MADE_SETTINGS} written_per_chunk held_out seed precision {LLM_SETTINGS}",
            counts=as_judged,
            facts=built_in,
            unfinished=lambda: llm_query.unanswered(context),
        )
    yield stage("embed", embed, (EMBEDDINGS,), made(CHUNKS, *split) | encoder, "precision")
    in_sentences = {}
    if config.mine_by == "sentence":
        in_sentences = made(SENTENCES)
        yield stage(
            "sentences", sentences, (SENTENCES,), made(CHUNKS, *split) | encoder, "precision"
        )
    yield stage(
        "mine",
        mine,
        (NEGATIVES, MINING_FACTS),
        made(CHUNKS, *split, EMBEDDINGS) | in_sentences,
        "band skip relative_margin select mine_by seed",
        negatives=context.mined_negatives,
    )
    taught = {}
    pairs = made(CHUNKS, *split, NEGATIVES)
    if context.teacher_kind is not None:
        taught = made(TAUGHT, TEACHING_FACTS)
    if context.teacher is not None:
        yield stage(
            "teach",
            teach,
            (TAUGHT, TEACHING_FACTS),
            pairs | {"teacher": context.teacher},
            "precision teacher",
        )
    elif taught:
        from . import llm_teach  # needs the extra llm

        yield stage(
            "teach",
            llm_teach,
            (TAUGHT, TEACHING_FACTS),
            pairs,
            f"queries_per_chunk seed teacher {LLM_SETTINGS}",
            unfinished=lambda: llm_teach.unanswered(context),
        )
    trained = (TUNED, TRAINING_FACTS, *([ADAPTER] if config.lora is not None else []))

    def training(name: str, distill: float, under: str = "") -> Stage:
        return stage(
            name,
            train,
            trained,
            made(*train.READ) | taught | encoder,
            "epochs max_steps batch_size lr warmup temperature precision memory seed fusion "
            "lora train_layers"
            + (" weight" if context.twin else "")
            + (" teacher_temperature" if taught else ""),
            under=under,
            distill=distill,
            negatives=context.trained_negatives(distill),
            similar_batches=context.similar_batches(distill),
            taught=context.teacher_kind,
        )

    def scoring(name: str, weight: float, under: str = "") -> Stage:
        tuned = f"{under}/{TUNED}" if under else TUNED
        return stage(
            name,
            curve,
            (curve_file(weight),),
            made(CHUNKS, DEV, *([tuned] if weight else [*split, EMBEDDINGS])) | encoder,
            "seed precision" + (" fusion" if weight else ""),
            under=under,
            weight=weight,
            tuned=tuned,
        )

    curves = {weight: scoring(f"curve {weight!r}", weight) for weight in context.curve_weights}
    compared = [weight for weight in context.compared_weights if weight > 0]
    if context.chooses_distill:
        yield curves.pop(0.0)
        candidates = made(DEV, curve_file(0))
        for share in context.shares:
            folder = at_share(share)
            yield training(f"train {share!r}", share, folder)
            for weight in compared:
                yield scoring(f"curve {weight!r} of {share!r}", weight, folder)
            names = (*trained, *map(curve_file, compared))
            candidates |= made(*(f"{folder}/{name}" for name in names))
        yield stage(
            "train",
            choose_share,
            (*trained, DISTILL_FACTS, *map(curve_file, compared)),
            candidates,
            "weight tolerance curve distill" if context.chooses_weight else "weight distill",
            shares=context.shares,
            rule=context.distill,
        )
    else:
        yield training("train", context.distill)
    yield from curves.values()
    yield stage(
        "choose",
        choose,
        (FUSION_FACTS,),
        made(DEV) | curve_files if context.chooses_weight else {},
        "weight tolerance curve" if context.chooses_weight else "weight",
    )
    sets = judged | {f"ood {name_of(folder.name)}": folder for folder in context.ood}
    for system in SYSTEMS:
        models: dict[str, Path] = {}
        settings = "ood_passages seed"
        if system != "BM25":
            models |= encoder
            settings += " precision"
        if system == "base":
            models |= made(*split, EMBEDDINGS)
        if system in ("fine-tuned", "fused"):
            models |= made(TUNED)
        if system == "fused":
            # a weight of 0 or 1 may take the scores of an end
            models |= made(FUSION_FACTS, score_file("base"), score_file("fine-tuned"))
            settings += " fusion"
        yield stage(
            f"score {system}",
            score,
            (score_file(system), SETS) if system == "BM25" else (score_file(system),),
            made(CHUNKS, HELD_OUT) | sets | models,
            settings,
            counts={label: read_by_beir(folder) for label, folder in sets.items()},
            facts=built_in | {"ood": "general knowledge" if config.ood is None else "given"},
            system=system,
        )
    served = {}
    if config.served:
        served = made(SERVED)
        yield stage(
            "systems",
            systems,
            (SERVED,),
            made(CHUNKS, *split, EMBEDDINGS, TUNED, FUSION_FACTS) | judged | encoder,
            "seed precision fusion",
            counts=as_judged,
        )
    recipe = made(MINING_FACTS, TRAINING_FACTS) | taught
    if context.chooses_distill:
        recipe |= made(DISTILL_FACTS)
    yield stage(
        "fuse",
        fuse,
        (MODEL,),
        encoder
        | given(model_card=context.encoder / "README.md")
        | made(TUNED, FUSION_FACTS, EMBEDDINGS)
        | recipe
        | scores,
        "weight fusion skip relative_margin select mine_by batch_size lr warmup temperature seed "
        f"{NAMES}",
    )
    account = made(ACCOUNT) if config.llm_writes else {}
    yield stage(
        "report",
        report,
        ("report.md", "report.json", "report.html", "figures"),
        made(CHUNKS, CHUNK_FACTS, *split, EMBEDDINGS, NEGATIVES, SETS, FUSION_FACTS)
        | recipe
        | scores
        | curve_files
        | served
        | account
        | judged,
        "weight curve fusion band skip relative_margin select mine_by batch_size lr temperature "
        f"seed served docs {NAMES}",
        counts=as_judged,
    )


def _work(
    module: ModuleType, context: RunContext, under: str, arguments: dict[str, Any], folder: Path
) -> None:
    """What a stage does in its folder."""
    (folder / under).mkdir(parents=True, exist_ok=True)
    module.run(context, folder / under, **arguments)
