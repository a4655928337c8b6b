"""A teacher's share of the target distribution of info_nce."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import batch, error, value_and_gradients

import refine_fast as rf
from refine_fast import reference


@pytest.mark.parametrize("function", [rf.info_nce, reference.info_nce])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_torchs_cross_entropy_with_probabilities(function: Any, share: float) -> None:
    tensors = batch(20, 50, 16)
    teacher = batch(20, 50, 16, seed=1)
    shares = share * (teacher["q"] @ teacher["d"].T / 0.3).softmax(1)
    columns = torch.arange(50).expand(20, 50)
    target = shares + (1 - share) * torch.eye(20, 50, dtype=torch.float64)

    def gold(q: torch.Tensor, d: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(q @ d.T / temperature, target)

    expected = value_and_gradients(gold, tensors, torch.float64, 0.1)
    found = value_and_gradients(
        function, tensors, torch.float64, 0.1, soft_columns=columns, soft_targets=shares
    )
    assert all(e < 1e-12 for e in error(found, expected).values())


def test_no_gradient_reaches_the_teacher() -> None:
    tensors = batch(4, 4, 8)
    shares = torch.full((4, 2), 0.25, requires_grad=True)
    columns = torch.tensor([[0, 1]] * 4)
    q = tensors["q"].float().requires_grad_()
    rf.info_nce(q, tensors["d"].float(), soft_columns=columns, soft_targets=shares).backward()
    assert shares.grad is None
    assert q.grad is not None


def test_the_module_takes_them() -> None:
    q, d = (x.float() for x in batch(4, 6, 8).values())
    soft = {"soft_columns": torch.tensor([[5]] * 4), "soft_targets": torch.full((4, 1), 0.5)}
    found = rf.nn.InfoNCELoss(temperature=0.1)(q, d, **soft)
    assert found == rf.info_nce(q, d, temperature=0.1, normalize=True, **soft)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"soft_targets": None}, "soft_columns and soft_targets belong together"),
        ({"soft_columns": torch.tensor([[0], [1]])}, r"both must be \(3, T\)"),
        ({"soft_targets": torch.rand(3)}, r"both must be \(3, T\)"),
        ({"soft_columns": torch.tensor([[0], [1], [5]])}, "0 to 4, or -1 .got 0 to 5."),
        ({"soft_columns": torch.tensor([[0], [-2], [4]])}, "0 to 4, or -1 .got -2 to 4."),
        ({"soft_targets": torch.tensor([[0.5], [-0.1], [1]])}, "at least 0"),
        ({"soft_targets": torch.tensor([[0.5], [1.1], [1]])}, "a sum of at most 1"),
        ({"soft_targets": torch.tensor([[0.5], [float("nan")], [1]])}, "at least 0"),
        ({"margin": 0.1}, "give margin or soft_targets"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "q": torch.eye(3, 4),
        "d": torch.eye(5, 4),
        "soft_columns": torch.zeros(3, 1, dtype=torch.int64),
        "soft_targets": torch.ones(3, 1),
    }
    with pytest.raises(ValueError, match=message):
        rf.info_nce(**{**arguments, **change})


@pytest.mark.parametrize(
    "change", [{"soft_columns": torch.zeros(3, 1)}, {"soft_targets": torch.ones(3, 1).long()}]
)
def test_other_dtypes_are_refused(change: dict[str, Any]) -> None:
    arguments = {
        "soft_columns": torch.zeros(3, 1, dtype=torch.int64),
        "soft_targets": torch.ones(3, 1),
    }
    with pytest.raises(TypeError, match=r"soft_(columns|targets) must be"):
        rf.info_nce(torch.eye(3, 4), torch.eye(5, 4), **{**arguments, **change})
