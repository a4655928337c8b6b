"""embed: the training queries and chunks under the base encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...files import write_json
from ..artifacts import EMBEDDINGS, relevant_rows, training_view
from ..encoder.encode import compares_by_cosine, encode, prompt_of, unit_of_similarity
from ..encoder.load import load_encoder
from ..queries.splits import require_enough

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the embeddings of the distinct queries and of the chunks, as ``base_embeddings``,
    ``similarity_unit`` and ``base_prompts`` describe them."""
    chunks, queries = training_view(context.out)
    require_enough(queries)
    model = load_encoder(context.encoder, trust_remote_code=context.trust_remote_code)
    out = folder / EMBEDDINGS
    out.mkdir(exist_ok=True)
    texts = list(relevant_rows(chunks, queries))
    with context.console.progress("embedding queries") as progress:
        q = encode(model, texts, role="query", bf16=context.bf16, progress=progress)
    passages = [chunk.passage for chunk in chunks]
    with context.console.progress("embedding chunks") as progress:
        d = encode(model, passages, role="document", bf16=context.bf16, progress=progress)
    unit = unit_of_similarity(model, q, d)
    q /= unit
    similarity = {
        "similarity": "cosine" if compares_by_cosine(model) else "dot",
        "unit": unit,
        "query_prompt": prompt_of(model, "query"),
        "document_prompt": prompt_of(model, "document"),
    }
    write_json(out / "similarity.json", similarity)
    np.save(out / "queries.npy", q)
    np.save(out / "chunks.npy", d)
