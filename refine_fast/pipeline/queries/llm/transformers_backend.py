"""Generation in this process with transformers: no server, no key."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError

from ....errors import RefineFastError
from ...encoder.encode import has_fast_bf16
from ...encoder.load import device
from .continuous_batch import ContinuousBatch, Lines, Row, Sampling, unsupported_layers
from .request import Failure, Reply, Request

MAX_ROWS = 32
"""Replies that are written together: more hardly help a CPU."""

_ADMITTED = 8  # prompts that are read between two tokens of the replies


class LocalBackend:
    """One model at a time, loaded with the first request that names it."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._written: dict[Row, tuple[Request, asyncio.Future[Reply]]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._model: _Model | None = None
        self._stop = threading.Event()

    async def complete(self, request: Request) -> Reply:
        """The model's reply.

        Raises:
            Failure: if generation fails.
            RefineFastError: if the model cannot be loaded.
        """
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, reply))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await reply

    async def close(self) -> None:
        """Stops generation after the current token."""
        self._stop.set()
        if self._worker is not None:
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while (self._waiting or self._written) and not self._stop.is_set():
            await asyncio.sleep(0)  # lets the other requests of this moment join
            admitted = self._admitted()
            try:
                ended = await asyncio.to_thread(self._turn, admitted)
            except Exception as error:  # whoever waits must hear of it, or would wait for ever
                for _, future in [*admitted, *self._written.values()]:
                    if not future.done():
                        future.set_exception(_failure(error))
                self._written.clear()
                if self._model is not None:
                    self._model.batch.clear()
                continue
            for future, reply in ended:
                if future.done():
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)

    def _admitted(self) -> list[tuple[Request, asyncio.Future[Reply]]]:
        """Waiting requests to the model that is in use, for which there is room."""
        free = min(_ADMITTED, MAX_ROWS - len(self._written))
        if not self._waiting or not free:
            return []
        in_use = [request.model for request, _ in self._written.values()]
        model = in_use[0] if in_use else self._waiting[0][0].model
        admitted = [item for item in self._waiting if item[0].model == model][:free]
        self._waiting = [item for item in self._waiting if item not in admitted]
        return admitted

    def _turn(
        self, admitted: list[tuple[Request, asyncio.Future[Reply]]]
    ) -> list[tuple[asyncio.Future[Reply], Reply | Exception]]:
        """Reads the prompts of new requests and writes a token of every reply.

        Returns:
            What ended.
        """
        if admitted and (self._model is None or self._model.name != admitted[0][0].model):
            self._model = None  # frees the memory first
            self._model = _Model(admitted[0][0].model)
        model = self._model
        assert model is not None
        ended: list[tuple[asyncio.Future[Reply], Reply | Exception]] = []
        finished: list[Row] = []
        for request, future in admitted:
            if self._stop.is_set():
                break
            row = model.row(request)
            try:
                finished += model.batch.admit(row)
            except (RuntimeError, ValueError, IndexError) as error:
                # Out of memory, or a prompt beyond the model's positions.
                ended.append((future, _failure(error)))
            else:
                self._written[row] = request, future
        if len(model.batch) and not self._stop.is_set():
            finished += model.batch.step()
        for row in finished:
            _, future = self._written.pop(row)
            ended.append((future, model.reply(row)))
        return ended


def check_model(name: str) -> None:
    """Loads the model's configuration and tokenizer, which takes a moment.

    Raises:
        RefineFastError: if they cannot be loaded, or replies cannot be generated with the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = _source(name)
    with _as_user_error(name):
        AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
    _require_supported_layers(name, config)


def _source(name: str) -> str:
    """The folder of a model, or its name on the hub."""
    from .settings import SMOLLM2_MODEL
    from .smollm2 import smollm2_folder

    return str(smollm2_folder()) if name == SMOLLM2_MODEL else name


@contextlib.contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    """Raises RefineFastError with the remedy if the model cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise RefineFastError(
            f"llm_model: {name} cannot be loaded ({why}); give a folder or the name of a "
            "model on the hub."
        ) from None


def _require_supported_layers(name: str, config: Any) -> None:
    if other := unsupported_layers(config):
        raise RefineFastError(
            f"llm_model: {name} has layers of the kind {other}, which cannot be generated with "
            "here; give a model whose layers are attention alone, or serve it (vLLM, Ollama) "
            "and give its URL to --llm."
        )


class _Model:
    """A model, its tokenizer, and the replies that it is writing."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = name
        source = _source(name)
        on = device()
        with _as_user_error(name):
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        _require_supported_layers(name, model.config)
        if on.type == "cpu":
            # Without such hardware, products of 16 bits are many times slower than float32's.
            model = model.to(torch.bfloat16 if has_fast_bf16(on) else torch.float32)
        model = model.to(on).eval()
        self._generation = model.generation_config
        end = self._generation.eos_token_id
        ends = {*([end] if isinstance(end, int) else end or ()), self._tokenizer.eos_token_id}
        self.batch = ContinuousBatch(model, ends - {None})
        marks = {self._ids(mark)[-1] for mark in "？؟" if len(self._ids(mark)) == 1}
        vocabulary = self._tokenizer.get_vocab().items()
        self._question_marks = frozenset(marks | {id for token, id in vocabulary if "?" in token})

    def row(self, request: Request) -> Row:
        """The request as token ids, with what decides its reply."""
        ids = self._tokenizer(
            _prompt(self._tokenizer, request),
            add_special_tokens=not self._tokenizer.chat_template,
        )["input_ids"]
        lines = None
        if request.lines is not None:
            lines = Lines(
                request.lines,
                [self._ids(word)[0] for word in request.starts],
                self._question_marks,
                self._ids("\n")[-1],
            )
        seed = int(hashlib.sha256(request.key.encode()).hexdigest()[:16], 16)
        return Row(ids, self._sampling(request.temperature), seed, request.max_tokens, lines)

    def reply(self, row: Row) -> Reply:
        """What was written."""
        text = str(self._tokenizer.decode(row.tokens, skip_special_tokens=True))
        return Reply(text, str(row.finish), len(row.prompt), len(row.tokens))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _sampling(self, temperature: float | None) -> Sampling:
        """The temperature that was asked for, or the model's own; the rest is the model's own."""
        own = self._generation
        if temperature is None:
            temperature = (own.temperature or 1.0) if own.do_sample else 0.0
        return Sampling(temperature, own.top_k or 50, own.top_p or 1.0)


def _failure(error: Exception) -> Exception:
    if isinstance(error, RuntimeError | ValueError | IndexError):
        return Failure("wrong", f"generation failed: {' '.join(str(error).split())[:300]}")
    return error


def _prompt(tokenizer: Any, request: Request) -> str:
    """The chat template's prompt; plain paragraphs for a model without one."""
    if not tokenizer.chat_template:
        return "\n\n".join([*(message["content"] for message in request.messages), ""])
    options = dict(request.extra.get("chat_template_kwargs", {}))
    options |= {"tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(request.messages, **options)
    except TemplateError:  # Gemma 2 and others have no system role
        return tokenizer.apply_chat_template(request.messages_without_system, **options)
