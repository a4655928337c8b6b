"""sentences: every sentence of the chunks that training may see, under the base encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifacts import SENTENCES, training_view
from ..corpus.sentences import sentence_texts, split_passages
from ..encoder.encode import encode
from ..encoder.load import load_encoder
from ..reserve import save_rows

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the embeddings of the sentences and the offsets of each chunk's, as ``base_sentences``
    describes them."""
    chunks, _ = training_view(context.out)
    spans = split_passages(chunks)
    load = partial(load_encoder, context.encoder, trust_remote_code=context.trust_remote_code)
    model, spread = load(), context.spread(folder, load, "base")
    out = folder / SENTENCES
    out.mkdir(exist_ok=True)
    save_rows(out / "offsets.npy", np.cumsum([0, *map(len, spans)], dtype=np.int64))
    with context.console.progress("embedding sentences") as progress:
        encode(
            model,
            sentence_texts(chunks, spans),
            role="document",
            bf16=context.bf16,
            out=out / "sentences.npy",
            progress=progress,
            spread=spread,
        )
