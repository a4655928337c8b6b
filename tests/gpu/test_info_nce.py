"""info_nce's Triton kernels against float64 of the same inputs, with small tiles so that every loop runs more than once and ends ragged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import refine_fast as rf
from refine_fast import reference
from refine_fast.ops import info_nce as operator

triton = pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")

from refine_fast.triton_kernels import info_nce  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")
EVERYTHING = {"K": 2, "mask": True, "ids": True, "positives": True, "margin": -0.3}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = info_nce.Tiling(16, 32, 16, warps=4, stages=2)
    monkeypatch.setattr(info_nce, "tiling", lambda capability, element_bytes: tile)
    monkeypatch.setattr(info_nce, "LEAST_WAVE", 16)
    monkeypatch.setattr(info_nce, "ENOUGH_PROGRAMS", 4)  # two splits of two tiles for the 19 x 75 cases


def problem(
    B: int, N: int, D: int, device: torch.device, *, K: int = 0, mask: bool = False, ids: bool = False, positives: bool = False,
    dtype: torch.dtype = torch.float32, scale: float = 1.0, normalize: bool = False, temperature: float = 0.05,
    margin: float | None = None, symmetric: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Inputs in which every term matters: related pairs, duplicated positives and ids, hard negatives near the query, uneven norms."""
    torch.manual_seed(B * N + D)
    owner = torch.randint(0, N, (B,)) if positives else torch.arange(B)
    q, d = torch.randn(B, D), torch.randn(N, D)
    if positives:
        owner[1] = owner[0]
    q = q + d[owner]
    hard = q[:, None] + 2 * torch.randn(B, K, D)  # about half of them under the margin's ceiling
    if normalize:
        q, d, hard = q * (0.5 + torch.rand(B, 1)), d * (0.5 + torch.rand(N, 1)), hard * (0.5 + torch.rand(B, K, 1))
    else:
        q, d, hard = (F.normalize(x, dim=-1) * scale for x in (q, d, hard))
    inputs = {
        "q": q.to(dtype), "d": d.to(dtype), "hard": hard.to(dtype) if K else None, "temperature": torch.tensor(temperature),
        "positives": owner if positives else None, "doc_ids": torch.randint(0, max(N // 2, 1), (N,)) if ids else None,
        "hard_mask": torch.rand(B, K) < 0.7 if mask else None,
    }  # fmt: skip
    inputs = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    return inputs | {"margin": margin, "symmetric": symmetric, "normalize": normalize}


def gold(inputs: dict[str, object], g: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss by row and the gradients, in float64."""
    leaves = {name: inputs[name].cpu().double().requires_grad_() for name in ("q", "d", "hard", "temperature") if inputs[name] is not None}
    rest = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in inputs.items() if name not in leaves}
    loss = reference.info_nce(**leaves, **rest, reduction="none")
    loss.backward(g.cpu().double())
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """In the Frobenius norm, relative; absolute where nothing is wanted (a single row has no negative)."""
    return float((found.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-6))


def tolerance(inputs: dict[str, object]) -> tuple[float, float]:
    """For the loss and the gradients. A logit of n bits (log2(e) |q| |d| / tau; 72 for unit vectors at tau=0.02) has an error of n * 2^-24,
    and its weight the same, relatively: 4 of them. 16-bit inputs are exact themselves; the weights, the scaled q and the result are rounded
    to bf16, 2^-9 each, at random. The interpreter truncates instead: 2^-8."""
    rounding = 2.0**-9 if inputs["q"].is_cuda else 2.0**-8
    norms = 1.0 if inputs["normalize"] else float(inputs["q"].float().norm(dim=1).max() * inputs["d"].float().norm(dim=1).max())
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
    "norms of 5 at tau=0.05: rows outside the window": ((19, 75, 24), {"scale": 5.0, "K": 2, "ids": True}),
    "bf16": ((19, 75, 48), EVERYTHING | {"normalize": True, "dtype": torch.bfloat16}),
    "fp16": ((19, 75, 48), EVERYTHING | {"normalize": True, "dtype": torch.float16}),
}


@pytest.mark.parametrize("workspace", [512 << 20, 30_000, 4_000], ids=["one wave", "waves", "tiles"])
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


@pytest.mark.parametrize("case", ["everything, both directions", "norms of 5 at tau=0.05: rows outside the window", "bf16"])
def test_gradients_from_the_losses_of_an_earlier_call(case: str, small_tiles: None, device: torch.device) -> None:
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
    reduction: str, widths: tuple[int, ...] | None, small_tiles: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """refine_fast.info_nce over these kernels, autograd, weights and widths included; without a GPU its CPU branch is sent here."""
    monkeypatch.setattr(operator, "_run_cpu", lambda g, *problem: operator._run_gpu(g, problem, None))
    inputs = problem(19, 75, 24, device, **EVERYTHING, normalize=True, symmetric=True)
    weight = torch.rand(19, device=device) + 0.5
    found, wanted = [], []
    for dtype, place, call, results in ((torch.float32, device, rf.info_nce, found), (torch.float64, "cpu", reference.info_nce, wanted)):
        leaves = {name: inputs[name].detach().clone().to(place, dtype).requires_grad_() for name in ("q", "d", "hard", "temperature")}
        rest = {name: x.to(place) if isinstance(x, torch.Tensor) else x for name, x in inputs.items() if name not in leaves}
        options = {"widths": widths, "width_weights": widths and (0.5, 1, 2), "reduction": reduction}
        loss = call(**leaves, **rest, weight=weight.to(place, dtype), **options)
        loss.sum().backward()
        results += [loss.detach(), *(leaf.grad for leaf in leaves.values())]
    assert all(error(ours, theirs) < tolerance(inputs)[1] for ours, theirs in zip(found, wanted, strict=True))


def test_equal_inputs_give_equal_bits(small_tiles: None, device: torch.device) -> None:
    inputs = problem(33, 75, 24, device, **EVERYTHING)
    g = torch.ones(33, device=device)
    first, again = (info_nce.gradients(g, **inputs)[1] for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("q", "d", "hard", "temperature"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_margin_of_0_keeps_what_stands_twice(normalize: bool, dtype: torch.dtype, small_tiles: None, device: torch.device) -> None:
    """A document that stands twice, as a hard negative too, ties with itself; a query does in the other direction. In float64 a margin of
    1e-9 says so; nothing else lies that near."""
    inputs = problem(40, 40, 100, device, K=1, dtype=dtype, normalize=normalize, temperature=1.0, symmetric=True)
    q, d = inputs["q"], inputs["d"]
    q[30:], d[10:20], inputs["hard"][:] = q[:10], d[:10], d[:, None]
    wanted = reference.info_nce(
        **{k: x.cpu().double() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()} | {"margin": 1e-9}, reduction="none"
    )
    assert error(info_nce.losses(**inputs | {"margin": 0.0}).mean(0), wanted) < 1e-5


@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_masked_is_not_read(normalize: bool, small_tiles: None, device: torch.device) -> None:
    """Padding may hold anything, NaN too."""
    inputs = problem(19, 40, 24, device, K=2, mask=True, normalize=normalize)
    first, again = (
        info_nce.gradients(
            torch.ones(19, device=device), **inputs | {"hard": inputs["hard"].masked_fill(~inputs["hard_mask"][..., None], padding)}
        )[1]
        for padding in (0.0, float("nan"))
    )
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("q", "d", "hard", "temperature"))


def test_strided_inputs(small_tiles: None, device: torch.device) -> None:
    """A slice of a larger matrix is read in place; a transposed one is copied."""
    inputs = problem(17, 40, 24, device, K=2)
    g = torch.ones(17, device=device)
    losses, grads = info_nce.gradients(g, **inputs)
    wide = torch.zeros(17, 50, device=device)
    wide[:, 3:27] = inputs["q"]
    hard = inputs["hard"].transpose(0, 1).contiguous().transpose(0, 1)
    strided = inputs | {"q": wide[:, 3:27], "d": inputs["d"].T.contiguous().T, "hard": hard}
    other_losses, other = info_nce.gradients(g, **strided)
    # not bit by bit: how a row is read decides in which order a GPU adds it up
    bound = tolerance(inputs)[1]
    assert error(other_losses, losses.cpu().double()) < bound
    assert error(other.d, grads.d.cpu().double()) < bound
    assert error(other.hard, grads.hard.cpu().double()) < bound


def test_no_rows(device: torch.device) -> None:
    inputs = problem(2, 5, 8, device, K=2, symmetric=True)
    inputs |= {"q": inputs["q"][:0], "hard": inputs["hard"][:0]}
    losses, grads = info_nce.gradients(torch.ones(0, device=device), **inputs)
    assert info_nce.losses(**inputs).shape == losses.shape == (2, 0)
    assert grads.d.shape == (5, 8)
    assert not grads.d.any()


@pytest.mark.parametrize("text", ["15", "-1", "a lot"])
def test_a_workspace_that_cannot_be_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINE_FAST_WORKSPACE_MB", text)
    with pytest.raises(ValueError, match=r"REFINE_FAST_WORKSPACE_MB is .* at least 16"):
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
    ids=["the target", "1 M needs blocks", "the least workspace", "no room for d's sum", "a small batch is one wave"],
)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_plan_stays_inside_the_workspace(B: int, N: int, D: int, mb: int, waves: bool, element_bytes: int) -> None:
    found, used = planned(B, N, D, element_bytes, mb << 20)
    assert found.waves == waves
    assert used <= mb << 20
    assert waves or used > (mb << 20) * 0.7  # and makes use of it


def planned(B: int, N: int, D: int, element_bytes: int, workspace: int) -> tuple[info_nce.Plan, int]:
    """The plan and the bytes that it takes beyond the gradients. That of d comes after the last wave, beside its sum."""
    tile = info_nce.tiling((9, 0), element_bytes)
    found = info_nce.plan(B, N, D, element_bytes=element_bytes, copies=False, workspace=workspace, tile=tile)
    rows, cols = min(found.rows, B), triton.cdiv(min(found.cols, N), tile.n) * tile.n
    used = rows * cols * element_bytes + rows * D * (element_bytes + 4) + cols * D * 4 + 4 * rows * triton.cdiv(cols, tile.n)
    return found, max(used - N * D * element_bytes, 4 * N * D) if found.waves else used


@pytest.mark.parametrize("D", [384, 768, 1024])
def test_one_percent_of_eager_at_the_target(D: int) -> None:
    """Torch holds three bf16 B x N matrices at its peak: the log-softmax, its gradient and that of the logits."""
    B = 65_536
    _, used = planned(B, B, D, 2, 240 << 20)
    assert used < 3 * 2 * B * B / 100
