"""teach: a cross-encoder scores each training query's positives and mined negatives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...files import write_json
from ..artifacts import TEACHING_FACTS, to_judge, write_taught
from ..training.cross_encoder import load_cross_encoder, logits_of

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the logits, and which negatives are left out."""
    assert context.teacher is not None
    chunks, judged = to_judge(context.out)
    model = load_cross_encoder(context.teacher, trust_remote_code=context.trust_remote_code)
    with context.console.progress("scoring pairs") as progress:
        logits = logits_of(
            model,
            [(query, document) for query, rows in enumerate(judged.values()) for document in rows],
            list(judged),
            [chunk.passage for chunk in chunks],
            folder / "logits.npy",
            bf16=context.bf16,
            progress=progress,
        )
    remaining = iter(logits.tolist())
    by_query = ([next(remaining) for _ in rows] for rows in judged.values())
    facts = write_taught(context.out, folder, by_query)
    write_json(folder / TEACHING_FACTS, facts)
    context.console.say(
        f"  {facts['pairs']:,} pairs scored; {facts['relabelled']:,} of {facts['negatives']:,} "
        "negatives score above a positive and are left out"
    )
