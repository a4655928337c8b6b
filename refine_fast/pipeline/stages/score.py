"""score: one system (BM25, or the encoder at a fusion weight) on every retrieval set."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import RefineFastWarning
from ...files import write_json
from ..artifacts import (
    CHUNKS,
    DEV,
    FORGETTING_CHUNKS,
    FORGETTING_QUERIES,
    HELD_OUT,
    SETS,
    TUNED,
    score_file,
    write_scores,
)
from ..corpus.beir import RetrievalSet, load_beir
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.fused import load_fused
from ..encoder.twin import load_twin
from ..evaluation.bm25 import score_bm25
from ..evaluation.evaluate import score
from ..queries.query import Query
from ..queries.splits import held_out_set

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ..context import RunContext


def run(context: RunContext, folder: Path, *, weight: float | None) -> None:
    """Writes the scores of the encoder at a fusion weight, or of BM25 (None), on every set."""
    sets = retrieval_sets(context)
    if weight is None:
        for data in sets.values():
            for remark in data.remarks():
                warnings.warn(remark, RefineFastWarning, stacklevel=2)
        write_json(folder / SETS, {name: len(data.docs) for name, data in sets.items()})
        scores = {name: score_bm25(data) for name, data in sets.items()}
    else:
        model = encoder_at(context, weight)
        scores = {}
        for name, data in sets.items():
            with context.console.progress(f"weight {weight:g} on {data.name}") as progress:
                scores[name] = score(model, data, bf16=context.bf16, progress=progress)
    write_scores(folder / score_file(weight), scores)


def retrieval_sets(context: RunContext) -> dict[str, RetrievalSet]:
    """The sets that are scored: "in_domain"; "dev" where a weight is to be chosen; each
    out-of-domain set under "ood:" and its name."""
    config = context.config
    chunks = read_records(context.path(CHUNKS), Chunk)

    def held_out(name: str) -> RetrievalSet:
        return held_out_set(chunks, read_records(context.path(name), Query))

    judged = context.judged_corpus
    sets = {"in_domain": load_beir(judged) if judged else held_out(HELD_OUT)}
    if context.chooses_weight:
        sets["dev"] = held_out(DEV)
    if context.checks_forgetting:
        documentation = read_records(context.path(FORGETTING_CHUNKS), Chunk)
        queries = read_records(context.path(FORGETTING_QUERIES), Query)
        sets["ood:python-docs"] = held_out_set(documentation, queries, "python-docs")
    for folder in config.ood or ():
        data = load_beir(folder)
        sets[f"ood:{folder.name}"] = data.sample(
            queries=len(data.queries), docs=config.ood_passages, seed=config.seed
        )
    return sets


def encoder_at(context: RunContext, weight: float) -> SentenceTransformer:
    """The encoder at a fusion weight: the base at 0, the fine-tuned encoder at 1."""
    tuned = context.path(TUNED)
    if 0 < weight < 1 and context.twin:
        return load_twin(
            tuned, context.encoder, weight, trust_remote_code=context.trust_remote_code
        )
    return load_fused(context.encoder, tuned, weight, trust_remote_code=context.trust_remote_code)
