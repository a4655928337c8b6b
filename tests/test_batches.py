"""Training batches, gradient caching, and the plan of training memory."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from refine_fast.cli import main
from refine_fast.integrations import attention
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.training import batches, memory
from refine_fast.pipeline.training.loss import BatchLoss
from refine_fast.pipeline.training.memory import activation_bytes
from refine_fast.pipeline.training.mini_batches import cut, longest

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


def texts(widths: list[int], *, left: bool = False) -> dict[str, object]:
    """What an encoder reads of texts of so many tokens: each token is the number of its text."""
    ids = torch.zeros(len(widths), max(widths), dtype=torch.int64)
    for i, width in enumerate(widths):
        ids[i, -width if left else 0 : None if left else width] = i + 1
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "prompt_length": 1}


def test_mini_batches_hold_as_many_tokens() -> None:
    """The longest texts first, each mini-batch as wide as its longest text, and every text once."""
    widths = [3, 9, 2, 4, 10, 2, 5, 2]
    side, other = texts(widths), texts([12, 1])
    assert longest([side, other]) == 12
    parts, places = cut(side, 20)
    assert [part["attention_mask"].sum(1).tolist() for part in parts] == [
        [10, 9], [5, 4, 3, 2], [2, 2],
    ]  # fmt: skip
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 10), (4, 5), (2, 2)]
    rows = torch.cat([part["input_ids"][:, 0] for part in parts])
    assert rows[places].tolist() == list(range(1, 9))
    assert {part["prompt_length"] for part in parts} == {1}


def test_mini_batches_of_texts_padded_on_the_left() -> None:
    """Their padding stays, since positions count from it."""
    parts, places = cut(texts([3, 1, 2], left=True), 6)
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 3), (1, 3)]
    assert torch.cat([part["input_ids"][:, -1] for part in parts])[places].tolist() == [1, 2, 3]


@pytest.mark.parametrize("side", [texts([3, 1]), {"input_ids": torch.arange(4)}])
def test_a_side_at_once(side: dict[str, object]) -> None:
    """Without a limit, and where one list holds the tokens of all texts."""
    limit = None if "attention_mask" in side else 2
    assert cut(side, limit) == ([side], slice(None))
    assert longest([side]) == (1 if limit else 3)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("mini_batch", [None, 3])
def test_training_in_bf16_widens_attention(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, mini_batch: int | None, cached: bool
) -> None:
    """Each layer's, in each forward pass that has a backward pass."""
    tried = []
    monkeypatch.setattr(attention, "wide_is_faster", lambda width: tried.append(width) or True)
    model = load_encoder(tiny).bfloat16()
    pages = [topics[name][:300] for name in sorted(topics)[:4]]
    examples = [
        batches.Example(page[:60], i, (), frozenset({i}), i) for i, page in enumerate(pages)
    ]
    batch = batches.Collator(model, examples, pages)([{"row": i} for i in range(4)])
    sides = [
        {k.removeprefix(f"{side}_"): v for k, v in batch.items() if k.startswith(f"{side}_")}
        for side in ("query", "document")
    ]
    loss = BatchLoss(model, 0.05, mini_batch or (4 if cached else None), cached)
    loss(sides, batch["label"]).backward()
    layers = model[0].auto_model.config.num_hidden_layers
    assert len(tried) >= 2 * layers
    assert len(tried) % layers == 0


@pytest.mark.parametrize(
    ("planned", "resident", "returned"), [(None, 1, 1), (1000, 849, 0), (1000, 851, 1)]
)
def test_free_memory_is_kept_within_the_plan(
    monkeypatch: pytest.MonkeyPatch, planned: int | None, resident: int, returned: int
) -> None:
    class Process:
        def memory_info(self) -> Process:
            return self

        rss = resident

    trimmed: list[int] = []
    monkeypatch.setattr("psutil.Process", Process)
    monkeypatch.setattr(memory.os, "name", "posix")
    monkeypatch.setattr(
        memory.ctypes, "CDLL", lambda name: type("C", (), {"malloc_trim": trimmed.append})
    )
    memory.return_free_memory(planned)
    assert len(trimmed) == returned


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
