"""Any OpenAI-compatible endpoint, through the openai client without its retries: what to do after a failure is policy.py's."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import openai

from .request import Failure, Reply, Request, count_tokens

MODES = ("json_schema", "json_object", "plain")
"""Ways of asking for JSON, the strictest first. Servers differ: some obey, some ignore, some answer 400 or 500."""


def response_format(mode: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The request field of a mode. llama.cpp's servers take the schema beside ``json_object``."""
    if mode == "json_schema":
        return {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": schema},
            }
        }
    if mode == "json_object":
        return {"response_format": {"type": "json_object", "schema": schema}}
    return {}


class HttpBackend:
    """The first request finds out, alone, which mode the server accepts; its reply counts like any other, and the calls that the server
    rejected on the way, which cost nothing, do not count. No text that leaves this class holds the key."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self._url = url
        self._key = key
        self._timeout = timeout
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=key or "none", max_retries=0, timeout=timeout
        )
        self._limit_name = (
            "max_completion_tokens" if urlsplit(url).hostname == "api.openai.com" else "max_tokens"
        )
        self._finding_out = asyncio.Lock()
        self.mode: str | None = None

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, request: Request) -> Reply:
        if self.mode is None:
            async with self._finding_out:
                if self.mode is None:
                    return await self._find_mode(request)
        return await self.call(request, self.mode)

    async def _find_mode(self, request: Request) -> Reply:
        """Steps down where the server rejects the request as it stands. A 500 may be a rejection or chance: it is asked twice."""
        for mode in MODES:
            for again in (True, False):
                try:
                    reply = await self.call(request, mode)
                except _Rejected as failure:
                    if mode == MODES[-1]:
                        raise
                    if failure.server_side and again:
                        continue
                    break
                self.mode = mode
                return reply
        raise AssertionError("the last mode returns or raises")

    async def call(self, request: Request, mode: str) -> Reply:
        fields: dict[str, Any] = {
            "model": request.model,
            "messages": request.messages,
            self._limit_name: request.max_tokens,
        }
        if request.temperature is not None:
            fields["temperature"] = request.temperature
        try:
            async with asyncio.timeout(self._timeout):
                # As extra_body, because the client would walk through every part of the schema at every call: a fifth of its time.
                completion = await self._client.chat.completions.create(
                    **fields, extra_body=response_format(mode, request.schema)
                )
        except Exception as error:
            raise self._failure(error) from None
        return self._reply(completion, request)

    def _reply(self, completion: Any, request: Request) -> Reply:
        try:
            choice = completion.choices[0]
            text, finish = choice.message.content or "", str(choice.finish_reason)
            if not isinstance(text, str):
                raise TypeError
        except (AttributeError, IndexError, TypeError):
            raise Failure(
                "broken",
                f"the server's answer is no chat completion: {self.redact(str(completion))[:200]}",
            ) from None

        def used(name: str, estimate: int) -> int:
            told = getattr(completion.usage, name, None)  # whatever the server wrote there
            return told if isinstance(told, int) and told > 0 else estimate

        tokens_in, tokens_out = (
            used("prompt_tokens", request.tokens_in),
            used("completion_tokens", count_tokens(text)),
        )
        return Reply(self.redact(text), finish, tokens_in, tokens_out)

    async def models(self) -> list[dict[str, Any]]:
        """What the endpoint says it serves."""
        try:
            async with asyncio.timeout(self._timeout):
                return [model.model_dump() for model in (await self._client.models.list()).data]
        except Exception as error:
            raise self._failure(error) from None

    async def page(self, path: str) -> Any:
        """The JSON at ``path``, which begins where the API's own "/v1" does; None where there is none."""
        root = self._url.rstrip("/").removesuffix("/v1")
        try:
            async with asyncio.timeout(self._timeout):
                return await self._client.get(root + path, cast_to=object)
        except (openai.OpenAIError, TimeoutError, ValueError):
            return None

    def redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return Failure("busy", f"no reply within {self._timeout:g} s")
        if isinstance(error, openai.APIStatusError):
            return self._status(error)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            return Failure(
                "broken",
                self.redact(
                    f"the connection failed ({type(cause or error).__name__}: {cause or error})"
                ),
            )
        if isinstance(
            error, openai.OpenAIError | ValueError | TypeError | AttributeError
        ):  # a body that is no JSON, or another JSON
            return Failure(
                "broken",
                self.redact(
                    f"the server's answer is no chat completion ({type(error).__name__}: {error})"
                )[:300],
            )
        raise error

    def _status(self, error: openai.APIStatusError) -> Failure:
        status = error.status_code
        said = " ".join(str(error.message).split()).removeprefix(f"Error code: {status} - ")
        message = self.redact(f"HTTP {status}: {said[:300]}")
        wait = retry_after(error.response.headers)
        if status in (401, 402, 403) or error.code == "insufficient_quota":
            return Failure("fatal", message)
        if status == 404:
            return Failure(
                "fatal",
                f"{message} (does the model's name match, and does the URL end as the server's does, mostly in /v1?)",
            )
        if status in (429, 503, 529):
            return Failure("busy", message, wait)
        if status in (408, 409, 425):
            return Failure("broken", message, wait)
        return _Rejected(message, server_side=status >= 500, retry_after=wait)


class _Rejected(Failure):
    """An answer that may be about the request's form: 400, 422, or a server's 500."""

    def __init__(self, message: str, *, server_side: bool, retry_after: float | None) -> None:
        super().__init__("broken" if server_side else "wrong", message, retry_after)
        self.server_side = server_side


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: ``retry-after-ms``, or ``Retry-After`` as a number or a date (RFC 9110, section 10.2.3)."""
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(headers.get("retry-after-ms")) / 1000)  # type: ignore[arg-type]
    value = headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    date = email.utils.parsedate_tz(value)
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
