"""Where a run meets the language model: a run's options as the model's settings, and the hooks of its stage, of plan and of doctor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RefineFastWarning
from .chunks import Chunk
from .embed import encode
from .encoder import load_encoder
from .job import Job
from .queries import Query
from .stages import Stage, read_json

if TYPE_CHECKING:
    from .llm import Account, Progress

ACCOUNT = "llm.json"
"""The stage's output beside the queries: calls, tokens, cost and the reasons of drops."""

REPLIES = "replies.jsonl"
"""In the run folder, beside the stages' outputs: what was paid for outlives every change of the options."""


def written_queries(job: Job, chunks: list[Chunk]) -> tuple[list[Query], Account]:
    """The stage: the model's queries, and the account of them. The encoder is loaded only where a limit or a filter needs it."""
    from .llm import generate_queries

    settings = job.config.llm_settings()
    assert settings is not None

    def embed(texts: list[str], role: str) -> np.ndarray:
        with job.console.progress(f"embedding {len(texts):,} texts") as advance:
            return encode(load_encoder(job.encoder), texts, role=role, bf16=job.bf16, progress=advance)  # type: ignore[arg-type]

    limited = any(limit is not None for limit in (settings.max_calls, settings.max_tokens, settings.max_cost))
    embeddings = embed([chunk.passage for chunk in chunks], "document") if limited or settings.round_trip else None
    asked: list[Progress] = []
    with job.console.progress("asking the model") as advance:

        def watch(state: Progress) -> None:
            asked[:] = [state]
            cost = f", cost {state.cost:.4f}" if settings.price_in or settings.price_out else ""
            before = f", {state.reused} from before" if state.reused else ""
            note = f"{state.rate:.1f}/s{cost}, {state.failed} failed, {state.concurrency} at a time{before}"
            # Over what is asked in this start: replies from before would make the time left look short.
            advance(state.done + state.failed - state.reused, state.total - state.reused, note)

        try:
            queries, account = generate_queries(
                chunks, settings, job.path(REPLIES), embeddings=embeddings, encode=embed if settings.round_trip else None, watch=watch
            )
        except KeyboardInterrupt:
            for state in asked:
                job.console.say(f"  {state.done:,} of {state.total:,} replies are on disk and are not asked for again")
            raise
    job.console.say(f"  {summary(account.to_dict())}")
    if account.stopped:
        where = f"after {account.replied:,} of {account.chunks:,} chunks"
        job.console.say(f"  stopped by {account.stopped} {where}; a higher limit goes on from here")
    if account.failures:
        reason, count = next(iter(account.failures.items()))
        warnings.warn(
            f"{account.failed} chunks got no reply (most often, {count} times: {reason}); the next start asks for them again.",
            RefineFastWarning,
            stacklevel=2,
        )
    return queries, account


def of_a_model(stage: Stage, job: Job) -> Stage:
    """The stage of the queries, where a model writes them: what it depends on and leaves besides."""
    config = job.config
    from .llm import filters, generate, parse

    fields = "llm llm_model llm_mix llm_temperature llm_reply_tokens max_calls max_tokens max_cost price_in price_out"
    fields += " duplicates round_trip judge"
    prompts = {"prompt": config.prompt, "judge prompt": config.judge_prompt}
    files = {name: path for name, path in prompts.items() if path is not None}
    return replace(
        stage,
        outputs=(*stage.outputs, ACCOUNT),
        files={**stage.files, **files, "encoder": job.encoder},
        settings={**stage.settings, **{field: getattr(config, field) for field in fields.split()}},
        code=(*stage.code, filters, generate, parse),
        unfinished=lambda: unanswered(job),
    )


def summary(account: Mapping[str, Any]) -> str:
    """The account in a sentence."""
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(account["dropped"].items(), key=lambda item: -item[1]))
    cost = "" if account["cost"] is None else f", cost {account['cost']:,.4f}"
    unjudged = f" ({account['unjudged']:,} without a verdict of the judge)" if account["unjudged"] else ""
    return (
        f"{account['kept']:,} queries{unjudged} from {account['replied']:,} replies, {account['reused']:,} of them from before; "
        f"{account['calls']:,} calls, {account['tokens_in']:,} tokens in and {account['tokens_out']:,} out{cost}; "
        f"{account['replies_per_second']:.1f} replies a second; dropped: {dropped or 'none'}"
    )


def still_to_ask(job: Job, chunks: list[Chunk]) -> dict[str, float | None]:
    """For a plan: the calls, tokens and cost that are left, before a token is spent."""
    from .llm import estimate

    settings = job.config.llm_settings()
    assert settings is not None
    return asdict(estimate(chunks, settings, job.path(REPLIES)))


def estimate_rows(asked: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same as plan shows it."""
    yield "calls to the model", f"{asked['calls']:,}"
    yield "tokens", f"{asked['tokens_in']:,} in, about {asked['tokens_out']:,} out, at most {asked['tokens_out_most']:,}"
    if asked["cost"] is None:
        yield "cost", "unknown without --price-in and --price-out"
    else:
        yield "cost", f"about {asked['cost']:,.4f}, at most {asked['cost_most']:,.4f}"
    if asked["stops_after"] is not None:
        yield "a limit stops it", f"after about {asked['stops_after']:,} calls"


def unanswered(job: Job) -> list[str]:
    """Why the stage is to be done again although nothing changed: chunks that got no reply, or nothing."""
    failed = (read_json(job.path(ACCOUNT)) or {}).get("failed", 0)
    return [f"{failed} chunks without a reply"] if failed else []


def endpoint_rows(url: str, models: str | None, key_env: str) -> Iterator[tuple[str, bool, str]]:
    """doctor's rows, one model each: (what, whether it works, what was found)."""
    from .llm import LLMSettings, probe

    settings = LLMSettings(url, tuple((models or "").split(",")), key_env=key_env)
    for model, report in zip(settings.models, probe(settings), strict=True):
        if report.problem:
            yield f"llm {model}", False, report.problem
            continue
        served = {True: "served", False: "answers, though the endpoint does not list it", None: "answers"}[report.served]
        modes = ", ".join(f"{mode} {answer}" for mode, answer in report.structured.items())
        context = f"{report.context:,} tokens of context" if report.context else "context length not told"
        yield f"llm {model}", True, f"{served}; {modes}; {context}; {report.tokens_per_second:.0f} tokens/s"
