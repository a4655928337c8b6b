"""The encoders that an index was made with, loaded when they are first needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..encoder.encode import encode
from ..encoder.load import load_encoder
from ..progress import Progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Side = Literal["product", "base"]

LABELS: dict[Side, str] = {"product": "the product encoder", "base": "the base encoder"}
"""Names of their digests in what an index is made from."""


@dataclass(frozen=True)
class Encoders:
    """The product of a run, and the base encoder where the product is another."""

    folders: dict[Side, Path]
    """"product"; "base" unless the product is the base."""
    bf16: bool | None = None
    """As for ``encode``."""
    trust_remote_code: bool = False
    _loaded: dict[Side, SentenceTransformer] = field(default_factory=dict)

    def _model(self, side: Side) -> SentenceTransformer:
        if side not in self._loaded:
            self._loaded[side] = load_encoder(
                self.folders[side], trust_remote_code=self.trust_remote_code
            )
        return self._loaded[side]

    def queries(self, side: Side, texts: Sequence[str]) -> np.ndarray:
        """(Q, d) float32 vectors of queries."""
        return encode(self._model(side), list(texts), role="query", bf16=self.bf16)

    def documents(
        self,
        side: Side,
        texts: Sequence[str],
        *,
        out: Path | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(n, d) float32 vectors of documents, written to the .npy file ``out`` if it is given."""
        return encode(
            self._model(side),
            list(texts),
            role="document",
            bf16=self.bf16,
            out=out,
            progress=progress,
        )
