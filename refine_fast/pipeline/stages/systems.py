"""systems: the base and the product in the system that is served, on a sample of test queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...files import write_json
from ..artifacts import CHUNKS, DEV, HELD_OUT, SERVED, TUNED, base_passages, fused_weight
from ..corpus.beir import RetrievalSet
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.encode import Role, encode
from ..encoder.weighted import encoder_at
from ..queries.query import Query
from ..queries.splits import held_out_set, in_domain_set
from ..serving.blend import Choosing
from ..serving.systems import Remembered, choose, components_of, relevant_of, score_systems

if TYPE_CHECKING:
    from ..context import RunContext

QUERIES, PASSAGES = 300, 500
"""The most of the queries and passages that are scored: every sentence is encoded, under both
encoders."""


def run(context: RunContext, folder: Path) -> None:
    """Writes the scores of every system under the base and under the product, and the weights,
    which are chosen for each on the queries that choose the fusion weight."""
    asked = read_records(context.path(DEV), Query)
    dev, test = _sets(context, asked)
    kind_of = {query.text: query.kind for query in asked}
    kinds = [kind_of[text] for text in dev.queries]
    weight = fused_weight(context.out)
    facts = {}
    for side, at in {"base": 0.0, "fused": weight}.items():
        if side == "fused" and not weight:
            continue  # the product is the base
        encoder = _Encoder(context, folder, side, at)
        held = Choosing(components_of(dev, encoder.documents, encoder.queries), relevant_of(dev))
        choice = choose(held, kinds)
        parts = components_of(test, encoder.documents, encoder.queries)
        scores = score_systems(test, parts, choice)
        facts[side] = {
            "choice": choice.facts(),
            "scores": {
                system: {name: values.tolist() for name, values in found.per_query.items()}
                for system, found in scores.items()
            },
        }
    write_json(folder / SERVED, {"passages": len(test.docs), "sides": facts})


def _sets(context: RunContext, asked: Sequence[Query]) -> tuple[RetrievalSet, RetrievalSet]:
    """The queries that choose, and those that are shown."""
    dev = held_out_set(read_records(context.path(CHUNKS), Chunk), asked, "dev")
    test = in_domain_set(
        context.judged_corpus,
        context.path(CHUNKS),
        context.path(HELD_OUT),
        built_in=context.built_in,
    )
    seed = context.config.seed
    first, second = (s.sample(queries=QUERIES, docs=PASSAGES, seed=seed) for s in (dev, test))
    return first, second


class _Encoder:
    """The encoder at a fusion weight. A text is encoded once."""

    def __init__(self, context: RunContext, folder: Path, side: str, weight: float) -> None:
        self._context = context
        self._label = f"serving {side}"
        load = partial(
            encoder_at,
            weight,
            context.encoder,
            context.path(TUNED),
            twin=context.twin,
            trust_remote_code=context.trust_remote_code,
        )
        self._model = load()
        self._spread = context.spread(folder, load, weight)
        self._calls = count()
        known = {} if weight else base_passages(context.out)
        self.documents = Remembered(partial(self._encode, "document"), known)
        self.queries = Remembered(partial(self._encode, "query"))

    def _encode(self, role: Role, texts: Sequence[str]) -> np.ndarray:
        spread = self._spread
        if spread is not None:  # each call keeps its shards until the stage is done
            spread = replace(spread, folder=spread.folder / f"{self._label} {next(self._calls)}")
        with self._context.console.progress(self._label) as progress:
            return encode(
                self._model,
                texts,
                role=role,
                bf16=self._context.bf16,
                progress=progress,
                spread=spread,
            )
