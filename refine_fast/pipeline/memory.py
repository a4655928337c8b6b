"""How many sequences of training fit into a memory budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import RefineFastError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINI_BATCH = 8
"""Sequences that training encodes at a time where no budget is given. MiniLM-L6 on SQuAD, batch 64, two CPU cores: a step takes 1.07 times
as long as with 16, where the whole process peaks at 4.4 GB."""

PROCESS = 1 << 30
"""Python, torch, transformers and the data, before any model."""


def training_bytes(model: SentenceTransformer) -> int:
    """Weights, gradients and Adam's two moments, in float32."""
    return 4 * 4 * sum(p.numel() for p in model.parameters())


def activation_bytes(model: SentenceTransformer) -> int:
    """Of one sequence of the greatest length, kept for the backward: ``layers * s * h * (34 + 5 * heads * s / h)`` values' worth of 16
    bits, here float32 (Korthikanti et al. 2022, arXiv 2205.05198, equation 2). An upper bound: bf16 and fused attention keep less."""
    transformer: Any = model[0]
    config = transformer.auto_model.config
    s, h = model.max_seq_length, config.hidden_size
    return int(2 * config.num_hidden_layers * s * h * (34 + 5 * config.num_attention_heads * s / h))


def mini_batch_for(budget: int | None, model: SentenceTransformer, sequences: int) -> int | None:
    """Sequences to encode at a time so that training stays under ``budget`` bytes; None where all ``sequences`` of a batch fit at once, so
    that no gradient caching is needed."""
    if budget is None:
        return MINI_BATCH if sequences > MINI_BATCH else None
    fixed, each = PROCESS + training_bytes(model), activation_bytes(model)
    fits = (budget - fixed) // each
    if fits < 1:
        least = f"{(fixed + each) / 2**30:.1f}GB"
        raise RefineFastError(f"memory: {budget / 2**30:.1f} GB is too little for this encoder; give at least {least}.")
    return None if fits >= sequences else int(fits)
