"""score: one system (BM25, or an encoder) on every test set."""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import RefineFastWarning
from ...files import write_json
from ..artifacts import (
    CHUNKS,
    HELD_OUT,
    SETS,
    TUNED,
    base_passages,
    fused_weight,
    score_file,
    write_scores,
)
from ..corpus.beir import RetrievalSet, load_beir
from ..encoder.weighted import encoder_at
from ..evaluation.bm25 import score_bm25
from ..evaluation.evaluate import score
from ..evaluation.general_knowledge import general_knowledge
from ..queries.splits import in_domain_set

if TYPE_CHECKING:
    from ..context import RunContext


_WEIGHTS = {"base": 0.0, "fine-tuned": 1.0}
"""System -> the fusion weight that makes it."""
_SYSTEMS = {weight: system for system, weight in _WEIGHTS.items()}


def run(context: RunContext, folder: Path, *, system: str) -> None:
    """Writes the scores of one of ``SYSTEMS`` on every test set."""
    target = folder / score_file(system)
    # not of a twin, which has unit vectors, as the fine-tuned encoder may not
    same = None if system != "fused" or context.twin else _SYSTEMS.get(fused_weight(context.out))
    if same is not None:
        shutil.copy(context.path(score_file(same)), target)
        return
    sets = scored_sets(context)
    if system == "BM25":
        for data in sets.values():
            for remark in data.remarks():
                warnings.warn(remark, RefineFastWarning, stacklevel=2)
        write_json(folder / SETS, {name: len(data.docs) for name, data in sets.items()})
        scores = [score_bm25(data) for data in sets.values()]
    else:
        load = partial(
            encoder_at,
            _WEIGHTS[system] if system in _WEIGHTS else fused_weight(context.out),
            context.encoder,
            context.path(TUNED),
            twin=system == "fused" and context.twin,
            trust_remote_code=context.trust_remote_code,
        )
        spread = context.spread(folder, load, system)
        with context.console.progress(f"scoring {system}") as progress:
            scores = score(
                load(),
                list(sets.values()),
                bf16=context.bf16,
                known=base_passages(context.out) if system == "base" else None,
                progress=progress,
                spread=spread,
            )
    write_scores(target, dict(zip(sets, scores, strict=True)))


def scored_sets(context: RunContext) -> dict[str, RetrievalSet]:
    """The sets that the report shows and that chose nothing: "in_domain"; each out-of-domain set
    under "ood:" and its name."""
    config = context.config
    chunks, queries = context.path(CHUNKS), context.path(HELD_OUT)
    sets = {
        "in_domain": in_domain_set(
            context.judged_corpus, chunks, queries, built_in=context.built_in
        )
    }
    if config.ood is None:
        sets["ood:general knowledge"] = general_knowledge("test")
    for folder in context.ood:
        data = load_beir(folder)
        sets[f"ood:{data.name}"] = data.sample(
            queries=len(data.queries), docs=config.ood_passages, seed=config.seed
        )
    return sets
