"""``refine-fast plan``: what a run would do and take.

The documents are read and cut, the encoder is tried, and a few passages are encoded to time the
machine. A language model gets one request, to see that it writes queries. Nothing is written, but
for an object under ``--shards`` that is deleted again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import read_json
from ..artifacts import ACCOUNT, REPLIES, to_judge
from ..cluster.object_path import ObjectPath
from ..config import RunConfig
from ..config_file import refuse_others
from ..console import Console, facts_table
from ..context import RunContext
from ..corpus.beir import load_beir
from ..corpus.chunk import Chunk
from ..encoder.encode import encode, has_fast_bf16
from ..encoder.load import encoder_folder
from ..encoder.prepare import prepare_encoder
from ..engine import RunFolder
from ..evaluation.general_knowledge import general_knowledge
from ..preflight import try_encoder, try_language_model, try_teacher
from ..queries.python_questions import python_questions
from ..queries.query import KINDS_IN_TURN, Query
from ..queries.splits import MOST_DEV, require_enough
from ..stages import run_stages, systems
from ..stages.chunk import cut_corpus
from ..stages.curve import PASSAGES
from ..stages.query import added_queries, dev_queries, made_queries, offline_queries, split_queries
from ..training.cross_encoder import pair_logits
from ..training.memory import fit_training
from ..training.trained import Trained
from ..training.trainer import epochs_of, steps_of

if TYPE_CHECKING:
    from ..queries.llm import Candidates, LLMSettings

SAMPLE = 64
"""Chunks that are encoded to time the encoder on this machine."""

TRAINING_OVER_ENCODING = 3.0
"""Time of forward and backward relative to forward: the backward has twice the products."""

CHANGE_NO_QUERY = {
    "max_calls",
    "max_tokens",
    "max_cost",
    "price_in",
    "price_out",
    "llm",
    "llm_batch",
}
"""Settings that leave what a language model has written as it is."""

CHECKPOINTS = 2 * 3
"""Copies of the weights on disk: two checkpoints, each with Adam's two moments."""


@dataclass(frozen=True)
class Plan:
    """What a run would do, and its estimated cost on this machine."""

    documents: int
    chunks: int
    duplicates_removed: int
    training_queries: int
    test_queries: int
    trainings: int
    """Each of so many steps; several to choose the teachers' share of the loss."""
    steps: int
    passages_encoded: int
    """By all stages except training."""
    precision: str
    mini_batch: int
    """Sequences that training encodes at a time."""
    pairs_scored: int
    """By the cross-encoder; 0 without one. At most: a query may have fewer negatives."""
    teaching_minutes: float
    training_gb: float
    """Peak memory of training, in GiB, as for --memory."""
    training_minutes: float
    encoding_minutes: float
    disk_mb: float
    llm: dict[str, float | None] | None
    """Calls, tokens and cost that remain at the language model, if there is one; for one in this
    process, its tokens per second and the minutes that it takes."""


def plan(config: RunConfig) -> Plan:
    """Estimates what ``run(config)`` would do and take on this machine.

    Raises:
        RefineFastError: if the input cannot be used.
    """
    if config.shards is not None:
        ObjectPath(config.shards).check()
    options = config.encoder_options()
    encoder = prepare_encoder(encoder_folder(config.model), options)
    context = RunContext(config, encoder, Console(quiet=True), options)
    refuse_others(RunFolder(context.out), list(run_stages(context)))
    parameters = Trained(config.lora, config.train_layers)
    model = try_encoder(encoder, trust_remote_code=context.trust_remote_code, trained=parameters)
    if settings := config.llm_settings():
        for grades in (False, True):
            if context.teacher_kind == "llm" if grades else config.llm_writes:
                try_language_model(settings, context.path(REPLIES), grades=grades, keep=False)
    teacher = None
    if context.teacher is not None:
        teacher = try_teacher(context.teacher, trust_remote_code=context.trust_remote_code)
    documents, chunks, duplicates = cut_corpus(context)
    if config.llm_writes:
        # As many made ones stand for the model's.
        asked = made_queries(context, chunks, KINDS_IN_TURN, config.written_per_chunk)
        asked += made_queries(context, chunks, config.made_kinds)
    else:
        asked = offline_queries(context, chunks, duplicates.twins)
    dev = dev_queries(context, chunks, duplicates.twins)
    queries = split_queries(context, chunks, asked, dev, added_queries(context, chunks))
    if not config.llm_writes:
        require_enough(queries["train"])
    examples = len(queries["train"])
    batch = min(config.batch_size, max(examples, 1))
    steps = 0
    if examples:
        steps = steps_of(
            examples,
            batch_size=batch,
            epochs=epochs_of(examples, batch_size=batch, epochs=config.epochs),
            max_steps=config.max_steps,
        )

    judged = load_beir(context.judged_corpus) if context.judged_corpus else None
    if config.docs is None:
        test_queries = len(python_questions(chunks).queries)
    else:
        test_queries = len(judged.queries) if judged else len(queries["held_out"])
    scored = test_queries + (len(judged.docs) if judged else len(chunks))
    if config.ood is None:
        scored += 2 * len(general_knowledge("test").docs)
    for folder in context.ood:
        data = load_beir(folder)
        scored += min(len(data.docs), config.ood_passages) + len(data.queries)
    compared = min(len(chunks), PASSAGES) + min(len(queries["dev"]), MOST_DEV)
    compared += 2 * len(general_knowledge("guard").docs)  # each with a question
    weights = list(context.weights)
    for _ in context.shares[1:]:
        weights += [weight for weight in context.compared_weights if weight > 0]
    encoders = sum(2 if context.twin and weight > 0 else 1 for weight in weights)
    # the base, the fine-tuned encoder, and both or one where they are fused
    encoded = len(chunks) + examples + encoders * compared + (3 + context.twin) * scored
    if config.mine_by == "sentence":
        encoded += len(chunks)  # the sentences of a passage together are as long as it
    if config.served:
        tested = len(judged.docs) if judged else len(chunks)
        # a passage and its sentences, under the base and under the product
        encoded += 2 * 2 * sum(min(count, systems.PASSAGES) for count in (len(chunks), tested))

    parameters.choose(model)
    bf16 = has_fast_bf16(model.device) if context.bf16 is None else context.bf16
    passages = [chunk.passage for chunk in chunks]
    drawn = np.random.default_rng(config.seed).permutation(len(chunks))[:SAMPLE]
    encode(model, [passages[drawn[0]]], role="document", bf16=bf16)  # the first call allocates
    start = time.perf_counter()
    encode(model, [passages[i] for i in drawn], role="document", bf16=bf16)
    seconds = (time.perf_counter() - start) / len(drawn)
    scored_pairs = seconds_per_pair = 0.0
    if teacher is not None and examples:
        scored_pairs = examples * (1 + context.mined_negatives)
        query = queries["train"][0].text
        start = time.perf_counter()
        pair_logits(teacher, [(query, passages[i]) for i in drawn], bf16=context.bf16)
        seconds_per_pair = (time.perf_counter() - start) / len(drawn)
    # queries are short: passages dominate
    most = max(map(context.trained_negatives, context.shares))
    trained = sum(steps * batch * (1 + context.trained_negatives(s)) for s in context.shares)
    fit = fit_training(
        model,
        [query.text for query in queries["train"]],
        passages,
        examples,
        batch_size=config.batch_size,
        negatives=most,
        memory=config.memory,
        bf16=bf16,
    )
    candidates = len(context.shares) if context.chooses_distill else 0
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return Plan(
        documents=documents,
        chunks=len(chunks),
        duplicates_removed=duplicates.exact + duplicates.near,
        training_queries=examples,
        test_queries=test_queries,
        trainings=len(context.shares),
        steps=steps,
        passages_encoded=encoded,
        precision="bf16" if bf16 else "fp32",
        mini_batch=fit.mini_batch or batch * (1 + most),
        pairs_scored=round(scored_pairs),
        teaching_minutes=round(scored_pairs * seconds_per_pair / 60, 1),
        training_gb=round(fit.peak / 2**30, 2),
        training_minutes=round(trained * seconds * TRAINING_OVER_ENCODING / 60, 1),
        encoding_minutes=round(encoded * seconds / 60, 1),
        llm=None
        if settings is None
        else _remaining_calls(context, settings, chunks, queries["train"]),
        # tuned and fused; with a twin, the tuned encoder twice and the frozen one
        disk_mb=round((2 + context.twin + candidates + CHECKPOINTS) * weight_bytes / 1e6),
    )


def show_plan(config: RunConfig, console: Console) -> None:
    """Prints the plan as a table, or as JSON."""
    facts = asdict(plan(config))
    remaining = facts.pop("llm")
    table = facts_table(facts)
    for row in _estimate_rows(remaining) if remaining else ():
        table.add_row(*row)
    llm_facts = {f"llm_{name}": value for name, value in (remaining or {}).items()}
    console.result(facts | llm_facts, table)


def _remaining_calls(
    context: RunContext,
    settings: LLMSettings,
    chunks: Sequence[Chunk],
    train: Sequence[Query],
) -> dict[str, float | None]:
    """Calls, tokens and cost that remain at the language model, and the time of one in this
    process."""
    from ..queries.llm import calls_to_grade, estimate
    from ..queries.llm.generate import query_requests
    from ..queries.llm.grade import grade_requests

    is_to_write = context.config.llm_writes and not _stands(context, "query")
    written = list(chunks) if is_to_write else []
    graded = _to_grade(context, chunks, train) if context.teacher_kind == "llm" else []
    store = context.path(REPLIES)
    grading = calls_to_grade(graded, settings, store)
    remaining = asdict(estimate(written, settings, store, others=grading))
    speed, seconds = None, 0.0
    if settings.in_process and remaining["calls"]:
        from ..queries.llm.local_speed import local_speed

        for requests, calls in (
            (grade_requests(graded, settings), grading.calls),
            (
                query_requests(written, list(range(len(written))), settings),
                remaining["calls"] - grading.calls,
            ),
        ):
            speed = local_speed(list(requests)) or speed
            seconds += calls * (speed.seconds_per_reply if speed is not None else 0)
    return remaining | {
        "tokens_per_second": speed and round(speed.tokens_per_second, 1),
        "minutes": speed and round(seconds / 60, 1),
    }


def _to_grade(
    context: RunContext, chunks: Sequence[Chunk], train: Sequence[Query]
) -> list[Candidates]:
    """The queries that are graded, with their passages. Where the run is to mine yet, or anew, with
    other passages in place of the negatives."""
    from ..queries.llm import Candidates
    from ..stages.llm_teach import to_grade

    if _stands(context, "mine"):
        return to_grade(*to_judge(context.out))
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    shown = min(1 + context.mined_negatives, len(chunks))
    return [
        Candidates(
            query.text,
            tuple(chunks[(row[query.chunk_id] + i) % len(chunks)] for i in range(shown)),
        )
        for query in train
    ]


def _stands(context: RunContext, name: str) -> bool:
    """Whether the run folder has this stage, and a run would change nothing up to it."""
    folder = RunFolder(context.out)
    for stage in run_stages(context):
        if folder.reasons(stage, but=CHANGE_NO_QUERY):
            return False
        if stage.name == "query" and (read_json(context.path(ACCOUNT)) or {}).get("stopped"):
            return False
        if stage.name == name:
            return True
    return False


def _estimate_rows(remaining: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The remaining calls as rows of the table."""
    most = "at most " if remaining["verdicts"] else ""
    judging = f", {remaining['verdicts']:,} of them of the judge" if most else ""
    yield "LLM calls", f"{most}{remaining['calls']:,}{judging}"
    tokens_out = f"about {remaining['tokens_out']:,} out, at most {remaining['tokens_out_most']:,}"
    yield "LLM tokens", f"{most}{remaining['tokens_in']:,} in, {tokens_out}"
    if remaining["cost"] is None:
        yield "LLM cost", "unknown without --price-in and --price-out"
    else:
        yield "LLM cost", f"about {remaining['cost']:,.4f}, at most {remaining['cost_most']:,.4f}"
    if remaining["minutes"] is not None:
        speed = f"{remaining['tokens_per_second']:,.0f} tokens a second on this machine"
        yield "LLM minutes", f"about {remaining['minutes']:,.1f}, at {speed}"
    if remaining["stops_after"] is not None:
        yield "stopped by a limit", f"after about {remaining['stops_after']:,} calls"
