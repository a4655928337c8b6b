"""``refine-fast eval --systems``: models in the systems that are served, on a retrieval set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..corpus.beir import DEV_SPLITS, RetrievalSet, is_beir, load_beir
from ..corpus.text import normalize
from ..encoder.encode import Role, encode, has_fast_bf16
from ..encoder.load import device, load_encoder
from ..evaluation.evaluate import models_and_set
from ..evaluation.metrics import METRICS
from ..evaluation.scores import Scores
from ..evaluation.significance import gain
from ..progress import Progress
from .blend import Choosing
from .systems import (
    SYSTEM_NAMES,
    Remembered,
    choose,
    components_of,
    made_set,
    relevant_of,
    score_systems,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHOOSING = 300
"""The most of the queries that choose the weights."""

Bar = Callable[[str], AbstractContextManager[Progress]]


def evaluate_systems(
    models: Sequence[str],
    data: Path,
    split: str = "test",
    *,
    precision: Literal["fp32", "bf16", "auto"] = "fp32",
    trust_remote_code: bool = False,
    progress: Bar,
) -> dict[str, Any]:
    """Scores every model in every system of ``SYSTEM_NAMES``.

    The weights of each model's blends are chosen on queries that are not scored: those of the
    set's split dev or validation, else of its split train, else queries that are made from its
    passages, as in the index of a run without a language model.

    Args:
        models: Folders or names, as for ``encoder_folder``.
        data: A folder in BEIR layout.
        split: Which of its qrels.
        precision: Of the encoder; auto: bf16 where the hardware has bf16 products.
        trust_remote_code: Whether to run Python code in the models' folders.
        progress: Shows what is encoded.

    Returns:
        data, split, passages, queries, precision; chosen_on = {"name", "queries"}; blends = the
        facts of each model's ``BlendChoice``; rows, one for BM25 and one for each model and system:
        model (None for BM25), system, one key per metric, ``gain`` = {metric: {"mean", "low",
        "high"}} against the passage vectors of the same model, ``gain_over_first`` against the
        same system under the first model.
    """
    folders, held = models_and_set(models, data, split, trust_remote_code=trust_remote_code)
    name, choosing, kinds = choosing_set(data, split, held)
    bf16 = has_fast_bf16(device()) if precision == "auto" else precision == "bf16"
    rows: list[dict[str, Any]] = []
    blends: dict[str, Any] = {}
    first: dict[str, Scores] = {}
    for label, folder in zip(models, folders, strict=True):
        model = load_encoder(folder, trust_remote_code=trust_remote_code)
        documents, queries = (
            Remembered(partial(_encode, model, role, bf16, progress))
            for role in ("document", "query")
        )
        parts = Choosing(components_of(choosing, documents, queries), relevant_of(choosing))
        choice = choose(parts, kinds)
        blends[label] = choice.facts()
        scores = score_systems(held, components_of(held, documents, queries), choice)
        if not first:
            rows.append({"model": None, "system": "BM25", **scores["BM25"].metrics})
        for system in SYSTEM_NAMES:
            if system == "BM25":
                continue  # the same under every model
            row = {"model": label, "system": system, **scores[system].metrics}
            if system != "passages":
                row["gain"] = _gains(scores["passages"], scores[system])
            if first:
                row["gain_over_first"] = _gains(first[system], scores[system])
            rows.append(row)
        first = first or scores
    return {
        "data": held.name,
        "split": split,
        "passages": len(held.docs),
        "queries": len(held.queries),
        "precision": "bf16" if bf16 else "fp32",
        "chosen_on": {"name": name, "queries": len(choosing.queries)},
        "blends": blends,
        "rows": rows,
    }


def choosing_set(
    folder: Path, split: str, held: RetrievalSet
) -> tuple[str, RetrievalSet, list[str]]:
    """The queries that choose the weights: what they are, their set, and the kind of each. At most
    ``CHOOSING``, none with the text of a query of ``held``, the split that is scored."""
    scored = {normalize(text) for text in held.queries}
    for name in (*DEV_SPLITS, "train"):
        if name == split or not is_beir(folder, name):
            continue
        found = load_beir(folder, name)
        other = [i for i, text in enumerate(found.queries) if normalize(text) not in scored]
        drawn = np.random.default_rng(0).permutation(other)[:CHOOSING].tolist()
        if drawn:
            chosen = replace(
                found,
                query_ids=[found.query_ids[i] for i in drawn],
                queries=[found.queries[i] for i in drawn],
                qrels=[found.qrels[i] for i in drawn],
            )
            return f"the split {name}", chosen, ["user"] * len(drawn)
    return "made from the passages", *made_set(held, CHOOSING)


def _gains(before: Scores, after: Scores) -> dict[str, Any]:
    return {name: vars(gain(before.per_query[name], after.per_query[name])) for name in METRICS}


def _encode(
    model: SentenceTransformer, role: Role, bf16: bool, progress: Bar, texts: Sequence[str]
) -> np.ndarray:
    with progress("encoding") as advance:
        return encode(model, texts, role=role, bf16=bf16, progress=advance)
