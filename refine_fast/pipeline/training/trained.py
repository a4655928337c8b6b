"""Which parameters of an encoder training changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..encoder.adapters import add_lora
from ..encoder.layers import freeze_but_last_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Trained:
    """Every parameter, unless one of these is given."""

    lora: int | None = None
    """Rank of an adapter that is trained instead."""
    last_layers: int | None = None
    """Layers that are trained, counted from the end of the transformer."""

    def choose(self, model: SentenceTransformer) -> list[PeftModel]:
        """Freezes the other parameters of ``model``.

        Returns:
            The adapters, as ``add_lora`` does; none without ``lora``.

        Raises:
            RefineFastError: if the encoder has no such parameters.
        """
        if self.last_layers is not None:
            freeze_but_last_layers(model, self.last_layers)
        return [] if self.lora is None else add_lora(model, self.lora)
