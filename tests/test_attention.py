"""Attention in bf16 whose backward pass runs in float32: its gradients, and what it leaves to
torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refine_fast.integrations import attention
from refine_fast.integrations.attention import wide_backward

CPU = torch.device("cpu")
ROWS, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 37, 41, 16  # no multiples of the kernel's tiles
EVERY_ROW_OPEN = torch.rand(ROWS, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(2))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"attn_mask": (torch.arange(KEYS) < torch.tensor([[41], [30], [7]]))[:, None, None]},
    "a mask of each query": {"attn_mask": EVERY_ROW_OPEN < 0.7},
    "numbers added to the scores": {"attn_mask": 4 * EVERY_ROW_OPEN},
    "causal": {"is_causal": True},
    "its own scale": {"scale": 0.7},
}


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine is."""
    monkeypatch.setattr(attention, "wide_is_faster", lambda width: True)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as an encoder makes them, (rows, heads, tokens, width) with heads inside."""
    random = torch.Generator().manual_seed(1)
    sizes = (QUERIES, KEYS, KEYS)
    made = [torch.randn(ROWS, n, HEADS, WIDTH, generator=random).transpose(1, 2) for n in sizes]
    return [x.bfloat16().to(dtype).requires_grad_() for x in made]


def attended(dtype: torch.dtype, attend: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    """The output and the three gradients, in float64."""
    q, k, v = inputs(dtype)
    if dtype == torch.float64 and "attn_mask" in options:
        mask = options["attn_mask"]
        options = {"attn_mask": mask if mask.dtype == torch.bool else mask.bfloat16().double()}
    elif "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    out = attend(q, k, v, **options)
    random = torch.Generator().manual_seed(3)
    upstream = torch.randn(out.shape, generator=random).bfloat16().to(dtype)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), upstream))]


def distance(found: Tensor, gold: Tensor) -> float:
    return float((found - gold).norm() / gold.norm())


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_no_worse_than_torchs(case: str) -> None:
    """Nothing is rounded to bf16 but the output and the gradients themselves: each value by at most
    2^-9 of itself, on average by half of that."""
    options = CASES[case]

    def wide(*args: Tensor, **options: Any) -> Tensor:
        with wide_backward(CPU):
            out = F.scaled_dot_product_attention(*args, **options)
        assert "_AttentionBackward" in str(out.grad_fn)
        return out

    gold = attended(torch.float64, F.scaled_dot_product_attention, **options)
    theirs = attended(torch.bfloat16, F.scaled_dot_product_attention, **options)
    found = attended(torch.bfloat16, wide, **options)
    assert torch.equal(found[0], theirs[0])
    for ours, other, right in zip(found[1:], theirs[1:], gold[1:], strict=True):
        assert distance(ours, right) < 0.9 * distance(other, right)
        assert distance(ours, right) < 2**-8


def test_under_autocast() -> None:
    """float32 tensors are narrowed as torch narrows them, and have gradients in float32."""
    q, k, v = inputs(torch.float32)
    with wide_backward(CPU), torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert "_AttentionBackward" in str(out.grad_fn)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    gold = inputs(torch.float64)
    right = F.scaled_dot_product_attention(*gold)
    for found, expected in zip(
        gradients, torch.autograd.grad(right, gold, torch.ones_like(right)), strict=True
    ):
        assert found.dtype == torch.float32
        assert distance(found, expected) < 2**-7


def others() -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    bias = torch.zeros(QUERIES, KEYS, dtype=torch.bfloat16, requires_grad=True)
    bf16 = inputs(torch.bfloat16)
    return {
        "float32": (inputs(torch.float32), {}),
        "float16": (inputs(torch.float16), {}),
        "dropout": (bf16, {"dropout_p": 0.1}),
        "fewer heads of keys": (
            [bf16[0], *(x[:, :1] for x in bf16[1:])],
            {"enable_gqa": True},
        ),
        "a bias that is learned": (bf16, {"attn_mask": bias}),
        "nothing that is trained": ([x.detach() for x in bf16], {}),
    }


@pytest.mark.parametrize("case", others())
def test_the_rest_is_torchs(case: str) -> None:
    args, options = others()[case]
    found = []
    for context in (wide_backward(CPU), wide_backward(torch.device("cuda"))):
        torch.manual_seed(0)
        with context:
            found.append(F.scaled_dot_product_attention(*args, **options))
    assert "_AttentionBackward" not in str(found[0].grad_fn)
    assert torch.equal(*found)


def test_where_bf16_is_fast_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    monkeypatch.setattr(attention, "wide_is_faster", lambda width: widths.append(width))
    with wide_backward(CPU):
        out = F.scaled_dot_product_attention(*inputs(torch.bfloat16))
    assert widths == [WIDTH]
    assert "_AttentionBackward" not in str(out.grad_fn)


def test_the_trial_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a training tries again after a kill, its order and dropout stay the same."""
    monkeypatch.undo()
    before = torch.get_rng_state()
    assert attention.wide_is_faster.__wrapped__(8) in (True, False)
    assert torch.equal(torch.get_rng_state(), before)
