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
