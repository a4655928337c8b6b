"""Generation in this process with transformers: no server, no key.

Requests that wait together become one left-padded batch.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from jinja2 import TemplateError

from ....errors import RefineFastError
from .request import Failure, Reply, Request


class LocalBackend:
    """One model at a time, loaded with the first request that names it.

    Args:
        batch: prompts that are generated together.
    """

    def __init__(self, *, batch: int = 16) -> None:
        self._batch = batch
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._loaded: tuple[str, Any, Any] | None = None
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
        """Stops generation and waits for it."""
        self._stop.set()
        if self._worker is not None:
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while self._waiting and not self._stop.is_set():
            await asyncio.sleep(0)  # lets the other requests of this moment join
            first = self._waiting[0][0]
            same = [
                item
                for item in self._waiting
                if (item[0].model, item[0].temperature) == (first.model, first.temperature)
            ]
            same = same[: self._batch]
            self._waiting = [item for item in self._waiting if item not in same]
            requests = [request for request, _ in same]
            try:
                replies: list[Reply | Exception] = list(
                    await asyncio.to_thread(self._generate, requests)
                )
            # Out of memory, or a prompt beyond the model's positions.
            except (RuntimeError, ValueError) as error:
                said = " ".join(str(error).split())[:300]
                replies = [Failure("wrong", f"generation failed: {said}")] * len(same)
            except Exception as error:  # whoever waits must hear of it, or would wait for ever
                replies = [error] * len(same)
            for (_, future), reply in zip(same, replies, strict=True):
                if future.done():
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)

    def _load(self, name: str) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            device = "cuda" if torch.cuda.is_available() else "cpu"
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
                model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
                model = model.to(device).eval()
            except (OSError, ValueError) as error:
                why = " ".join(str(error).split())[:200]
                raise RefineFastError(
                    f"llm_model: {name} cannot be loaded ({why}); give a folder or the name of a "
                    "model on the hub."
                ) from None
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._loaded = (name, tokenizer, model)
        return self._loaded[1:]

    def _generate(self, requests: list[Request]) -> list[Reply]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        stop = self._stop

        class Stopped(StoppingCriteria):
            """Ctrl-C does not wait for the end of a batch."""

            def __call__(
                self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
            ) -> torch.Tensor:
                return torch.full(
                    (len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device
                )

        tokenizer, model = self._load(requests[0].model)
        prompts = [_prompt(tokenizer, request) for request in requests]
        inputs = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=not tokenizer.chat_template,
        ).to(model.device)
        temperature = requests[0].temperature
        sampling: dict[str, Any] = {}
        if temperature is not None:
            sampling = (
                {"do_sample": True, "temperature": temperature}
                if temperature
                else {"do_sample": False}
            )
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max(r.max_tokens for r in requests),
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([Stopped()]),
                **sampling,
            )
        end = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *([end] if isinstance(end, int) else end or ())}
        masks = inputs["attention_mask"].tolist()
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_reply(tokenizer, *item, ends) for item in zip(requests, masks, rows, strict=True)]


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


def _reply(
    tokenizer: Any, request: Request, mask: list[int], row: list[int], ends: set[int]
) -> Reply:
    end = next((i for i, token in enumerate(row) if token in ends), None)
    tokens = row[: request.max_tokens] if end is None else row[: min(end, request.max_tokens)]
    finish = "length" if end is None or end > request.max_tokens else "stop"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Reply(text, finish, sum(mask), len(tokens))
