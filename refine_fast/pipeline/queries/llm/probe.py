"""What ``doctor`` finds out about an endpoint, in four short calls and a few looks at what the server tells of itself."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any

from ....errors import RefineFastError
from .http_backend import MODES, HttpBackend
from .prompt import query_schema
from .request import Failure, Request
from .settings import IN_PROCESS, LLMSettings

_CONTEXT_FIELDS = (
    "max_model_len",
    "loaded_context_length",
    "context_length",
    "context_window",
    "max_context_length",
    "n_ctx",
)
"""What servers call it; not n_ctx_train, which is what the model was trained for and not what its server runs it with."""


@dataclass(frozen=True)
class EndpointReport:
    reachable: bool
    served: bool | None = None
    """None: the endpoint lists no models."""
    structured: dict[str, str] = dataclasses.field(default_factory=dict)
    """json_schema, json_object, plain -> "honoured", "ignored" (no such JSON came) or "rejected"; plain: "answers" or "rejected"."""
    context: int | None = None
    tokens_per_second: float | None = None
    problem: str | None = None


def probe(settings: LLMSettings) -> list[EndpointReport]:
    """One report for each model named."""
    if settings.url == IN_PROCESS:
        raise RefineFastError(f"llm: {IN_PROCESS} is no endpoint; doctor probes URLs.")
    return asyncio.run(_probe_all(settings))


async def _probe_all(settings: LLMSettings) -> list[EndpointReport]:
    backend = HttpBackend(settings.url, settings.key(), settings.timeout)
    try:
        return [await _probe(backend, settings, model) for model in settings.models]
    finally:
        await backend.close()


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
    structured = {mode: await _honours(backend, settings, model, mode) for mode in MODES}
    speed, problem = await _speed(backend, settings, model)
    return EndpointReport(
        True,
        bool(own) if listed else None,
        structured,
        await _context(backend, own, model),
        speed,
        problem,
    )


async def _honours(backend: HttpBackend, settings: LLMSettings, model: str, mode: str) -> str:
    """The prompt says nothing of JSON: if it comes all the same, the server saw to it."""
    schema = query_schema(["question"])
    request = Request(
        "probe",
        model,
        "",
        "Ask one short question about rivers.",
        schema,
        128,
        settings.temperature,
    )
    try:
        reply = await backend.call(request, mode)
    except Failure:
        return "rejected"
    if mode == "plain":
        return "answers"
    try:
        value = json.loads(reply.text)
    except ValueError:
        # A reply cut by its length shows by its beginning that the grammar holds.
        return (
            "honoured"
            if reply.finish == "length" and reply.text.lstrip().startswith('{"queries')
            else "ignored"
        )
    return "honoured" if isinstance(value, dict) and "queries" in value else "ignored"


async def _speed(
    backend: HttpBackend, settings: LLMSettings, model: str
) -> tuple[float | None, str | None]:
    """Tokens a second of one stream, the prompt's share included."""
    request = Request(
        "probe", model, "", "Count from one to sixty, in words.", {}, 128, settings.temperature
    )
    start = time.perf_counter()
    try:
        reply = await backend.call(request, "plain")
    except Failure as failure:
        return None, str(failure)
    return reply.tokens_out / (time.perf_counter() - start), None


async def _context(backend: HttpBackend, own: dict[str, Any], model: str) -> int | None:
    """Tokens of prompt and reply together: from the list of models (vLLM, OpenRouter), or else as the server runs it from the pages of
    llama.cpp, Ollama (the model is loaded by now) and LM Studio."""
    if found := _told(own):
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
            if isinstance(entry, dict) and (found := _told(entry)):
                return found
    return None


def _told(entry: dict[str, Any]) -> int | None:
    return next((entry[name] for name in _CONTEXT_FIELDS if isinstance(entry.get(name), int)), None)
