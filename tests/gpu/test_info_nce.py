"""info_nce's Triton kernels by themselves against float64 of the same inputs, with small tiles so
that every loop runs more than once and ends ragged. tests/test_info_nce.py runs them too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import refine_fast as rf
from refine_fast import reference

triton = pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")

from refine_fast.triton_kernels import info_nce, info_nce_plan  # noqa: E402

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan", "interpreted_bf16")
EVERYTHING = {"K": 2, "mask": True, "ids": True, "positives": True, "margin": -0.3}


def problem(
    B: int, N: int, D: int, device: torch.device, *, K: int = 0, mask: bool = False,
    ids: bool = False, positives: bool = False, dtype: torch.dtype = torch.float32,
    scale: float = 1.0, normalize: bool = False, temperature: float = 0.05,
    margin: float | None = None, symmetric: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Inputs in which every term matters: related pairs, duplicated positives and ids, hard
    negatives near the query, uneven norms."""
    torch.manual_seed(B * N + D)
    owner = torch.randint(0, N, (B,)) if positives else torch.arange(B)
    q, d = torch.randn(B, D), torch.randn(N, D)
    if positives:
        owner[1] = owner[0]
    q = q + d[owner]
    hard = q[:, None] + 2 * torch.randn(B, K, D)  # about half of them under the margin's ceiling
    if normalize:
        q = q * (0.5 + torch.rand(B, 1))
        d = d * (0.5 + torch.rand(N, 1))
        hard = hard * (0.5 + torch.rand(B, K, 1))
    else:
        q, d, hard = (F.normalize(x, dim=-1) * scale for x in (q, d, hard))
    inputs = {
        "q": q.to(dtype),
        "d": d.to(dtype),
        "hard": hard.to(dtype) if K else None,
        "temperature": torch.tensor(temperature),
        "positives": owner if positives else None,
        "doc_ids": torch.randint(0, max(N // 2, 1), (N,)) if ids else None,
        "hard_mask": torch.rand(B, K) < 0.7 if mask else None,
    }
    inputs = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    return inputs | {"margin": margin, "symmetric": symmetric, "normalize": normalize}


def gold(
    inputs: dict[str, object], g: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss by row and the gradients, in float64."""
    leaves = {
        name: inputs[name].cpu().double().requires_grad_()
        for name in ("q", "d", "hard", "temperature")
        if inputs[name] is not None
    }
    rest = {
        name: x.cpu() if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
        if name not in leaves
    }
    loss = reference.info_nce(**leaves, **rest, reduction="none")
    loss.backward(g.cpu().double())
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """In the Frobenius norm, relative; absolute where nothing is wanted (a single row has no
    negative)."""
    return float((found.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-6))


def tolerance(inputs: dict[str, object]) -> tuple[float, float]:
    """For the loss and the gradients. A logit of n bits (log2(e) |q| |d| / tau; 72 for unit vectors
    at tau=0.02) has an error of n * 2^-24, and its weight the same, relatively: 4 of them. 16-bit
    inputs are exact themselves; the weights, the scaled q and the result are rounded to bf16, 2^-9
    each, at random. The interpreter truncates instead: 2^-8."""
    rounding = 2.0**-9 if inputs["q"].is_cuda else 2.0**-8
    norms = 1.0
    if not inputs["normalize"]:
        for name in ("q", "d"):
            norms *= float(inputs[name].float().norm(dim=1).max())
    logit = 4 * 2.0**-24 * max(1.4427 * norms / float(inputs["temperature"]), 72)
    return logit, logit if inputs["q"].dtype == torch.float32 else rounding * 3**0.5


CASES = {
    "square, no option": ((32, 32, 32), {}),
    "one row": ((1, 1, 8), {}),
    "ragged, D no multiple of the tile": ((19, 75, 23), EVERYTHING),
    "D=384": ((17, 40, 384), {"ids": True, "normalize": True}),
    "everything, normalized": ((19, 75, 24), EVERYTHING | {"normalize": True, "symmetric": True}),
    "everything, both directions": ((19, 75, 24), EVERYTHING | {"symmetric": True}),
    "tau=0.01: logits to 144 bits": ((19, 75, 24), {"temperature": 0.01, "K": 1}),
    "norms of 5 at tau=0.05: rows outside the window": (
        (19, 75, 24),
        {"scale": 5.0, "K": 2, "ids": True},
    ),
    "bf16": ((19, 75, 48), EVERYTHING | {"normalize": True, "dtype": torch.bfloat16}),
    "fp16": ((19, 75, 48), EVERYTHING | {"normalize": True, "dtype": torch.float16}),
}


@pytest.mark.parametrize(
    "workspace", [512 << 20, 30_000, 4_000], ids=["one wave", "waves", "tiles"]
)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, workspace: int, small_tiles: None, device: torch.device) -> None:
    (B, N, D), options = CASES[case]
    inputs = problem(B, N, D, device, **options)
    g = torch.rand(B, device=device) + 0.1
    wanted_loss, wanted = gold(inputs, g)
    losses, grads = info_nce.gradients(g, workspace=workspace, **inputs)
    assert error(losses.mean(0), wanted_loss) < tolerance(inputs)[0]
    for name, gradient in wanted.items():
        assert error(getattr(grads, name), gradient) < tolerance(inputs)[1], name
        assert getattr(grads, name).dtype == info_nce.gradient_dtype(inputs[name].dtype)


@pytest.mark.parametrize(
    "case",
    ["everything, both directions", "norms of 5 at tau=0.05: rows outside the window", "bf16"],
)
def test_gradients_from_the_losses_of_an_earlier_call(
    case: str, small_tiles: None, device: torch.device
) -> None:
    (B, N, D), options = CASES[case]
    inputs = problem(B, N, D, device, **options)
    g = torch.rand(B, device=device) - 0.5
    wanted_loss, wanted = gold(inputs, g)
    losses = info_nce.losses(**inputs)
    assert error(losses.mean(0), wanted_loss) < tolerance(inputs)[0]
    _, grads = info_nce.gradients(g, losses=losses, **inputs)
    for name, gradient in wanted.items():
        assert error(getattr(grads, name), gradient) < tolerance(inputs)[1], name


@pytest.mark.parametrize("widths", [None, (8, 12, 24)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_operator(
    reduction: str,
    widths: tuple[int, ...] | None,
    triton_path: torch.device,
) -> None:
    """refine_fast.info_nce over these kernels, autograd, weights and widths included."""
    device = triton_path
    inputs = problem(19, 75, 24, device, **EVERYTHING, normalize=True, symmetric=True)
    weight = torch.rand(19, device=device) + 0.5
    found, wanted = [], []
    for dtype, place, call, results in (
        (torch.float32, device, rf.info_nce, found),
        (torch.float64, "cpu", reference.info_nce, wanted),
    ):
        leaves = {
            name: inputs[name].detach().clone().to(place, dtype).requires_grad_()
            for name in ("q", "d", "hard", "temperature")
        }
        rest = {
            name: x.to(place) if isinstance(x, torch.Tensor) else x
            for name, x in inputs.items()
            if name not in leaves
        }
        options = {
            "widths": widths,
            "width_weights": widths and (0.5, 1, 2),
            "reduction": reduction,
        }
        loss = call(**leaves, **rest, weight=weight.to(place, dtype), **options)
        loss.sum().backward()
        results += [loss.detach(), *(leaf.grad for leaf in leaves.values())]
    assert all(
        error(ours, theirs) < tolerance(inputs)[1]
        for ours, theirs in zip(found, wanted, strict=True)
    )


def test_equal_inputs_give_equal_bits(small_tiles: None, device: torch.device) -> None:
    inputs = problem(33, 75, 24, device, **EVERYTHING)
    g = torch.ones(33, device=device)
    first, again = (info_nce.gradients(g, **inputs)[1] for _ in range(2))
    assert all(
        torch.equal(getattr(first, name), getattr(again, name))
        for name in ("q", "d", "hard", "temperature")
    )


@pytest.mark.parametrize("text", ["15", "-1", "a lot"])
def test_a_workspace_too_small_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_FAST_WORKSPACE_MB", text)
    with pytest.raises(
        ValueError, match=r"REFINE_FAST_WORKSPACE_MB must be an integer >= 16 \(got "
    ):
        info_nce.workspace_bytes()


@pytest.mark.parametrize(
    ("B", "N", "D", "mb", "waves"),
    [
        (65_536, 65_536, 768, 512, True),
        (1 << 20, 1 << 20, 768, 512, False),
        (65_536, 65_536, 768, 16, False),
        (65_536, 65_536, 1_024, 240, False),
        (512, 8_192, 384, 64, True),
    ],
    ids=[
        "the target",
        "1 M needs blocks",
        "the smallest workspace",
        "no room for d's sum",
        "a small batch is one wave",
    ],
)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_plan_stays_inside_the_workspace(
    B: int, N: int, D: int, mb: int, waves: bool, element_bytes: int
) -> None:
    found, used = planned(B, N, D, element_bytes, mb << 20)
    assert found.waves == waves
    assert used <= mb << 20
    assert waves or used > (mb << 20) * 0.7  # and uses most of it


def planned(
    B: int, N: int, D: int, element_bytes: int, workspace: int
) -> tuple[info_nce_plan.Plan, int]:
    """The plan and the bytes that it takes beyond the gradients. That of d comes after the last
    wave, beside its sum."""
    tile = info_nce_plan.tiling((9, 0), element_bytes)
    found = info_nce_plan.plan(
        B, N, D, element_bytes=element_bytes, copies=False, workspace=workspace, tile=tile
    )
    rows, cols = min(found.rows, B), triton.cdiv(min(found.cols, N), tile.n) * tile.n
    used = (
        rows * cols * element_bytes
        + rows * D * (element_bytes + 4)
        + cols * D * 4
        + 4 * rows * triton.cdiv(cols, tile.n)
    )
    return found, max(used - N * D * element_bytes, 4 * N * D) if found.waves else used


@pytest.mark.parametrize("D", [384, 768, 1024])
def test_one_percent_of_eager_at_the_target(D: int) -> None:
    """Torch holds three bf16 B x N matrices at its peak: the log-softmax, its gradient and that of
    the logits."""
    B = 65_536
    _, used = planned(B, B, D, 2, 240 << 20)
    assert used < 3 * 2 * B * B / 100


def test_no_room_for_the_losses_is_not_blamed_on_the_workspace(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They use none of it."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(info_nce, "_directions", lambda *_, **__: full())
    inputs = problem(19, 75, 24, device)
    with pytest.raises(torch.OutOfMemoryError) as without:
        info_nce.losses(**inputs)
    said = "info_nce of 19 rows found no room for its vectors; lower the batch size"
    assert str(without.value) == said
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"for 64 MB of .* lower REFINE_FAST_WORKSPACE_MB \(at least 16\) or the batch size",
    ):
        info_nce.gradients(torch.ones(19, device=device), workspace=64 << 20, **inputs)
