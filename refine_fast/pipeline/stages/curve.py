"""curve: the encoder at one fusion weight, on the two sets that choose the weight."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifacts import CHUNKS, DEV, TUNED, base_passages, curve_file, write_scores
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.weighted import encoder_at
from ..evaluation.evaluate import score
from ..evaluation.general_knowledge import general_knowledge
from ..queries.query import Query
from ..queries.splits import MOST_DEV, held_out_set

if TYPE_CHECKING:
    from ..context import RunContext

PASSAGES = 1000
"""The most chunks that are scored at each weight, besides those that answer a query."""


def run(context: RunContext, folder: Path, *, weight: float, tuned: str = TUNED) -> None:
    """Writes the scores of the base fused with the ``tuned`` encoder, a folder in the run's, on
    queries that were held out or set aside ("dev") and on general knowledge ("guard")."""
    chunks = read_records(context.path(CHUNKS), Chunk)
    dev = held_out_set(chunks, read_records(context.path(DEV), Query), "dev").sample(
        queries=MOST_DEV, docs=PASSAGES, seed=context.config.seed
    )
    load = partial(
        encoder_at,
        weight,
        context.encoder,
        context.path(tuned),
        twin=weight > 0 and context.twin,
        trust_remote_code=context.trust_remote_code,
    )
    spread = context.spread(folder, load, f"{tuned} {weight!r}")
    with context.console.progress(f"weight {weight:g}") as progress:
        scores = score(
            load(),
            [dev, general_knowledge("guard")],
            bf16=context.bf16,
            known=None if weight else base_passages(context.out),
            progress=progress,
            spread=spread,
        )
    write_scores(folder / curve_file(weight), dict(zip(("dev", "guard"), scores, strict=True)))
