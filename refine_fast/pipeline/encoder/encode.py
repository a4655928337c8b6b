"""Texts to unit vectors. sentence-transformers does the work; this decides the order, the precision and where the result goes."""

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


BATCHES_PER_BLOCK = 16
"""sentence-transformers gets this many batches at a time: progress and Ctrl-C stay lively, and only one block of vectors is held twice."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there: AVX512_BF16 or AMX on a CPU, compute capability 8.0 on CUDA."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not {"avx512_bf16", "amx"}.isdisjoint(available_isas())


def prompt_name(model: SentenceTransformer, role: Literal["query", "document"]) -> str | None:
    """The name of the model's own prompt: "query"; or the first of "document", "passage", "corpus" that is not empty. None if it has none.

    ``encode_document`` alone would take the empty "document" that every model is given by default, and so pass over a "passage" prompt.
    """
    names = ("query",) if role == "query" else ("document", "passage", "corpus")
    return next((name for name in names if model.prompts.get(name)), None)


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    role: Literal["query", "document"],
    batch_size: int = 32,
    bf16: bool | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The rows ``x / |x|`` for ``x = model.encode(prompt(role) + text)``: (n, d) float32, in the order of ``texts``.

    The prompt is that of ``prompt_name``. ``bf16`` runs the forward pass under bf16 autocast; by default where the hardware has bf16
    products (MiniLM-L6 on SQuAD passages: cosine to float32 at least .99997). With ``out``, the rows go to that .npy file, which appears
    when it is complete, and a read-only memmap of it is returned: a corpus of any size takes one block of memory.
    """
    bf16 = has_fast_bf16(model.device) if bf16 is None else bf16
    encode_role: Callable[..., Any] = partial(
        model.encode_query if role == "query" else model.encode_document,
        prompt_name=prompt_name(model, role),
        batch_size=batch_size,
        show_progress_bar=False,
        convert_to_tensor=True,
    )
    dimension = encode_role([""]).shape[1]  # the model may not state it
    rows = _Rows(len(texts), dimension, out)
    # Longest first: a batch holds texts of one length, so little is spent on padding, and memory that is too small shows at once.
    order = np.argsort([-len(text) for text in texts], kind="stable")
    block = batch_size * BATCHES_PER_BLOCK
    with rows, torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(texts), block):
            chosen = order[start : start + block]
            vectors: torch.Tensor = encode_role([texts[i] for i in chosen])
            rows.values[chosen] = (
                torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
            )
            if progress is not None:
                progress(min(start + block, len(texts)), len(texts))
    return rows.values


class _Rows:
    """An (n, d) float32 array in memory, or in a file that takes its name once every row is written and on the disk."""

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
