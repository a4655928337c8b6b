"""info_nce in torch's machinery: autograd, torch.compile, autocast, the module."""

from __future__ import annotations

import pytest
import torch
from info_nce_cases import OPTIONS, B, D, K, N, batch, error, value_and_gradients
from torch import Tensor

import refine_fast as rf
from refine_fast.ops import info_nce_operators as operators
from refine_fast.ops.info_nce_problem import Problem


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward(case: str, reduction: str) -> None:
    """The first backward hands its gradients over; changing them afterwards (here: zeroing them in
    place) does not affect the next."""
    tensors = {
        name: x.float().requires_grad_()
        for name, x in batch(B, N, D, K if case == "all" else 0).items()
    }
    loss, other = (
        rf.info_nce(**tensors, temperature=0.1, reduction=reduction, **OPTIONS[case]).sum()
        for _ in range(2)
    )
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
    """A step allocates its gradients through torch, once, in float32. (The kernel's own memory is
    not torch's.)"""
    q, d = (torch.randn(512, 256).to(dtype).requires_grad_() for _ in range(2))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        (2 * rf.info_nce(q, d)).backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    size = 4 * (q.numel() + d.numel())
    # 0.5 more: bfloat16, a piece at a time
    assert size <= allocated < (1.1 if dtype == torch.float32 else 1.6) * size


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

    def loss(q: Tensor, d: Tensor, hard: Tensor) -> Tensor:
        return rf.info_nce(q, d, hard=hard, temperature=0.5, symmetric=True, normalize=True)

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_break(case: str, reduction: str) -> None:
    tensors = batch(B, N, D, K if case == "all" else 0)
    compiled = torch.compile(rf.info_nce, fullgraph=True, backend="aot_eager")
    gold = value_and_gradients(
        rf.info_nce, tensors, torch.float32, 0.1, reduction=reduction, **OPTIONS[case]
    )
    found = value_and_gradients(
        compiled, tensors, torch.float32, 0.1, reduction=reduction, **OPTIONS[case]
    )
    # the compiler may multiply the scale of the loss in elsewhere
    assert max(error(found, gold).values()) < 1e-6


def test_compiles_with_settings_that_vary() -> None:
    """A temperature on a schedule: from the second value on, torch.compile traces it as a
    symbol."""
    torch.compiler.reset()
    compiled = torch.compile(rf.info_nce, fullgraph=True, backend="aot_eager")
    q, d = torch.randn(8, 16), torch.randn(8, 16)
    for x in (0.1, 0.2, 0.3):
        options = {"temperature": x, "margin": 10 * x, "widths": (8, 16), "width_weights": (x, 1.0)}
        torch.testing.assert_close(compiled(q, d, **options), rf.info_nce(q, d, **options))


def test_compiled_step_runs_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the forward serve the compiled backward too."""
    runs = []
    monkeypatch.setattr(
        operators,
        "run",
        lambda *args, run=operators.run: runs.append(args[0] is not None) or run(*args),
    )
    torch.compiler.reset()  # the cases above use up the number of recompilations
    q, d = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    torch.compile(rf.info_nce, fullgraph=True, backend="aot_eager")(q, d).backward()
    assert runs == [True]


def test_the_schema_names_the_problem() -> None:
    names = [argument.split()[-1] for argument in operators.SCHEMA.split(",")]
    assert tuple(names) == Problem._fields
    assert tuple(names[: len(operators.TENSORS)]) == operators.TENSORS


@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck(symmetric: bool) -> None:
    problem = Problem(
        q=torch.randn(6, 8, requires_grad=True),
        d=torch.randn(9, 8, requires_grad=True),
        temperature=torch.tensor(0.1, requires_grad=True),
        positives=torch.arange(6),
        doc_ids=torch.arange(9) % 7,
        hard=torch.randn(6, 2, 8, requires_grad=True),
        hard_mask=torch.ones(6, 2, dtype=torch.bool),
        margin=0.5,
        symmetric=symmetric,
        normalize=True,
        widths=[4, 8],
        width_weights=[0.5, 1.0],
    )
    ops = torch.ops.refine_fast
    torch.library.opcheck(ops.info_nce_losses.default, (*problem,))
    torch.library.opcheck(
        ops.info_nce_weighted_sum.default, (torch.rand(6, requires_grad=True), *problem)
    )
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


def test_module_learns_its_temperature() -> None:
    tensors = {name: x.float() for name, x in batch(16, 20, 8).items()}
    loss = rf.nn.InfoNCELoss(0.05, learnable=True, symmetric=True)
    gold = value_and_gradients(
        lambda **x: rf.info_nce(**x, symmetric=True, normalize=True), tensors, torch.float32, 0.05
    )
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
    assert loss.temperature > 0.01  # the parameter can leave the bound
    assert [name for name, _ in rf.nn.InfoNCELoss(0.05).named_parameters()] == []
