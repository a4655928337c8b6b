"""What ``doctor`` reports about an endpoint.

One request as the stage sends it, four short ones, and a look at what the server says about itself.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, replace
from typing import Any

from ....errors import RefineFastError
from .dispatch import why_useless
from .event_loop import run
from .generate import holds_queries, query_requests
from .http_backend import MODES, Form, HttpBackend
from .prompt import query_schema
from .request import Failure, Request
from .samples import sample_chunks
from .settings import LLMSettings

_CONTEXT_FIELDS = (
    "max_model_len",
    "loaded_context_length",
    "context_length",
    "context_window",
    "max_context_length",
    "n_ctx",
)
"""What servers call it. Not n_ctx_train: the model was trained for it, its server may run less."""


@dataclass(frozen=True)
class EndpointReport:
    """What was found out about one model at an endpoint."""

    reachable: bool
    served: bool | None = None
    """Whether the endpoint lists the model; None: it lists no models."""
    form: str | None = None
    """The form in which the model accepts requests, such as "json_schema, no system role"."""
    structured: dict[str, str] = dataclasses.field(default_factory=dict)
    """json_schema, json_object -> "honoured", "ignored" (other text came) or "rejected"; plain ->
    "answers" or "rejected"."""
    context: int | None = None
    """Tokens of prompt and reply together."""
    tokens_per_second: float | None = None
    problem: str | None = None
    """Why the model cannot write queries; None if it can."""


def probe(settings: LLMSettings) -> list[EndpointReport]:
    """Sends a few requests to each endpoint.

    Returns:
        One report for each model of the settings at the first endpoint, at the second, ...

    Raises:
        RefineFastError: if the settings name no endpoint.
    """
    if settings.in_process:
        raise RefineFastError(f"llm: doctor probes URLs (got {settings.url}).")
    return run(_probe_all(settings))


async def _probe_all(settings: LLMSettings) -> list[EndpointReport]:
    reports = []
    for url in settings.urls:
        backend = HttpBackend(url, settings.key(), settings.timeout)
        try:
            reports += [await _probe(backend, settings, model) for model in settings.models]
        finally:
            await backend.close()
    return reports


async def _probe(backend: HttpBackend, settings: LLMSettings, model: str) -> EndpointReport:
    listed: list[dict[str, Any]] = []
    try:
        listed = await backend.models()
    except Failure as failure:
        if "HTTP" not in str(failure):
            return EndpointReport(reachable=False, problem=str(failure))
        if failure.kind == "fatal" and "404" not in str(failure):
            return EndpointReport(reachable=True, problem=str(failure))
    own = next((entry for entry in listed if entry.get("id") == model), {})
    report = EndpointReport(True, bool(own) if listed else None)
    problem = await _problem(backend, settings, model)
    if model not in backend.forms:
        return replace(report, problem=problem)
    form = backend.forms[model]
    structured = {
        mode: await _honours(backend, settings, model, replace(form, mode=mode)) for mode in MODES
    }
    speed, failed = await _speed(backend, settings, model)
    return replace(
        report,
        form=str(form),
        structured=structured,
        context=await _context(backend, own, model),
        tokens_per_second=speed,
        problem=problem or failed,
    )


async def _problem(backend: HttpBackend, settings: LLMSettings, model: str) -> str | None:
    """Why the reply to a request of the stage is useless; None if queries can be read from it."""
    (request,) = query_requests(sample_chunks()[:1], [0], replace(settings, models=(model,)))
    try:
        return why_useless(await backend.complete(request), holds_queries)
    except Failure as failure:
        return str(failure)


def _short_request(settings: LLMSettings, model: str, text: str, schema: dict[str, Any]) -> Request:
    return Request("probe", model, "", text, schema, 128, settings.temperature, settings.extra)


async def _honours(backend: HttpBackend, settings: LLMSettings, model: str, form: Form) -> str:
    """Whether JSON comes although the prompt does not mention it: the server enforced it."""
    schema = query_schema(["question"])
    request = _short_request(settings, model, "Ask one short question about rivers.", schema)
    try:
        reply = await backend.call(request, form)
    except Failure:
        return "rejected"
    if form.mode == "plain":
        return "answers"
    try:
        value = json.loads(reply.text)
    except ValueError:
        # The beginning of a reply that was cut shows that the grammar holds.
        is_cut = reply.finish == "length" and reply.text.lstrip().startswith('{"queries')
        return "honoured" if is_cut else "ignored"
    return "honoured" if isinstance(value, dict) and "queries" in value else "ignored"


async def _speed(
    backend: HttpBackend, settings: LLMSettings, model: str
) -> tuple[float | None, str | None]:
    """(tokens per second of one stream, prompt processing included, why it failed)."""
    request = _short_request(settings, model, "Count from one to sixty, in words.", {})
    start = time.perf_counter()
    try:
        reply = await backend.call(request, replace(backend.forms[model], mode="plain"))
    except Failure as failure:
        return None, str(failure)
    return reply.tokens_out / (time.perf_counter() - start), None


async def _context(backend: HttpBackend, own: dict[str, Any], model: str) -> int | None:
    """Tokens of prompt and reply together.

    From the list of models (vLLM, OpenRouter), or else, as the server runs the model, from the
    pages of llama.cpp, Ollama (the model is loaded by now) and LM Studio.
    """
    if found := _context_field(own):
        return found
    for path in ("/props", "/api/ps", "/api/v0/models"):
        page = await backend.page(path)
        if not isinstance(page, dict):
            continue
        entries = [
            entry
            for entry in (page.get("models") or page.get("data") or [])
            if isinstance(entry, dict)
        ]
        same = [
            entry
            for entry in entries
            if model
            in (entry.get("id"), str(entry.get("name")).removesuffix(":latest"), entry.get("name"))
        ]
        for entry in (page.get("default_generation_settings"), *same):
            if isinstance(entry, dict) and (found := _context_field(entry)):
                return found
    return None


def _context_field(entry: dict[str, Any]) -> int | None:
    return next((entry[name] for name in _CONTEXT_FIELDS if isinstance(entry.get(name), int)), None)
