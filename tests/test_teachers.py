"""Distillation in training: the teachers' targets, when BM25 teaches, and the loss."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.training.batches import Collator, Example
from refine_fast.pipeline.training.loss import BatchLoss
from refine_fast.pipeline.training.teachers import (
    HYBRID_TEMPERATURE,
    Lexical,
    Teachers,
    lexical_teacher,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = [
    "The pump of the harbour takes three tonnes a day.",
    "The valve of the quarry opens at noon.",
    "The boiler of the bakery burns wood.",
    "A crane lifts stones in the quarry.",
]
QUERIES = ["which valve opens at noon", "what burns wood", "stones that a crane lifts"]
RELEVANT = [[1], [2], [3]]


def unit(rows: int, columns: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_targets_are_what_the_module_says() -> None:
    q, d = unit(3, 8, 0), unit(4, 8, 1)
    lexical = Lexical.of(QUERIES, DOCUMENTS)
    assert lexical is not None
    rows, columns = [2, 0], [3, 1, 0]
    found = Teachers(q, d, 0.05, lexical).targets(rows, columns)
    dense = torch.from_numpy((q @ d.T)[rows][:, columns])
    words = lexical.scores(range(3), range(4))[rows][:, columns]
    assert words[0, 0] > 0 == words[0, 1]  # "crane" and "stones" are in document 3 alone
    z = [
        (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0) for x in (words, dense)
    ]
    torch.testing.assert_close(found["frozen"], (dense / 0.05).softmax(1))
    torch.testing.assert_close(found["hybrid"], (z[0] + z[1]).softmax(1))


def test_a_query_without_known_words_leaves_the_frozen_encoder() -> None:
    lexical = Lexical.of(["zzz"], DOCUMENTS)
    assert lexical is not None
    q, d = unit(1, 8, 0), unit(4, 8, 1)
    found = Teachers(q, d, 0.05, lexical).targets([0], range(4))["hybrid"]
    dense = torch.from_numpy(q @ d.T)
    z = (dense - dense.mean()) / dense.std(correction=0)
    torch.testing.assert_close(found, z.softmax(1))


@pytest.mark.parametrize(
    ("queries", "encoder", "teaches"),
    [
        (QUERIES, "random", True),  # the words find what the encoder does not
        (QUERIES, "perfect", False),  # nothing to add
        (["the tonnes of a pump", "a valve of a quarry", "wood"], "perfect", False),  # misleading
    ],
)
def test_bm25_teaches_where_it_adds_to_the_encoder(
    queries: list[str], encoder: str, teaches: bool
) -> None:
    d = unit(4, 8, 1)
    q = d[[rows[0] for rows in RELEVANT]] if encoder == "perfect" else unit(3, 8, 0)
    found = lexical_teacher(queries, RELEVANT, DOCUMENTS, (q, d), seed=0)
    assert (found is not None) == teaches


def test_the_documents_are_read_once_for_many_queries() -> None:
    """And the queries of a block are judged by their own positives."""

    class Counted(np.ndarray):
        reads = 0

        @property
        def T(self) -> np.ndarray:
            Counted.reads += 1
            return np.asarray(self).T

    d, many = unit(4, 8, 1).view(Counted), 14
    found = lexical_teacher(
        QUERIES * many, RELEVANT * many, DOCUMENTS, (unit(3 * many, 8, 0), d), seed=0
    )
    assert found is not None
    assert Counted.reads == 2
    others = RELEVANT[1:] + RELEVANT[:1]  # the encoder knows them, the words do not
    q = np.asarray(d)[[rows[0] for rows in others]]
    found = lexical_teacher(
        QUERIES * many, others * many, DOCUMENTS, (np.tile(q, (many, 1)), d), seed=0
    )
    assert found is None


def test_documents_without_words_have_no_lexical_teacher() -> None:
    q, d = unit(1, 8, 0), unit(2, 8, 1)
    assert lexical_teacher(["?"], [[0]], ["!!!", "..."], (q, d), seed=0) is None


@pytest.mark.parametrize(("mini_batch", "cached"), [(None, False), (3, False), (3, True)])
@pytest.mark.parametrize("distill", [0.3, 1.0])
def test_the_loss_of_a_batch(
    tiny: Path, distill: float, mini_batch: int | None, cached: bool
) -> None:
    """Against the formula, with the whole matrix, in float64; so are the gradients."""
    pages = [topics[name][:300] for name in sorted(topics)[:8]]
    examples = [Example(page[:60], i, (), frozenset({i}), i) for i, page in enumerate(pages)]
    model = load_encoder(tiny).double().eval()
    q0, d0 = unit(8, 8, 0), unit(8, 8, 1)
    lexical = Lexical.of([example.query for example in examples], pages)
    teachers = Teachers(q0, d0, 0.05, lexical)

    def sides() -> tuple[list[dict[str, Any]], torch.Tensor, dict[str, torch.Tensor]]:
        batch = Collator(model, examples, pages, teachers=teachers)([{"row": i} for i in range(8)])
        targets = {name: batch[f"query_targets_{name}"].double() for name in ("frozen", "hybrid")}
        features = [
            {k.removeprefix(f"{side}_"): v for k, v in batch.items() if k.startswith(f"{side}_")}
            for side in ("query", "document")
        ]
        return features, batch["label"], targets

    features, label, targets = sides()
    found = BatchLoss(model, 0.05, mini_batch, cached, distill=distill)(features, label)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    features, label, targets = sides()
    q, d = (
        F.normalize(
            model({k: v for k, v in side.items() if k not in ("group", *_targets(side))})[
                "sentence_embedding"
            ]
        )
        for side in features
    )
    s = q @ d.T / 0.05
    expected = (1 - distill) * F.cross_entropy(s, label)
    expected += distill / 2 * F.cross_entropy(s, targets["frozen"])
    expected += distill / 2 * F.cross_entropy(s / HYBRID_TEMPERATURE, targets["hybrid"])
    expected.backward()
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # the targets are float32
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def _targets(side: dict[str, Any]) -> list[str]:
    return [name for name in side if name.startswith("targets_")]
