"""Every paid reply, on disk before it counts.

One append-only JSONL file. A record is a reply or a failure, under the key of its request; the last
record for a key wins. Records that arrive together share one write and one fsync (group commit),
and :meth:`ReplyStore.append` returns after it: what was returned survives kill -9 and a power cut.
An incomplete last line was never returned; it is cut off when the file is opened again.

A record says what it cost, at the prices of its time. Without prices then, it is priced by those of
today; "share" is the part of them that it costs, in an older record that of the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import RefineFastError


@dataclass
class Spent:
    """Everything that the records of a store cost."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


class ReplyStore:
    """The file of replies, a context manager that locks it.

    Keys and positions are in memory (about 150 bytes per reply), texts on disk.

    Args:
        path: the file.
        prices: of a million tokens of prompts and of replies; 0: unknown.
        share: the part of the price that tokens cost, of a record that does not say.

    Raises:
        RefineFastError: on entry, if another process has the file or a line is damaged.
    """

    def __init__(
        self, path: Path, prices: tuple[float, float] = (0.0, 0.0), share: float = 1.0
    ) -> None:
        self.path = path
        self._share = share
        self._prices = prices
        self.spent = Spent()
        self.failures: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._positions: dict[str, int] = {}
        self._queue: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None

    def __enter__(self) -> ReplyStore:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what cannot be written must not wait for the next write, or for the end.
        self._file = open(self.path, "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RefineFastError(
                f"{self.path}: another process is writing to this file; wait for it, or give "
                "another --out."
            ) from None
        self._load()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self) -> None:
        position = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._file.truncate(position)
                    break
                try:
                    self._enter(json.loads(line), position)
                except (ValueError, KeyError, TypeError):
                    raise RefineFastError(
                        f"{self.path}:{number} is damaged; delete the line, and its reply is "
                        "requested again."
                    ) from None
                position += len(line)
        self._end = position

    def _enter(self, record: dict[str, Any], position: int) -> None:
        key = record["key"]
        if "error" in record:
            self.failures[key] = record["error"]
        else:
            self._positions[key] = position
            self.failures.pop(key, None)
        self.spent.calls += record["calls"]
        self.spent.tokens_in += record.get("tokens_in", 0)
        self.spent.tokens_out += record.get("tokens_out", 0)
        self.spent.cost += record.get("cost") or self._cost(record)

    def _cost(self, record: dict[str, Any]) -> float:
        tokens = record.get("tokens_in", 0), record.get("tokens_out", 0)
        at_full_price = sum(n * price for n, price in zip(tokens, self._prices, strict=True)) / 1e6
        return float(at_full_price * record.get("share", self._share))

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def lacks(self, key: str) -> bool:
        """Whether a request has neither a reply nor failed since the file was opened."""
        return key not in self._positions and key not in self._given_up

    def __len__(self) -> int:
        return len(self._positions)

    def replies(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        """The records of these keys, in their order; keys without a reply are left out."""
        with open(self.path, "rb") as file:
            for key in keys:
                if key in self._positions:
                    file.seek(self._positions[key])
                    yield json.loads(file.readline())

    async def append(self, record: dict[str, Any], *, share: float = 1.0) -> None:
        """Writes a record, and returns when it is durable.

        Args:
            record: a reply or a failure.
            share: the part of the price that its tokens cost.

        Raises:
            RefineFastError: if it cannot be written.
        """
        record = record | {"share": share}
        if cost := self._cost(record):
            record = record | {"cost": cost}
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((record, durable))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await asyncio.shield(durable)

    async def _flush(self) -> None:
        while self._queue:
            batch, self._queue = self._queue, []
            lines = [
                json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                for record, _ in batch
            ]
            try:
                await asyncio.to_thread(self._write, b"".join(lines))
            except OSError as error:
                failure = RefineFastError(
                    f"{self.path}: a reply cannot be written ({error.strerror}); free disk space "
                    "and run the same command again."
                )
                for _, durable in batch:
                    if not durable.cancelled():
                        durable.set_exception(failure)
                continue
            for (record, durable), line in zip(batch, lines, strict=True):
                self._enter(record, self._end)
                self._end += len(line)
                if is_failure(record):
                    self._given_up.add(record["key"])
                if not durable.cancelled():
                    durable.set_result(None)

    def _write(self, data: bytes) -> None:
        try:
            while data:  # a disk may have room for a part
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)  # later lines must not follow half a one
            raise

    async def drain(self) -> None:
        """Waits until everything is written."""
        if self._flusher is not None:
            await self._flusher


def is_failure(record: Mapping[str, Any]) -> bool:
    """Whether the request of a record failed; one that a limit left out did not."""
    return "error" in record and "limit" not in record
