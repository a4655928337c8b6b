"""How well a model retrieves: it encodes a retrieval set and ranks every passage, exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import RefineFastWarning
from ...ops.band_topk import band_topk
from ..corpus.beir import RetrievalSet, load_beir
from ..encoder.encode import encode, has_fast_bf16
from ..encoder.load import device, encoder_folder, load_encoder
from ..encoder.options import EncoderOptions
from ..encoder.prepare import prepare_encoder
from ..progress import Progress
from ..workers import Spread
from .bm25 import score_bm25
from .metrics import DEPTH, METRICS, score_ranking
from .scores import Scores
from .significance import gain

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def rank(
    queries: np.ndarray, docs: np.ndarray, exclude: Sequence[Sequence[int]] | None = None
) -> np.ndarray:
    """The nearest documents of each query by inner product, exactly.

    Equal similarities are ordered by row. trec_eval orders them by document id, so its figures can
    differ where passages tie, such as duplicates.

    Args:
        queries: (Q, d) float32.
        docs: (N, d) float32.
        exclude: Per query, rows of ``docs`` to leave out.

    Returns:
        (Q, 100) int64 rows of ``docs``, best first; -1 beyond the last one.
    """
    everything = (-float("inf"), float("inf"))
    return band_topk(queries, docs, DEPTH, band=everything, skip=0, exclude=exclude).ids.numpy()


def score(
    model: SentenceTransformer,
    sets: Sequence[RetrievalSet],
    *,
    batch_size: int = 32,
    bf16: bool | None = None,
    known: Mapping[str, np.ndarray] | None = None,
    progress: Progress | None = None,
    spread: Spread | None = None,
) -> list[Scores]:
    """Scores a model on retrieval sets. A text that several of them hold is encoded once.

    As in BEIR, a query's own document (the passage with the query's id) is left out of its ranking.

    Args:
        model: Encodes both sides, with its own prompts.
        sets: The sets.
        batch_size: Texts per forward pass.
        bf16: Whether to encode under bf16 autocast; None: where the hardware has bf16 products.
        known: Passages with their embeddings, (d,) float32, which need not be encoded.
        progress: Called with (done, total), in distinct texts that are encoded.
        spread: The workers that encode, as for ``encode``.
    """
    known = known or {}
    passages = dict.fromkeys(text for data in sets for text in data.docs)
    docs = [text for text in passages if text not in known]
    asked = dict.fromkeys(text for data in sets for text in data.queries)
    queries = {text: row for row, text in enumerate(asked)}
    total = len(docs) + len(queries)
    in_docs = progress and (lambda done, _: progress(done, total))
    in_queries = progress and (lambda done, _: progress(len(docs) + done, total))
    how: dict[str, Any] = {"batch_size": batch_size, "bf16": bf16, "spread": spread}
    d = encode(model, docs, role="document", progress=in_docs, **how)
    vectors = {**known, **dict(zip(docs, d, strict=True))}
    q = encode(model, list(queries), role="query", progress=in_queries, **how)
    return [
        score_vectors(
            data,
            q[[queries[text] for text in data.queries]],
            np.stack([vectors[text] for text in data.docs]),
        )
        for data in sets
    ]


def score_vectors(data: RetrievalSet, queries: np.ndarray, docs: np.ndarray) -> Scores:
    """Scores the exact ranking by inner product.

    Args:
        data: The set.
        queries: (Q, d) float32, of its queries.
        docs: (N, d) float32, of its passages.
    """
    own = data.own_rows if any(data.own_rows) else None
    return score_ranking(data.ids_at(rank(queries, docs, own)), data.qrels)


def models_and_set(
    models: Sequence[str], data: Path, split: str, *, trust_remote_code: bool
) -> tuple[list[Path], RetrievalSet]:
    """The folders of the models, ready to load, and the set; warns of what is odd about the set."""
    options = EncoderOptions(trust_remote_code=trust_remote_code)
    folders = [prepare_encoder(encoder_folder(name), options) for name in models]
    held = load_beir(data, split)
    for remark in held.remarks():
        warnings.warn(remark, RefineFastWarning, stacklevel=2)
    return folders, held


def evaluate_models(
    models: Sequence[str],
    data: Path,
    split: str = "test",
    *,
    precision: Literal["fp32", "bf16", "auto"] = "fp32",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The rows of ``refine-fast eval``: BM25, then each model.

    Args:
        models: Folders or names, as for ``encoder_folder``.
        data: A folder in BEIR layout.
        split: Which of its qrels.
        precision: Of the encoder; auto: bf16 where the hardware has bf16 products.
        trust_remote_code: Whether to run Python code in the models' folders.
        progress: Called with (done, total), in texts of one model.

    Returns:
        A row per system: system, data, split, passages, queries, precision (None for BM25), one
        key per metric and, for the models after the first, ``gain`` = {metric: {"mean", "low",
        "high"}} against the first.
    """
    folders, held = models_and_set(models, data, split, trust_remote_code=trust_remote_code)
    about = {
        "data": held.name,
        "split": split,
        "passages": len(held.docs),
        "queries": len(held.queries),
    }
    bm25 = score_bm25(held)
    rows: list[dict[str, Any]] = [{"system": "BM25", **about, "precision": None, **bm25.metrics}]
    bf16 = has_fast_bf16(device()) if precision == "auto" else precision == "bf16"
    about["precision"] = "bf16" if bf16 else "fp32"
    first: Scores | None = None
    for name, folder in zip(models, folders, strict=True):
        model = load_encoder(folder, trust_remote_code=trust_remote_code)
        (scores,) = score(model, [held], bf16=bf16, progress=progress)
        rows.append({"system": name, **about, **scores.metrics})
        if first is None:
            first = scores
        else:
            rows[-1]["gain"] = {
                metric: vars(gain(first.per_query[metric], scores.per_query[metric]))
                for metric in METRICS
            }
    return rows
