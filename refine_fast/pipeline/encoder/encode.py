"""Texts to embeddings: sentence-transformers does the work; this module decides the order, the
precision and where the result goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..._native import available_isas
from ..progress import Progress
from ..reserve import reserve, save_rows
from ..workers import Spread, Work

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Role = Literal["query", "document"]

BATCHES_PER_BLOCK = 16
"""Batches that sentence-transformers gets at a time: progress and Ctrl-C stay responsive, and only
one block of embeddings is held twice."""
BLOCKS_PER_SHARD = 8
"""Blocks that a worker of another process gets at a time: 4,096 texts."""


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
    return 1.0 if compares_by_cosine(model) else mean_product_of_lengths(q, d)


def mean_product_of_lengths(q: np.ndarray, d: np.ndarray) -> float:
    """The mean ``|q| * |d|`` over all pairs of rows: 1 for unit rows."""
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
    spread: Spread | None = None,
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
        spread: the workers that encode in shards, with the loader of this model; None: this
            process. A shard is a run of the blocks that one process would encode, so the rows are
            the same bits wherever torch computes alike (version, threads, instruction set).

    Returns:
        (n, d) float32, in the order of ``texts``; a read-only memmap if ``out`` is given. Rows are
        unit vectors unless the model compares by dot product.
    """
    bf16 = has_fast_bf16(model.device) if bf16 is None else bf16
    encode_block = _block_encoder(model, role, batch_size)
    dimension = encode_block(["a"]).shape[1]  # the model may not state it
    rows = _Rows(len(texts), dimension, out)
    # Longest first: a batch holds texts of similar length, so little is spent on padding, and
    # memory that is too small fails at once.
    order = np.argsort([-len(text) for text in texts], kind="stable")
    block = batch_size * BATCHES_PER_BLOCK
    done = 0
    with rows:
        if spread is None:
            parts = _in_blocks(encode_block, texts, order, block, _autocast(model, bf16))
        else:
            parts = _in_shards(spread, texts, order, block, (role, batch_size, bf16))
        for chosen, vectors in parts:
            rows.values[chosen] = vectors
            done += len(chosen)
            if progress is not None:
                progress(done, len(texts))
    return rows.values


def _block_encoder(
    model: SentenceTransformer, role: Role, batch_size: int
) -> Callable[[Sequence[str]], np.ndarray]:
    """Encodes one block of texts; (n, d) float32."""
    encode_role: Callable[..., Any] = partial(
        model.encode_query if role == "query" else model.encode_document,
        prompt=prompt_of(model, role),
        batch_size=batch_size,
        show_progress_bar=False,
        convert_to_tensor=True,
    )

    def encode_block(texts: Sequence[str]) -> np.ndarray:
        vectors: torch.Tensor = encode_role(list(texts)).float()
        if compares_by_cosine(model):
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.cpu().numpy()

    return encode_block


def _autocast(model: SentenceTransformer, bf16: bool) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)


def _in_blocks(
    encode_block: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    order: np.ndarray,
    block: int,
    autocast: torch.autocast,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(which texts, their rows), block by block in this process."""
    for start in range(0, len(order), block):
        chosen = order[start : start + block]
        with autocast:
            vectors = encode_block([texts[i] for i in chosen])
        yield chosen, vectors


def _in_shards(
    spread: Spread,
    texts: Sequence[str],
    order: np.ndarray,
    block: int,
    how: tuple[Role, int, bool],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(which texts, their rows), in shards of whole blocks by the workers."""
    assert spread.load is not None
    size = block * BLOCKS_PER_SHARD

    def chosen(i: int) -> np.ndarray:
        return order[i * size : (i + 1) * size]

    shards = spread.workers.map(
        spread.folder / how[0],
        [spread.name, *how],
        partial(_shard_encoder, spread.load, block, *how),
        -(-len(order) // size),
        lambda i: [texts[j] for j in chosen(i)],
    )
    for i, path in shards:
        yield chosen(i), np.load(path, mmap_mode="r")


def _shard_encoder(
    load: Callable[[], SentenceTransformer], block: int, role: Role, batch_size: int, bf16: bool
) -> Work:
    model = load()
    encode_block = _block_encoder(model, role, batch_size)

    def work(texts: list[str], path: Path) -> None:
        parts = _in_blocks(
            encode_block, texts, np.arange(len(texts)), block, _autocast(model, bf16)
        )
        save_rows(path, np.concatenate([vectors for _, vectors in parts]))

    return work


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
            self.values = self.file = reserve(self.partial, np.float32, (n, d))

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
