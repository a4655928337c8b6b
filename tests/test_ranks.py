"""Training on several ranks: the gradients, the model and the messages of one process."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from refine_fast.cli import main
from refine_fast.collectives import gather_rows, mean_gradients, mean_over_ranks, ranks
from refine_fast.errors import RefineFastError
from refine_fast.nn import InfoNCELoss
from refine_fast.pipeline import RunConfig
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.ranks import RankLostError, Ranks, launched, may_report
from refine_fast.pipeline.stages import train
from refine_fast.pipeline.training import trainer
from refine_fast.pipeline.training.batches import Collator, Example, Twin
from refine_fast.pipeline.training.loss import BatchLoss
from refine_fast.pipeline.training.memory import Fit
from refine_fast.pipeline.training.teachers import Lexical, Teachers
from refine_fast.pipeline.training.trained import Trained

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = [topics[name][:240] for name in sorted(topics)[:24]]
QUERIES = [page[20:90] for page in PAGES[:14]]
# documents that two queries share, and queries with two positives
EXAMPLES = [
    Example(
        query,
        i,
        ((i + 1) % 24, (3 * i + 5) % 24),
        frozenset({i, (i + 7) % 24} if i % 3 else {i}),
        i,
    )
    for i, query in enumerate(QUERIES)
]
BATCH = [{"row": i} for i in range(10)]  # not a multiple of 4

EVERYTHING = Trained()

EXACT = 1e-12
"""Largest difference of float64 gradients, relative to the largest of the parameter. All that may
differ is the order of sums: over the columns of a row, over the 3,264 tokens of a batch, over the
ranks. A sum of n terms in another order is off by at most (n - 1) 2^-53 of the sum of their
absolute values, and by the square root of n where errors are independent: 6e-15.
Measured: 4e-14."""

ROUNDED = 1e-4
"""The same in float32, where 2^-24 replaces 2^-53: 3e-6 where errors are independent. Measured:
1.3e-5."""


@contextlib.contextmanager
def joined() -> Any:
    """The process group of this test's ranks."""
    found = launched()
    assert found is not None
    found.join("gloo")
    yield found
    found.leave()


def encoder_of(folder: Path, dtype: torch.dtype) -> SentenceTransformer:
    """The tiny encoder with weights so large that its embeddings differ: where all are alike, the
    gradient is what rounding leaves of a difference."""
    model = load_encoder(folder).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(8)
    return model


class ExactLexical(Lexical):
    """BM25 whose scores are standardized in float64."""

    def scores(self, *rows: Any) -> Tensor:
        return super().scores(*rows).double()


def teachers() -> Teachers:
    random = np.random.default_rng(0)
    queries, documents = (random.standard_normal((n, 32)) for n in (14, 24))  # float64
    return Teachers(queries, documents, 5.0, ExactLexical.of(QUERIES, PAGES))


def twin() -> Twin:
    random = np.random.default_rng(1)
    made = [random.standard_normal((n, 32)).astype(np.float32) for n in (14, 24)]
    return Twin(0.4, *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in made))


OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "mini-batches": {"mini_batch": 3},
    "cached": {"mini_batch": 2, "cached": True},
    "teachers": {"distill": 0.6},
    "teachers, cached": {"distill": 1.0, "mini_batch": 2, "cached": True},
    "twin": {"twin": True},
    "one document": {"alike": True},
}


def batch_gradients(model: SentenceTransformer, options: dict[str, Any]) -> dict[str, Any]:
    """The loss and the gradients of one batch, of all ranks."""
    model, dtype = copy.deepcopy(model), model.dtype
    rank, size = ranks()
    options = dict(options)
    made = twin() if options.pop("twin", False) else None
    taught = teachers() if "distill" in options else None
    examples = EXAMPLES
    if options.pop("alike", False):  # fewer documents than ranks
        examples = [Example(query, 0, (1,), frozenset({0}), i) for i, query in enumerate(QUERIES)]
    batch = Collator(model, examples, PAGES, made, taught, rank, size)(BATCH)
    sides = [
        {name.removeprefix(f"{side}_"): x for name, x in batch.items() if name.startswith(side)}
        for side in ("query", "document")
    ]
    for side in sides:
        for name in [name for name in side if name == "frozen" or name.startswith("targets_")]:
            side[name] = side[name].to(dtype)
    if made is not None:
        options["twin_weight"] = made.weight
    loss = BatchLoss(model, 0.05, **options)(sides, batch["label"])
    loss.backward()
    value = mean_gradients(list(model.parameters()), loss)
    return {
        "loss": value.item(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


PRECISIONS = ((torch.float64, EXACT), (torch.float32, ROUNDED))


def every_gradient(encoder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Of each precision and option."""
    models = [encoder_of(encoder, dtype) for dtype, _ in PRECISIONS]
    return [batch_gradients(model, OPTIONS[name]) for model in models for name in names]


def joined_gradients(encoder: Path, names: list[str]) -> list[dict[str, Any]]:
    with joined():
        return every_gradient(encoder, names)


def require_close(found: dict[str, Any], gold: dict[str, Any], bound: float) -> None:
    assert found.keys() == gold.keys()
    assert found["loss"] == pytest.approx(gold["loss"], rel=bound)
    scale = max(float(x.abs().max()) for name, x in gold.items() if name != "loss")
    assert scale > 0.1
    for name, expected in gold.items():
        if name != "loss":
            # a key's bias changes no attention: its gradient is rounding alone
            largest = max(float(expected.abs().max()), 1e-3 * scale)
            assert float((found[name] - expected).abs().max()) <= bound * largest, name


@pytest.mark.parametrize(("size", "names"), [(2, ["whole", "cached"]), (4, list(OPTIONS))])
def test_gradients_are_those_of_one_process(tiny: Path, size: int, names: list[str]) -> None:
    gold = every_gradient(tiny, names)
    bounds = [bound for _, bound in PRECISIONS for _ in names]
    for of_rank in run_ranks(size, joined_gradients, tiny, names):
        for found, expected, bound in zip(of_rank, gold, bounds, strict=True):
            require_close(found, expected, bound)


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "dot products": {"normalize": False, "temperature": 2.0},
    "margin": {"margin": 0.1, "symmetric": True},
    "widths": {"widths": (4, 8), "width_weights": (0.5, 1.0), "symmetric": True},
    "learnable": {"learnable": True},
    "sum": {"reduction": "sum"},
}
INPUTS = ["", "positives", "doc_ids", "hard", "weight", "soft"]


def loss_gradients(counts: list[int] | None, settings: dict[str, Any], given: str) -> list[Tensor]:
    """Loss and gradients of a linear encoder and of the temperature over 11 queries and 13
    documents. ``counts``: the queries of each rank; None: all in this process."""
    random = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    texts, weights = draw(24, 8), draw(8, 8)
    encoder = nn.Linear(8, 8, bias=False, dtype=torch.float64)
    with torch.no_grad():
        encoder.weight.copy_(weights)
    n, m, q_start, d_start = 11, 13, 0, 0
    if counts is not None:  # a rank with queries has one document more
        n, before = counts[ranks()[0]], counts[: ranks()[0]]
        m, q_start = n + (n > 0), sum(before)
        d_start = q_start + sum(count > 0 for count in before)
    rows, columns = slice(q_start, q_start + n), slice(d_start, d_start + m)
    own = torch.tensor([i + (i >= 5) for i in range(11)])[rows] - d_start
    ids = torch.tensor([0, 1, 2, 3, 1, 5, 6, 7, 8, 6, 10, 11, 2])
    inputs: dict[str, Tensor] = {"positives": own}
    hard = draw(11, 2, 8)
    if given == "doc_ids":
        inputs["doc_ids"] = ids[columns]
    elif given == "hard":
        inputs["hard"] = encoder(hard[rows])
        inputs["hard_mask"] = torch.tensor([[i % 3 > 0, True] for i in range(11)])[rows]
    elif given == "weight":
        inputs["weight"] = torch.linspace(0.2, 2, 11, dtype=torch.float64)[rows]
    elif given == "soft":
        inputs["hard"] = encoder(hard[rows])
        shares = torch.linspace(0.1, 0.3, 33, dtype=torch.float64).view(11, 3)[rows]
        inputs["soft_columns"] = torch.stack(
            [own + 1, torch.full_like(own, m + 1), torch.full_like(own, -1)], 1
        )
        inputs["soft_targets"] = shares
    loss = InfoNCELoss(**{"temperature": 0.3, **settings}, gather=counts is not None).double()
    value = loss(encoder(texts[:11][rows]), encoder(texts[11:][columns]), **inputs)
    value.sum().backward()
    return [value.detach(), encoder.weight.grad, *(p.grad for p in loss.parameters())]


CASES = [
    (name, given)
    for name, given in itertools.product(LOSSES, INPUTS)
    if not (given == "soft" and "margin" in LOSSES[name])
]


def every_loss(counts: list[int]) -> list[list[Tensor]]:
    with joined():
        found = []
        for name, given in CASES:
            tensors = loss_gradients(counts, LOSSES[name], given)
            mean_over_ranks(tensors)
            found.append(tensors)
        return found


@pytest.mark.parametrize("counts", [[5, 6], [5, 0, 6, 0]], ids=["two", "four, two of them empty"])
def test_the_module_gathers_negatives(counts: list[int]) -> None:
    """The mean over the ranks of loss and gradients is that of the whole batch; of "sum", the sum
    divided by the ranks."""
    for of_rank in run_ranks(len(counts), every_loss, counts):
        for (name, given), found in zip(CASES, of_rank, strict=True):
            gold = loss_gradients(None, LOSSES[name], given)
            share = len(counts) if name == "sum" else 1
            for ours, expected in zip(found, gold, strict=True):
                torch.testing.assert_close(
                    ours * share, expected, rtol=1e-10, atol=1e-12, msg=f"{name}, {given}"
                )


def gathered_twice() -> list[Tensor]:
    with joined() as found:
        x = torch.full((found.rank, 2), float(found.rank), dtype=torch.bfloat16, requires_grad=True)
        every = gather_rows(x)
        (
            every.float() * torch.arange(len(every)).float()[:, None] * (found.rank + 1)
        ).sum().backward()
        return [every.detach(), x.grad]


def test_rows_in_the_order_of_the_ranks() -> None:
    """Each with the gradients of all ranks, in its own type, and none of an empty rank."""
    found = run_ranks(3, gathered_twice)
    for every, _ in found:
        assert every.tolist() == [[1, 1], [2, 2], [2, 2]]
    sums = [row * (1 + 2 + 3) for row in range(3)]
    assert [grad.tolist() for _, grad in found] == [
        [], [[sums[0]] * 2], [[sums[1]] * 2, [sums[2]] * 2],
    ]  # fmt: skip


def trained(
    encoder: Path,
    folder: Path,
    options: dict[str, Any],
    dies: int | None = None,
    part: Trained = EVERYTHING,
) -> tuple[dict[str, Tensor], list[int], list[Any]] | str:
    """The weights after training, the steps of this start and the losses; or why a rank stopped.

    Args:
        encoder: of float64, so that what differs between runs is more than rounding.
        folder: of the checkpoints, one at every step.
        options: of the training.
        dies: rank 1 is killed after this step.
        part: what is trained. Adapters are drawn at random, on each rank others.
    """
    trainer.CHECKPOINT_SECONDS = 0.0
    found = launched()
    model = encoder_of(encoder, torch.float64)
    torch.manual_seed(found.rank if found is not None else 0)
    part.choose(model)
    steps: list[int] = []

    def progress(step: int, steps_in_all: int, note: str) -> None:
        steps.append(step)
        if step == dies and found is not None and found.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if found is not None:
        found.join("gloo")
    try:
        history = trainer.train(
            model, EXAMPLES, PAGES, folder, epochs=4, batch_size=10, lr=1e-3, temperature=0.05,
            progress=progress, ranks=found, **options,
        )  # fmt: skip
    except RefineFastError as error:
        return str(error)
    if found is not None:
        found.leave()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, steps, history["loss"]


def require_same_training(found: Any, gold: Any) -> None:
    """To the rounding of float64. Adam divides a gradient by its size, so that rounding in one that
    is nearly 0 grows: hence not to ``EXACT``."""
    for name, expected in gold[0].items():
        torch.testing.assert_close(found[0][name], expected, rtol=0, atol=1e-8, msg=name)
    assert [loss for _, loss in found[2]] == pytest.approx([loss for _, loss in gold[2]], rel=1e-8)


def test_a_checkpoint_of_four_ranks_resumed_by_two(tiny: Path, tmp_path: Path) -> None:
    """After a rank was killed: the others stop with one sentence, and the model is that of one
    process that never stopped."""
    options = {"mini_batch": 2, "cached": True}
    gold = trained(tiny, tmp_path / "alone", options)
    shared = tmp_path / "shared"
    stopped = run_ranks(4, trained, tiny, shared, options, 2)
    assert stopped[1] is None
    for sentence in (stopped[0], *stopped[2:]):
        assert sentence.startswith("another rank of this run ended")
        assert sentence.endswith("run the same command to resume from the last checkpoint.")
    for found in run_ranks(2, trained, tiny, shared, {}):
        assert found[1] == [3, 4, 5]
        require_same_training(found, gold)
    saved = {path.name for path in shared.glob("*/*")}  # by rank 0
    assert saved == {path.name for path in (tmp_path / "alone").glob("*/*")}


@pytest.mark.parametrize(
    ("part", "trains"),
    [(Trained(lora=2), "lora_"), (Trained(last_layers=1), "layer.1.")],
    ids=["adapters", "last layer"],
)
def test_a_part_of_the_parameters(tiny: Path, tmp_path: Path, part: Trained, trains: str) -> None:
    """Trained on two ranks, it is what one process trains, and the rest is as it was."""
    gold = trained(tiny, tmp_path / "alone", {}, None, part)
    for found in run_ranks(2, trained, tiny, tmp_path / "shared", {}, None, part):
        require_same_training(found, gold)
    before = {
        name.replace("base_layer.", ""): parameter
        for name, parameter in encoder_of(tiny, torch.float64).named_parameters()
    }
    changed = {
        name
        for name, parameter in gold[0].items()
        if not torch.equal(parameter, before.get(name.replace("base_layer.", ""), torch.empty(0)))
    }
    assert changed == {name for name in gold[0] if trains in name}


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and messages of the command line on this rank."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    return code, said.getvalue()


def test_rank_0_alone_speaks(copied: Path) -> None:
    out = str(copied)
    (code, said), follower = run_ranks(2, command, "mine", "--out", out)
    assert code == 0
    assert "mine: up to date" in said
    assert follower == (0, "")
    manifest = (copied / "manifest.json").read_text()
    spoken = run_ranks(3, command, "train", "--out", out, "--batch-size", "2")
    assert all(code for code, _ in spoken)
    errors = [said for _, said in spoken if "error:" in said]
    assert len(errors) == 1
    assert "3 processes cannot share a batch of 2 queries; give a larger --batch-size" in errors[0]
    assert (copied / "manifest.json").read_text() == manifest


def test_torchrun_trains_what_one_process_trains(copied: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(copied, tmp_path / "alone")
    train = ["train", "--epochs", "2", "--out"]
    assert command(*train, str(alone))[0] == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launcher, "2", "-m", "refine_fast", *train, str(copied)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes share each batch of 8 queries" in done.stderr
    assert done.stderr.count("train: done in") == 1
    facts, gold = (json.loads((run / "training.json").read_text()) for run in (copied, alone))
    assert {**facts, "loss": 0} == {**gold, "loss": 0}
    losses = [[loss for _, loss in each["loss"]] for each in (facts, gold)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # float32, after up to 12 steps of Adam


def gpu_of(visible: str | None, gpus: int) -> str:
    torch.cuda.device_count = lambda: gpus
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        launched()
    except RefineFastError as error:
        return str(error)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_rank_has_a_gpu_of_its_own() -> None:
    assert run_ranks(2, gpu_of, None, 2) == ["0", "1"]
    assert run_ranks(2, gpu_of, "6,3,1", 3) == ["6", "3"]
    for sentence in run_ranks(2, gpu_of, None, 1):
        assert sentence.startswith("train: 2 processes on this machine need 2 GPUs (1 visible)")


def short_of_gpus() -> list[bool]:
    torch.cuda.device_count = lambda: 1
    with pytest.raises(RefineFastError, match="need 2 GPUs"):
        launched()
    return [may_report(), may_report()]


def test_one_rank_says_that_gpus_are_missing() -> None:
    found = run_ranks(2, short_of_gpus)
    assert sum(may for of_rank in found for may in of_rank) == 1


@pytest.mark.parametrize(
    ("distill", "command"),
    [
        ("auto", "torchrun --nproc-per-node 2 -m refine_fast train --out {out})"),
        ("choose", "refine-fast train --out {out} --engine ray)"),  # torchrun is refused
    ],
)
def test_the_hint_at_more_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, distill: str, command: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = RunConfig(out=tmp_path, distill=distill)
    context = RunContext(config, tmp_path, Console())
    train._say_how(context, Fit(None, False, 1 << 30), "fp32", None)
    assert command.format(out=tmp_path) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("fusion", "decides"), [("weights", False), ("embeddings", True)])
def test_ranks_must_have_the_weight_of_a_twin(tmp_path: Path, fusion: str, decides: bool) -> None:
    config = RunConfig(out=tmp_path, fusion=fusion, weight=0.3)
    context = RunContext(config, tmp_path, Console(quiet=True))
    assert ("weight" in train._what_decides(context, [], [], None)) == decides


def differing() -> str:
    found = launched()
    assert isinstance(found, Ranks)
    try:
        found.require_same({"seed": 0, "training data": "ab" if found.rank else "cd"})
    except RefineFastError as error:
        return str(error)
    with pytest.raises(RankLostError, match="told to stop, since another rank ended or the launch"):
        signal.raise_signal(signal.SIGTERM)
    told = [callable(signal.getsignal(signal.SIGTERM)), may_report(), may_report()]
    return f"first {told} {signal.getsignal(signal.SIGTERM) == signal.SIG_DFL}"


def test_ranks_that_read_other_data_are_refused() -> None:
    first, second = run_ranks(2, differing)
    assert second.startswith("train: rank 1 and rank 0 differ in training data; start every rank")
    assert first == "first [True, True, False] True"
