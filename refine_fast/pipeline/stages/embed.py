"""embed: the training queries and every chunk under the base encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...files import write_json
from ..artifacts import CHUNKS, EMBEDDINGS, held_out_chunks, relevant_rows, training_view
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.encode import compares_by_cosine, encode, prompt_of, unit_of_similarity
from ..encoder.load import load_encoder
from ..queries.splits import require_enough
from ..reserve import save_rows

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the embeddings of the distinct queries and of the chunks, as ``base_embeddings``,
    ``base_passages``, ``similarity_unit`` and ``base_prompts`` describe them."""
    chunks, queries = training_view(context.out)
    others = held_out_chunks(read_records(context.path(CHUNKS), Chunk), chunks)
    require_enough(queries)
    load = partial(load_encoder, context.encoder, trust_remote_code=context.trust_remote_code)
    model, spread = load(), context.spread(folder, load, "base")
    out = folder / EMBEDDINGS
    out.mkdir(exist_ok=True)
    texts = list(relevant_rows(chunks, queries))
    with context.console.progress("embedding queries") as progress:
        q = encode(model, texts, role="query", bf16=context.bf16, progress=progress, spread=spread)
    passages = [chunk.passage for chunk in (*chunks, *others)]
    with context.console.progress("embedding chunks") as progress:
        every = encode(
            model,
            passages,
            role="document",
            bf16=context.bf16,
            out=folder / "passages.npy",
            progress=progress,
            spread=spread,
        )
    d, held = np.split(every, [len(chunks)])
    unit = unit_of_similarity(model, q, d)
    q /= unit
    similarity = {
        "similarity": "cosine" if compares_by_cosine(model) else "dot",
        "unit": unit,
        "query_prompt": prompt_of(model, "query"),
        "document_prompt": prompt_of(model, "document"),
    }
    write_json(out / "similarity.json", similarity)
    save_rows(out / "queries.npy", q)
    save_rows(out / "chunks.npy", d)
    save_rows(out / "held_out.npy", held)
