"""Training batches, gradient caching, and the plan of training memory."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from refine_fast.cli import main
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.training import batches
from refine_fast.pipeline.training.loss import BatchLoss
from refine_fast.pipeline.training.memory import activation_bytes

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the killed runs


def test_a_batch_counts_every_document_once(tiny: Path) -> None:
    """Two queries share document 3, and 3 and 5 both answer the first: nothing that answers a
    query is its negative."""
    examples = [
        batches.Example("a", 3, (7,), frozenset({3, 5}), 0),
        batches.Example("b", 3, (5, 7), frozenset({3}), 1),
        batches.Example("c", 5, (), frozenset({5}), 2),
    ]
    batch = batches.Collator(load_encoder(tiny), examples, [f"document {i}" for i in range(9)])(
        [{"row": i} for i in range(3)]
    )
    assert batch["label"].tolist() == [0, 0, 2]  # the columns are 3, 7, 5
    assert len(batch["document_input_ids"]) == 3
    groups = batch["document_group"].tolist()
    assert groups[0] == groups[2] != groups[1]


def test_mini_batches_change_nothing_but_memory(tiny: Path) -> None:
    """Three sequences at a time, with gradient caching or without, give the gradients of the whole
    batch; in float64, where the order of the sums does not show."""
    pages = [topics[name][:300] for name in sorted(topics)[:8]]
    examples = [
        batches.Example(page[:60], i, ((i + 1) % 8,), frozenset({i}), i)
        for i, page in enumerate(pages)
    ]
    gradients = []
    for mini_batch, cached in ((None, False), (3, False), (3, True)):
        model = load_encoder(tiny).double().eval()  # without dropout, whose draws would differ
        batch = batches.Collator(model, examples, pages)([{"row": i} for i in range(8)])
        sides = [
            {k.removeprefix(f"{side}_"): v for k, v in batch.items() if k.startswith(f"{side}_")}
            for side in ("query", "document")
        ]
        BatchLoss(model, 0.05, mini_batch, cached)(sides, batch["label"]).backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    largest = max(grad.abs().max() for grad in gradients[0].values())
    assert largest > 1e-5
    for other in gradients[1:]:
        assert gradients[0].keys() == other.keys()
        for name, grad in gradients[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-6, atol=float(1e-8 * largest))


def test_a_memory_budget(copied: Path, capsys) -> None:
    command = ["train", "--out", str(copied), "--negatives", "1", "--memory"]
    assert main([*command, "512MB"]) == 2
    assert (
        "error: memory: 0.5 GB is too little for this encoder; give at least 0.9GB."
        in capsys.readouterr().err
    )
    assert main([*command, "919MB"]) == 0
    assert (
        " sequences at a time, gradients cached, in fp32: about 0.9 GB of memory"
        in capsys.readouterr().err
    )
    assert main([*command, "2GB"]) == 0
    assert "  a batch at once, in fp32: about 0.9 GB of memory" in capsys.readouterr().err


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("words", [60, 300])
def test_the_plan_counts_what_the_backward_keeps(minilm: Path, words: int, bf16: bool) -> None:
    """The activations of this text, not of the longest that the encoder reads.

    By hand, for each of BERT's layers and tokens (Korthikanti et al. 2022, arXiv 2205.05198,
    section 4.1, without dropout, with attention that keeps no scores): the inputs of two layer
    norms in float32; the inputs of the four products, q, k, v and both sides of the activation;
    the input of q, k and v narrowed for each of them. Left out, at most 6%: the softmax's sums,
    embeddings, masks, pooling.
    """
    model, text, width = load_encoder(minilm), "house " * words, 2 if bf16 else 4
    tokens = model.preprocess([text])["input_ids"].shape[1]
    assert tokens == min(words + 2, 256)
    by_hand = tokens * 6 * (2 * 384 * 4 + ((6 + 2 * bf16) * 384 + 2 * 1536) * width)
    assert by_hand <= activation_bytes(model, text, bf16=bf16) <= 1.06 * by_hand
