"""Loads the tuned encoder beside its frozen base as one encoder (fusion of embeddings)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...integrations.sentence_transformers.twin import TwinEncoder
from .load import device, load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_twin(
    tuned: Path, frozen: Path, weight: float, *, trust_remote_code: bool = False
) -> SentenceTransformer:
    """Loads the encoder ``normalize(weight * e_tuned + (1 - weight) * e_frozen)``.

    Args:
        tuned: folder of the fine-tuned encoder.
        frozen: folder of its base.
        weight: share of the tuned embeddings.
        trust_remote_code: whether to run Python code that the folders bring.
    """
    tuned_model, frozen_model = (
        load_encoder(folder, trust_remote_code=trust_remote_code) for folder in (tuned, frozen)
    )
    pair = TwinEncoder(tuned_model, frozen_model, weight)
    return pair.model(device().type)
