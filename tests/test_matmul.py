"""The product under info_nce and band_topk, tile by tile, at every ISA level, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refine_fast import _core


def product(a: Tensor, b: Tensor, bf16: bool) -> Tensor:
    out = torch.full((a.shape[0], b.shape[1]), float("nan"))
    strides = [a.data_ptr(), *a.stride(), b.data_ptr(), b.stride(1), b.stride(0)]
    _core.matmul(*strides, a.shape[0], b.shape[1], a.shape[1], bf16, out.data_ptr())
    return out


# One tile; less than one of each level's; every level's ragged edges at once; k that no granularity
# divides; k = 384, MiniLM's width.
SHAPES = [(12, 32, 64), (1, 1, 1), (67, 101, 37), (33, 65, 384), (5, 3, 31)]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(
    isa: str, shape: tuple[int, int, int], transposed: tuple[bool, bool], bf16: bool
) -> None:
    m, n, k = shape
    generator = torch.Generator().manual_seed(m * n + k)
    a = (
        torch.randn(m, k, generator=generator)
        if not transposed[0]
        else torch.randn(k, m, generator=generator).T
    )
    b = (
        torch.randn(k, n, generator=generator)
        if not transposed[1]
        else torch.randn(n, k, generator=generator).T
    )
    x, y = (t.bfloat16().double() if bf16 else t.double() for t in (a, b))
    # k products and k additions, each rounded to float32 (VDPBF16PS rounds no worse): gamma_k of
    # Higham's, section 3.1
    bound = (k + 1) * 2.0**-24 * (x.abs() @ y.abs())
    assert ((product(a, b, bf16).double() - x @ y).abs() <= bound).all()


# The smallest operands that keep all digits in three pieces of bf16; the largest float, which alone
# would round to infinity in bf16.
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0**-100, 1.0), (2.0**127, 0.25)], ids=str)
def test_each_product_has_all_digits(isa: str, scales: tuple[float, float]) -> None:
    """Sums of one product, so that nothing hides what is missing. In three pieces two roundings:
    what is left out, and the sum."""
    generator = torch.Generator().manual_seed(0)
    a, b = 1 + torch.rand(300, 1, generator=generator), 1 + torch.rand(1, 200, generator=generator)
    a[0], a[1::2] = 2 - 2.0**-23, -a[1::2]
    a, b = scales[0] * a, scales[1] * b
    exact = a.double() @ b.double()
    assert ((product(a, b, False).double() - exact).abs() <= 2.0**-23 * exact.abs()).all()


@pytest.mark.parametrize("d", [384, 768])
def test_scores_of_unit_rows(isa: str, d: int) -> None:
    """The root mean square of their errors; MKL's product has 1.8e-8 at 384, 1.3e-8 at 768."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, d, generator=generator) for _ in range(2))
    a, b = (torch.nn.functional.normalize(x) for x in (a, b))
    errors = product(a, b.T, False).double() - a.double() @ b.double().T
    assert errors.square().mean().sqrt() <= 9e-9


def test_strided_operands(isa: str) -> None:
    """A slice of a wider matrix, both strides above 1: the packers' general path."""
    a, b = torch.randn(40, 90)[::2, ::3], torch.randn(60, 70)[::2, ::2]
    torch.testing.assert_close(
        product(a, b, False).double(), a.double() @ b.double(), rtol=0, atol=31 * 2.0**-24 * 90
    )


def test_nan_and_infinity_pass_through(isa: str) -> None:
    a, b = torch.ones(3, 40), torch.ones(40, 5)
    a[1, 7], a[2, 39] = float("nan"), float("inf")
    out = product(a, b, True)
    assert out[0].eq(40).all()
    assert out[1].isnan().all()
    assert out[2].isinf().all()
