"""The web page and the JSON endpoint of a run's index.

    GET  /                                      the page
    GET  /api/search?q=QUERY&k=10      {"query", "blend", "systems": {name: hits}, "marked"}
    POST /api/search  {"query", "k"}            the same
    POST /api/judge   {"query", "doc_id", "answers": true}      {"marks"}
    GET  /api/about                             {"passages", "blend", "marks"}

Texts of documents and of queries reach the page as JSON and are shown with textContent; the page
may run no script but its own.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from ....errors import RefineFastError
from ...corpus.text import whole_characters
from ..judged import Judged
from ..search import Searcher

STATIC = Path(__file__).parent / "static"

MAX_BODY = 200_000
"""Bytes of a request: 10,000 characters, escaped."""

BODY_SECONDS = 5
"""How long a request may take to arrive: a server that is stopped waits for what has begun."""

MAX_K = 100

COOKIE = "refine_fast_token"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

Handler = Callable[[Request], Awaitable[Response]]


def application(
    searcher: Searcher, judged: Judged, *, token: str | None = None, hosts: list[str] | None = None
) -> Starlette:
    """The ASGI application.

    Args:
        searcher: the index.
        judged: where marks go.
        token: what every request must carry, as a bearer token or, after a visit to /?token=...,
            as a cookie; None: no token.
        hosts: the values of Host that are answered, so that another site's name that resolves to
            this machine is not; None: any.
    """
    pages = [Route(path, partial(_file, *file)) for path, file in FILES.items()]
    api = Api(searcher, judged)
    routes = [
        *pages,
        Route("/api/search", api.search, methods=["GET", "POST"]),
        Route("/api/judge", api.judge, methods=["POST"]),
        Route("/api/about", api.about),
    ]
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=_with_headers)]
    if hosts is not None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts))
    if token is not None:
        middleware.append(Middleware(BaseHTTPMiddleware, dispatch=partial(_check_token, token)))
    return Starlette(routes=routes, middleware=middleware, exception_handlers={BadRequest: _refuse})


class BadRequest(Exception):
    """A request that cannot be answered; the text says why."""


def _refuse(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _file(name: str, kind: str, _: Request) -> Response:
    return Response((STATIC / name).read_bytes(), media_type=kind)


async def _with_headers(request: Request, answer: Handler) -> Response:
    response = await answer(request)
    response.headers.update(HEADERS)
    return response


async def _check_token(token: str, request: Request, answer: Handler) -> Response:
    def matches(given: str | None) -> bool:
        return given is not None and hmac.compare_digest(given.encode(), token.encode())

    if request.url.path == "/" and matches(request.query_params.get("token")):
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return response
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    if matches(request.cookies.get(COOKIE)) or matches(bearer):
        return await answer(request)
    message = "a token is needed: open the address that refine-fast serve printed"
    return JSONResponse({"error": message}, status_code=401)


class Api:
    """The JSON endpoint."""

    def __init__(self, searcher: Searcher, judged: Judged) -> None:
        """Keeps the index and the marks."""
        self._searcher = searcher
        self._judged = judged
        self._lock = Lock()  # a tokenizer serves one thread at a time

    async def search(self, request: Request) -> Response:
        """The best passages by each system, and which of them are marked for this query."""
        if request.method != "POST":  # GET, or HEAD, which is answered as GET
            asked: dict[str, Any] = dict(request.query_params)
            query, k = asked.get("q"), asked.get("k", "10")
        else:
            asked = await _json(request)
            query, k = asked.get("query"), str(asked.get("k", 10))
        text = _text(query, "query")
        if not k.isdecimal() or len(k) > 4 or not 1 <= int(k) <= MAX_K:
            raise BadRequest(f"k must be an integer from 1 to {MAX_K} (got {k[:20]!r})")
        return JSONResponse(await run_in_threadpool(self._search, text, int(k)))

    def _search(self, query: str, k: int) -> dict[str, Any]:
        with self._lock:
            try:
                self._searcher.refresh()
                found = self._searcher.search(query, k)
            except RefineFastError as error:
                raise BadRequest(str(error)) from None
        shown = {hit.chunk.id: hit.chunk.text for hits in found.values() for hit in hits}
        return {
            "query": query,
            "blend": self._blend(),
            "systems": {name: [hit.facts() for hit in hits] for name, hits in found.items()},
            "marked": self._judged.of(query, shown),
        }

    async def judge(self, request: Request) -> Response:
        """Marks that a passage answers a query, or takes the mark back."""
        asked = await _json(request)
        query, doc_id = _text(asked.get("query"), "query"), _text(asked.get("doc_id"), "doc_id")
        answers = asked.get("answers", True)
        if not isinstance(answers, bool):
            raise BadRequest("answers must be true or false")
        try:
            marks = await run_in_threadpool(self._mark, query, doc_id, answers)
        except RefineFastError as error:
            raise BadRequest(str(error)) from None
        return JSONResponse({"marks": marks})

    def _mark(self, query: str, doc_id: str, answers: bool) -> int:
        passage = self._searcher.index.texts({doc_id}).get(doc_id)
        if answers and passage is None:
            raise BadRequest("doc_id names no passage of the index; search again")
        return self._judged.mark(query, doc_id, passage, answers=answers)

    async def about(self, _: Request) -> Response:
        """How many passages and marks there are, and the weights of the blend."""
        return JSONResponse(
            {
                "passages": self._searcher.index.count,
                "blend": self._blend(),
                "marks": len(self._judged),
            }
        )

    def _blend(self) -> dict[str, float]:
        blend = self._searcher.blend
        return {"sentences": blend.sentences, "lexical": blend.lexical}


async def _json(request: Request) -> dict[str, Any]:
    """The object in a request. Its type must be JSON, which another site's page cannot send
    without permission."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise BadRequest("Content-Type must be application/json")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise BadRequest(f"a request may have at most {MAX_BODY:,} bytes")
    except (ClientDisconnect, TimeoutError):
        raise BadRequest(f"the request did not arrive within {BODY_SECONDS} seconds") from None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the request is not valid JSON") from None
    if not isinstance(value, dict):
        raise BadRequest("the request must be a JSON object")
    return value


def _text(value: Any, name: str) -> str:
    """A text that is not blank, as ``whole_characters``."""
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(f"{name} must be a text that is not empty")
    return whole_characters(value)
