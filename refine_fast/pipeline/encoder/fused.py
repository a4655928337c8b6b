"""The encoder at a fusion weight, for scores: what loading the product of ``fuse`` gives."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import RefineFastError
from ...fuse import fuse, fuse_into
from ...fuse.into import check_fuse_into
from .load import load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_fused(
    base: Path,
    tuned: Path,
    weight: float,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = torch.float32,
) -> SentenceTransformer:
    """Loads the encoder ``base + weight * (tuned - base)``, every value rounded to the base's type.

    Nothing is written, except for architectures whose files hold other tensors than the loaded
    model, such as a joint matrix for queries, keys and values: these pass through a temporary
    folder.

    Args:
        base: folder of the base, as ``prepare_encoder`` returned it.
        tuned: folder of the fine-tuned encoder.
        weight: share of the fine-tuned encoder; 0 loads the base.
        trust_remote_code: whether to run Python code that the folders bring.
        dtype: of the parameters, as in ``load_encoder``; the values are the same.

    Raises:
        RefineFastError: if the two do not fit together.
    """
    model = load_encoder(base, trust_remote_code=trust_remote_code, dtype=dtype)
    if weight == 0:
        return model
    try:
        check_fuse_into(model, base)
    except RefineFastError:
        with tempfile.TemporaryDirectory() as temporary:
            product = Path(temporary) / "model"
            fuse(base, tuned, product, weight)
            return load_encoder(product, trust_remote_code=trust_remote_code, dtype=dtype)
    fuse_into(model, tuned, weight, base=base)
    return model
