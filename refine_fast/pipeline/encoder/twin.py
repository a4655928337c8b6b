"""Loads the tuned encoder beside its frozen base as one encoder (fusion of embeddings)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...integrations.sentence_transformers.twin import TwinEncoder
from .fused import load_fused
from .load import device, load_encoder
from .prepare import CODE, copy_missing

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_twin(
    tuned: Path,
    frozen: Path,
    weight: float,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = torch.float32,
) -> SentenceTransformer:
    """Loads the encoder ``normalize(weight * e_tuned + (1 - weight) * e_frozen)``.

    The values of both are in the base's type, in which the product is saved, as those of fused
    weights are.

    Args:
        tuned: folder of the fine-tuned encoder.
        frozen: folder of its base.
        weight: share of the tuned embeddings.
        trust_remote_code: whether to run Python code that the folders bring.
        dtype: of the parameters, as in ``load_encoder``; the values are the same.
    """
    pair = TwinEncoder(
        load_fused(frozen, tuned, 1.0, trust_remote_code=trust_remote_code, dtype=dtype),
        load_encoder(frozen, trust_remote_code=trust_remote_code, dtype=dtype),
        weight,
    )
    return pair.model(device().type)


def save_twin(
    tuned: Path, frozen: Path, weight: float, out: Path, *, trust_remote_code: bool = False
) -> None:
    """Saves the encoder of ``load_twin`` in the base's type, and loads it once.

    Args:
        tuned, frozen, weight, trust_remote_code: as for ``load_twin``.
        out: the folder to write to.

    Raises:
        RefineFastError: if what was saved cannot be loaded.
    """
    pair = load_twin(tuned, frozen, weight, trust_remote_code=trust_remote_code, dtype="auto")
    pair.save_pretrained(str(out), create_model_card=False)
    del pair
    for member in ("tuned", "frozen"):
        copy_missing(frozen, out / member, CODE)
    load_encoder(out, trust_remote_code=trust_remote_code, dtype="auto")
