"""Loads the tuned encoder beside its frozen base as one encoder (fusion of embeddings)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...integrations.sentence_transformers.twin import TwinEncoder
from .load import device, load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_twin(tuned: Path, frozen: Path, weight: float) -> SentenceTransformer:
    """The encoder ``normalize(weight * e_tuned + (1 - weight) * e_frozen)``."""
    pair = TwinEncoder(load_encoder(tuned), load_encoder(frozen), weight)
    return pair.model(device().type)
