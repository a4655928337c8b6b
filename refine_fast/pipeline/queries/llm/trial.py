"""One real request to each model, before a run spends anything on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ....errors import RefineFastError
from .batch import require_endpoints_of_batches
from .dispatch import IsUseful, failure_record, reply_record, why_useless
from .event_loop import run
from .generate import holds_queries, query_requests
from .grade import Candidates, grade_requests, holds_grades
from .http_backend import HttpBackend
from .judge import holds_verdicts, judge_requests
from .reply_log import ReplyStore
from .request import Failure, Request
from .samples import sample_chunks
from .settings import LLMSettings
from .transformers_backend import check_model


@dataclass(frozen=True)
class Task:
    """What a stage asks of a model, on the sample passages."""

    requests: Callable[[LLMSettings], Iterator[Request]]
    is_useful: IsUseful
    otherwise: str
    """What a model does that is of no use, in words."""


def _query_requests(settings: LLMSettings) -> Iterator[Request]:
    chunks = sample_chunks()
    return query_requests(chunks, list(range(len(chunks))), settings)


def _grade_requests(settings: LLMSettings) -> Iterator[Request]:
    chunks = tuple(sample_chunks())
    return grade_requests([Candidates(chunk.text[:24], chunks) for chunk in chunks], settings)


def _judge_requests(settings: LLMSettings) -> Iterator[Request]:
    return judge_requests([(chunk, [chunk.text[:24]]) for chunk in sample_chunks()], settings)


WRITING = Task(_query_requests, holds_queries, "writes no queries")
JUDGING = Task(_judge_requests, holds_verdicts, "gives no verdicts on queries")
GRADING = Task(_grade_requests, holds_grades, "grades no passages")


def try_models(settings: LLMSettings, store: Path, task: Task = WRITING) -> None:
    """Sends each model at most three requests of a stage, until a reply holds what it asks for; of
    several endpoints, the first that works is enough. Where queries are judged, the judge is tried
    with their writers.

    Of a model in this process, which costs nothing, it is only seen that it is there.

    Args:
        settings: the models, and what is asked of them.
        store: the file of replies. The replies are kept there, so that they count for the limits,
            and a run that is resumed does not pay for them again.
        task: what the stage asks for.

    Raises:
        RefineFastError: if a model cannot be asked, its replies are of no use, a prompt is no
            template, or a batch is open at another endpoint.
    """
    require_endpoints_of_batches(store, settings.urls)
    tasks = [task, JUDGING] if task is WRITING and settings.judge else [task]
    for each in tasks:
        next(each.requests(settings))  # renders its prompt
    if not settings.in_process:
        run(_try_all(settings, store, tasks))
        return
    for model in settings.models:
        check_model(model)


async def _try_all(settings: LLMSettings, store: Path, tasks: Sequence[Task]) -> None:
    asked = [
        (task, model)
        for task in tasks
        for model in (settings.models[:1] if task is JUDGING else settings.models)
    ]
    with ReplyStore(store, settings.prices, settings.share) as replies:
        for task, model in asked:
            own = replace(settings, models=(model,))
            problems = {}
            for url in settings.urls:
                problem = await _problem_at(url, own, replies, task)
                if problem is None:
                    break  # an endpoint that does not work is left out later
                problems[url] = problem
            else:
                url, problem = next(iter(problems.items()))
                raise RefineFastError(
                    f"llm: {model} at {url} {task.otherwise}: {problem}; try "
                    f"refine-fast doctor --llm {settings.url} --llm-model {model}."
                )


async def _problem_at(
    url: str, settings: LLMSettings, replies: ReplyStore, task: Task
) -> str | None:
    backend = HttpBackend(url, settings.key(), settings.timeout)
    try:
        return await _problem(backend, settings, replies, task)
    finally:
        await backend.close()


async def _problem(
    backend: HttpBackend, settings: LLMSettings, replies: ReplyStore, task: Task
) -> str | None:
    """Why the model of the settings cannot do the task; None if it can, or a limit is reached."""
    problem = None
    for request in task.requests(settings):
        if request.key in replies or _limit_is_reached(settings, replies):
            return None
        try:
            reply = await backend.complete(request)
        except Failure as failure:
            if failure.kind == "busy":
                return None  # the server works; the stage waits for it
            problem = str(failure)
            if failure.kind == "late":  # it may be paid for
                lost = request.tokens_in, request.max_tokens
                await replies.append(failure_record(request, problem, lost=lost))
            if failure.kind == "fatal":
                break
            continue
        record = reply_record(request, reply, calls=1)
        problem = why_useless(reply, task.is_useful)
        if problem is not None:  # requested again at the next start
            record.pop("text", None)
            record["error"] = problem
        await replies.append(record)
        if problem is None:
            return None
    return problem


def _limit_is_reached(settings: LLMSettings, replies: ReplyStore) -> bool:
    spent = replies.spent
    used = (
        (settings.max_calls, spent.calls),
        (settings.max_tokens, spent.tokens_in + spent.tokens_out),
        (settings.max_cost, spent.cost),
    )
    return any(limit is not None and value >= limit for limit, value in used)
