"""An OpenAI-compatible server on loopback that misbehaves as told.

Run as a script, so that it shares no interpreter with the client. Prints its port. GET /stats: what
it served. POST /options: a JSON object of Options to change. A fault is drawn per call with a
seeded generator, so a repeated call draws anew.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

FAULTS = ("429", "500", "503", "drop", "half", "garbage", "stall")


@dataclasses.dataclass
class Options:
    latency: float = 0.0
    slots: int = 10_000
    faults: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    once: bool = False
    """Whether a passage that had a fault gets no other."""
    retry_after: str = "0.05"
    stall: float = 3600.0
    hold_after: int | None = None
    """Good replies after which every further call waits until this is changed; None: no end."""
    rules: tuple[str, ...] = ()
    """What the model refuses or returns besides: "max_completion_tokens", "no system role",
    "no temperature", "error with status 200", "parts", "only reasoning", "reasoning to the limit",
    "inline reasoning to the limit"."""
    structured: str = "json_schema"
    """The strictest mode that is accepted; a stricter one is answered with the status
    ``rejection``."""
    rejection: int = 500
    rate: float = 0.0
    """Calls a second beyond which it answers 429; 0: no limit."""
    status: int = 200
    """Anything else is the answer to every call."""
    flagged: str = ""
    """Passages with this text are answered with 403 and ``flag``."""
    flag: dict = dataclasses.field(default_factory=dict)
    reply: str = ""
    """The text of every reply; empty: made from the passage."""
    verdict: tuple[int, ...] = (1,)
    """The numbers of the queries that pass, in every reply of the judge."""
    ungraded: float = 0.0
    """Share of the replies of the judge of passages that hold no grades."""
    empty: float = 0.0
    """Share of the replies without any text."""
    usage: dict | None = None
    """What every reply says that it took; None: the truth."""
    answers: str = ""
    """A JSON file: passage -> list of queries."""
    card: dict = dataclasses.field(default_factory=lambda: {"max_model_len": 4096})
    """What the list of models says of the model besides its name."""
    bare_list: bool = False
    """Whether the list of models is a bare JSON list."""
    pages: dict = dataclasses.field(default_factory=dict)
    """What else it answers to GET, by path."""


class Server:
    def __init__(self) -> None:
        self.options = Options()
        self.random = random.Random(0)
        self.served: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.faulted: set[str] = set()
        self.answers: dict[str, list[str]] = {}
        self.working = self.in_flight = self.peak = self.received = 0
        self.busy = 0.0
        self.first = self.last = self.changed = 0.0
        self.tokens, self.refilled = 0.0, time.monotonic()
        self.free = asyncio.Condition()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = json.loads(await reader.readexactly(int(length[1]))) if length else {}
                self.in_flight += 1
                self.peak = max(self.peak, self.in_flight)
                try:
                    keep = await self.answer(method, path, head, body, writer)
                finally:
                    self.in_flight -= 1
                if not keep:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(
        self, method: str, path: str, head: bytes, body: dict, writer: asyncio.StreamWriter
    ) -> bool:
        if path == "/options":
            self.options = dataclasses.replace(self.options, **body)
            self.answers = (
                json.loads(Path(self.options.answers).read_text()) if self.options.answers else {}
            )
            return await self.send(writer, 200, {})
        if path == "/stats":
            calls = sum(self.served.values())
            stats = {
                "served": calls,
                "distinct": len(self.served),
                "most": max(self.served.values(), default=0),
                "calls": self.calls,
            }
            stats |= {
                "received": self.received,
                "peak": self.peak,
                "busy": self.busy,
                "seconds": self.last - self.first,
                "bodies": self.bodies,
            }
            return await self.send(writer, 200, stats)
        if path == "/v1/models":
            model = {
                "id": "tiny",
                "object": "model",
                "created": 0,
                "owned_by": "us",
                **self.options.card,
            }
            listed = [model] if self.options.bare_list else {"object": "list", "data": [model]}
            return await self.send(writer, 200, listed)
        if method == "GET":
            page = self.options.pages.get(path)
            return await self.send(writer, 200 if page else 404, page or {"error": "no such page"})
        return await self.complete(head, body, writer)

    async def complete(self, head: bytes, body: dict, writer: asyncio.StreamWriter) -> bool:
        options = self.options
        self.bodies = [*self.bodies[-9:], body]
        self.received += 1
        mode = body.get("response_format", {}).get("type", "plain")
        order = ["plain", "json_object", "json_schema"]
        if options.status != 200:
            echo = re.search(rb"authorization: (.*)\r", head, re.IGNORECASE)
            return await self.send(
                writer,
                options.status,
                {"error": {"message": f"no: {echo[1].decode() if echo else ''}"}},
            )
        if refusal := refused(body, options.rules):
            self.calls["rejected"] += 1
            return await self.send(writer, *refusal)
        if order.index(mode) > order.index(options.structured):
            self.calls["rejected"] += 1
            return await self.send(
                writer,
                options.rejection,
                {"error": {"message": "response_format is not supported"}},
            )
        fault = (
            self.random.choice(options.kinds) if self.random.random() < options.faults else "none"
        )
        if options.once and fault != "none":
            asked = body["messages"][-1]["content"]
            fault = "none" if asked in self.faulted else fault
            self.faulted.add(asked)
        if options.rate and not self.take():
            fault = "429"
        self.calls[fault] += 1
        if options.flagged and options.flagged in body["messages"][-1]["content"]:
            return await self.send(writer, 403, {"error": options.flag})
        if fault == "json_validate_failed":
            error = {"message": "Failed to validate JSON", "code": fault}
            return await self.send(writer, 400, {"error": error})
        if fault == "429":
            return await self.send(
                writer,
                429,
                {"error": {"message": "slow down"}},
                f"Retry-After: {options.retry_after}\r\n",
            )
        async with self.free:
            await self.free.wait_for(lambda: self.working < options.slots)
            self.count(+1)
        try:
            await asyncio.sleep(options.stall if fault == "stall" else options.latency)
            while (held := self.options.hold_after) is not None and sum(
                self.served.values()
            ) >= held:
                await asyncio.sleep(0.01)
        finally:
            async with self.free:
                self.count(-1)
                self.free.notify()
        if fault in ("500", "503"):
            return await self.send(writer, int(fault), {"error": {"message": "try again"}})
        if fault in ("drop", "stall"):
            return False
        user = body["messages"][-1]["content"]
        match = re.search(r"^Passage: (.*?)\n(?:Wanted|Queries):", user, re.DOTALL | re.MULTILINE)
        passage = match[1] if match else user
        content = options.reply or (
            "" if self.random.random() < options.empty else self.write(passage, user)
        )
        reply = {
            "id": "c", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, **choice(content, options.rules)}],
            "usage": options.usage or {
                "prompt_tokens": len(user) // 4,
                "completion_tokens": len(content) // 4,
                "total_tokens": 0,
            },
        }  # fmt: skip
        if fault == "garbage":
            return await self.send(writer, 200, '{"id": "c", "choices": [{"mess')
        if fault == "half":
            data = json.dumps(reply).encode()
            writer.write(head_of(200, len(data)) + data[: len(data) // 2])
            await writer.drain()
            return False
        await self.send(writer, 200, reply)
        self.served[hashlib.md5(passage.encode()).hexdigest()] += 1
        return True

    def write(self, passage: str, user: str) -> str:
        if user.startswith("Query: "):
            listed = user.removesuffix("Grades:")
            passages = re.split(r"^Passage \d+: ", listed, flags=re.MULTILINE)[1:]
            self.calls["graded"] += 1
            if self.random.random() < self.options.ungraded:
                return "All of them are fine."
            return "<think>2: 0?</think>\n" + "\n".join(
                f"{i}: {grade_of(text)}" for i, text in enumerate(passages, 1)
            )
        if "Queries:" in user:
            return json.dumps({"answerable": self.options.verdict})
        texts = (
            self.answers.get(passage)
            if self.answers
            else [f"What is told of {passage.split('.')[0].strip()[:60]}?"]
        )
        return json.dumps({"queries": [{"kind": "question", "text": text} for text in texts or []]})

    def take(self) -> bool:
        now = time.monotonic()
        self.tokens = min(
            max(1.0, self.options.rate / 10),
            self.tokens + (now - self.refilled) * self.options.rate,
        )
        self.refilled = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True

    def count(self, step: int) -> None:
        now = time.monotonic()
        self.busy += self.working * (now - self.changed) if self.changed else 0.0
        self.first = self.first or now
        self.last = self.changed = now
        self.working += step

    async def send(
        self, writer: asyncio.StreamWriter, status: int, body: dict | str, headers: str = ""
    ) -> bool:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        writer.write(head_of(status, len(data), headers) + data)
        await writer.drain()
        return True


def grade_of(passage: str) -> int:
    """The grade of a passage, whatever the query: a hash of its last 12 characters."""
    return hashlib.md5(passage.strip()[-12:].encode()).digest()[0] % 4


def refused(body: dict, rules: tuple[str, ...]) -> tuple[int, dict] | None:
    """The status and the body with which a model refuses the form of a request."""

    def error(message: str, status: int = 400, **fields: object) -> tuple[int, dict]:
        return status, {"error": {"message": message, **fields}}

    if "error with status 200" in rules:
        return error("The provider has no credits left", 200, code=402)
    if "max_completion_tokens" in rules and "max_tokens" in body:
        return error("Unsupported parameter: use 'max_completion_tokens' instead of 'max_tokens'.")
    if "no system role" in rules and any(m["role"] == "system" for m in body["messages"]):
        return error("System role not supported")
    if "no name for the system role" in rules and any(
        m["role"] == "system" for m in body["messages"]
    ):
        return error("invalid request")
    if "no temperature" in rules and "temperature" in body:
        return error("'temperature' does not support 0.2 with this model.", param="temperature")
    if "no extra" in rules and "enable_thinking" in body:
        return error("Unrecognized request argument supplied: enable_thinking")
    return None


def choice(content: str, rules: tuple[str, ...]) -> dict:
    """The finish reason and the message of a reply, in the form that the rules ask for."""
    message: dict = {"role": "assistant", "content": content}
    finish = "stop"
    if "parts" in rules:
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "1. Hm, what?"}]}
        message["content"] = [thought, {"type": "text", "text": content}]
    if "only reasoning" in rules:
        message |= {"content": None, "reasoning_content": content}
    if "reasoning to the limit" in rules:
        message |= {"content": None, "reasoning": "Let me think. " * 50}
        finish = "length"
    if "inline reasoning to the limit" in rules:
        message["content"] = "<think>\nLet me think. What would one ask? " * 20
        finish = "length"
    return {"finish_reason": finish, "message": message}


def head_of(status: int, length: int, headers: str = "") -> bytes:
    lines = f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {length}"
    return ("\r\n".join(lines) + f"\r\n{headers}\r\n").encode()


async def main() -> None:
    server = Server()
    listener = await asyncio.start_server(server.connection, "127.0.0.1", 0, limit=2**24)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # with the pipe of the test that started it


asyncio.run(main())
