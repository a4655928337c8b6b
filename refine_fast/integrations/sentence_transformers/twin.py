"""A fine-tuned encoder beside its frozen original: REFINE's fusion (arXiv 2410.12890) read as a
fusion of embeddings, not of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...imports import uncollected

with uncollected():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule


def fuse_embeddings(tuned: Tensor, frozen: Tensor, weight: float) -> Tensor:
    """``normalize(weight * normalize(tuned) + (1 - weight) * normalize(frozen))``, row by row;
    both are (n, d). Both are scaled to unit length, so that ``weight`` means the same under every
    encoder."""
    mixed = weight * normalize(tuned, dim=-1) + (1 - weight) * normalize(frozen, dim=-1)
    return normalize(mixed, dim=-1)


class TwinEncoder(InputModule):
    """Two encoders as one module: ``fuse_embeddings(tuned(text), frozen(text), weight)``, at twice
    the cost.

    The frozen encoder stays in evaluation mode and keeps no graph; the tuned one trains under any
    loss, which sees the fused embedding::

        base = SentenceTransformer("base")
        model = TwinEncoder(base, SentenceTransformer("base"), weight=0.35).model()
        model.save_pretrained("twin")  # twin/tuned and twin/frozen: two complete models
        # trust_remote_code: for every class that is not sentence-transformers' own
        model = SentenceTransformer("twin", trust_remote_code=True)

    Args:
        tuned: the encoder to train.
        frozen: the original; must have the same vocabulary, since both read the same tokens.
        weight: the share of the tuned embedding, 0 to 1; may be changed later.

    Raises:
        ValueError: a weight out of range, two vocabularies, or encoders that share parameters.
    """

    config_file_name = "twin_config.json"
    config_keys = ["weight"]  # noqa: RUF012 - as the parent declares it

    def __init__(
        self, tuned: SentenceTransformer, frozen: SentenceTransformer, weight: float = 0.35
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be from 0 to 1 (got {weight})")
        if tuned.tokenizer.get_vocab() != frozen.tokenizer.get_vocab():
            raise ValueError(
                "tuned and frozen have different vocabularies; they must read the same tokens"
            )
        if not {*tuned.parameters()}.isdisjoint(frozen.parameters()):
            raise ValueError(
                "tuned and frozen share parameters, so that nothing would be trained; load the"
                " model twice"
            )
        self.tuned, self.frozen, self.weight = tuned, frozen.requires_grad_(False).eval(), weight

    def model(self, device: str | None = None) -> SentenceTransformer:
        """This module as a model, with the tuned model's prompts and similarity."""
        tuned = self.tuned
        return SentenceTransformer(
            modules=[self],
            device=device,
            prompts=tuned.prompts,  # type: ignore[arg-type]
            default_prompt_name=tuned.default_prompt_name,
            similarity_fn_name=tuned.similarity_fn_name,
        )

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds the fused ``sentence_embedding`` to the tokenized features."""
        with torch.no_grad():
            frozen = self.frozen(dict(features))["sentence_embedding"]
        tuned = self.tuned(features)["sentence_embedding"]
        used = slice(self.tuned.truncate_dim)
        features["sentence_embedding"] = fuse_embeddings(
            tuned[:, used], frozen[:, used], self.weight
        )
        return features

    def train(self, mode: bool = True) -> TwinEncoder:
        """Sets the mode of the tuned encoder; the frozen one stays in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokenizes as the tuned encoder does."""
        return self.tuned.preprocess(inputs, prompt=prompt, **kwargs)

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The tuned encoder's tokenizer."""
        return self.tuned.tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """The most tokens of a text, as the tuned encoder has it."""
        return self.tuned.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        # the tuned encoder's tokenizer truncates for both
        self.tuned.max_seq_length = value

    def get_embedding_dimension(self) -> int | None:
        """The width of the embeddings."""
        return self.tuned.get_embedding_dimension()

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Saves both encoders as complete models, and the weight."""
        for name, encoder in (("tuned", self.tuned), ("frozen", self.frozen)):
            encoder.save_pretrained(
                str(Path(output_path, name)),
                create_model_card=False,
                safe_serialization=safe_serialization,
            )
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> TwinEncoder:  # type: ignore[override]
        """Loads what ``save`` wrote. kwargs: as for ``SentenceTransformer``."""
        place = {
            name: kwargs.pop(name)
            for name in ("token", "cache_folder", "revision", "local_files_only")
            if name in kwargs
        }
        config = cls.load_config(model_name_or_path, subfolder=subfolder, **place)

        def encoder(name: str) -> SentenceTransformer:
            folder = cls.load_dir_path(
                model_name_or_path, subfolder=Path(subfolder, name).as_posix(), **place
            )
            # the caller moves the complete model
            return SentenceTransformer(folder, device="cpu", local_files_only=True, **kwargs)

        return cls(encoder("tuned"), encoder("frozen"), **config)
