"""info_nce in bf16, term by term. On AMX it is another solver, which stores no scores: it makes
them again for the second gradient, keeps a shift for each row and raises it, and takes the columns
in chunks of 256, so each of these has a case of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from info_nce_cases import OPTIONS, B, D, K, N, batch, error, value_and_gradients
from torch import Tensor

import refine_fast as rf
from refine_fast import reference

FUSED = {
    name: {key: value for key, value in options.items() if key not in ("symmetric", "widths")}
    for name, options in OPTIONS.items()
    if name not in ("symmetric", "widths", "soft", "soft and all")
}
for options in FUSED.values():
    options.pop("width_weights", None)


def assert_exact(
    tensors: dict[str, Tensor], temperature: float = 0.05, **options: Any
) -> dict[str, Tensor]:
    """Against float64 on the rounded inputs. The softmax is in float32: the loss and the gradient
    of the temperature have its error, 2^-24 times the largest exponent, 1 / temperature. The
    weights and the gradients round to bf16, 2^-9 each at most."""
    rounded = {name: x.bfloat16().double() for name, x in tensors.items()}
    temperature = float(torch.tensor(temperature, dtype=torch.float32))
    gold = value_and_gradients(reference.info_nce, rounded, torch.float64, temperature, **options)
    found = value_and_gradients(rf.info_nce, rounded, torch.bfloat16, temperature, **options)
    exponent = 2**-24 * max(1 / temperature, 20)
    limits = {"loss": exponent, "temperature": 4 * exponent, "weight": 4 * exponent}
    for name, value in error(found, gold).items():
        limit = limits.get(name, 2**-8)
        assert value <= limit, f"{name}: error {value:.2e}, limit {limit:.2e}"
    return gold


@pytest.mark.parametrize("temperature", [0.005, 0.05, 1.0])
@pytest.mark.parametrize("case", FUSED)
def test_every_term(isa: str, case: str, temperature: float) -> None:
    if "margin" in FUSED[case]:  # exp(-0.5 / temperature), all that is left, vanishes in float32
        temperature = max(temperature, 0.05)
    assert_exact(
        batch(B, N, D, K if case in ("hard", "all") else 0),
        temperature,
        reduction="sum" if case == "weight" else "mean",
        **FUSED[case],
    )


# One row, one column; a width below a tile's step, one beyond it; several chunks and a ragged last
# tile; slices of the width, equal and unequal; several tasks of rows.
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1),
        (2, 3, 31),
        (33, 65, 33),
        (40, 700, 48),
        (35, 300, 768),
        (3, 40, 1000),
        (600, 600, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", [False, True])
def test_shapes(isa: str, shape: tuple[int, int, int], normalize: bool) -> None:
    assert_exact(batch(*shape), normalize=normalize)


def test_many_columns_with_the_documents_of_others(isa: str) -> None:
    """Whole tiles and whole chunks hold one document, which is the positive of some rows."""
    tensors = batch(70, 900, 24)
    assert_exact(
        tensors, doc_ids=torch.arange(900) // 300, positives=torch.arange(70) * 12 + 7, margin=0.3
    )


def towards(cosines: Tensor) -> Tensor:
    """Rows in the plane with these cosines to (1, 0)."""
    return torch.stack([cosines, (1 - cosines**2).sqrt()], 1)


@pytest.mark.parametrize(
    ("first", "last"), [(0.9, 0.0), (0.0, 0.87), (0.7, 0.87), (0.9, 0.87), (0.7, 1.0), (0.9, 1.0)]
)
def test_negatives_far_above_the_positive(isa: str, first: float, last: float) -> None:
    """At temperature 0.02 the shift starts at the positive, cosine 0. Scores from 0.83 on exceed it
    by more than 2^60: in the first chunk, or in the last one, when those of the first that came
    within 2^17 of them still count."""
    cosines = torch.full((600,), first, dtype=torch.float64) - torch.linspace(0, 0.05, 600).abs()
    cosines[0], cosines[550:] = 0, last - torch.linspace(0, 0.05, 50)
    tensors = {"q": towards(torch.linspace(1, 0.98, 40).double()), "d": towards(cosines)}
    for temperature in (0.02, 0.005):
        assert_exact(tensors, temperature, positives=torch.zeros(40, dtype=torch.int64))


def test_a_margin_after_the_shift_is_raised(isa: str) -> None:
    """The first chunk raises the rows' shifts by 87 to 145; in the last one the margin cuts."""
    cosines = torch.cat([torch.full((300,), 0.5), torch.linspace(0.3, 1, 300)]).double()
    cosines[0] = 0
    tensors = {"q": towards(torch.linspace(1, 0.98, 40).double()), "d": towards(cosines)}
    assert_exact(tensors, 0.005, positives=torch.zeros(40, dtype=torch.int64), margin=0.7)


def test_a_private_negative_above_all(isa: str) -> None:
    tensors = batch(40, 300, 16, 2)
    tensors["d"][:40] = -tensors["q"]
    tensors["hard"][:, 0] = tensors["q"]
    assert_exact(tensors, 0.005)


def test_a_product_that_overflows(isa: str) -> None:
    q, d = torch.full((3, 4), 1e20), torch.full((40, 4), 1e20)
    d[0] = 0
    q, d = q.bfloat16().requires_grad_(), d.bfloat16().requires_grad_()
    with pytest.raises(ValueError, match="overflows float32"):
        rf.info_nce(q, d, positives=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("sides", ["documents", "queries"])
def test_more_columns_than_are_packed_at_a_time(sides: str) -> None:
    """13 MB of packed rows of width 8 are 212,992: sums and shifts wait for the next ones."""
    many, few = 213_100, 40
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(many, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(few, 8, generator=generator, dtype=torch.float64)
    rows = {"q": y, "d": x} if sides == "documents" else {"q": x, "d": y}
    assert_exact(
        rows, 1.0, normalize=True, positives=torch.arange(len(rows["q"])) * 7 % len(rows["d"])
    )


@pytest.mark.parametrize("case", ["plain", "all"])
def test_deterministic_whatever_the_thread_count(case: str) -> None:
    tensors = {x: y.bfloat16() for x, y in batch(B, N, D, K if case == "all" else 0).items()}
    big = {x: y.bfloat16() for x, y in batch(500, 600, 400).items()}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                [
                    value_and_gradients(rf.info_nce, leaves, torch.bfloat16, 0.02, **options)
                    for leaves, options in ((tensors, FUSED[case]), (big, {}))
                ]
            )
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        for ours, first in zip(one, found[0], strict=True):
            assert all(torch.equal(ours[name], first[name]) for name in first)


def test_the_loss_without_gradients(isa: str) -> None:
    tensors = {x: y.bfloat16() for x, y in batch(B, 400, D, K).items()}
    gold = reference.info_nce(**{x: y.double() for x, y in tensors.items()}, temperature=0.02)
    found = rf.info_nce(**tensors, temperature=0.02)
    assert math.isclose(found, gold, rel_tol=2**-20)
