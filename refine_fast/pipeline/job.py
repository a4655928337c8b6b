"""What a run is about: handed to every stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import RefineFastError
from ..integrations.sentence_transformers.twin import TwinEncoder
from .config import RunConfig, is_beir
from .console import Console


@dataclass(frozen=True)
class Job:
    """One run: what is asked, the encoder's folder, and who is told."""

    config: RunConfig
    encoder: Path
    console: Console

    def __post_init__(self) -> None:
        if (self.encoder / TwinEncoder.config_file_name).is_file():
            raise RefineFastError(f"model: {self.encoder} holds two encoders (fusion embeddings); adapt its folder tuned or frozen.")

    def path(self, name: str) -> Path:
        return self.config.out / name

    @property
    def bf16(self) -> bool | None:
        return {"auto": None, "bf16": True, "fp32": False}[self.config.precision]

    @property
    def judged(self) -> Path | None:
        """The documents' folder, where it comes with judged test queries of its own."""
        return self.config.docs if self.config.docs is not None and is_beir(self.config.docs) else None

    @property
    def own_check(self) -> bool:
        """Whether forgetting is checked on Python's documentation: no set is named, and it is not what is trained on."""
        return self.config.ood is None and self.config.docs is not None

    @property
    def twin(self) -> bool:
        """Whether the frozen encoder stays beside the fine-tuned one, in the loss and in the product."""
        return self.config.fusion == "embeddings"

    @property
    def weights(self) -> list[float]:
        chosen = [] if self.config.weight == "auto" else [float(self.config.weight)]
        return sorted({*self.config.curve, *chosen})
