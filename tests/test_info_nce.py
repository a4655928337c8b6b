"""info_nce against float64 at every ISA level, and the promises of its docstring."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import refine_fast as rf
from refine_fast import reference
from refine_fast.ops import info_nce as operator


def batch(B: int, N: int, D: int, K: int = 0, *, seed: int = 0) -> dict[str, Tensor]:
    """Unit vectors. The larger i, the nearer is row i of d to query i, from not at all: at every temperature some rows have a large loss,
    some next to none."""
    generator = torch.Generator().manual_seed(seed)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)  # noqa: E731
    d = unit(N, D)
    tensors = {"q": torch.nn.functional.normalize(torch.linspace(0, 1, B)[:, None] * d[:B] + unit(B, D), dim=-1), "d": d}
    if K:
        tensors["hard"] = torch.nn.functional.normalize(tensors["q"][:, None] + 2 * unit(B, K, D), dim=-1)
    return tensors


def value_and_gradients(
    function: Callable[..., Any], tensors: dict[str, Tensor], dtype: torch.dtype, temperature: float, **options: Any
) -> dict[str, Tensor]:
    """The loss and every gradient of sum_i (1 + i / B) loss_i (of 1.7 loss where it is a scalar): every row counts differently."""
    leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in tensors.items()}
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    leaves["temperature"] = torch.tensor(temperature, dtype=exact, requires_grad=True)
    if "weight" in options:
        leaves["weight"] = options.pop("weight").to(exact).detach().requires_grad_()
    loss = function(**leaves, **options)
    (loss * (torch.linspace(1, 2, len(loss), dtype=exact) if loss.ndim else 1.7)).sum().backward()
    return {"loss": loss.detach()} | {name: x.grad for name, x in leaves.items()}


def error(found: dict[str, Tensor], gold: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name].double() - gold[name]).norm() / gold[name].norm().clamp_min(1e-300)) for name in gold}


def errors(tensors: dict[str, Tensor], dtype: torch.dtype, temperature: float, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Ours and torch's, in ``dtype``, against float64 on the rounded inputs."""
    rounded = {name: x.to(dtype).double() for name, x in tensors.items()}
    temperature = float(torch.tensor(temperature, dtype=torch.float32))
    gold = value_and_gradients(reference.info_nce, rounded, torch.float64, temperature, **options)
    ours, torchs = (value_and_gradients(f, rounded, dtype, temperature, **options) for f in (rf.info_nce, reference.info_nce))
    return error(ours, gold), error(torchs, gold)


def assert_as_exact_as_torch(tensors: dict[str, Tensor], dtype: torch.dtype, temperature: float, **options: Any) -> None:
    """Of one draw, small and ragged. fp32: at most twice torch's error (the order of summation is each level's own), or 5e-7, 8 roundings;
    16 bits: no worse than torch, whose softmax is in 16 bits too. `test_temperatures` is the sharp one."""
    ours, torchs = errors(tensors, dtype, temperature, **options)
    for name, value in ours.items():
        limit = max(2 * torchs[name], 5e-7) if dtype == torch.float32 else torchs[name]
        assert value <= limit, f"{name}: error {value:.2e}, torch's {torchs[name]:.2e}"


B, N, D, K = 67, 131, 40, 3  # no tile size divides any of them
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "positives": {"positives": torch.arange(B).flip(0) * 131 // 67},  # anywhere in d, some twice
    "ids": {"doc_ids": torch.arange(N) % 50},  # 2 or 3 columns to an id: false negatives
    "margin": {"margin": -0.5},  # drops the nearer half of the negatives
    "hard": {"hard_mask": (torch.arange(B * K).reshape(B, K) * 7 % 5) > 1},  # ragged; some rows have none
    "symmetric": {"symmetric": True},
    "normalize": {"normalize": True},
    "weight": {"weight": torch.linspace(0, 2, B, dtype=torch.float64)},
    "widths": {"widths": (7, 16, D), "width_weights": (0.5, 0.0, 2.0)},  # slices of 7, 9 and 24 columns
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_term(isa: str, case: str, reduction: str) -> None:
    tensors = batch(B, N, D, K if "hard_mask" in OPTIONS[case] else 0)
    if "normalize" in OPTIONS[case]:
        lengths = torch.linspace(0.5, 3, N, dtype=torch.float64)
        tensors = {name: x * lengths[: len(x)].reshape(-1, *[1] * (x.ndim - 1)) for name, x in tensors.items()}
    assert_as_exact_as_torch(tensors, torch.float32, 0.1, reduction=reduction, **OPTIONS[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.05, 1.0])
def test_temperatures(isa: str, temperature: float, dtype: torch.dtype) -> None:
    """No less exact than torch: the root mean square of each error over three draws. A single number is rounded: the loss by 2^-24 of
    it, the temperature's gradient by 2^-23, for the factor of the loss rounds it once more. Ours / torch's, AVX-512:

        temperature          .005              .02               .05               1
        fp32  loss           0.2e-7 / 0.6e-7   0.3e-7 / 0.4e-7   0.3e-7 / 0.5e-7   0.2e-7 / 0.9e-7
              q              0.7e-6 / 2.2e-6   0.3e-6 / 0.9e-6   0.2e-6 / 0.5e-6   1.7e-7 / 2.6e-7
              d              0.6e-6 / 1.2e-6   0.2e-6 / 0.8e-6   0.2e-6 / 0.4e-6   1.4e-7 / 1.9e-7
              hard           1.0e-6 / 2.9e-6   0.5e-6 / 1.1e-6   0.3e-6 / 0.6e-6   0.7e-7 / 2.4e-7
              temperature    0.7e-7 / 6.9e-7   0.5e-7 / 3.4e-7   0.5e-7 / 3.4e-7   0.2e-7 / 0.9e-7
        bf16  loss           0.3e-7 / 3.2e-3   0.2e-7 / 2.3e-3   0.3e-7 / 1.8e-3   0.3e-7 / 0.7e-3
              q and d        1.7e-3 / 5.2e-2   1.8e-3 / 2.6e-2   2.2e-3 / 1.9e-2   2.0e-3 / 4.8e-3
    """
    drawn = [errors(batch(100, 300, 384, 3, seed=seed), dtype, temperature) for seed in range(3)]
    for name in drawn[0][0]:
        ours, torchs = (math.sqrt(statistics.fmean(one[side][name] ** 2 for one in drawn)) for side in (0, 1))
        limit = max(torchs, {"loss": 2**-24, "temperature": 2**-23}.get(name, 0))
        assert ours <= limit, f"{name}: error {ours:.2e}, torch's {torchs:.2e}"


def test_the_other_direction_sums_a_long_column(isa: str) -> None:
    """4,095 times exp(-0.6), one query after the other: the additions round alike, and a plain float32 chain ends up wrong by 1e-5."""
    q, d = torch.full((4096, 1), 0.4), torch.ones(4096, 1)
    q[0] = 1
    found, gold = (rf.info_nce(x, y, temperature=1, symmetric=True, reduction="none")[0] for x, y in ((q, d), (q.double(), d.double())))
    assert abs(found - gold) <= 2**-23 * gold


# One row (loss 0 without a second document), one column more, MiniLM's width (Inf-CL refuses 384), more columns than a block of 192 (and a
# ragged tail: Inf-CL's mask is misaligned there), more rows than a strip of 640, a width below every granularity, none.
@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 1), (5, 5, 384), (33, 400, 48), (700, 701, 17), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_shapes(isa: str, shape: tuple[int, int, int], symmetric: bool) -> None:
    assert_as_exact_as_torch(batch(*shape), torch.float32, 0.05, symmetric=symmetric)


# Packing 16-bit rows: ragged rows, columns and widths, rows that end within a vector; 17 is odd, so no pair of columns comes out even.
@pytest.mark.parametrize("shape", [(33, 70, 17), (20, 210, 45), (5, 7, 384)], ids=str)
@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_in_16_bits(isa: str, shape: tuple[int, int, int], dtype: torch.dtype, case: str) -> None:
    options = {"plain": {}, "all": {"normalize": True, "symmetric": True, "widths": (8, 12, shape[-1])}}[case]
    assert_as_exact_as_torch(batch(*shape), dtype, 0.05, **options)


def test_widths_are_the_sum_of_their_losses(isa: str) -> None:
    tensors = {name: x.float() for name, x in batch(B, N, D, K).items()}
    loss = rf.info_nce(**tensors, normalize=True, widths=(8, D), width_weights=(0.25, 1), reduction="none", return_lse=True)
    full = rf.info_nce(**tensors, normalize=True, reduction="none", return_lse=True)
    half = rf.info_nce(**{name: x[..., :8] for name, x in tensors.items()}, normalize=True, reduction="none")
    torch.testing.assert_close(loss[0], full[0] + 0.25 * half)
    torch.testing.assert_close(loss[1], full[1])


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_any_logits(isa: str, scale: float) -> None:
    """Logits of +-1e6: most exponentials underflow, and no fixed shift would serve every row."""
    tensors = batch(40, 60, 32)
    tensors["q"] = tensors["q"] * torch.logspace(0, math.log10(scale), 40, dtype=torch.float64)[:, None]
    assert_as_exact_as_torch(tensors, torch.float32, 1.0, symmetric=True)


def test_a_row_without_negatives_has_loss_0(isa: str) -> None:
    q, d = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    hard, mask = torch.randn(4, 2, 8, requires_grad=True), torch.zeros(4, 2, dtype=torch.bool)
    temperature = torch.tensor(0.02, requires_grad=True)
    same = torch.zeros(6, dtype=torch.int64)
    loss = rf.info_nce(q, d, hard=hard, hard_mask=mask, doc_ids=same, temperature=temperature, reduction="none")
    assert loss.tolist() == [0, 0, 0, 0]
    loss.sum().backward()  # NeMo's temperature gradient is NaN where padding is masked
    assert all(x.grad is not None and not x.grad.any() for x in (q, d, hard, temperature))


@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_masked_is_not_read(isa: str, normalize: bool) -> None:
    """Padding may hold anything, NaN too."""
    tensors, mask = batch(B, N, D, K), OPTIONS["hard"]["hard_mask"]
    found = []
    for padding in (0.0, math.nan):
        tensors["hard"] = tensors["hard"].masked_fill(~mask[..., None], padding)
        found.append(value_and_gradients(rf.info_nce, tensors, torch.float32, 0.1, hard_mask=mask, normalize=normalize))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_margin_of_0_keeps_what_stands_twice(isa: str, normalize: bool, dtype: torch.dtype) -> None:
    """The same query with another document (and the same document with another query) ties with the pair: not above the margin, wherever
    the two lie in the kernels' tiles. In float64 a margin of 1e-9 says so; nothing else lies that near."""
    q, d = batch(B, B, 200, seed=1).values()
    q[40:], d[20:40] = q[: B - 40], d[:20]
    q, d = q.to(dtype), d.to(dtype)
    options = {"symmetric": True, "normalize": normalize, "widths": (30, 200), "temperature": 1.0, "reduction": "none"}
    gold = rf.info_nce(q.double(), d.double(), margin=1e-9, **options)
    torch.testing.assert_close(rf.info_nce(q, d, margin=0.0, **options).double(), gold, rtol=1e-5, atol=1e-5)


def test_a_margin_that_drops_everything(isa: str) -> None:
    tensors = {name: x.float() for name, x in batch(5, 7, 8, 2).items()}
    assert rf.info_nce(**tensors, margin=-math.inf, symmetric=True) == 0


def test_no_rows() -> None:
    q, d = torch.zeros(0, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    loss = rf.info_nce(q, d)
    loss.backward()
    assert loss == 0
    assert q.grad.shape == (0, 8)
    assert not d.grad.any()
    assert rf.info_nce(q, d, weight=torch.zeros(0)) == 0
    assert rf.info_nce(torch.randn(2, 8), d, weight=torch.zeros(2)) == 0


def test_a_weight_of_another_dtype() -> None:
    q, d, weight = torch.randn(4, 8), torch.randn(4, 8), torch.rand(4, dtype=torch.float64)
    for reduction in ("mean", "none"):
        for leaf in (q, q.clone().requires_grad_()):
            assert rf.info_nce(leaf, d, weight=weight, reduction=reduction).dtype == torch.float32


def test_log_sum_exp() -> None:
    tensors = batch(B, N, D, K)
    options = {"hard_mask": OPTIONS["hard"]["hard_mask"], "temperature": 0.1}
    s = torch.cat([tensors["q"] @ tensors["d"].T, torch.einsum("bd,bkd->bk", tensors["q"], tensors["hard"])], 1) / 0.1
    s[:, N:] = s[:, N:].masked_fill(~options["hard_mask"], -math.inf)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        loss, lse = rf.info_nce(**{k: x.to(dtype) for k, x in tensors.items()}, **options, reduction="none", return_lse=True)
        torch.testing.assert_close(lse.double(), s.logsumexp(1), rtol=tolerance, atol=tolerance)
        assert loss.shape == lse.shape == (B,)
        assert not lse.requires_grad


@pytest.mark.parametrize("case", ["plain", "all"])
def test_deterministic_whatever_the_thread_count(case: str) -> None:
    tensors, before, found = batch(B, N, D, K if case == "all" else 0), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(value_and_gradients(rf.info_nce, tensors, torch.float32, 0.1, **OPTIONS[case]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_strided_inputs() -> None:
    q, d = torch.randn(16, 10).T, torch.randn(40, 32)[::2, ::2]
    options = {"positives": torch.arange(20).flip(0)[::2]}
    torch.testing.assert_close(rf.info_nce(q, d, **options), reference.info_nce(q, d, **options))


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward(case: str, reduction: str) -> None:
    """The first backward hands its gradients over; what becomes of them (here: zeroed in place) is no concern of the next."""
    tensors = {name: x.float().requires_grad_() for name, x in batch(B, N, D, K if case == "all" else 0).items()}
    loss, other = (rf.info_nce(**tensors, temperature=0.1, reduction=reduction, **OPTIONS[case]).sum() for _ in range(2))
    gold = torch.autograd.grad(3 * other, list(tensors.values()))
    for _ in range(3):
        for x in tensors.values():
            x.grad = None
        (3 * loss).backward(retain_graph=True)
        torch.testing.assert_close([x.grad for x in tensors.values()], list(gold))
        for x in tensors.values():
            x.grad.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_handed_over(dtype: torch.dtype) -> None:
    """What a step allocates through torch is its gradients, once, in float32. (The kernel's own memory is not torch's.)"""
    q, d = (torch.randn(512, 256).to(dtype).requires_grad_() for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        (2 * rf.info_nce(q, d)).backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    size = 4 * (q.numel() + d.numel())
    assert size <= allocated < (1.1 if dtype == torch.float32 else 1.6) * size  # 0.5: bfloat16, a piece at a time


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction: str) -> None:
    q, d = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    loss = rf.info_nce(q, d, reduction=reduction).sum() * q.sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, q, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_float64_runs_the_reference() -> None:
    tensors = {name: x.requires_grad_() for name, x in batch(5, 7, 4, 2).items()}
    loss = lambda q, d, hard: rf.info_nce(q, d, hard=hard, temperature=0.5, symmetric=True, normalize=True)  # noqa: E731
    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))


# --- torch's machinery ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(case: str, reduction: str) -> None:
    tensors = batch(B, N, D, K if case == "all" else 0)
    compiled = torch.compile(rf.info_nce, fullgraph=True, backend="aot_eager")
    gold = value_and_gradients(rf.info_nce, tensors, torch.float32, 0.1, reduction=reduction, **OPTIONS[case])
    found = value_and_gradients(compiled, tensors, torch.float32, 0.1, reduction=reduction, **OPTIONS[case])
    assert max(error(found, gold).values()) < 1e-6  # the scale of the loss may be multiplied in elsewhere


def test_compiles_with_settings_that_vary() -> None:
    """A temperature on a schedule: from the second value on, torch.compile traces it as a symbol."""
    torch.compiler.reset()
    compiled = torch.compile(rf.info_nce, fullgraph=True, backend="aot_eager")
    q, d = torch.randn(8, 16), torch.randn(8, 16)
    for x in (0.1, 0.2, 0.3):
        options = {"temperature": x, "margin": 10 * x, "widths": (8, 16), "width_weights": (x, 1.0)}
        torch.testing.assert_close(compiled(q, d, **options), rf.info_nce(q, d, **options))


def test_compiled_step_runs_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the forward serve the compiled backward too."""
    runs = []
    monkeypatch.setattr(operator, "_run", lambda *args, run=operator._run: runs.append(args[0] is not None) or run(*args))
    torch.compiler.reset()  # the cases above use up the number of recompilations
    q, d = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    torch.compile(rf.info_nce, fullgraph=True, backend="aot_eager")(q, d).backward()
    assert runs == [True]


@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck(symmetric: bool) -> None:
    problem = [
        torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True), torch.tensor(0.1, requires_grad=True),
        torch.arange(6), torch.arange(9) % 7, torch.randn(6, 2, 8, requires_grad=True), torch.ones(6, 2, dtype=torch.bool),
        0.5, symmetric, True, [4, 8], [0.5, 1.0],
    ]  # fmt: skip
    ops = torch.ops.refine_fast
    torch.library.opcheck(ops.info_nce_losses.default, tuple(problem))
    torch.library.opcheck(ops.info_nce_weighted_sum.default, (torch.rand(6, requires_grad=True), *problem))
    losses = ops.info_nce_losses(*problem)[1].detach()
    detached = [x.detach() if isinstance(x, Tensor) else x for x in problem]
    torch.library.opcheck(ops.info_nce_gradients.default, (torch.rand(6), losses, *detached))


def test_autocast() -> None:
    tensors = {name: x.float().requires_grad_() for name, x in batch(32, 40, 64).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rf.info_nce(**tensors)
    loss.backward()
    lower = {name: x.detach().bfloat16().requires_grad_() for name, x in tensors.items()}
    rf.info_nce(**lower).backward()
    assert loss.dtype == torch.float32
    for name, x in tensors.items():
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, lower[name].grad.float())


# --- bad input ------------------------------------------------------------------------------------------------------------------------

q, d = torch.randn(4, 8), torch.randn(6, 8)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": q[:, :7]}, ValueError, r"q has shape \(4, 7\) and d \(6, 8\)"),
    ({"q": q[0]}, ValueError, "q has shape"),
    ({"d": d[:3]}, ValueError, "d has 3 rows for 4 queries"),
    ({"positives": torch.arange(5)}, ValueError, r"positives has shape \(5,\)"),
    ({"positives": torch.tensor([0, 1, 2, 6])}, ValueError, "positives holds 6; it must be a row of d, 0 to 5"),
    ({"positives": torch.tensor([0, 1, 2, -1])}, ValueError, "positives holds -1"),
    ({"positives": torch.arange(4.0)}, TypeError, "positives is torch.float32; it must be torch.int64"),
    ({"doc_ids": torch.arange(4)}, ValueError, "doc_ids has shape"),
    ({"hard": torch.randn(4, 2, 7)}, ValueError, "hard has shape"),
    ({"hard": torch.randn(4)}, ValueError, "hard has shape"),
    ({"hard_mask": torch.ones(4, 2, dtype=torch.bool)}, ValueError, "hard_mask is given without hard"),
    ({"hard": torch.randn(4, 2, 8), "hard_mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, "hard_mask has shape"),
    ({"hard": torch.randn(4, 2, 8), "hard_mask": torch.ones(4, 2)}, TypeError, "hard_mask is torch.float32"),
    ({"d": d.bfloat16()}, TypeError, "d is torch.bfloat16 and q torch.float32"),
    ({"q": q.long(), "d": d.long()}, TypeError, "floating-point"),
    ({"d": d.to("meta")}, ValueError, "d is on meta and q on cpu"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be a positive number"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature is -1.0"),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\)"),
    ({"temperature": math.nan}, ValueError, "temperature is nan"),
    ({"margin": math.nan}, ValueError, "margin is NaN"),
    ({"weight": torch.ones(3)}, ValueError, "weight has shape"),
    ({"widths": (4, 4, 8)}, ValueError, r"widths is \[4, 4, 8\]; it must ascend from at least 1 to the 8 columns of q"),
    ({"widths": (4,)}, ValueError, "widths is"),
    ({"widths": (4, 8), "width_weights": (1,)}, ValueError, r"width_weights is \[1.0\]; it must hold one finite number"),
    ({"width_weights": (1,)}, ValueError, "width_weights is given without widths"),
    ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
    ({"q": q * math.nan}, ValueError, "row 0 of q holds NaN or infinity"),
    ({"d": torch.cat([d[:5], d[5:] * math.nan]), "doc_ids": torch.zeros(6, dtype=torch.int64)}, ValueError, "row 5 of d holds NaN"),
    ({"q": q.abs(), "d": torch.cat([d[:5], d[5:].abs() * -math.inf])}, ValueError, "row 5 of d holds NaN or infinity"),  # no logit is NaN
    ({"hard": torch.cat([d[:4], d[:4] * math.nan], 1).reshape(4, 2, 8)}, ValueError, r"row 1 of hard.flatten\(0, 1\) holds NaN"),
    ({"q": q * 1e30, "d": d * 1e30}, ValueError, "the loss of row . is not finite: a product of q and d or hard overflows float32"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=[f"{next(iter(o))}-{i}" for i, (o, _, _) in enumerate(BAD)])
def test_bad_input(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rf.info_nce(**{"q": q, "d": d, **options})


INTERRUPTED = """
import _thread, threading, time, torch, refine_fast as rf
torch.set_num_threads(1)
q, d = torch.randn(60_000, 64, requires_grad=True), torch.randn(60_000, 64)
def interrupt():
    global asked
    asked = time.monotonic()
    _thread.interrupt_main()
rf.info_nce(q[:8], d[:8], symmetric=True)
threading.Timer(0.5, interrupt).start()
try:
    rf.info_nce(q, d, symmetric=True)
except KeyboardInterrupt:
    print(time.monotonic() - asked)
"""


def test_an_interrupt_is_heard() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 5, done.stderr  # 0.1 s on an idle machine; the whole call takes longer than the process may


# --- the module -----------------------------------------------------------------------------------------------------------------------


def test_module_learns_its_temperature() -> None:
    tensors = {name: x.float() for name, x in batch(16, 20, 8).items()}
    loss = rf.nn.InfoNCELoss(0.05, learnable=True, symmetric=True)
    gold = value_and_gradients(lambda **x: rf.info_nce(**x, symmetric=True, normalize=True), tensors, torch.float32, 0.05)
    value = loss(tensors["q"], tensors["d"])
    (1.7 * value).backward()
    torch.testing.assert_close(value.detach(), gold["loss"])
    torch.testing.assert_close(loss.log_temperature.grad, gold["temperature"] * 0.05)
    with torch.no_grad():
        loss.log_temperature.fill_(-20)
    loss(tensors["q"], tensors["d"]).backward()
    assert loss.temperature.item() == pytest.approx(0.01)
    with torch.no_grad():
        loss.log_temperature -= 0.001 * loss.log_temperature.grad.sign()
    assert loss.temperature > 0.01  # the bound is no trap
    assert [name for name, _ in rf.nn.InfoNCELoss(0.05).named_parameters()] == []
