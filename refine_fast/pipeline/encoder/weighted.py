"""The encoder at a fusion weight, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .fused import load_fused
from .twin import load_twin

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def encoder_at(
    weight: float, base: Path, tuned: Path, *, twin: bool, trust_remote_code: bool = False
) -> SentenceTransformer:
    """The base at weight 0; at 1 the fine-tuned encoder, of a twin as unit vectors.

    Args:
        weight: share of the fine-tuned encoder.
        base: folder of the base encoder.
        tuned: folder of the fine-tuned encoder; not read at weight 0.
        twin: whether embeddings are fused, not weights.
        trust_remote_code: whether to run Python code in the folders.
    """
    if twin and weight > 0:
        return load_twin(tuned, base, weight, trust_remote_code=trust_remote_code)
    return load_fused(base, tuned, weight, trust_remote_code=trust_remote_code)
