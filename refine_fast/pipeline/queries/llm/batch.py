"""OpenAI's batch endpoint: requests in a file, replies within a day, at half the price.

What a batch holds is on disk before it is created, and its id before anything waits for it. A start
that finds a batch there collects its replies and sends only what is left, in batches or not. Each
batch carries a name in its metadata, so that one that was created just before a kill is found at
the server. Source: https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import asyncio
import json
import uuid
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from openai.types.chat import ChatCompletion

from ....errors import RefineFastError, RefineFastWarning
from ....files import read_json, write_json
from .budget import Budget
from .dispatch import CallProgress, Watch, failure_record, reply_record
from .http_backend import Address, HttpBackend
from .reply_log import ReplyStore
from .request import Failure, Reply, Request, Sent
from .settings import BATCH_PRICE
from .throttle import MAX_TRIES, delay

MAX_REQUESTS, MAX_BYTES = 50_000, 150_000_000
"""Size of a batch; OpenAI takes 50,000 requests and 200 MB. Batches with more tokens than the
account may queue are halved."""

POLL_SECONDS = 15.0

FREE_TRIES = dict.fromkeys(("busy", "late", "broken"), 30)
"""Give up on a call about a file or a batch, which costs nothing, after this many failures."""

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"

_ENDED = ("completed", "failed", "expired", "cancelled")
_NAME = "refine_fast"  # the metadata field that names a batch

Result = TypeVar("Result")


def require_endpoints_of_batches(store: Path, urls: Sequence[str]) -> None:
    """Raises RefineFastError if a batch is open at another endpoint than those at ``urls``: asked
    there, its requests would be paid for twice."""
    for entry in _entries(journal_of(store)):
        if not _is_at(entry, urls):
            where, use = "the server that took it", "with its URL alone"
            if "url" in entry:
                where = use = entry["url"]
            raise RefineFastError(
                f"{journal_of(store)}: a batch of {len(entry['chunks'])} requests is open at "
                f"{where}; use --llm {use} until it is collected, or delete this file to ask, and "
                "to pay, once more."
            )


def is_batch_open(store: Path, url: str) -> bool:
    """Whether an earlier start left a batch at this endpoint."""
    return any(_is_at(entry, [url]) for entry in _entries(journal_of(store)))


@dataclass(frozen=True)
class _Sent:
    """A batch at the server."""

    id: str
    model: str
    chunks: dict[str, str]
    """Key of each request -> the id of its chunk."""
    reserved: dict[str, tuple[int, int]]
    """Key -> tokens in and out that this start reserved for it."""
    requests: list[Request] = field(default_factory=list)
    """Those that this start sent; an earlier start's are drawn again."""


class Batches:
    """Batches of one run folder at an endpoint; their ids are in a file beside the replies."""

    def __init__(
        self,
        state: CallProgress,
        backend: HttpBackend,
        store: ReplyStore,
        budget: Budget,
        watch: Watch | None,
    ) -> None:
        self._state = state
        self._backend = backend
        self._store = store
        self._budget = budget
        self._watch = watch
        self._file = journal_of(store.path)
        self._most = MAX_REQUESTS

    async def collect_open(self) -> None:
        """Waits for the batches that an earlier start sent and did not collect; what the server
        refused of them is asked again."""
        entries = _entries(self._file)
        own = [entry for entry in entries if _is_at(entry, [self._backend.url])]
        for entry in own:
            if entry["id"] is None:  # killed before the answer that told the id
                entry["id"] = await self._id_of(entry["name"])
        never_sent = [entry for entry in own if entry["id"] is None]
        write_json(self._file, [entry for entry in entries if entry not in never_sent])
        own = [entry for entry in own if entry not in never_sent]
        for entry in own:
            for _ in entry["chunks"]:
                self._budget.hold_sent()
        for entry in own:
            await self.collect(_Sent(entry["id"], entry["model"], entry["chunks"], {}))

    async def ask(self, requests: Iterable[Request]) -> None:
        """Sends the requests in batches and puts every reply into the store.

        One request to each model is sent alone first, to find the form that the model accepts.

        Raises:
            Failure: if the server has no batches, or refuses one.
        """
        stream = iter(requests)
        while drawn := await self.draw(stream):
            group, stream = drawn
            for sent in [await self.submit(part) for part in _by_model(group)]:
                if await self.collect(sent):
                    stream = chain(sent.requests, stream)

    async def draw(
        self, stream: Iterator[Request]
    ) -> tuple[list[Request], Iterator[Request]] | None:
        """The requests of the next batches, and what is left; None if nothing may be sent.

        A model whose form is unknown gets its first request alone.
        """
        group: list[Request] = []
        size = 0
        for request in stream:
            reserved = request.tokens_in, request.max_tokens
            is_alone = request.model not in self._backend.forms
            if stopped := self._budget.hold(*reserved, 1.0 if is_alone else BATCH_PRICE):
                if not group:
                    self._state.stopped = stopped
                    return None
                return group, chain([request], stream)
            if is_alone:
                await self._alone(request)
                continue
            group.append(request)
            size += len(_line(request, self._backend))
            if len(group) >= self._most or size >= MAX_BYTES:
                break
        return (group, stream) if group else None

    async def _alone(self, request: Request) -> None:
        used, reserved = (0, 0), (request.tokens_in, request.max_tokens)
        try:
            tries = {kind: MAX_TRIES[kind] for kind in ("busy", "broken")}
            reply = await _patiently(lambda: self._backend.complete(request), tries)
            used = reply.tokens_in, reply.tokens_out
        except Failure as failure:
            if failure.kind == "fatal":
                raise
            used = reserved if failure.kind == "late" else used
            record = _failed(request, failure, used)
        else:
            record = reply_record(request, reply, 1)
        finally:
            await self._budget.settle(reserved, used)
        await self._enter(record, 1.0)

    async def submit(self, group: list[Request]) -> _Sent:
        """Sends a batch, and returns when its id is on disk."""
        lines = b"".join(_line(request, self._backend) for request in group)
        client = self._backend.client
        try:
            upload = await self._call(
                lambda: client.files.create(file=("requests.jsonl", lines), purpose="batch")
            )
        except Failure as failure:
            if failure.status not in (404, 405):
                raise
            raise Failure("fatal", "the server has no batches; omit --llm-batch") from None
        model, name = group[0].model, uuid.uuid4().hex
        chunks = {request.key: request.chunk_id for request in group}
        entry: dict[str, Any] = {"name": name, "id": None, "model": model, "chunks": chunks}
        entry["url"] = self._backend.url
        others = _entries(self._file)
        write_json(self._file, [*others, entry])
        # Sent once: whether a lost answer was that of a new batch is found out by the next start.
        batch = await self._call(
            lambda: client.batches.create(
                input_file_id=upload.id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={_NAME: name},
            ),
            tries={},
        )
        write_json(self._file, [*others, entry | {"id": batch.id}])
        reserved = {request.key: (request.tokens_in, request.max_tokens) for request in group}
        return _Sent(batch.id, model, chunks, reserved, group)

    async def collect(self, sent: _Sent) -> bool:
        """Waits for a batch and stores its replies; then its id is forgotten.

        Returns:
            Whether its requests are to be sent again, in smaller batches.
        """
        left = dict(sent.chunks)
        try:
            batch = await self._ended(sent.id)
            for file in filter(None, (batch.output_file_id, batch.error_file_id)):
                content = await self._call(partial(self._backend.client.files.content, file))
                for line in content.text.split("\n"):  # a reply may hold U+2028
                    await self._store_line(_line_read(line), sent, left)
        except Failure as failure:
            if failure.status != 404:
                raise
            batch = None
            warnings.warn(
                f"llm: the server no longer has the batch {sent.id} or its files; {len(left)} "
                "requests of it are without a reply.",
                RefineFastWarning,
                stacklevel=2,
            )
        too_large = batch is not None and _too_large(batch)
        for key in left:
            await self._settle(sent, key, (0, 0), calls=0 if too_large else 1)
        entries = _entries(self._file)
        write_json(self._file, [entry for entry in entries if entry["id"] != sent.id])
        if too_large and len(sent.chunks) > 1:
            self._most = min(self._most, len(sent.chunks) // 2)
            return True
        if left and batch is not None and batch.status != "completed":
            refusal = self._refused(batch, sent)
            if sent.reserved:
                raise refusal
            warnings.warn(
                f"llm: {refusal}; {len(left)} requests of it are asked again.",
                RefineFastWarning,
                stacklevel=2,
            )
        # Not answered in time, or lost; what an earlier start sent is drawn again by this one.
        self._state.failed += len(left.keys() & sent.reserved.keys())
        return False

    async def _ended(self, id: str) -> Any:
        """The batch, once it is done."""
        while True:
            batch = await self._call(lambda: self._backend.client.batches.retrieve(id))
            if batch.status in _ENDED:
                return batch
            await asyncio.sleep(POLL_SECONDS)

    async def _store_line(self, line: dict[str, Any], sent: _Sent, left: dict[str, str]) -> None:
        key = str(line.get("custom_id"))
        chunk = left.pop(key, None)
        if chunk is None:
            return
        request = Sent(key, chunk, sent.model)
        response = _fields(line.get("response"))
        body = _fields(response.get("body"))
        used = (0, 0)
        if response.get("status_code") == 200:
            try:
                reply: Reply = self._backend.reply(ChatCompletion.construct(**body), 0)
                used = reply.tokens_in, reply.tokens_out
                record = reply_record(request, reply, 1)
            except Failure as failure:
                record = _failed(request, failure)
        else:
            record = _failed(request, self._refusal(line, response.get("status_code"), body))
        await self._settle(sent, key, used)
        if key not in self._store:
            await self._enter(record, BATCH_PRICE)

    def _refusal(self, line: dict[str, Any], status: Any, body: Any) -> Failure:
        """Why a line of a batch has no reply."""
        error = line.get("error") or body.get("error") or body
        fields = error if isinstance(error, dict) else {"message": error}
        said = str(fields.get("message"))
        if not isinstance(status, int):  # such as a batch that expired
            return Failure("broken", self._backend.redact(said))
        return self._backend.status_failure(status, said, fields.get("code"), None)

    def _refused(self, batch: Any, sent: _Sent) -> Failure:
        """The server's reason for a batch without replies."""
        errors = getattr(batch.errors, "data", None) or ()
        why = next((str(error.message) for error in errors if error.message), batch.status)
        return Failure("fatal", f"the batch {sent.id} {batch.status}: {self._backend.redact(why)}")

    async def _settle(self, sent: _Sent, key: str, used: tuple[int, int], calls: int = 1) -> None:
        reserved = sent.reserved.get(key, (0, 0))
        await self._budget.settle(reserved, used, calls, BATCH_PRICE)

    async def _enter(self, record: dict[str, Any], share: float) -> None:
        await self._store.append(record, share=share)
        self._state.count(record, self._budget)
        if self._watch:
            self._watch(self._state)

    async def _id_of(self, name: str) -> str | None:
        """The id of the batch with this name, if the server has it."""
        page = await self._call(lambda: self._backend.client.batches.list(limit=100))
        named = (batch for batch in page.data if (batch.metadata or {}).get(_NAME) == name)
        return next((batch.id for batch in named), None)

    async def _call(
        self, call: Callable[[], Awaitable[Result]], tries: Mapping[str, int] = FREE_TRIES
    ) -> Result:
        async def once() -> Result:
            try:
                return await call()
            except Exception as error:
                raise self._backend.failure(error) from None

        return await _patiently(once, tries)


def journal_of(store: Path) -> Path:
    """The file beside the replies that names the open batches."""
    return store.with_suffix(".batches.json")


def _entries(journal: Path) -> list[dict[str, Any]]:
    return list(read_json(journal) or [])


def _is_at(entry: dict[str, Any], urls: Sequence[str]) -> bool:
    """Whether the batch is at one of these endpoints. Before its URL was written, it was at the
    only one, over HTTP."""
    if "url" not in entry:
        return len(urls) == 1 and urls[0].startswith("http")
    return Address.of(entry["url"]).base in {Address.of(url).base for url in urls}


async def _patiently(call: Callable[[], Awaitable[Result]], tries: Mapping[str, int]) -> Result:
    """The call's result, after at most so many tries by the kind of the failure; else one."""
    attempt = 0
    while True:
        try:
            return await call()
        except Failure as failure:
            if attempt + 1 >= tries.get(failure.kind, 1):
                raise
            await asyncio.sleep(delay(attempt, failure))
            attempt += 1


def _by_model(group: list[Request]) -> list[list[Request]]:
    """A batch must name one model."""
    parts: dict[str, list[Request]] = {}
    for request in group:
        parts.setdefault(request.model, []).append(request)
    return list(parts.values())


def _too_large(batch: Any) -> bool:
    """Whether the server refused the batch because it queues no more tokens at a time."""
    errors = getattr(batch.errors, "data", None) or ()
    return any(error.code == "token_limit_exceeded" for error in errors)


def _line(request: Request, backend: HttpBackend) -> bytes:
    """The request as a line of a batch's file."""
    fields, extra = backend.forms[request.model].fields(request)
    line = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": fields | extra}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _line_read(line: str) -> dict[str, Any]:
    """A line of a batch's results; empty where it is cut: its request has no reply then."""
    try:
        return _fields(json.loads(line))
    except ValueError:
        return {}


def _fields(value: Any) -> dict[str, Any]:
    """What should be an object, but may be null or a text."""
    return value if isinstance(value, dict) else {}


def _failed(
    request: Request | Sent, failure: Failure, lost: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """The record of a request without a reply."""
    record = failure_record(request, str(failure), lost=lost)
    return record | ({"rejected": True} if failure.kind == "wrong" else {})
