"""Texts to embeddings: sentence-transformers does the work; this module decides the order, the
precision and where the result goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..._native import available_isas
from ..progress import Progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Role = Literal["query", "document"]

BATCHES_PER_BLOCK = 16
"""Batches that sentence-transformers gets at a time: progress and Ctrl-C stay responsive, and only
one block of embeddings is held twice."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device runs bf16 matrix products in hardware: AVX512_BF16 or AMX on a CPU,
    compute capability 8.0 on CUDA."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not {"avx512_bf16", "amx"}.isdisjoint(available_isas())


def prompt_of(model: SentenceTransformer, role: Role) -> str | None:
    """The prompt that ``model.encode_query`` or ``model.encode_document`` puts before a text.

    sentence-transformers gives every model the prompts "query" and "document", if only empty ones;
    ``prepare_encoder`` copies a prompt named otherwise there.
    """
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    return next((model.prompts[name] for name in names if name in model.prompts), None)


def compares_by_cosine(model: SentenceTransformer) -> bool:
    """Whether the model's similarity is the cosine; otherwise it is the dot product."""
    return model.similarity_fn_name != "dot"


def unit_of_similarity(model: SentenceTransformer, q: np.ndarray, d: np.ndarray) -> float:
    """What one unit of the band and of the temperature stands for under this model.

    Args:
        model: the encoder.
        q: (Q, d) float32, embeddings of queries.
        d: (N, d) float32, embeddings of documents.

    Returns:
        1 under a cosine; the mean ``|q| * |d|`` under a dot product.
    """
    if compares_by_cosine(model):
        return 1.0
    return float(np.linalg.norm(q, axis=1).mean() * np.linalg.norm(d, axis=1).mean())


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    role: Role,
    batch_size: int = 32,
    bf16: bool | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Encodes texts so that the inner product of two rows is the model's similarity.

    Args:
        model: the encoder. It adds its prompt for the role, takes the role's route, and keeps the
            first ``model.truncate_dim`` dimensions if that is set.
        texts: n texts.
        role: whether the texts are queries or documents.
        batch_size: texts per forward pass.
        bf16: whether the forward pass runs under bf16 autocast; None: if the hardware has bf16
            products. MiniLM-L6 on SQuAD passages: cosine to float32 at least .99997.
        out: a .npy file for the rows. It appears when it is complete, and one block of memory is
            enough for any number of texts.
        progress: called with (encoded texts, n).

    Returns:
        (n, d) float32, in the order of ``texts``; a read-only memmap if ``out`` is given. Rows are
        unit vectors unless the model compares by dot product.
    """
    bf16 = has_fast_bf16(model.device) if bf16 is None else bf16
    encode_role: Callable[..., Any] = partial(
        model.encode_query if role == "query" else model.encode_document,
        prompt=prompt_of(model, role),
        batch_size=batch_size,
        show_progress_bar=False,
        convert_to_tensor=True,
    )
    dimension = encode_role(["a"]).shape[1]  # the model may not state it
    rows = _Rows(len(texts), dimension, out)
    # Longest first: a batch holds texts of similar length, so little is spent on padding, and
    # memory that is too small fails at once.
    order = np.argsort([-len(text) for text in texts], kind="stable")
    block = batch_size * BATCHES_PER_BLOCK
    with rows, torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(texts), block):
            chosen = order[start : start + block]
            vectors: torch.Tensor = encode_role([texts[i] for i in chosen]).float()
            if compares_by_cosine(model):
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            rows.values[chosen] = vectors.cpu().numpy()
            if progress is not None:
                progress(min(start + block, len(texts)), len(texts))
    return rows.values


class _Rows:
    """An (n, d) float32 array in memory, or in a file that gets its name once every row is on the
    disk."""

    def __init__(self, n: int, d: int, out: Path | None) -> None:
        self.out = out
        self.values: np.ndarray
        if out is None:
            self.values = np.empty((n, d), np.float32)
        else:
            self.partial = out.with_name(f".{out.name}.partial")
            self.values = self.file = np.lib.format.open_memmap(
                self.partial, "w+", np.float32, (n, d)
            )

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.out is None:
            return
        if error is not None:
            self.partial.unlink()
            return
        self.file.flush()  # msync: the pages are on the disk before the name is
        os.replace(self.partial, self.out)
        self.values = np.load(self.out, mmap_mode="r")
