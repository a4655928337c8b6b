"""Vectors that take less room: their first dimensions (Matryoshka), as int8 or as bits.

float32   4 d bytes   the first d numbers, scaled to unit length if the encoder's vectors have it
int8      d bytes     those numbers times ``scale``, rounded; their inner product divided by
                      ``scale ** 2`` is the similarity
binary    d / 8 bytes a bit for each number, 1 above 0, the first in the highest bit
                      (``numpy.packbits``); compared by Hamming distance
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ...errors import RefineFastError

Numbers = Literal["float32", "int8", "binary"]


@dataclass(frozen=True)
class CompactVectors:
    """How vectors are stored."""

    numbers: Numbers
    dimensions: int
    unit: bool
    """Whether they are scaled to unit length after the cut."""
    scale: float = 1.0
    """Of int8: 127 over the largest number of any passage."""

    @classmethod
    def of(
        cls, vectors: np.ndarray, numbers: Numbers, dimensions: int | None, *, unit: bool
    ) -> CompactVectors:
        """Fitted to the vectors of the passages.

        Args:
            vectors: (n, d) float32.
            numbers: how each is stored.
            dimensions: how many are kept; None: all.
            unit: whether the encoder's vectors have unit length.

        Raises:
            RefineFastError: more dimensions than there are, or bits that fill no bytes.
        """
        d = vectors.shape[1]
        kept = d if dimensions is None else dimensions
        if kept > d:
            raise RefineFastError(f"--dims: {kept} is more than the vectors' {d}; give fewer.")
        if numbers == "binary" and kept % 8:
            whole_bytes = max(8, kept - kept % 8)
            remedy = f"add --dims {whole_bytes}" if whole_bytes <= d else "give --vectors int8"
            raise RefineFastError(
                f"--dims: binary vectors need a multiple of 8 dimensions (got {kept}); {remedy}."
            )
        whole = cls(numbers, kept, unit)
        if numbers != "int8":
            return whole
        return cls(numbers, kept, unit, 127 / float(np.abs(whole.cut(vectors)).max()))

    def cut(self, vectors: np.ndarray) -> np.ndarray:
        """(n, dimensions) float32."""
        kept = vectors[:, : self.dimensions]
        if not self.unit:
            return kept
        return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)

    def stored(self, vectors: np.ndarray) -> np.ndarray:
        """What is written of (n, d) float32 vectors: float32, int8, or uint8 of 8 bits each."""
        kept = self.cut(vectors)
        if self.numbers == "int8":
            return np.clip(np.rint(kept * self.scale), -127, 127).astype(np.int8)
        return np.packbits(kept > 0, axis=1) if self.numbers == "binary" else kept

    def compared(self, vectors: np.ndarray) -> np.ndarray:
        """Float32 vectors whose inner products rank as the stored ones do. Of bits they are signs:
        the inner product is the number of dimensions minus twice the Hamming distance."""
        if self.numbers == "binary":
            return np.where(self.cut(vectors) > 0, np.float32(1), np.float32(-1))
        return self.stored(vectors).astype(np.float32)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
