"""How much memory training takes, and how many sequences of it fit into a budget."""

from __future__ import annotations

import ctypes
import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RefineFastError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .config import RunConfig

MINI_BATCH = 8
"""Sequences that training encodes at a time where no budget is given. MiniLM-L6 on SQuAD, batch 64, two CPU cores: a step takes 1.07 times
as long as with 16."""

PROCESS = 900 << 20
"""Python, torch, transformers and the data (650 MiB), and malloc's holes between tensors that pass."""

HOLES = 1.35
"""What mini-batches of one size after the other occupy over what the backward keeps, with glibc's malloc.

Measured of planned, MiB, gradients cached, one thread. Sequences of the greatest length: MiniLM-L6 in fp32, 8 at a time, 1,448 of 1,635;
32, 2,645 of 2,802; in bf16, 24, 1,894 of 2,019; 48, 2,671 of 2,748. BERT-base in fp32, 2, 2,786 of 2,959; 4, 3,095 of 3,348; in bf16, 8,
3,657 of 3,751; 16, 4,499 of 4,723. MiniLM-L6 on SQuAD, batch 64, in bf16, 8, 1,360 of 1,533."""


def return_free_memory() -> None:
    """Gives the free pages of malloc back to the system: steps of other lengths leave holes that nothing else fits into. Linux with glibc;
    elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def training_bytes(model: SentenceTransformer, mini_batch: int, *, bf16: bool) -> int:
    """The peak of a training that encodes ``mini_batch`` sequences of the greatest length at a time."""
    parameters = sum(p.numel() for p in model.parameters())
    # weights, gradients and Adam's two moments in float32; autocast's copies of the weights
    return PROCESS + (16 + 2 * bf16) * parameters + int(HOLES * mini_batch * activation_bytes(model, bf16=bf16))


def activation_bytes(model: SentenceTransformer, *, bf16: bool) -> int:
    """What the backward keeps of one sequence of the greatest length. By layer and token (Korthikanti et al. 2022, arXiv 2205.05198,
    section 4.1, without dropout, and with attention that keeps no scores): the inputs of two layer norms, in float32; the inputs of the
    four products, q, k, v and both sides of the feed-forward's activation, as wide as the products are: ``2 h * 4 + (6 h + 2 i) * width``
    bytes for hidden size h and intermediate size i. Autocast narrows the input of q, k and v for each of them: another 2 h in bf16."""
    transformer: Any = model[0]
    config = transformer.auto_model.config
    h = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * h
    width = 2 if bf16 else 4
    return int(model.max_seq_length * config.num_hidden_layers * (2 * h * 4 + ((6 + 2 * bf16) * h + 2 * intermediate) * width))


class Fit(NamedTuple):
    """How many sequences training encodes at a time, and what it takes."""

    at_once: int
    cached: bool
    """Whether those are fewer than a batch has, so that gradients are cached."""
    peak: int
    """Bytes."""


def fit_training(config: RunConfig, model: SentenceTransformer, examples: int, *, bf16: bool) -> Fit:
    """As many sequences at a time as stay under ``config.memory`` bytes, the whole batch where it does."""
    sequences = min(config.batch_size, max(examples, 1)) * (2 + config.negatives)
    fits = MINI_BATCH
    if config.memory is not None:
        fits = int((config.memory - training_bytes(model, 0, bf16=bf16)) / (HOLES * activation_bytes(model, bf16=bf16)))
        if fits < 1:
            least = f"{math.ceil(training_bytes(model, 1, bf16=bf16) / 2**30 * 10) / 10:.1f}GB"
            raise RefineFastError(f"memory: {config.memory / 2**30:.1f} GB is too little for this encoder; give at least {least}.")
    at_once = min(fits, sequences)
    return Fit(at_once, at_once < sequences, training_bytes(model, at_once, bf16=bf16))
