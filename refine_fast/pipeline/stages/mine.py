"""mine: hard negatives of each training query."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import RefineFastError, RefineFastWarning
from ...files import write_json
from ...mine import band_in_words, mine
from ...ops.band_topk import band_topk
from ..artifacts import (
    MINING_FACTS,
    NEGATIVES,
    base_embeddings,
    base_sentences,
    compared_by_cosine,
    relevant_rows,
    training_view,
)
from ..sharded_search import search_in_shards

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path, *, negatives: int) -> None:
    """Writes the mined negatives, and the band with the number of queries that found none.

    Warns if the band is empty for most queries.
    """
    config = context.config
    chunks, queries = training_view(context.out)
    relevant = relevant_rows(chunks, queries)
    q, d = base_embeddings(context.out)
    groups = None
    if config.mine_by == "sentence":
        d, groups = base_sentences(context.out)
    spread = context.spread(folder)
    try:
        with context.console.progress("mining") as progress:
            mined = mine(
                q,
                d,
                list(relevant.values()),
                k=min(max(1, negatives), len(chunks)),
                band=config.band,
                skip=config.skip,
                relative_margin=config.relative_margin,
                select=config.select,
                seed=config.seed,
                normalize=compared_by_cosine(context.out),
                groups=groups,
                progress=progress,
                search=band_topk if spread is None else partial(search_in_shards, spread),
            )
    except ValueError as reason:
        raise RefineFastError(f"mine: {reason}.") from None
    with (folder / NEGATIVES).open("w", encoding="utf-8") as file:
        for text, ids, scores in zip(relevant, mined.ids, mined.scores, strict=True):
            found = [
                {"chunk_id": chunks[i].id, "score": round(float(score), 6)}
                for i, score in zip(ids.tolist(), scores, strict=True)
                if i >= 0
            ]
            record = {"query": text, "negatives": found[:negatives]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    in_band = np.asarray(mined.in_band)
    empty = int(np.sum(in_band == 0))
    facts = {
        "band": mined.band,
        "empty": empty,
        "median_in_band": float(np.median(in_band)),
        "queries": len(q),
    }
    write_json(folder / MINING_FACTS, facts)
    if 2 * empty > len(q) and negatives:
        warnings.warn(
            f"the band {band_in_words(mined.band)} after the {config.skip} most similar is empty "
            f"for {empty} of {len(q)} queries under this encoder, so they train on in-batch "
            "negatives alone; --band auto fits the band to the encoder.",
            RefineFastWarning,
            stacklevel=2,
        )
