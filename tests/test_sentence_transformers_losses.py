"""The fused losses beside sentence-transformers' own: same loss, same gradients, wherever the
parents run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_ranks
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim, dot_score

import refine_fast as rf
from refine_fast.integrations import attention
from refine_fast.integrations import sentence_transformers as ours
from refine_fast.integrations.sentence_transformers import losses

MODEL = nn.Sequential(nn.Identity())
FUSED = ours.FusedMultipleNegativesRankingLoss
CACHED_FUSED = ours.CachedFusedMultipleNegativesRankingLoss

# What info_nce covers, then what the parent's code must still answer for.
COVERED: dict[str, dict[str, Any]] = {
    "default": {},
    "scale": {"scale": 100.0},
    "dot": {"similarity_fct": dot_score, "scale": 1.0},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "symmetric": {
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    },
}
SYMMETRIC = COVERED["symmetric"]
PASSED_ON: dict[str, dict[str, Any]] = {
    "all directions": {
        "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    },
    "hardness": {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
    "own similarity": {"similarity_fct": lambda a, b: cos_sim(a, b) ** 3},
}


def embeddings(columns: int, rows: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 24, generator=generator)
    return [
        (query * (i < 2) + torch.randn(rows, 24, generator=generator)).requires_grad_()
        for i in range(columns)
    ]


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("case", [*COVERED, *PASSED_ON])
def test_loss_and_gradients(case: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (COVERED | PASSED_ON)[case]
    found = []
    for kind in (MultipleNegativesRankingLoss, FUSED):
        inputs = embeddings(columns)
        loss = kind(nn.Identity(), **settings).compute_loss_from_embeddings(inputs, None)
        loss.backward()
        found.append((loss, [x.grad for x in inputs]))
    for kind in (CachedMultipleNegativesRankingLoss, CACHED_FUSED):
        inputs = embeddings(columns)
        chunks = [[x.detach().requires_grad_() for x in column.split(5)] for column in inputs]
        loss = kind(MODEL, mini_batch_size=5, **settings).calculate_loss(chunks, with_backward=True)
        assert not loss.requires_grad
        found.append((loss, [torch.cat([x.grad for x in column]) for column in chunks]))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss.detach(), found[0][0].detach(), rtol=1e-5, atol=1e-6)
        # fp32 rounding: logits of up to 100, each wrong by some 1e-6 of itself
        torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=2e-6)
    assert (losses._loss(FUSED(nn.Identity(), **settings), inputs) is not None) == (case in COVERED)


@pytest.mark.parametrize("columns", [2, 3])
def test_matryoshka(columns: int, minilm: Path) -> None:
    """sentence-transformers' MatryoshkaLoss around its own loss, around ours, and widths in one
    pass: one loss, one gradient."""
    model = SentenceTransformer(str(minilm), device="cpu").eval()
    texts = (
        ["a river", "boiling", "Hamlet"],
        ["the Loire", "100 degrees", "Shakespeare"],
        ["the Alps", "salt", "Goethe"],
    )[:columns]
    features = lambda: [model.preprocess(list(column)) for column in texts]  # noqa: E731
    dims, dim_weights = [384, 128, 32], [1.0, 0.5, 2.0]

    def in_one_pass() -> Tensor:
        queries, *documents = (model(x)["sentence_embedding"] for x in features())
        settings = {"widths": dims[::-1], "width_weights": dim_weights[::-1]}
        return rf.nn.InfoNCELoss(0.05, **settings)(queries, torch.cat(documents))

    def by_theirs(kind: type[nn.Module]) -> Tensor:
        return MatryoshkaLoss(model, kind(model), dims, dim_weights)(features(), torch.zeros(3))

    found = []
    for loss in (
        lambda: by_theirs(MultipleNegativesRankingLoss),
        lambda: by_theirs(FUSED),
        in_one_pass,
    ):
        model.zero_grad()
        value = loss()
        value.backward()
        found.append(
            (
                value.detach(),
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
            )
        )
    for value, grad in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-5, atol=0)
        assert (grad - found[0][1]).norm() < 1e-4 * found[0][1].norm()


def test_the_parents_arguments_and_errors() -> None:
    with pytest.raises(ValueError, match="Scale must be a positive value"):
        FUSED(nn.Identity(), scale=0)
    with pytest.raises(ValueError, match="Invalid directions"):
        CACHED_FUSED(MODEL, directions=("up",))
    with pytest.raises(ValueError, match="at least 2"):
        FUSED(nn.Identity()).compute_loss_from_embeddings(embeddings(1), None)
    parent, child = (
        kind(MODEL, mini_batch_size=7)
        for kind in (CachedMultipleNegativesRankingLoss, CACHED_FUSED)
    )
    assert parent.get_config_dict() == child.get_config_dict()


PAIRS = {
    "anchor": [
        "a river in France",
        "the boiling point of water",
        "who wrote Hamlet",
        "capital of Japan",
        "speed of light",
        "moon landing",
    ],
    "positive": [
        "the Loire",
        "100 degrees Celsius",
        "William Shakespeare",
        "Tokyo",
        "299792 km/s",
        "Apollo 11 in 1969",
    ],
}


@torch.no_grad()
def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def trained(
    minilm: Path, kind: type[nn.Module], folder: Path, **settings: Any
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = SentenceTransformer(str(minilm), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=6,
        learning_rate=1e-3,
        optim="sgd",
        seed=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(
        model, arguments, Dataset.from_dict(PAIRS), loss=kind(model, **settings)
    ).train()
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def test_interchangeable_in_the_trainer(minilm: Path, tmp_path: Path) -> None:
    """Two steps with dropout on: the mini-batches of the cached losses replay its random
    numbers."""
    for parent, child, settings in (
        (MultipleNegativesRankingLoss, FUSED, {}),
        (CachedMultipleNegativesRankingLoss, CACHED_FUSED, {"mini_batch_size": 4}),
    ):
        gold, found = (trained(minilm, kind, tmp_path, **settings) for kind in (parent, child))
        start = dict(SentenceTransformer(str(minilm), device="cpu").named_parameters())
        moved, apart = distance(gold, start), distance(gold, found)
        # the weights (norm 300) hold the steps (1e-3) to some 4 digits
        assert apart < 1e-3 * moved, (apart, moved)


@pytest.mark.parametrize("scaler", [1.0, 1000.0])
def test_cached_gradients_through_the_encoder(minilm: Path, scaler: float) -> None:
    """After sentence-transformers' test_cmnrl_same_grad: triplets, mini-batches of 2 that leave one
    over, an upstream gradient like a GradScaler's. (The gradient cache that ignores the
    temperature, in tevatron, fails this.)"""
    model = SentenceTransformer(str(minilm), device="cpu").eval()
    texts = (
        ["aaa", "bbb", "ccc", "ddd", "eee"],
        ["aas", "bbs", "ccs", "dds", "ees"],
        ["xxx", "yyy", "zzz", "kkk", "fff"],
    )
    found = []
    for loss in (
        MultipleNegativesRankingLoss(model, scale=50.0),
        CACHED_FUSED(model, scale=50.0, mini_batch_size=2),
    ):
        model.zero_grad()
        value = loss([model.preprocess(list(column)) for column in texts], torch.zeros(5)) * scaler
        value.backward()
        found.append(
            (
                value.detach(),
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
            )
        )
    (gold, gold_grad), (value, grad) = found
    torch.testing.assert_close(value, gold, rtol=1e-5, atol=0)
    assert (grad - gold_grad).norm() < 1e-4 * gold_grad.norm()
    with torch.no_grad():
        value = loss([model.preprocess(list(column)) for column in texts], torch.zeros(5)) * scaler
    torch.testing.assert_close(value, gold, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [FUSED, CACHED_FUSED])
def test_attention_of_a_bf16_encoder_goes_back_in_float32(
    kind: type[nn.Module], minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each layer, where that is faster."""
    seen = []

    def backward(gradient: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(gradient.dtype)
        return torchs(gradient, *args, **options)

    torchs = attention._backward
    monkeypatch.setattr(attention, "_backward", backward)
    monkeypatch.setattr(attention, "wide_is_faster", lambda width: True)
    model = SentenceTransformer(str(minilm), device="cpu").eval()
    texts = ["a river", "boiling", "Hamlet"], ["the Loire", "100 degrees", "Shakespeare"]
    with torch.autocast("cpu", torch.bfloat16):
        kind(model)([model.preprocess(column) for column in texts], torch.zeros(3)).backward()
    assert seen == [torch.float32] * 12  # 6 layers, both columns


def linear(
    kind: Any, sizes: list[int], rank: int, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of a linear encoder; one size: the whole batch in one process."""
    torch.manual_seed(0)
    encoder, batch = nn.Linear(16, 8, bias=False), torch.randn(3, 10, 16)
    scores, several = torch.randn(10, 2), len(sizes) > 1
    model = DistributedDataParallel(encoder) if several else encoder
    part = batch.split(sizes, dim=1)[rank]
    loss = kind(MODEL, gather_across_devices=several, **settings)
    labels = scores.split(sizes)[rank] if "distill" in settings else None
    columns = list(model(part))
    if kind is FUSED:
        value = loss.compute_loss_from_embeddings(columns, labels)
    else:
        value = loss.calculate_loss([[x] for x in columns], labels)
    value.backward()
    return value.detach(), encoder.weight.grad


def gathered() -> int:
    """What each rank does: the number of comparisons that it made."""
    distributed.init_process_group("gloo")
    compared = 0
    for name in ("default", "queries", "symmetric", "distill"):
        settings = {"distill": 0.7} if name == "distill" else COVERED[name]
        for kind in (FUSED, CACHED_FUSED):
            whole, gold = linear(kind, [10], 0, settings)
            for sizes in ([5, 5], [3, 7]):
                value, grad = linear(kind, sizes, distributed.get_rank(), settings)
                distributed.all_reduce(value)
                torch.testing.assert_close(value / 2, whole)
                torch.testing.assert_close(grad, gold, rtol=1e-4, atol=1e-6)
                compared += 1
    distributed.destroy_process_group()
    return compared


def test_negatives_gathered_from_two_processes() -> None:
    """Over gloo: each process has a part of the batch and sees all of it; DDP's mean gradient is
    the single process's."""
    assert run_ranks(2, gathered) == [16, 16]


@pytest.mark.parametrize("kind", [FUSED, CACHED_FUSED])
@pytest.mark.parametrize("symmetric", [False, True])
def test_distillation_from_the_labels(kind: Any, symmetric: bool) -> None:
    """Against the whole matrix and torch's cross-entropy with probabilities."""
    torch.manual_seed(0)
    parts = [torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    labels = torch.randn(5, 2, dtype=torch.float64)
    loss = kind(
        MODEL, scale=10.0, distill=0.4, distill_temperature=0.5, **(SYMMETRIC if symmetric else {})
    )
    if kind is FUSED:
        found = loss.compute_loss_from_embeddings(parts, labels)
    else:
        found = loss.calculate_loss([[part] for part in parts], labels)
    q, positive, negative = (nn.functional.normalize(part, dim=1) for part in parts)
    teacher = (labels.float() / 0.5).softmax(1).double()
    target = torch.cat([torch.diag(0.6 + 0.4 * teacher[:, 0]), torch.diag(0.4 * teacher[:, 1])], 1)
    expected = nn.functional.cross_entropy(10 * q @ torch.cat([positive, negative]).T, target)
    if symmetric:
        back = nn.functional.cross_entropy(10 * positive @ q.T, torch.arange(5))
        expected = (expected + back) / 2
    torch.testing.assert_close(found, expected)
    ours_, theirs = (torch.autograd.grad(x, parts, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(ours_, theirs)
    assert loss.get_config_dict()["distill"] == 0.4


def test_distillation_that_cannot_work_is_refused() -> None:
    parts = [torch.randn(5, 8) for _ in range(3)]
    for arguments, words in (
        ({"distill": 2}, "between 0 and 1"),
        ({"distill": 0.5, "distill_temperature": 0.0}, "a positive number"),
    ):
        with pytest.raises(ValueError, match=words):
            FUSED(MODEL, **arguments)
    with pytest.raises(ValueError, match=r"labels of shape \(5, 2\).*got labels of shape \(5,\)"):
        FUSED(MODEL, distill=0.5).compute_loss_from_embeddings(parts, torch.zeros(5))
    hardened = FUSED(MODEL, distill=0.5, hardness_mode="in_batch_negatives", hardness_strength=1.0)
    with pytest.raises(ValueError, match="set distill=0"):
        hardened.compute_loss_from_embeddings(parts, torch.zeros(5, 2))
