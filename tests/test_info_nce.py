"""info_nce against float64, over every backend: CPU levels, Triton, plain torch."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from backends import Backend
from info_nce_cases import (
    OPTIONS,
    B,
    D,
    K,
    N,
    assert_as_exact_as_torch,
    batch,
    error,
    errors,
    value_and_gradients,
)
from torch import Tensor

import refine_fast as rf
from refine_fast import reference
from refine_fast.ops import info_nce_operators as operators
from refine_fast.ops.info_nce_problem import Problem


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_term(isa: str, case: str, reduction: str) -> None:
    tensors = batch(B, N, D, K if "hard_mask" in OPTIONS[case] else 0)
    if "normalize" in OPTIONS[case]:
        lengths = torch.linspace(0.5, 3, N, dtype=torch.float64)
        tensors = {
            name: x * lengths[: len(x)].reshape(-1, *[1] * (x.ndim - 1))
            for name, x in tensors.items()
        }
    assert_as_exact_as_torch(tensors, torch.float32, 0.1, reduction=reduction, **OPTIONS[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.05, 1.0])
def test_temperatures(isa: str, temperature: float, dtype: torch.dtype) -> None:
    """No less exact than torch: the root mean square of each error over three draws. A single
    number is rounded: the loss by 2^-24 of it, the temperature's gradient by 2^-23, because the
    factor of the loss rounds it once more. Ours / torch's, AVX-512:

        temperature        .005              .02               .05               1
        fp32  loss         0.2e-7 / 0.6e-7   0.3e-7 / 0.4e-7   0.3e-7 / 0.5e-7   0.2e-7 / 0.9e-7
              q            0.7e-6 / 2.2e-6   0.3e-6 / 0.9e-6   0.2e-6 / 0.5e-6   1.7e-7 / 2.6e-7
              d            0.6e-6 / 1.2e-6   0.2e-6 / 0.8e-6   0.2e-6 / 0.4e-6   1.4e-7 / 1.9e-7
              hard         1.0e-6 / 2.9e-6   0.5e-6 / 1.1e-6   0.3e-6 / 0.6e-6   0.7e-7 / 2.4e-7
              temperature  0.7e-7 / 6.9e-7   0.5e-7 / 3.4e-7   0.5e-7 / 3.4e-7   0.2e-7 / 0.9e-7
        bf16  loss         0.3e-7 / 3.2e-3   0.2e-7 / 2.3e-3   0.3e-7 / 1.8e-3   0.3e-7 / 0.7e-3
              q and d      1.7e-3 / 5.2e-2   1.8e-3 / 2.6e-2   2.2e-3 / 1.9e-2   2.0e-3 / 4.8e-3
    """
    drawn = [errors(batch(100, 300, 384, 3, seed=seed), dtype, temperature) for seed in range(3)]
    for name in drawn[0][0]:
        ours, torchs = (
            math.sqrt(statistics.fmean(one[side][name] ** 2 for one in drawn)) for side in (0, 1)
        )
        limit = max(torchs, {"loss": 2**-24, "temperature": 2**-23}.get(name, 0))
        assert ours <= limit, f"{name}: error {ours:.2e}, torch's {torchs:.2e}"


def test_the_other_direction_sums_a_long_column(isa: str) -> None:
    """4,095 times exp(-0.6), one query after the other: the additions round alike, and a plain
    float32 chain ends up wrong by 1e-5."""
    q, d = torch.full((4096, 1), 0.4), torch.ones(4096, 1)
    q[0] = 1
    found, gold = (
        rf.info_nce(x, y, temperature=1, symmetric=True, reduction="none")[0]
        for x, y in ((q, d), (q.double(), d.double()))
    )
    assert abs(found - gold) <= 2**-23 * gold


# One row (loss 0 without a second document), one column more, MiniLM's width (Inf-CL refuses 384),
# more columns than a block of 192 (and a ragged tail: Inf-CL's mask is misaligned there), more rows
# than a strip of 640, a width below every granularity, no width.
@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (1, 2, 1), (5, 5, 384), (33, 400, 48), (700, 701, 17), (3, 5, 0)], ids=str
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_shapes(isa: str, shape: tuple[int, int, int], symmetric: bool) -> None:
    assert_as_exact_as_torch(batch(*shape), torch.float32, 0.05, symmetric=symmetric)


# Packing 16-bit rows: ragged rows, columns and widths, rows that end within a vector; 17 is odd, so
# that one column stays without a partner.
@pytest.mark.parametrize("shape", [(33, 70, 17), (20, 210, 45), (5, 7, 384)], ids=str)
@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_in_16_bits(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, case: str
) -> None:
    options = {
        "plain": {},
        "all": {"normalize": True, "symmetric": True, "widths": (8, 12, shape[-1])},
    }[case]
    assert_as_exact_as_torch(batch(*shape), dtype, 0.05, **options)


def ragged(backend: Backend) -> tuple[int, int, int]:
    """B, N and D that no tile size divides: at a CPU level as in OPTIONS; for Triton, whose
    interpreter takes long, two tiles by three of ``small_tiles``, in steps of two."""
    return (19, 75, 24) if backend.name == "triton" else (B, N, D)


def test_widths_are_the_sum_of_their_losses(info_nce_backend: Backend) -> None:
    inputs, device = batch(*ragged(info_nce_backend), K), info_nce_backend.device
    tensors = {name: x.float().to(device) for name, x in inputs.items()}
    options: dict[str, Any] = {"normalize": True, "reduction": "none"}
    widths = {"widths": (8, tensors["q"].shape[1]), "width_weights": (0.25, 1)}
    loss = rf.info_nce(**tensors, **widths, **options, return_lse=True)
    full = rf.info_nce(**tensors, **options, return_lse=True)
    half = rf.info_nce(**{name: x[..., :8] for name, x in tensors.items()}, **options)
    torch.testing.assert_close(loss[0], full[0] + 0.25 * half)
    torch.testing.assert_close(loss[1], full[1])


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_any_logits(isa: str, scale: float) -> None:
    """Logits of +-1e6: most exponentials underflow, and no fixed shift would serve every row."""
    tensors = batch(40, 60, 32)
    tensors["q"] = (
        tensors["q"] * torch.logspace(0, math.log10(scale), 40, dtype=torch.float64)[:, None]
    )
    assert_as_exact_as_torch(tensors, torch.float32, 1.0, symmetric=True)


def test_a_row_without_negatives_has_loss_0(info_nce_backend: Backend) -> None:
    q, d, hard = (torch.randn(*shape) for shape in ((4, 8), (6, 8), (4, 2, 8)))
    leaves = {"q": q, "d": d, "hard": hard, "temperature": torch.tensor(0.02)}
    leaves = {name: x.to(info_nce_backend.device).requires_grad_() for name, x in leaves.items()}
    mask = torch.zeros(4, 2, dtype=torch.bool, device=info_nce_backend.device)
    same = torch.zeros(6, dtype=torch.int64, device=info_nce_backend.device)
    loss = rf.info_nce(**leaves, hard_mask=mask, doc_ids=same, reduction="none")
    assert loss.tolist() == [0, 0, 0, 0]
    loss.sum().backward()  # NeMo's temperature gradient is NaN where padding is masked
    assert all(x.grad is not None and not x.grad.any() for x in leaves.values())


@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_masked_is_not_read(info_nce_backend: Backend, normalize: bool) -> None:
    """Padding may hold anything, NaN too."""
    if info_nce_backend.name == "reference":
        pytest.skip("torch multiplies the padding by 0, which leaves NaN")
    tensors = batch(*ragged(info_nce_backend), K)
    mask = OPTIONS["hard"]["hard_mask"][: len(tensors["q"])]
    options = {"hard_mask": mask, "normalize": normalize, "device": info_nce_backend.device}
    found = []
    for padding in (0.0, math.nan):
        tensors["hard"] = tensors["hard"].masked_fill(~mask[..., None], padding)
        found.append(value_and_gradients(rf.info_nce, tensors, torch.float32, 0.1, **options))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_margin_of_0_keeps_what_occurs_twice(
    info_nce_backend: Backend, normalize: bool, dtype: torch.dtype
) -> None:
    """The same query with another document (and the same document with another query, or as a hard
    negative) ties with the pair: it is not above the margin, wherever the two lie in the kernels'
    tiles. In float64 a margin of 1e-9 says so; nothing else lies that near."""
    if info_nce_backend.name == "reference":
        pytest.skip("torch rounds equal pairs apart")
    width = 40 if info_nce_backend.name == "triton" else 200
    q, d = batch(B, B, width, seed=1).values()
    q[40:], d[20:40] = q[: B - 40], d[:20]
    q, d = q.to(dtype), d.to(dtype)
    tensors = {"q": q, "d": d, "hard": d[:, None].clone()}
    options: dict[str, Any] = {
        "symmetric": True, "normalize": normalize, "widths": (30, width), "temperature": 1.0,
        "reduction": "none",
    }  # fmt: skip
    gold = reference.info_nce(**{k: x.double() for k, x in tensors.items()}, margin=1e-9, **options)
    tensors = {name: x.to(info_nce_backend.device) for name, x in tensors.items()}
    found = rf.info_nce(**tensors, margin=0.0, **options)
    torch.testing.assert_close(found.cpu().double(), gold, rtol=1e-5, atol=1e-5)
    assert (found.cpu().double() - gold).norm() < 1e-5 * gold.norm()


def test_a_margin_that_drops_everything(info_nce_backend: Backend) -> None:
    tensors = {n: x.float().to(info_nce_backend.device) for n, x in batch(5, 7, 8, 2).items()}
    assert rf.info_nce(**tensors, margin=-math.inf, symmetric=True) == 0


@pytest.mark.parametrize("hards", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_rows(info_nce_backend: Backend, symmetric: bool, hards: int) -> None:
    device = info_nce_backend.device
    q, d = torch.zeros(0, 8, device=device), torch.randn(3, 8, device=device)
    hard = torch.zeros(0, hards, 8, device=device) if hards else None
    leaves = [x.requires_grad_() for x in (q, d, hard) if x is not None]
    loss = rf.info_nce(q, d, hard=hard, symmetric=symmetric)
    loss.backward()
    assert loss == 0
    assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]
    assert not d.grad.any()
    none = torch.zeros(0, device=device)
    assert rf.info_nce(q, d, hard=hard, symmetric=symmetric, reduction="none").shape == (0,)
    assert rf.info_nce(q, d, weight=none) == 0
    two, no_weight = torch.randn(2, 8, device=device), torch.zeros(2, device=device)
    assert rf.info_nce(two, d, weight=no_weight) == 0
    temperature = torch.tensor(0.02, device=device)
    problem = Problem(
        q.detach(), d.detach(), temperature, None, None, None if hard is None else hard.detach(),
        None, None, symmetric, False, [], [],
    )  # fmt: skip
    losses, grads = operators.run(none, problem)
    assert losses.shape == (1, 2 if symmetric else 1, 0)
    assert [x.shape for x in grads[:2]] == [(0, 8), (3, 8)]
    assert not grads[1].any()


@pytest.mark.parametrize(("of_widths", "dtype"), [(False, torch.float16), (True, torch.float32)])
def test_no_hard_negatives(info_nce_backend: Backend, of_widths: bool, dtype: torch.dtype) -> None:
    """None of each row is the same as none at all, and every gradient has its shape and, in the
    operator, the same dtype."""
    rows, columns, width = ragged(info_nce_backend)
    tensors, widths = batch(rows, columns, width), (8, width) if of_widths else None
    none = {"hard": torch.zeros(rows, 0, width, dtype=torch.float64)}
    options: dict[str, Any] = {"widths": widths, "device": info_nce_backend.device}
    without = value_and_gradients(rf.info_nce, tensors, dtype, 0.1, **options)
    found = value_and_gradients(rf.info_nce, tensors | none, dtype, 0.1, **options)
    assert found["hard"].shape == (rows, 0, width)
    assert all(torch.equal(found[name], x) for name, x in without.items())
    q, d, hard = (
        x.to(info_nce_backend.device, dtype) for x in (tensors["q"], tensors["d"], none["hard"])
    )
    g, temperature = torch.ones(rows, device=q.device), torch.tensor(0.1, device=q.device)
    asked = [*(widths or [])], [1.0] * len(widths or [])
    for given, shape in ((None, (0,)), (hard, hard.shape)):
        problem = Problem(
            q, d, temperature, None, None, given, None, None, False, False, *asked
        )  # fmt: skip
        _, grads = operators.run(g, problem)
        assert [(x.shape, x.dtype) for x in grads] == [
            (x, torch.float32) for x in (q.shape, d.shape, shape, ())
        ]


def test_a_weight_of_another_dtype() -> None:
    q, d, weight = torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, dtype=torch.float64)
    for reduction in ("mean", "none"):
        for leaf in (q, q.clone().requires_grad_()):
            assert rf.info_nce(leaf, d, weight=weight, reduction=reduction).dtype == torch.float32


def test_log_sum_exp(info_nce_backend: Backend) -> None:
    tensors = batch(*ragged(info_nce_backend), K)
    mask = OPTIONS["hard"]["hard_mask"][: len(tensors["q"])]
    own = torch.einsum("bd,bkd->bk", tensors["q"], tensors["hard"]).masked_fill(~mask, -math.inf)
    gold = (torch.cat([tensors["q"] @ tensors["d"].T, own], 1) / 0.1).logsumexp(1)
    device = info_nce_backend.device
    options: dict[str, Any] = {"temperature": 0.1, "reduction": "none", "return_lse": True}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        cast = {name: x.to(device, dtype) for name, x in tensors.items()}
        loss, lse = rf.info_nce(**cast, hard_mask=mask.to(device), **options)
        torch.testing.assert_close(lse.cpu().double(), gold, rtol=tolerance, atol=tolerance)
        assert loss.shape == lse.shape == mask.shape[:1]
        assert not lse.requires_grad


@pytest.mark.parametrize("case", ["plain", "all", "several blocks"])
def test_deterministic_whatever_the_thread_count(case: str) -> None:
    """Several blocks of columns add to the same sums of the queries, in their order."""
    several = {"several blocks": {"symmetric": True, "normalize": True, "widths": [24, D]}}
    options = {**OPTIONS, **several}[case]
    shape = (300, 1500, D) if case in several else (B, N, D, K if case == "all" else 0)
    tensors, before, found = batch(*shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(value_and_gradients(rf.info_nce, tensors, torch.float32, 0.1, **options))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def slice_of_wider(x: Tensor) -> Tensor:
    """x as the slice of a larger matrix, whose rows are read in place."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 26)
    wide[..., 3 : 3 + x.shape[-1]] = x
    return wide[..., 3 : 3 + x.shape[-1]]


LAYOUTS = {
    "slices of wider matrices": dict.fromkeys(["q", "d", "hard"], slice_of_wider),
    "columns apart": {"q": lambda x: x.T.contiguous().T, "d": lambda x: x.T.contiguous().T},
    "every other": {"d": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]},
    "hard negatives first": {"hard": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(info_nce_backend: Backend, layout: str) -> None:
    tensors = {name: x.float() for name, x in batch(17, 40, 24, 2).items()}
    options = {"positives": torch.arange(34).flip(0)[::2], "device": info_nce_backend.device}
    strided = tensors | {name: f(tensors[name]) for name, f in LAYOUTS[layout].items()}
    assert all(torch.equal(strided[name], x) for name, x in tensors.items())
    found = value_and_gradients(rf.info_nce, strided, torch.float32, 0.05, **options)
    same = value_and_gradients(rf.info_nce, tensors, torch.float32, 0.05, **options)
    exact = {name: x.double() for name, x in tensors.items()}
    options["device"] = "cpu"
    gold = value_and_gradients(reference.info_nce, exact, torch.float64, 0.05, **options)
    # not bit by bit: how a row is read decides in which order a GPU adds it up
    bound = 4 * 2.0**-24 * 72 if info_nce_backend.name == "triton" else 2e-6
    for wanted in (gold, {name: x.double() for name, x in same.items()}):
        assert max(error(found, wanted).values()) < bound
