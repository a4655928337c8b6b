"""Inputs and measures that the tests of info_nce share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import refine_fast as rf
from refine_fast import reference


def batch(B: int, N: int, D: int, K: int = 0, *, seed: int = 0) -> dict[str, Tensor]:
    """Unit vectors in float64. Row i of d is the nearer to query i the larger i is: at every
    temperature some rows have a large loss and some almost none."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=-1)

    d = unit(N, D)
    q = torch.linspace(0, 1, B)[:, None] * d[:B] + unit(B, D)
    tensors = {"q": torch.nn.functional.normalize(q, dim=-1), "d": d}
    if K:
        hard = tensors["q"][:, None] + 2 * unit(B, K, D)
        tensors["hard"] = torch.nn.functional.normalize(hard, dim=-1)
    return tensors


def value_and_gradients(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    temperature: float,
    *,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Tensor]:
    """The loss and every gradient of sum_i (1 + i / B) loss_i (of 1.7 loss where it is a scalar):
    every row counts differently. Computed on ``device``, returned on the CPU."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {name: x.to(device, dtype).detach() for name, x in tensors.items()}
    leaves["temperature"] = torch.tensor(temperature, dtype=exact, device=device)
    if "weight" in options:
        leaves["weight"] = options.pop("weight").to(device, exact).detach().clone()
    for x in leaves.values():
        x.requires_grad_()
    options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    loss = function(**leaves, **options)
    rows = torch.linspace(1, 2, len(loss), dtype=exact, device=device) if loss.ndim else 1.7
    (loss * rows).sum().backward()
    return {"loss": loss.detach().cpu()} | {name: x.grad.cpu() for name, x in leaves.items()}


def error(found: dict[str, Tensor], gold: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each tensor in the Frobenius norm."""
    return {
        name: float((found[name].double() - x).norm() / x.norm().clamp_min(1e-300))
        for name, x in gold.items()
    }


def errors(
    tensors: dict[str, Tensor], dtype: torch.dtype, temperature: float, **options: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Ours and torch's, in ``dtype``, against float64 on the rounded inputs."""
    rounded = {name: x.to(dtype).double() for name, x in tensors.items()}
    temperature = float(torch.tensor(temperature, dtype=torch.float32))
    gold = value_and_gradients(reference.info_nce, rounded, torch.float64, temperature, **options)
    ours, torchs = (
        value_and_gradients(f, rounded, dtype, temperature, **options)
        for f in (rf.info_nce, reference.info_nce)
    )
    return error(ours, gold), error(torchs, gold)


def assert_as_exact_as_torch(
    tensors: dict[str, Tensor], dtype: torch.dtype, temperature: float, **options: Any
) -> None:
    """Of one draw, small and ragged. fp32: at most twice torch's error (the order of summation is
    each level's own), or 5e-7, 8 roundings; 16 bits: no worse than torch, whose softmax is in 16
    bits too. `test_temperatures` is the sharp one."""
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
    # ragged; some rows have none
    "hard": {"hard_mask": (torch.arange(B * K).reshape(B, K) * 7 % 5) > 1},
    "symmetric": {"symmetric": True},
    "normalize": {"normalize": True},
    "weight": {"weight": torch.linspace(0, 2, B, dtype=torch.float64)},
    # slices of 7, 9 and 24 columns
    "widths": {"widths": (7, 16, D), "width_weights": (0.5, 0.0, 2.0)},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}

# a teacher's shares of 0.9 in each row; some columns are unused, the row's positive, or dropped by
# their id or mask
_COLUMNS = torch.arange(B * 4).reshape(B, 4) * 29 % (N + K + 1) - 1
_SHARES = torch.linspace(-2, 2, B * 4, dtype=torch.float64).reshape(B, 4).softmax(1) * 0.9
OPTIONS["soft"] = {"soft_columns": _COLUMNS.clamp(max=N - 1), "soft_targets": _SHARES}
OPTIONS["soft and all"] = {
    **{name: value for name, value in OPTIONS["all"].items() if name != "margin"},
    "soft_columns": _COLUMNS,
    "soft_targets": _SHARES,
}
