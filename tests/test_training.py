"""Training: what meets in a batch, and what may go wrong: a diverging loss, several GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from refine_fast import reference
from refine_fast.errors import RefineFastError
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.training import loss, order, trainer
from refine_fast.pipeline.training.batches import Collator, Example
from refine_fast.pipeline.training.memory import fit_training
from refine_fast.pipeline.training.trainer import epochs_of, steps_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = [topics[name][:200] for name in sorted(topics)[:16]]
EXAMPLES = [Example(page[:60], i, (), frozenset({i}), i) for i, page in enumerate(PAGES)]


class Unchecked(torch.nn.Module):
    """A loss that does not look for NaN, like the GPU's."""

    def __init__(self, temperature: float, **_: object) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, q: torch.Tensor, d: torch.Tensor, **columns: torch.Tensor) -> torch.Tensor:
        return reference.info_nce(q, d, temperature=self.temperature, normalize=True, **columns)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each batch that is trained on."""
    batches: list[list[int]] = []
    collate = Collator.__call__

    def recorded(self: Collator, rows: list[dict[str, int]]) -> dict[str, object]:
        batches.append([row["row"] for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(Collator, "__call__", recorded)
    return batches


@pytest.mark.parametrize("checked", [True, False])
def test_a_diverging_loss_stops_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """At the step where it happens, without a checkpoint of what it left."""
    if not checked:
        monkeypatch.setattr(loss, "InfoNCELoss", Unchecked)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    seen = []

    def progress(step: int, steps: int, note: str) -> None:
        seen.append((step, note))

    with pytest.raises(RefineFastError, match=r"became NaN or infinite at step [1-3]; use a lower"):
        train(
            load_encoder(tiny), EXAMPLES, PAGES, tmp_path, max_steps=12, epochs=9, batch_size=4,
            lr=1e30, warmup=0.0, progress=progress,
        )  # fmt: skip
    assert 1 <= len(seen) <= 3
    assert all(math.isfinite(float(note.split()[1])) for _, note in seen)
    for saved in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert saved.parent.name == "checkpoint-1"  # of a finite loss


def test_several_gpus_change_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[list[int]]
) -> None:
    """The batch, the order and the number of times that each example is seen."""
    runs = []
    for gpus in (1, 2):
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self, n=gpus: n))
        batches.clear()
        history = train(
            load_encoder(tiny), EXAMPLES, PAGES, tmp_path / str(gpus), batch_size=4, epochs=1
        )
        runs.append((history, [list(batch) for batch in batches]))
    assert runs[0] == runs[1]
    assert sorted(row for batch in runs[1][1] for row in batch) == list(range(16))


@pytest.mark.parametrize(
    ("examples", "epochs", "steps"),
    [
        (2614, 1, 40),  # SQuAD's
        (690, 30 * 64 / 690, 30),  # COVID-QA's: 10 steps in one pass
        (128, 4, 8),
        (20, 4, 4),  # one batch of all in each pass
    ],
)
def test_the_steps_follow_the_data(examples: int, epochs: float, steps: int) -> None:
    found = epochs_of(examples, batch_size=64, epochs="auto")
    assert found == pytest.approx(epochs)
    assert steps_of(examples, batch_size=64, epochs=found, max_steps=None) == steps
    assert epochs_of(examples, batch_size=64, epochs=0.5) == 0.5


@pytest.mark.parametrize("batch", [2, 7, 8, 48])
def test_the_fewest_steps_are_what_is_promised(batch: int) -> None:
    """Whatever the rounding of the epochs: one fewer for 88 examples in batches of 8."""
    for examples in range(8 * batch, 30 * batch):
        epochs = epochs_of(examples, batch_size=batch, epochs="auto")
        assert steps_of(examples, batch_size=batch, epochs=epochs, max_steps=None) == 30


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_training_trains(tiny: Path, tmp_path: Path, steps: int) -> None:
    """The warm-up, which starts at a rate of 0, leaves at least one step."""
    model = load_encoder(tiny)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = train(model, EXAMPLES, PAGES, tmp_path, batch_size=8, epochs=9, max_steps=steps)
    assert any((p != before[name]).any() for name, p in model.named_parameters())
    assert (history["steps"], history["epochs"]) == (steps, steps / 2)


def test_a_second_kill_during_a_save_costs_no_complete_checkpoint(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)

    def killed(saves: int) -> None:
        """A training that ends in the save after as many."""
        left = iter(range(saves))

        def sync_or_die(path: Path) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "fsync_all", sync_or_die)
        with pytest.raises(KeyboardInterrupt):
            train(load_encoder(tiny), EXAMPLES, PAGES, tmp_path, batch_size=4, epochs=2.0)

    def complete() -> list[str]:
        return [path.parent.name for path in tmp_path.glob("*/complete")]

    killed(2)
    assert sorted(complete()) == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-3").is_dir()
    # saved at other steps this time, as the clock has it
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-6")
    killed(0)
    assert complete() == ["checkpoint-2"]


def test_memory_is_planned_for_the_most_tokens(tiny: Path) -> None:
    """Not for the most characters: of Chinese, each is a token."""
    model = load_encoder(tiny)
    english, chinese = PAGES[0][:150], "南瓜" * 40

    def peak(*passages: str) -> int:
        return fit_training(
            model, ["?"], passages, 100, batch_size=64, negatives=1, memory=None, bf16=False
        ).peak

    assert peak(english) < peak(chinese) == peak(english, chinese, *["a"] * 9)


def near_pairs(rows: np.ndarray, topics: np.ndarray, batch: int) -> float:
    """The share of pairs in a batch that are about one topic."""
    shares = []
    for start in range(0, len(rows) - batch + 1, batch):
        same = topics[rows[start : start + batch]]
        pairs = (same[:, None] == same) & ~np.eye(batch, dtype=bool)
        shares.append(pairs.sum() / (batch * (batch - 1)))
    return float(np.mean(shares))


@pytest.mark.parametrize("cell", [64, 8192])
def test_similar_examples_share_batches(monkeypatch: pytest.MonkeyPatch, cell: int) -> None:
    """In every pass each example once; other groups in each pass, and the same by the seed."""
    monkeypatch.setattr(order, "CELL", cell)
    random = np.random.default_rng(0)
    topics = np.repeat(np.arange(40), 8)
    vectors = random.standard_normal((40, 16))[topics] + 0.1 * random.standard_normal((320, 16))
    rows = order.grouped_order(vectors.astype(np.float32), 2 * 320, seed=3)
    for part in (rows[:320], rows[320:]):
        assert sorted(part) == list(range(320))
        alone = near_pairs(order.random_order(320, 320, seed=3), topics, 16)
        assert near_pairs(part, topics, 16) > 5 * alone
    assert (rows[:320] != rows[320:]).any()
    assert (rows == order.grouped_order(vectors.astype(np.float32), 2 * 320, seed=3)).all()
    assert (rows != order.grouped_order(vectors.astype(np.float32), 2 * 320, seed=4)).any()
    shorter = order.grouped_order(vectors.astype(np.float32), 100, seed=3)
    assert (shorter == rows[:100]).all()


def test_batches_of_similar_examples_are_trained_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[list[int]]
) -> None:
    monkeypatch.setattr(order, "GROUP", 4)
    vectors = np.eye(4, dtype=np.float32)[np.arange(len(EXAMPLES)) % 4]
    train(load_encoder(tiny), EXAMPLES, PAGES, tmp_path, batch_size=4, grouped_by=vectors)
    assert {tuple(sorted(row % 4 for row in batch)) for batch in batches} == {
        (i,) * 4 for i in range(4)
    }
