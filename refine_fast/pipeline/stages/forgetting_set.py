"""forgetting set: the built-in out-of-domain check, a sample of Python's documentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifacts import FORGETTING_CHUNKS, FORGETTING_QUERIES
from ..corpus.dedup import deduplicate
from ..corpus.documents import load_documents
from ..corpus.jsonl import write_records
from ..encoder.load import load_encoder
from ..queries.synthetic import synthesize_queries
from .chunk import cut

if TYPE_CHECKING:
    from ..context import RunContext

PASSAGES = 500
"""Chunks of the check."""


def run(context: RunContext, folder: Path) -> None:
    """Writes the sampled chunks, and one or more keyword queries for each."""
    config = context.config
    encoder = load_encoder(context.encoder, trust_remote_code=context.trust_remote_code)
    documents = load_documents(None)
    chunks, _ = deduplicate(cut(context, encoder, documents))
    drawn = np.random.default_rng(config.seed).permutation(len(chunks))
    chunks = [chunks[i] for i in sorted(drawn[: min(PASSAGES, config.ood_passages)])]
    queries = synthesize_queries(chunks, seed=config.seed, per_chunk=4)
    write_records(folder / FORGETTING_CHUNKS, chunks)
    spans = [query for query in queries if query.kind == "span"]
    write_records(folder / FORGETTING_QUERIES, spans)
