"""Generation in this process with transformers: no server, no key. Requests that wait together become one left-padded batch."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from ....errors import RefineFastError
from .request import Failure, Reply, Request


class LocalBackend:
    """``batch``: prompts generated together. One model at a time; it is loaded with the first request that names it."""

    def __init__(self, *, batch: int = 16) -> None:
        self._batch = batch
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._loaded: tuple[str, Any, Any] | None = None
        self._stop = threading.Event()

    async def complete(self, request: Request) -> Reply:
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, reply))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await reply

    async def close(self) -> None:
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
            except (
                RuntimeError,
                ValueError,
            ) as error:  # out of memory, a prompt beyond the model's positions
                replies = [
                    Failure("wrong", f"generation failed: {' '.join(str(error).split())[:300]}")
                ] * len(same)
            except RefineFastError as error:
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
                    f"llm_model: {name} cannot be loaded ({why}); name a folder or a model on the hub."
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
        if tokenizer.chat_template:
            prompts = [
                tokenizer.apply_chat_template(
                    r.messages, tokenize=False, add_generation_prompt=True
                )
                for r in requests
            ]
        else:
            prompts = ["\n\n".join([*(m["content"] for m in r.messages), ""]) for r in requests]
        inputs = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=not tokenizer.chat_template,
        ).to(model.device)
        temperature = requests[0].temperature
        sampling = (
            {"do_sample": True, "temperature": temperature}
            if temperature
            else {"do_sample": False}
            if temperature == 0
            else {}
        )
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max(r.max_tokens for r in requests),
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([Stopped()]),
                **sampling,
            )
        ends = {
            tokenizer.eos_token_id,
            *([end] if isinstance(end := model.generation_config.eos_token_id, int) else end or []),
        }
        masks, rows = (
            inputs["attention_mask"].tolist(),
            output[:, inputs["input_ids"].shape[1] :].tolist(),
        )
        return [
            self._reply(tokenizer, *item, ends) for item in zip(requests, masks, rows, strict=True)
        ]

    def _reply(
        self, tokenizer: Any, request: Request, mask: list[int], row: list[int], ends: set[int]
    ) -> Reply:
        end = next((i for i, token in enumerate(row) if token in ends), None)
        tokens = row[: request.max_tokens] if end is None else row[: min(end, request.max_tokens)]
        finish = "length" if end is None or end > request.max_tokens else "stop"
        return Reply(
            tokenizer.decode(tokens, skip_special_tokens=True), finish, sum(mask), len(tokens)
        )
