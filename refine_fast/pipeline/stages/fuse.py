"""fuse: the product, with its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...files import read_json
from ...fuse import fuse
from ...mine import band_in_words
from ..artifacts import (
    MINING_FACTS,
    MODEL,
    TEACHING_FACTS,
    TRAINING_FACTS,
    TUNED,
    all_scores,
    fused_weight,
    similarity_name,
)
from ..encoder.twin import save_twin
from ..reporting.format import loss_in_words
from ..reporting.model_card import model_card

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the fused model with its card."""
    weight = fused_weight(context.out)
    tuned, out = context.path(TUNED), folder / MODEL
    if context.twin:
        save_twin(tuned, context.encoder, weight, out, trust_remote_code=context.trust_remote_code)
    else:
        fuse(context.encoder, tuned, out, weight, overwrite=True)
    card = model_card(
        context.encoder,
        context.base_name,
        weight,
        _recipe(context, weight),
        all_scores(context.out),
        chosen=context.chooses_weight,
        twin=context.twin,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def _recipe(context: RunContext, weight: float) -> dict[str, str]:
    """How the model was made, for its card."""
    config = context.config
    mining = read_json(context.path(MINING_FACTS))
    training = read_json(context.path(TRAINING_FACTS))
    similarity = similarity_name(context.out)
    fused = "embeddings, in the loss too" if context.twin else "parameters"
    chosen = ", chosen on held-out queries and general knowledge" if context.chooses_weight else ""
    grouped = "similar documents together, " if training["similar_batches"] else ""
    margin = ""
    if config.relative_margin is not None:
        margin = f" and at most {1 - config.relative_margin:g} of the positive's"
    if config.mine_by == "sentence":
        margin += " by the best sentence"
    relabelled = ""
    if (teacher := context.teacher_name) is not None:
        teaching = read_json(context.path(TEACHING_FACTS))
        relabelled = (
            f"; {teaching['relabelled']} of {teaching['negatives']} left out, which {teacher} "
            "scores above a positive"
        )
        if context.teacher_kind == "llm" and (missing := teaching["grading"]["ungraded"]):
            relabelled += f"; {missing} of {teaching['grading']['queries']} queries without grades"
    share = ", the teachers' share chosen on held-out queries" if context.chooses_distill else ""
    return {
        "queries": f"{mining['queries']}, {context.query_source}",
        "loss": f"{loss_in_words(training['distill'], training['teachers'], teacher)} over the "
        f"{'cosine' if context.twin else similarity}, temperature {config.temperature:g}, "
        f"batch {config.batch_size}, {grouped}each document once{share}",
        "hard negatives": f"{training['negatives']} per query: after the {config.skip} most "
        f"similar, {similarity} {band_in_words(mining['band'])}{margin}, {config.select}; none for "
        f"{mining['empty']} queries{relabelled}"
        if training["negatives"]
        else "none, in-batch negatives alone",
        "optimizer": f"AdamW, learning rate {config.lr:g}, {training['steps']} steps, "
        f"warm-up {config.warmup:g}, seed {config.seed}",
        "fusion": f"weight {weight:g} of the fine-tuned {fused}{chosen}",
    }
