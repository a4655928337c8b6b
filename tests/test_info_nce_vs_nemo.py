"""Cases that other projects test in their InfoNCE. From NVIDIA NeMo Automodel's
tests/unit_tests/loss/test_infonce.py: hard negatives with a ragged mask, with and without in-batch
negatives, both directions, a learnable temperature (whose gradient was NaN once)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import refine_fast as rf

MASKS = {
    "all valid": [[1, 1], [1, 1], [1, 1]],
    "ragged": [[1, 0], [0, 0], [1, 1]],
    "all padding": [[0, 0], [0, 0], [0, 0]],
}


def row_by_row(
    query: Tensor, documents: Tensor, own: list[Tensor], scale: Tensor, in_batch: bool
) -> Tensor:
    """Each row's candidates written out: its positive, the others' if in_batch, and its own
    negatives."""
    losses = []
    for i, q in enumerate(query):
        others = [d for j, d in enumerate(documents) if in_batch and j != i]
        scores = torch.stack([documents[i], *others, *own[i]]) @ q * scale
        losses.append(scores.logsumexp(0) - scores[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_learnable_temperature_with_masked_negatives(
    symmetric: bool, in_batch: bool, mask: str
) -> None:
    torch.manual_seed(42)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in [(3, 8), (3, 8), (3, 2, 8)]]
    used = torch.tensor(MASKS[mask], dtype=torch.bool)
    loss = rf.nn.InfoNCELoss(0.2, learnable=True, symmetric=symmetric)
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    log_temperature = loss.log_temperature.detach().clone().requires_grad_()
    q, d, hard = (F.normalize(x, dim=-1) for x in copies)
    scale = (-log_temperature).exp()
    gold = row_by_row(q, d, [hard[i][used[i]] for i in range(3)], scale, in_batch)
    if symmetric:
        gold = (gold + row_by_row(d, q, [[], [], []], scale, in_batch)) / 2
    gold.backward()

    ids = (
        torch.arange(3) if in_batch else torch.zeros(3, dtype=torch.int64)
    )  # one id for all: nobody's document is a negative
    value = loss(inputs[0], inputs[1], hard=inputs[2], hard_mask=used, doc_ids=ids)
    value.backward()
    torch.testing.assert_close(value, gold)
    torch.testing.assert_close(
        loss.log_temperature.grad, log_temperature.grad, rtol=1e-5, atol=1e-6
    )
    expected = [torch.zeros_like(x) if x.grad is None else x.grad for x in copies]
    torch.testing.assert_close([x.grad for x in inputs], expected, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    q, d, real, junk = (
        torch.randn(1, 8),
        torch.randn(1, 8),
        torch.randn(1, 2, 8),
        torch.randn(1, 2, 8) * 100,
    )
    mask = torch.tensor([[True, True, False, False]])
    padded = rf.info_nce(q, d, hard=torch.cat([real, junk], 1), hard_mask=mask, temperature=0.1)
    assert padded == rf.info_nce(q, d, hard=real, temperature=0.1)


def test_a_temperature_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"temperature must be a positive number \(got 0.0\)"):
        rf.nn.InfoNCELoss(0.0, learnable=True)
