"""How much memory training takes, and how many sequences of it fit into a budget."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...errors import RefineFastError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


MINI_BATCH = 8
"""Sequences that training encodes at a time where no budget is given. MiniLM-L6 on SQuAD, batch 64, two CPU cores: a step takes 1.07 times
as long as with 16."""


PROCESS = 900 << 20
"""Python, torch, transformers and the data (650 MiB), and malloc's holes between tensors that pass."""


FRAGMENTATION = 1.5
"""What mini-batches of one size after the other occupy over what the backward keeps, with glibc's malloc.

Gradients cached, one thread, encoders of 6 layers and width 384 that read 256 tokens (MiniLM) or 512, measured of planned in MiB. With 1.4:
MiniLM in fp32, 15 at a time, 2,012 of 2,017, in bf16, 23 at a time, 2,032 of 2,028; MPNet, whose attention keeps its scores, 9,
1,825 of 1,930. With 1.3 MPNet took 2,075 of 1,951, BERT 1,885 of 1,960, ModernBERT 1,630 of 1,649 and in bf16 1,667 of 1,695."""


WHOLE_BATCH_OVERHEAD = 1.1
"""The same where a whole batch is encoded at once: 6,267 of 7,130 MiB (MiniLM in fp32, 64 queries and 128 documents at a time;
benchmarks/bench_memory.py)."""


def return_free_memory() -> None:
    """Gives the free pages of malloc back to the system: steps of other lengths leave holes that nothing else fits into. Linux with glibc;
    elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def activation_bytes(model: SentenceTransformer, text: str, *, bf16: bool) -> int:
    """What the backward keeps of ``text``, by torch's own account: of two of them less of one, which leaves the copies of weights out."""

    def kept(sequences: int) -> int:
        storages: dict[
            int, torch.UntypedStorage
        ] = {}  # a tensor's neighbours share its storage; alive, no two have one address

        def keep(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        device = model.device
        batch = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in model.preprocess([text] * sequences).items()
        }
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        ):
            model(batch)
        return sum(storage.nbytes() for storage in storages.values())

    model.eval()  # as in training
    return kept(2) - kept(1)


class Fit(NamedTuple):
    """How many sequences training encodes at a time, and what it takes."""

    at_once: int
    cached: bool
    """Whether a batch is more than that, so that gradients are cached."""
    peak: int
    """Bytes."""


def fit_training(
    model: SentenceTransformer,
    queries: Iterable[str],
    passages: Iterable[str],
    examples: int,
    *,
    batch_size: int,
    negatives: int,
    memory: int | None,
    bf16: bool,
) -> Fit:
    """The whole batch at once where it stays under ``memory`` bytes, else as many sequences at a
    time as do, each as long as the longest to train on.

    Args:
        model: the encoder to train.
        queries: texts of the training queries.
        passages: texts of the passages.
        examples: number of training examples.
        batch_size: queries in a batch.
        negatives: hard negatives of each query.
        memory: bytes that training may take; None: ``MINI_BATCH`` sequences at a time.
        bf16: whether the forward pass runs in bf16.

    Raises:
        RefineFastError: if ``memory`` is too little for a single sequence.
    """
    batch = min(batch_size, max(examples, 1))
    documents = batch * (1 + negatives)
    # weights, gradients and Adam's two moments in float32; autocast's copies of the weights
    fixed = PROCESS + (16 + 2 * bf16) * sum(p.numel() for p in model.parameters())
    query, passage = (
        activation_bytes(model, max(texts, key=len, default=""), bf16=bf16)
        for texts in (queries, passages)
    )
    whole = fixed + WHOLE_BATCH_OVERHEAD * (batch * query + documents * passage)
    each = FRAGMENTATION * max(query, passage)
    fits = MINI_BATCH if memory is None else int((memory - fixed) / each)
    if memory is not None and fits < 1:
        least = f"{math.ceil((fixed + each) / 2**30 * 10) / 10:.1f}GB"
        raise RefineFastError(
            f"memory: {memory / 2**30:.1f} GB is too little for this encoder; give at least {least}."
        )
    if fits >= batch + documents or (memory is not None and memory >= whole):
        return Fit(batch + documents, False, int(whole))
    at_once = min(fits, documents)  # of either side: more would change nothing
    return Fit(at_once, True, int(fixed + at_once * each))
