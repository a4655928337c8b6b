"""teach: a cross-encoder scores each training query's positives and mined negatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_json
from ..artifacts import TAUGHT, TEACHING_FACTS, read_negatives, relevant_rows, training_view
from ..training.cross_encoder import load_cross_encoder, logits_of

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the logits, and which negatives are left out: one with a logit above that of a
    positive is likely an answer that nobody marked (RLHN, arXiv 2505.16967)."""
    assert context.teacher is not None
    chunks, queries = training_view(context.out)
    relevant = relevant_rows(chunks, queries)
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    mined = read_negatives(context.out)
    judged = {
        text: [*positives, *(row[negative["chunk_id"]] for negative in mined[text])]
        for text, positives in relevant.items()
    }
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
    facts = {"pairs": len(logits), "negatives": 0, "relabelled": 0}
    with (folder / TAUGHT).open("w", encoding="utf-8") as file:
        for text, positives in relevant.items():
            marked = [{"chunk_id": chunks[i].id, "logit": next(remaining)} for i in positives]
            found = [{**negative, "logit": next(remaining)} for negative in mined[text]]
            record = {"query": text, "positives": marked, **_relabelled(marked, found)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            facts["negatives"] += len(found)
            facts["relabelled"] += len(record["relabelled"])
    write_json(folder / TEACHING_FACTS, facts)
    context.console.say(
        f"  {facts['pairs']:,} pairs scored; {facts['relabelled']:,} of {facts['negatives']:,} "
        "negatives score above a positive and are left out"
    )


def _relabelled(
    positives: list[dict[str, Any]], found: list[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The negatives that remain, and the others."""
    lowest = min(positive["logit"] for positive in positives)
    return {
        "negatives": [negative for negative in found if negative["logit"] <= lowest],
        "relabelled": [negative for negative in found if negative["logit"] > lowest],
    }
