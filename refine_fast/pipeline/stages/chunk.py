"""chunk: documents are read, cut into chunks and deduplicated."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import RefineFastError, RefineFastWarning
from ...files import write_json
from ..artifacts import CHUNK_FACTS, CHUNKS, TWINS
from ..corpus.chunk import Chunk, document_id
from ..corpus.chunking import chunk_documents, truncated_passages
from ..corpus.columns import Columns
from ..corpus.dedup import Duplicates, deduplicate, shingles
from ..corpus.documents import Document, Reading, beir_corpus, load_documents
from ..corpus.jsonl import write_records
from ..corpus.language import other_language
from ..encoder.load import DEFAULT_ENCODER, document_tokenizer, load_encoder
from ..queries.user_formats import (
    Judgement,
    query_files,
    read_dev_judgements,
    read_judgements,
)
from ..workers import Spread

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

    from ..context import RunContext

MANY_NEAR_DUPLICATES = 0.1
"""Share of the chunks from which their removal is a warning."""


def run(context: RunContext, folder: Path) -> None:
    """Writes the chunks, and how many documents and duplicates there were."""
    load = partial(_load_tokenizer, context.encoder, trust_remote_code=context.trust_remote_code)
    spread = context.spread(folder, load, "base")
    documents, chunks, duplicates = cut_corpus(context, spread)
    write_records(folder / CHUNKS, chunks)
    facts = {
        "documents": documents,
        "chunks": len(chunks),
        "duplicates": {"exact": duplicates.exact, "near": duplicates.near},
    }
    write_json(folder / CHUNK_FACTS, facts)
    write_json(folder / TWINS, dict(duplicates.twins))


def cut_corpus(
    context: RunContext, spread: Spread | None = None
) -> tuple[int, list[Chunk], Duplicates]:
    """The number of documents, their chunks, and what was removed as duplicates.

    Args:
        context: of the run.
        spread: the workers, with the loader of the encoder's tokenizer; None: this process.

    Raises:
        RefineFastError: if fewer than two chunks are left.
    """
    config, say = context.config, context.console.say
    exclude = () if config.queries is None else query_files(config.queries)
    documents = read_documents(context, config.docs, exclude=exclude, spread=spread)
    encoder = load_encoder(context.encoder, trust_remote_code=context.trust_remote_code)
    if config.model == DEFAULT_ENCODER:
        _check_language(documents)
    _check_passages(context, encoder, documents, spread)
    chunks = cut(context, encoder, documents, spread)
    with context.console.progress("removing duplicates") as progress:
        kept, duplicates = deduplicate(
            chunks,
            remove=config.dedup,
            is_labelled=_labelled(config.queries, config.encoding, chunks),
            progress=progress,
            spread=spread,
        )
    if duplicates.near:
        message = (
            f"{duplicates.near:,} of {len(chunks):,} chunks are removed as near duplicates of "
            "others, such as pages made from one template; --dedup exact keeps them"
        )
        if duplicates.near >= MANY_NEAR_DUPLICATES * len(chunks):
            warnings.warn(f"{message}.", RefineFastWarning, stacklevel=2)
        else:
            say(message)
    if config.limit is not None:
        kept = _whole_sources(kept, config.limit, config.seed)
    if len(kept) < 2:
        removed = duplicates.exact + duplicates.near
        raise RefineFastError(
            f"docs: {config.docs} gives {len(kept)} chunks of text"
            + (f" after {removed} duplicates are removed" if removed else "")
            + ", too few to learn from; give more documents"
            + (", or keep the duplicates with --dedup keep." if removed else ".")
        )
    return len(documents), kept, duplicates


def read_documents(
    context: RunContext,
    docs: Path | None,
    *,
    exclude: Sequence[Path] = (),
    root: Path | None = None,
    known: Mapping[str, str] | None = None,
    spread: Spread | None = None,
) -> list[Document]:
    """The documents at ``docs``, read with the run's encoding and columns.

    Args:
        context: of the run.
        docs: as ``--docs``; None: Python's language reference.
        exclude: files there that are no documents.
        root: as for ``Reading``.
        known: likewise; None: there are no earlier documents.
        spread: the workers; None: this process.
    """
    config = context.config
    columns = Columns(config.text_column, config.title_column, config.id_column)
    say = context.console.say
    reading = Reading(config.encoding, columns, exclude, root, say, known or {})
    with context.console.progress("reading documents") as progress:
        return load_documents(docs, progress, reading=reading, spread=spread)


def cut(
    context: RunContext,
    encoder: SentenceTransformer,
    documents: Sequence[Document],
    spread: Spread | None = None,
) -> list[Chunk]:
    """The chunks of ``documents``, as long as the encoder and ``--chunk-tokens`` allow. ``spread``
    is that of ``cut_corpus``."""
    most = context.config.chunk_tokens
    longest = min(most, encoder.max_seq_length or most)
    with context.console.progress("cutting documents, characters") as progress:
        return chunk_documents(
            documents,
            document_tokenizer(encoder),
            max_tokens=longest,
            progress=progress,
            spread=spread,
        )


def _load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return document_tokenizer(load_encoder(folder, trust_remote_code=trust_remote_code))


def _check_language(documents: Sequence[Document]) -> None:
    """Warns of documents that the bundled encoder was not trained for."""
    language = other_language([document.text for document in documents])
    if language is not None:
        warnings.warn(
            f"most documents are in {language}, and {DEFAULT_ENCODER} was trained on English only; "
            "give a multilingual encoder, such as --model intfloat/multilingual-e5-small.",
            RefineFastWarning,
            stacklevel=3,
        )


def _check_passages(
    context: RunContext,
    encoder: SentenceTransformer,
    documents: Sequence[Document],
    spread: Spread | None,
) -> None:
    """Warns of passages of a retrieval set that the encoder does not read to their end."""
    limit = encoder.max_seq_length
    if limit is None:
        return
    with context.console.progress("measuring passages") as progress:
        count, longest = truncated_passages(
            documents, document_tokenizer(encoder), limit, progress, spread
        )
    docs = context.config.docs
    if count and docs is not None:
        warnings.warn(
            f"{count:,} of {len(documents):,} passages are longer than the {limit:,} tokens that "
            f"the encoder reads (the longest has {longest:,}), and the rest of them is ignored; "
            f"give {beir_corpus(docs)} as DOCS to split them into chunks, or an "
            "encoder that reads more (--model).",
            RefineFastWarning,
            stacklevel=3,
        )


def _labelled(
    queries: Path | None, encoding: str | None, chunks: Sequence[Chunk]
) -> Callable[[Chunk], bool]:
    """Whether one of the user's queries names a chunk, by its id, its document's id or its text."""
    judgements: list[Judgement] = []
    if queries is not None:
        judgements = [*read_judgements(queries, encoding), *read_dev_judgements(queries)]
    known = {id for chunk in chunks for id in (chunk.id, document_id(chunk.id))}
    ids = {item.doc_id for item in judgements}
    texts = {item.passage for item in judgements if item.passage and item.doc_id not in known}
    parts = {shingle for text in texts for shingle in shingles(text)}

    def is_labelled(chunk: Chunk) -> bool:
        if chunk.id in ids or document_id(chunk.id) in ids:
            return True
        # A text may be that of a whole document, of which the chunk is a part.
        return bool(parts) and shingles(chunk.text) <= parts

    return is_labelled


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
