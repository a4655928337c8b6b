"""Where a run meets the language model: a run's options as the model's settings, and the hooks of its stage, of plan and of doctor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RefineFastError, RefineFastWarning
from .chunks import Chunk
from .embed import encode
from .encoder import load_encoder
from .queries import Query

if TYPE_CHECKING:
    from .config import RunConfig
    from .llm import Account, LLMSettings, Progress
    from .work import Job

REPLIES = "replies.jsonl"
"""In the run folder, beside the stages' outputs: what was paid for outlives every change of the options."""


def settings_of(config: RunConfig) -> LLMSettings:
    try:
        from .llm import LLMSettings
    except ImportError as error:
        raise RefineFastError(f"llm: queries from a model need {error.name}; pip install 'refine-fast[llm]'.") from None
    assert config.llm is not None
    return LLMSettings(
        config.llm,
        config.llm_model,
        key_env=config.llm_key_env,
        prompt=config.prompt,
        mix=dict(config.llm_mix),
        per_chunk=config.queries_per_chunk,
        temperature=config.llm_temperature,
        max_reply_tokens=config.llm_reply_tokens,
        concurrency=config.llm_concurrency,
        timeout=config.llm_timeout,
        max_calls=config.max_calls,
        max_tokens=config.max_tokens,
        max_cost=config.max_cost,
        price_in=config.price_in,
        price_out=config.price_out,
        round_trip=config.round_trip,
        judge=config.judge,
        seed=config.seed,
    )


def written_queries(job: Job, chunks: list[Chunk]) -> tuple[list[Query], Account]:
    """The stage: the model's queries, and the account of them. The encoder is loaded only where a limit or a filter needs it."""
    settings = settings_of(job.config)
    from .llm import generate_queries

    def embed(texts: list[str], role: str) -> np.ndarray:
        with job.console.progress(f"embedding {len(texts):,} texts") as advance:
            return encode(load_encoder(job.encoder), texts, role=role, bf16=job.bf16, progress=advance)  # type: ignore[arg-type]

    limited = any(limit is not None for limit in (settings.max_calls, settings.max_tokens, settings.max_cost))
    embeddings = embed([chunk.passage for chunk in chunks], "document") if limited or settings.round_trip else None
    with job.console.progress("asking the model") as advance:

        def watch(state: Progress) -> None:
            cost = f", cost {state.cost:.2f}" if settings.price_in or settings.price_out else ""
            advance(state.done, state.total, f"{state.rate:.1f}/s{cost}, {state.failed} failed, {state.concurrency} at a time")

        queries, account = generate_queries(
            chunks, settings, job.path(REPLIES), embeddings=embeddings, encode=embed if settings.round_trip else None, watch=watch
        )
    job.console.say(f"  {summary(account)}")
    if account.stopped:
        job.console.say(f"  stopped by {account.stopped} after {account.replied:,} of {account.chunks:,} chunks; a higher limit goes on from here")
    if account.failures:
        reason, count = next(iter(account.failures.items()))
        warnings.warn(
            f"{account.failed} chunks got no reply (most often, {count} times: {reason}); the next start asks for them again.",
            RefineFastWarning,
            stacklevel=2,
        )
    return queries, account


def summary(account: Account) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(account.dropped.items(), key=lambda item: -item[1]))
    return (
        f"{account.kept:,} queries from {account.replied:,} replies ({account.reused:,} of them from before; {account.calls:,} calls, "
        f"{account.tokens_in:,} tokens in and {account.tokens_out:,} out, cost {account.cost:.2f}); dropped: {dropped or 'none'}"
    )


def planned(job: Job, chunks: list[Chunk]) -> dict[str, Any]:
    """The rows of a plan: what is still to be asked and what it takes, before a token is spent."""
    from .llm import estimate

    settings = settings_of(job.config)
    return {f"llm_{name}": value for name, value in asdict(estimate(chunks, settings, job.path(REPLIES))).items()}


def endpoint_rows(settings: LLMSettings) -> Iterator[tuple[str, bool, str]]:
    """doctor's rows, one model each: (what, whether it works, what was found)."""
    from .llm import probe

    for model, report in zip(settings.models, probe(settings), strict=True):
        if report.problem:
            yield f"llm {model}", False, report.problem
            continue
        served = {True: "served", False: "answers, though the endpoint does not list it", None: "answers"}[report.served]
        modes = ", ".join(f"{mode} {answer}" for mode, answer in report.structured.items())
        context = f"{report.context:,} tokens of context" if report.context else "context length not told"
        yield f"llm {model}", True, f"{served}; {modes}; {context}; {report.tokens_per_second:.0f} tokens/s"
