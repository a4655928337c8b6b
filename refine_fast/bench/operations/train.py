"""train: one step of MiniLM on a batch far larger than what the encoder takes at a time, by
gradient caching (Gao et al., arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..operation import DTYPES, Contender, Operation, Shape, Work
from .encode import forward_flops, load_model, texts_of, watched

TEMPERATURE = 0.05


@dataclass
class Step:
    """The inputs of one step."""

    model: Any
    queries: list[str]
    passages: list[str]
    mini_batch: int
    dtype: str


@contextmanager
def inputs(shape: Shape, dtype: str, device: str) -> Iterator[Step]:
    """The model without dropout, so that every contender has the same gradients, and B pairs."""
    model = load_model(device, int(shape["layers"])).eval()
    B, tokens = int(shape["B"]), int(shape["tokens"])
    texts = texts_of(2 * B, tokens)
    yield Step(model, texts[:B], texts[B:], int(shape["mini_batch"]), dtype)


def step(inputs: Step, loss: Any) -> list[torch.Tensor]:
    """The loss, and the gradient of the first layer; all gradients are dropped afterwards."""
    model = inputs.model
    features = [
        {
            k: v.to(model.device) if torch.is_tensor(v) else v
            for k, v in model.preprocess(side).items()
        }
        for side in (inputs.queries, inputs.passages)
    ]
    enabled = inputs.dtype != "fp32"
    with torch.autocast(model.device.type, DTYPES[inputs.dtype], enabled=enabled):
        value = loss(features, None)
        value.backward()
    weights = dict(model.named_parameters())
    name = next(name for name in weights if name.endswith("layer.0.output.dense.weight"))
    gradient = weights[name].grad.clone()
    model.zero_grad(set_to_none=True)
    return [value.detach(), gradient]


def ours(inputs: Step) -> list[torch.Tensor]:
    """CachedFusedMultipleNegativesRankingLoss."""
    from refine_fast.integrations.sentence_transformers import (
        CachedFusedMultipleNegativesRankingLoss as Loss,
    )

    loss = Loss(inputs.model, scale=1 / TEMPERATURE, mini_batch_size=inputs.mini_batch)
    return step(inputs, loss)


def cached(inputs: Step) -> list[torch.Tensor]:
    """sentence-transformers' cached loss."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss as Loss,
    )

    loss = Loss(inputs.model, scale=1 / TEMPERATURE, mini_batch_size=inputs.mini_batch)
    return step(inputs, loss)


def plain(inputs: Step) -> list[torch.Tensor]:
    """sentence-transformers' loss with the whole batch in memory."""
    from sentence_transformers.sentence_transformer.losses import (
        MultipleNegativesRankingLoss as Loss,
    )

    return step(inputs, Loss(inputs.model, scale=1 / TEMPERATURE))


def work(shape: Shape, dtype: str) -> Work:
    """Forward and backward of the encoder, three forward passes' worth; caching adds a fourth."""
    B, tokens, layers = (int(shape[name]) for name in ("B", "tokens", "layers"))
    return Work(3 * forward_flops(2 * B, tokens, layers))


OPERATIONS = (
    Operation(
        "train",
        "cached step",
        shape={"B": 512, "tokens": 64, "mini_batch": 32, "layers": 6},
        quick={"B": 16, "tokens": 16, "mini_batch": 8},
        tiny={"B": 4, "tokens": 8, "mini_batch": 2, "layers": 2},
        full=({"B": 2048, "mini_batch": 8}, {"layers": 3}, {"layers": 12}),
        rounds=3,
        dtypes=("fp32", "bf16"),
        contenders=(
            Contender("refine_fast", ours, "CachedFusedMultipleNegativesRankingLoss"),
            Contender("sentence-transformers cached", cached, "CachedMultipleNegativesRankingLoss"),
            Contender("sentence-transformers", plain, "the whole batch in memory", slow=True),
        ),
        peer="sentence-transformers cached",
        inputs=inputs,
        work=work,
        needs="sentence-transformers",
        watched=watched,
    ),
)
