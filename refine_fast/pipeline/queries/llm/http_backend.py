"""Any OpenAI-compatible endpoint, through the openai client without its retries.

What to do after a failure is decided by dispatch and throttle.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import openai

from ...corpus.text import whole_characters
from .reply_parser import is_bare_answer
from .request import Failure, Reply, Request, count_tokens
from .throttle import MAX_TRIES

MODES = ("json_schema", "json_object", "plain")
"""Ways of asking for JSON, the strictest first. Servers differ: some obey, some ignore it, some
answer 400 or 500."""

MAX_REJECTED_REQUESTS = 3
"""The server is declared unusable after this many requests of which it rejected every form."""

_ABOUT_LIMIT = re.compile(
    r"max_completion_tokens|max_tokens\W.*(?:not supported|unsupported|unrecognized|unknown|"
    r"not permitted|unexpected|extra)",
    re.IGNORECASE,
)
_ABOUT_TEMPERATURE = re.compile(r"\btemperature\b", re.IGNORECASE)
_ABOUT_SYSTEM_ROLE = re.compile(
    r"system\W{0,3}(?:role|message|prompt|instruction)|role\W{0,3}system|developer instruction|"
    r"roles must alternate|only user and (?:assistant|model) roles",
    re.IGNORECASE,
)
_FLAGGED = re.compile(r"\bflagged|\bmoderation\b", re.IGNORECASE)
_TOO_LONG = re.compile(r"context.?(?:length|window|size)|maximum context|too long", re.IGNORECASE)


@dataclass(frozen=True)
class Form:
    """How a request is put, which servers and models restrict in different ways."""

    mode: str
    """One of MODES."""
    limit_field: str = "max_tokens"
    """The field for the longest reply; newer OpenAI models take only "max_completion_tokens"."""
    system_role: bool = True
    """False: the system message is put before the user's, for models such as Gemma 2."""
    temperature: bool = True
    """False: the temperature is left to the model, which takes no other than its own."""

    def __str__(self) -> str:
        role = () if self.system_role else ("no system role",)
        limit = () if self.limit_field == "max_tokens" else (self.limit_field,)
        temperature = () if self.temperature else ("no temperature",)
        return ", ".join((self.mode, *limit, *role, *temperature))

    def after(self, rejection: _Rejected, tried: set[Form]) -> Form | None:
        """The form to try next; None when none is left.

        What the rejection names is changed first. Otherwise the mode is lowered, and last, unless
        the server itself failed, the system role and the limit's field are changed.
        """
        other_limit = {
            "max_tokens": "max_completion_tokens",
            "max_completion_tokens": "max_tokens",
        }[self.limit_field]
        candidates = []
        if _ABOUT_TEMPERATURE.search(str(rejection)):
            candidates.append(replace(self, temperature=False))
        if _ABOUT_LIMIT.search(str(rejection)):
            candidates.append(replace(self, limit_field=other_limit))
        if _ABOUT_SYSTEM_ROLE.search(str(rejection)):
            candidates.append(replace(self, system_role=False))
        candidates += [replace(self, mode=mode) for mode in MODES[MODES.index(self.mode) + 1 :]]
        if not rejection.server_side:
            candidates += [
                replace(self, system_role=False),
                replace(self, system_role=True, limit_field=other_limit),
                replace(self, system_role=False, limit_field=other_limit),
            ]
        return next((form for form in candidates if form not in tried), None)

    def fields(self, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of a request in this form: those that every server knows, and the rest."""
        fields: dict[str, Any] = {
            "model": request.model,
            "messages": request.messages if self.system_role else request.messages_without_system,
            self.limit_field: request.max_tokens,
        }
        if request.temperature is not None and self.temperature:
            fields["temperature"] = request.temperature
        return fields, self.response_format(request.schema) | dict(request.extra)

    def response_format(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The request field that asks for JSON. llama.cpp reads the schema of ``json_object``."""
        if not schema:  # the prompt asks for lines
            return {}
        if self.mode == "json_schema":
            described = {"name": "reply", "strict": True, "schema": schema}
            return {"response_format": {"type": "json_schema", "json_schema": described}}
        if self.mode == "json_object":
            return {"response_format": {"type": "json_object", "schema": schema}}
        return {}


@dataclass(frozen=True)
class Address:
    """Where an endpoint's requests go."""

    base: str
    """The URL without "/chat/completions" and parameters."""
    query: dict[str, str]
    """Parameters of every request, such as Azure's api-version."""

    @classmethod
    def of(cls, url: str) -> Address:
        """From what the user gives: the URL of the API, or of its chat completions."""
        parts = urlsplit(url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        return cls(urlunsplit(parts._replace(path=path, query="")), dict(parse_qsl(parts.query)))

    @property
    def is_azure(self) -> bool:
        """Whether the key goes into the header "api-key"."""
        return "/openai/deployments/" in self.base or "api-version" in self.query


class HttpBackend:
    """An endpoint.

    The first request to each model probes, alone, which form the model accepts. Its reply counts
    like any other; rejected calls cost nothing and do not count. No error message holds the key.
    Replies come as they are: a key may be a placeholder, such as "test", that is a word in them.
    """

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self.url = url
        self._key = key
        self._timeout = timeout
        address = Address.of(url)
        self.client = openai.AsyncOpenAI(
            base_url=address.base,
            api_key=key or "none",
            max_retries=0,
            timeout=timeout,
            default_query=address.query,
            default_headers={"api-key": key} if address.is_azure and key else None,
        )
        own = urlsplit(url).hostname == "api.openai.com"
        self._first_form = Form(MODES[0], "max_completion_tokens" if own else "max_tokens")
        self._probing = asyncio.Lock()
        self._rejected_requests = 0
        self._late_requests = 0
        self._fatal: Failure | None = None
        self.forms: dict[str, Form] = {}
        """Model -> the form that it accepts."""

    async def close(self) -> None:
        """Closes the connections."""
        await self.client.close()

    async def complete(self, request: Request) -> Reply:
        """The reply to the request, in the form that the model accepts.

        Raises:
            Failure: if there is none.
        """
        if request.model not in self.forms:
            async with self._probing:
                if self._fatal is not None:  # another request found out while this one waited
                    raise self._fatal
                if request.model not in self.forms:
                    try:
                        return await self._find_form(request)
                    except Failure as failure:
                        self._fatal = failure if failure.kind == "fatal" else self._hangs(failure)
                        raise
        return await self.call(request, self.forms[request.model])

    def _hangs(self, failure: Failure) -> Failure | None:
        """What ends the search for a form after several requests without a reply in time."""
        self._late_requests += failure.kind == "late"
        if self.forms or self._late_requests < MAX_TRIES["late"]:
            return None
        return Failure("fatal", f"the first {self._late_requests} requests got {failure}")

    async def _find_form(self, request: Request) -> Reply:
        """Tries forms until one is accepted. A 500 may be a rejection or chance: asked twice."""
        form: Form | None = self._first_form
        tried: set[Form] = set()
        again: set[Form] = set()
        while form is not None:
            try:
                reply = await self.call(request, form)
            except _Rejected as failure:
                rejection = failure
                if failure.server_side and form not in again:
                    again.add(form)
                    continue
                tried.add(form)
                form = None if failure.too_long else form.after(failure, tried)
                continue
            self.forms[request.model] = form
            return reply
        self._rejected_requests += not rejection.server_side
        if not self.forms and self._rejected_requests >= MAX_REJECTED_REQUESTS:
            raise Failure("fatal", f"the server rejects every form of the request: {rejection}")
        raise rejection

    async def call(self, request: Request, form: Form) -> Reply:
        """The reply to the request in this form.

        Raises:
            Failure: if there is none.
        """
        fields, extra = form.fields(request)
        try:
            async with asyncio.timeout(self._timeout):
                # As extra_body, since the client would walk through every part of the schema at
                # every call: a fifth of its time.
                completion = await self.client.chat.completions.create(**fields, extra_body=extra)
            return self.reply(completion, request.tokens_in)
        except _Rejected as failure:
            raise _blame_option(failure, request) from None
        except Failure:
            raise
        except Exception as error:
            raise _blame_option(self.failure(error), request) from None

    def reply(self, completion: Any, tokens_in: int) -> Reply:
        """The reply that a chat completion holds.

        Args:
            completion: the client's object.
            tokens_in: estimated tokens of the prompt, if the server does not count them.

        Raises:
            Failure: if it holds none.
        """
        choice: Any = next(iter(getattr(completion, "choices", None) or ()), None)
        # Some gateways answer status 200 with an error in the body.
        error = getattr(completion, "error", None) or getattr(choice, "error", None)
        if error:
            raise self._error_in_body(error)
        try:
            message = choice.message
            content, finish = whole_characters(_text(message.content)), str(choice.finish_reason)
        except (AttributeError, TypeError):
            said = self.redact(str(completion))[:200]
            raise Failure(
                "broken", f"the server's answer is not a chat completion: {said}"
            ) from None
        reasoning = next(
            (
                whole_characters(text)
                for name in ("reasoning_content", "reasoning")
                if isinstance(text := getattr(message, name, None), str)
            ),
            "",
        )

        def used(name: str, estimate: int) -> int:
            count = getattr(completion.usage, name, None)  # whatever the server wrote there
            return count if isinstance(count, int) and count > 0 else estimate

        tokens_in = used("prompt_tokens", tokens_in)
        tokens_out = used("completion_tokens", count_tokens(content + reasoning))
        # xAI, and gateways to Gemini, count what was thought in the total alone.
        tokens_out = max(tokens_out, used("total_tokens", 0) - tokens_in)
        # Some servers take a whole reply for reasoning. What a model thinks is no answer.
        if not content.strip() and finish != "length" and is_bare_answer(reasoning):
            content = reasoning
        return Reply(content, finish, tokens_in, tokens_out)

    async def models(self) -> list[dict[str, Any]]:
        """The models that the endpoint lists; none where it does so in another form.

        Raises:
            Failure: if it does not answer, or with an error.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return [model.model_dump() for model in (await self.client.models.list()).data]
        except (ValueError, TypeError, AttributeError):
            return []  # in another form than OpenAI's: a bare list, a page of HTML
        except Exception as error:
            raise self.failure(error) from None

    async def page(self, path: str) -> Any:
        """The JSON at ``path``, relative to where the API's own "/v1" is; None if there is none."""
        root = Address.of(self.url).base.removesuffix("/v1")
        try:
            async with asyncio.timeout(self._timeout):
                return await self.client.get(root + path, cast_to=object)
        except (openai.OpenAIError, TimeoutError, ValueError):
            return None

    def redact(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, "***") if self._key else text

    def failure(self, error: Exception) -> Failure:
        """What an error of the client means; raises it again if it is a fault of this program."""
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return Failure(
                "late",
                f"no reply within {self._timeout:g} s (raise --llm-timeout if it needs longer)",
            )
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            # openai before 3.40 puts the whole body into its message.
            body = error.body if isinstance(error.body, dict) else {}
            said = " ".join(str(body.get("message") or error.message).split())
            if "flagged_input" in str(body.get("metadata")):
                said += " (flagged)"
            said = said.removeprefix(f"Error code: {status} - ")
            wait = retry_after(error.response.headers)
            return self.status_failure(status, said, error.code, wait)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return Failure(
                "broken",
                self.redact(f"the connection failed ({type(cause).__name__}: {cause})"),
            )
        # A body that is not JSON, or unexpected JSON.
        if isinstance(error, openai.OpenAIError | ValueError | TypeError | AttributeError):
            said = f"{type(error).__name__}: {error}"
            return Failure(
                "broken",
                self.redact(f"the server's answer is not a chat completion ({said})")[:300],
            )
        raise error

    def _error_in_body(self, error: Any) -> Failure:
        """The failure that an error under status 200 describes."""
        fields = error if isinstance(error, dict) else {"message": str(error)}
        code = str(fields.get("code"))
        status = int(code) if code.isdigit() else 500
        said = " ".join(str(fields.get("message") or fields).split())
        return self.status_failure(status, f"{said} (with status 200)", code, None)

    def status_failure(
        self, status: int, said: str, code: str | None, wait: float | None
    ) -> Failure:
        """What an HTTP status other than 200 means.

        Args:
            status: the status.
            said: the server's message.
            code: the server's name of the error, if it gives one.
            wait: seconds that it asks to wait.
        """
        message = self.redact(f"HTTP {status}: {said[:300]}")
        if status == 403 and _FLAGGED.search(said):  # of this passage alone, as OpenRouter says it
            return Failure("wrong", message, status=status)
        if status in (401, 402, 403) or code == "insufficient_quota":
            return Failure("fatal", message, status=status)
        if status == 404:
            return Failure(
                "fatal",
                f"{message} (check the model's name, and that the URL ends as the server's does, "
                "mostly in /v1)",
                status=status,
            )
        if status in (429, 503, 529):
            return Failure("busy", message, wait, status=status)
        if status in (504, 524):  # a gateway's time limit; the server behind it may go on
            return Failure("late", message, wait, status=status)
        # Groq's json_validate_failed is about this reply: asked again, the model writes another.
        if status in (408, 409, 425) or code == "json_validate_failed":
            return Failure("broken", message, wait, status=status)
        return _Rejected(message, status, wait)


class _Rejected(Failure):
    """An answer that may be about the request's form: 400, 422, or a server's 500."""

    def __init__(self, message: str, status: int, retry_after: float | None) -> None:
        self.server_side = status >= 500
        super().__init__(
            "broken" if self.server_side else "wrong", message, retry_after, status=status
        )
        self.too_long = not self.server_side and _TOO_LONG.search(message) is not None


def _blame_option(failure: Failure, request: Request) -> Failure:
    """A fatal failure with the remedy, if a rejection names a field that the user set."""
    if not isinstance(failure, _Rejected):
        return failure
    said = str(failure)
    for name in request.extra:
        if re.search(rf"\b{re.escape(name)}\b", said):
            return Failure("fatal", f"{said}; correct or remove {name!r} in --llm-extra")
    return failure


def _text(content: Any) -> str:
    """The text of a message: a string, or a list of parts of which those of type text count.

    Raises:
        TypeError: if it is neither.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError
    parts = (part if isinstance(part, dict) else {"type": "text", "text": part} for part in content)
    return "".join(
        part["text"]
        for part in parts
        if part.get("type") in (None, "text", "output_text") and isinstance(part.get("text"), str)
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: ``retry-after-ms``, or ``Retry-After`` as a number or a date.

    Source: RFC 9110, section 10.2.3.
    """
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(headers.get("retry-after-ms")) / 1000)  # type: ignore[arg-type]
    value = headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    date = email.utils.parsedate_tz(value)
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
