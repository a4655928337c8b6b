"""chunk: documents are read, cut into chunks and deduplicated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import RefineFastError
from ...files import write_json
from ..artifacts import CHUNK_FACTS, CHUNKS
from ..corpus.chunk import Chunk
from ..corpus.chunking import chunk_documents
from ..corpus.dedup import Duplicates, deduplicate
from ..corpus.documents import Document, load_documents
from ..corpus.jsonl import write_records
from ..encoder.load import document_tokenizer, load_encoder

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the chunks, and how many documents and duplicates there were."""
    documents, chunks, duplicates = cut_corpus(context)
    write_records(folder / CHUNKS, chunks)
    facts = {"documents": documents, "chunks": len(chunks), "duplicates": vars(duplicates)}
    write_json(folder / CHUNK_FACTS, facts)


def cut_corpus(context: RunContext) -> tuple[int, list[Chunk], Duplicates]:
    """The number of documents, their chunks, and what was removed as duplicates."""
    config = context.config
    with context.console.progress("reading documents") as progress:
        documents = load_documents(config.docs, progress)
    chunks, duplicates = cut(context, documents)
    if config.limit is not None:
        chunks = _whole_sources(chunks, config.limit, config.seed)
    if len(chunks) < 2:
        raise RefineFastError(
            f"docs: {config.docs} gives {len(chunks)} chunks of text, too few to learn from; "
            "give more documents."
        )
    return len(documents), chunks, duplicates


def cut(context: RunContext, documents: Sequence[Document]) -> tuple[list[Chunk], Duplicates]:
    """The chunks of ``documents``, as long as the encoder and ``--chunk-tokens`` allow."""
    encoder = load_encoder(context.encoder, trust_remote_code=context.trust_remote_code)
    most = context.config.chunk_tokens
    longest = min(most, encoder.max_seq_length or most)
    with context.console.progress("cutting documents, characters") as progress:
        chunks = chunk_documents(
            documents, document_tokenizer(encoder), max_tokens=longest, progress=progress
        )
    with context.console.progress("removing duplicates") as progress:
        return deduplicate(chunks, progress=progress)


def _whole_sources(chunks: Sequence[Chunk], limit: int, seed: int) -> list[Chunk]:
    """At most ``limit`` chunks, drawn source by source, in their original order."""
    names = sorted({chunk.source for chunk in chunks})
    np.random.default_rng(seed).shuffle(names)
    of_source = defaultdict(list)
    for chunk in chunks:
        of_source[chunk.source].append(chunk)
    drawn = [chunk for name in names for chunk in of_source[name]]
    kept = {chunk.id for chunk in drawn[:limit]}
    return [chunk for chunk in chunks if chunk.id in kept]
