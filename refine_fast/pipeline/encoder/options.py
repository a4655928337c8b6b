"""What a user may set of an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EncoderOptions:
    """Settings that ``prepare_encoder`` writes into the encoder; None: the encoder's own."""

    query_prompt: str | None = None
    """Text before every query; empty: none."""
    document_prompt: str | None = None
    """Text before every document; empty: none."""
    similarity: Literal["cosine", "dot"] | None = None
    dimensions: int | None = None
    """Number of leading dimensions of the embeddings that are used (Matryoshka)."""
    trust_remote_code: bool = False
    """Whether Python code in the encoder's folder may run."""
