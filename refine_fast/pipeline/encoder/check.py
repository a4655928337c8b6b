"""Checks that an encoder can be used from end to end, before anything is spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...errors import RefineFastError
from .encode import encode
from .fused import load_fused
from .load import load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_ROLES: tuple[Literal["query", "document"], ...] = ("query", "document")
_TEXTS = ("Where does the cat sleep?", "Which pump needs oil today?")
"""As many words each: an encoder that reads every word as unknown gives them one embedding."""


def check_encoder(folder: Path, *, trust_remote_code: bool = False) -> SentenceTransformer:
    """Loads the encoder, encodes two texts as queries and as documents, and fuses it with itself.

    Args:
        folder: what ``prepare_encoder`` returned.
        trust_remote_code: whether to run Python code that the folder brings.

    Returns:
        The loaded model.

    Raises:
        RefineFastError: if a step fails; the message says which and why.
    """
    model = load_encoder(folder, trust_remote_code=trust_remote_code)
    widths = {}
    for role in _ROLES:
        try:
            vectors = encode(model, _TEXTS, role=role, bf16=False)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise RefineFastError(
                f"model: {folder} cannot encode a {role} ({type(error).__name__}: {reason}); "
                "check that model.encode works in sentence-transformers."
            ) from error
        if not np.isfinite(vectors).all():
            raise RefineFastError(
                f"model: {folder} encodes a {role} to NaN or infinity; its weights are damaged or "
                "exceed their type; give another copy."
            )
        if np.array_equal(vectors[0], vectors[1]):
            raise RefineFastError(
                f"model: {folder} gives two different texts the same embedding as a {role}; "
                "its tokenizer or its weights are missing; give another copy."
            )
        widths[role] = vectors.shape[1]
    if widths["query"] != widths["document"]:
        raise RefineFastError(
            f"model: {folder} has query embeddings of {widths['query']} and document embeddings of "
            f"{widths['document']} dimensions; they must have the same number."
        )
    fused = load_fused(folder, folder, 0.5, trust_remote_code=trust_remote_code)
    if not np.array_equal(encode(fused, _TEXTS, role="document", bf16=False), vectors):
        raise RefineFastError(
            f"model: {folder} fused with itself is not the same encoder; its files hold other "
            "values than the loaded model; give another copy."
        )
    return model
