"""How well a model retrieves: held-out sets, exact ranking, the usual metrics, and intervals for what changed.

The metrics are those of BEIR, with binary relevance: recall@k = found / relevant, nDCG@10, MRR@10; each is kept per query, so that two
systems can be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ops.band_topk import band_topk
from ..corpus.beir import RetrievalSet, load_beir
from ..encoder.encode import encode
from ..encoder.load import encoder_folder, load_encoder
from ..encoder.options import EncoderOptions
from ..encoder.prepare import prepare_encoder
from ..progress import Progress
from .bm25 import score_bm25
from .metrics import DEPTH, METRICS, Scores, score_ranking
from .significance import gain

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def rank(queries: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """The exact 10 nearest rows of ``docs`` (N, d) for each row of ``queries`` (Q, d) by inner product, ties by lower row: (Q, 10) int64,
    -1 beyond N."""
    return band_topk(queries, docs, DEPTH, band=(-float("inf"), float("inf")), skip=0).ids.numpy()


def score(
    model: SentenceTransformer,
    data: RetrievalSet,
    *,
    batch_size: int = 32,
    bf16: bool | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Encodes both sides with the model's own prompts (``encode``) and ranks every document for every query, exactly. ``progress`` counts
    texts."""
    total = len(data.docs) + len(data.queries)
    in_docs = progress and (lambda done, _: progress(done, total))
    in_queries = progress and (lambda done, _: progress(len(data.docs) + done, total))
    docs = encode(
        model, data.docs, role="document", batch_size=batch_size, bf16=bf16, progress=in_docs
    )
    queries = encode(
        model, data.queries, role="query", batch_size=batch_size, bf16=bf16, progress=in_queries
    )
    return score_ranking(rank(queries, docs), data.relevant)


def evaluate_models(
    models: Sequence[str],
    data: Path,
    split: str = "test",
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The rows of ``refine-fast eval``: BM25, then each model, on the BEIR set ``data``.

    Args:
        models: named as for ``encoder_folder``.
        data: folder of the set.
        split: which of its qrels.
        trust_remote_code: whether to run Python code in the models' folders.
        progress: called with (encoded texts, all texts) of each model.

    Returns:
        Rows of system, data, split, passages, queries, one key per metric and, for the models after
        the first, ``gain`` = {metric: {"mean", "low", "high"}} against the first.
    """
    options = EncoderOptions(trust_remote_code=trust_remote_code)
    folders = [prepare_encoder(encoder_folder(name), options) for name in models]
    held = load_beir(data, split)
    about = {
        "data": held.name,
        "split": split,
        "passages": len(held.docs),
        "queries": len(held.queries),
    }
    rows: list[dict[str, Any]] = [{"system": "BM25", **about, **score_bm25(held).metrics}]
    first: Scores | None = None
    for name, folder in zip(models, folders, strict=True):
        model = load_encoder(folder, trust_remote_code=trust_remote_code)
        scores = score(model, held, progress=progress)
        rows.append({"system": name, **about, **scores.metrics})
        if first is None:
            first = scores
        else:
            rows[-1]["gain"] = {
                metric: vars(gain(first.per_query[metric], scores.per_query[metric]))
                for metric in METRICS
            }
    return rows
