"""What info_nce refuses, what it falls back to, and the promises of its docstring."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import OnGPU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import refine_fast as rf
from refine_fast import errors, reference, triton_kernels
from refine_fast.errors import RefineFastWarning
from refine_fast.ops import info_nce as info_nce_module
from refine_fast.ops import info_nce_operators as operators

q, d = torch.randn(4, 8), torch.randn(6, 8)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": q[:, :7]}, ValueError, r"q has shape \(4, 7\) and d \(6, 8\)"),
    ({"q": q[0]}, ValueError, "q has shape"),
    ({"d": d[:3]}, ValueError, "d has 3 rows for 4 queries"),
    ({"positives": torch.arange(5)}, ValueError, r"positives has shape \(5,\)"),
    (
        {"positives": torch.tensor([0, 1, 2, 6])},
        ValueError,
        r"positives must be rows of d, 0 to 5 \(got 6\)",
    ),
    ({"positives": torch.tensor([0, 1, 2, -1])}, ValueError, r"positives must be .* \(got -1\)"),
    (
        {"positives": torch.arange(4.0)},
        TypeError,
        r"positives must be torch.int64 \(got torch.float32\)",
    ),
    ({"doc_ids": torch.arange(4)}, ValueError, "doc_ids has shape"),
    ({"hard": torch.randn(4, 2, 7)}, ValueError, "hard has shape"),
    ({"hard": torch.randn(4, 8)}, ValueError, r"hard has shape \(4, 8\).* be \(4, 1, 8\)"),
    ({"hard": torch.randn(4)}, ValueError, "hard has shape"),
    (
        {"hard_mask": torch.ones(4, 2, dtype=torch.bool)},
        ValueError,
        "hard_mask is given without hard",
    ),
    (
        {"hard": torch.randn(4, 2, 8), "hard_mask": torch.ones(4, 3, dtype=torch.bool)},
        ValueError,
        "hard_mask has shape",
    ),
    (
        {"hard": torch.randn(4, 2, 8), "hard_mask": torch.ones(4, 2)},
        TypeError,
        r"hard_mask must be torch.bool \(got torch.float32\)",
    ),
    ({"d": d.bfloat16()}, TypeError, "d is torch.bfloat16 and q torch.float32"),
    ({"q": q.long(), "d": d.long()}, TypeError, "floating-point"),
    ({"d": d.to("meta")}, ValueError, "d is on meta and q on cpu"),
    ({"temperature": 0.0}, ValueError, r"temperature must be a positive number \(got 0.0\)"),
    (
        {"temperature": torch.tensor(-1.0)},
        ValueError,
        r"temperature must be a positive number .* \(got -1.0\)",
    ),
    ({"temperature": torch.tensor(math.inf)}, ValueError, r"positive number .* \(got inf\)"),
    (
        {"temperature": 1e-39},
        ValueError,
        r"with a finite inverse in torch.float32 \(got 1.0\d*e-39\)",
    ),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\)"),
    ({"temperature": math.nan}, ValueError, r"temperature must be a positive number \(got nan\)"),
    ({"margin": math.nan}, ValueError, r"margin must be a number \(got NaN\)"),
    ({"weight": torch.ones(3)}, ValueError, "weight has shape"),
    ({"weight": torch.ones(4, device="meta")}, ValueError, r"on meta; it must be \(4,\) on cpu"),
    (
        {"widths": (4, 4, 8)},
        ValueError,
        r"widths must ascend from at least 1 to the 8 columns of q \(got \[4, 4, 8\]\)",
    ),
    ({"widths": (4,)}, ValueError, r"widths must ascend .* \(got \[4\]\)"),
    ({"widths": (0, 8)}, ValueError, r"widths must ascend .* \(got \[0, 8\]\)"),
    ({"widths": ()}, ValueError, r"widths must ascend .* \(got \[\]\)"),
    (
        {"widths": (4, 8), "width_weights": (1,)},
        ValueError,
        r"width_weights must hold one finite number for each .* \(got \[1.0\]\)",
    ),
    ({"width_weights": (1,)}, ValueError, "width_weights is given without widths"),
    ({"reduction": "avg"}, ValueError, r"reduction must be .* \(got 'avg'\)"),
    ({"q": q * math.nan}, ValueError, "row 0 of q holds NaN or infinity"),
    (
        {"d": torch.cat([d[:5], d[5:] * math.nan]), "doc_ids": torch.zeros(6, dtype=torch.int64)},
        ValueError,
        "row 5 of d holds NaN",
    ),
    (
        {"q": q.abs(), "d": torch.cat([d[:5], d[5:].abs() * -math.inf])},
        ValueError,
        "row 5 of d holds NaN or infinity",  # although no logit is NaN
    ),
    (
        {"hard": torch.cat([d[:4], d[:4] * math.nan], 1).reshape(4, 2, 8)},
        ValueError,
        r"row 1 of hard.flatten\(0, 1\) holds NaN",
    ),
    ({"q": q.numpy(), "d": d.numpy()}, TypeError, r"q must be a torch tensor \(got ndarray\)"),
    ({"positives": [0, 1, 2, 3]}, TypeError, r"positives must be a torch tensor \(got list\)"),
    ({"widths": [2.0, 8]}, TypeError, r"widths must be integers \(got \[2.0, 8\]\)"),
    (
        {"q": q * 1e30, "d": d * 1e30},
        ValueError,
        "the loss of row . is not finite: a product of q and d or hard overflows float32",
    ),
]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    BAD,
    ids=[f"{next(iter(o))}-{i}" for i, (o, _, _) in enumerate(BAD)],
)
def test_bad_input(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rf.info_nce(**{"q": q, "d": d, **options})


def test_autocast_leaves_what_torch_leaves() -> None:
    """float64 stays, and an integer is refused as outside of it."""
    wide = {"q": q.double(), "d": d.double()}
    expected = rf.info_nce(**wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rf.info_nce(**wide), expected)
        assert not torch.equal(rf.info_nce(q, d), rf.info_nce(q.double(), d.double()).float())
        with pytest.raises(TypeError):
            rf.info_nce(q.int(), d.int())


def test_a_teacher_without_columns() -> None:
    none = {"soft_columns": torch.zeros(4, 0, dtype=torch.int64), "soft_targets": torch.ones(4, 0)}
    assert torch.equal(rf.info_nce(q, d, **none), rf.info_nce(q, d))


def test_rows_of_other_processes_are_no_positives_by_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rf.nn, "ranks", lambda: (0, 2))
    gathered = rf.nn.InfoNCELoss(gather=True)
    with pytest.raises(ValueError, match="d has 3 rows for 4 queries; give positives"):
        gathered(q, d[:3])
    with pytest.raises(ValueError, match="rows of this process's d, 0 to 3"):
        gathered(q, d[:4], positives=torch.tensor([0, 1, 2, 4]))
    for bad in (-1, 4):  # by the device
        positives = torch.tensor([0, 1, 2, bad]).as_subclass(OnGPU)
        with pytest.raises(RuntimeError, match="info_nce: positives must be rows of d"):
            gathered(q, d[:4], positives=positives)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_not_used_may_hold_anything(
    dtype: torch.dtype, soft: bool, normalize: bool
) -> None:
    """Padding that was allocated and never written; with a teacher too, whose shares torch adds."""
    options: dict[str, Any] = {"normalize": normalize, "temperature": 0.5}
    if soft:
        options |= {"soft_columns": torch.tensor([[5, 7]] * 4)}
        options |= {"soft_targets": torch.full((4, 2), 0.25)}
    mask = torch.tensor([[False, True], [True, True], [False, False], [True, False]])
    found = []
    for filler in (0.0, math.nan):
        hard = torch.ones(4, 2, 8, dtype=dtype).masked_fill(~mask[..., None], filler)
        leaves = [x.to(dtype).clone().requires_grad_() for x in (q, d, hard)]
        loss = rf.info_nce(leaves[0], leaves[1], hard=leaves[2], hard_mask=mask, **options)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    for clean, padded in zip(*found, strict=True):
        assert torch.equal(clean, padded)


def test_a_forward_derivative_is_refused() -> None:
    """torch would take it for zero."""

    def loss(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return rf.info_nce(x.to(dtype), d.to(dtype), temperature=0.5)

    trained = q.clone().requires_grad_()
    for call in (
        lambda: torch.func.jvp(loss, (q,), (q,)),
        lambda: torch.func.jvp(
            lambda t: rf.info_nce(q, d, temperature=t), (torch.tensor(0.5),), (torch.tensor(1.0),)
        ),
        lambda: torch.func.jvp(lambda w: rf.info_nce(trained, d, weight=w), (q[:, 0],), (q[:, 0],)),
        lambda: torch.func.jacfwd(loss)(q),
    ):
        with pytest.raises(RuntimeError, match="info_nce has no forward-mode derivative"):
            call()
    (slope,) = torch.autograd.grad(loss(trained), trained)
    exact = torch.func.jvp(lambda x: loss(x, torch.float64), (q,), (q,))[1]
    torch.testing.assert_close(exact.float(), (slope * q).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.zeros(6, 40, dtype=dtype)
    rows[:, 33] = torch.tensor([1, -1], dtype=dtype).repeat(3) * largest
    assert math.isclose(rf.info_nce(rows, torch.zeros_like(rows)), math.log(6), rel_tol=1e-6)
    for wrong in (math.inf, -math.inf, math.nan):
        rows[4, 38] = wrong
        with pytest.raises(ValueError, match="row 4 of q holds NaN or infinity"):
            rf.info_nce(rows, torch.zeros_like(rows))
        hard = rows.reshape(6, 1, 40)
        mask = torch.ones(6, 1, dtype=torch.bool)
        clean = torch.zeros_like(rows)
        with pytest.raises(ValueError, match=r"row 4 of hard.flatten\(0, 1\) holds NaN"):
            rf.info_nce(clean, clean, hard=hard, hard_mask=mask)
        mask[4] = False
        assert rf.info_nce(clean, clean, hard=hard, hard_mask=mask).isfinite()


def test_a_loss_checks_its_reduction_when_it_is_made() -> None:
    """With gather and several processes another word would be a sum."""
    with pytest.raises(ValueError, match=r"reduction must be .* \(got 'avg'\)"):
        rf.nn.InfoNCELoss(reduction="avg", gather=True)


INTERRUPTED = """
import _thread, threading, time, torch, refine_fast as rf
torch.set_num_threads({threads})
q, d = torch.randn(60_000, 64, requires_grad=True), torch.randn(60_000, 64)
def interrupt():
    global asked
    asked = time.process_time()
    _thread.interrupt_main()
rf.info_nce(q[:8], d[:8], symmetric=True)
for _ in range({times}):
    try:
        threading.Timer(0.5, interrupt).start()
        rf.info_nce(q, d, symmetric={symmetric})
    except KeyboardInterrupt:
        print(time.process_time() - asked)
"""


@pytest.mark.parametrize(
    ("threads", "symmetric", "times"),
    # before the gradients; most likely among them, where threads wait for each other
    [(1, True, 1), (2, False, 4)],
)
def test_an_interrupt_is_heard(threads: int, symmetric: bool, times: int) -> None:
    script = INTERRUPTED.format(threads=threads, symmetric=symmetric, times=times)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=500
    )
    # seconds of the CPU, the same on a busy machine: 0.1, of the 25 or more of the whole call
    waited = [float(line) for line in done.stdout.split()]
    assert len(waited) == times, done.stderr
    assert max(waited) < 5


HANDLED = """
import signal, sys, torch, refine_fast as rf
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.nn.functional.normalize(torch.randn(30_000, 256), dim=1)
q, d = x[:6_000].bfloat16(), x[6_000:20_000].bfloat16()
calls = []
def handler(*_):
    calls.append(torch.randn(64, 64).bfloat16() @ torch.randn(64, 64).bfloat16())
def both():
    return (
        rf.info_nce(q, d, temperature=0.05, reduction="none"),
        *rf.band_topk(x[:6_000], x, 5, band=(0.1, 0.3)),
    )
before = both()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.06, 0.06)
after = both()
signal.setitimer(signal.ITIMER_REAL, 0)
assert calls
assert all(torch.equal(one, other) for one, other in zip(before, after))
"""


def test_a_signal_handler_may_multiply() -> None:
    """On AMX a kernel holds the tiles of its thread, and so does oneDNN, which multiplies bf16: the
    kernel must have let go of them when it asks for signals."""
    subprocess.run([sys.executable, "-c", HANDLED], check=True, timeout=300)


@pytest.mark.parametrize("bad", [-1, 6])
def test_a_gpu_asserts_that_positives_are_rows_of_d(bad: int, triton_path: torch.device) -> None:
    """On the device, without a host synchronization, so not as a ValueError."""
    if triton_path.type == "cuda":
        pytest.skip("the assertion ends the CUDA context; tests/gpu/test_on_device.py covers it")
    positives = torch.tensor([0, 1, 2, bad])
    with pytest.raises(RuntimeError, match="info_nce: positives must be rows of d"):
        rf.info_nce(q, d, positives=positives)
    with pytest.raises(RuntimeError, match="info_nce: positives must be rows of d"):
        rf.info_nce(q.clone().requires_grad_(), d, positives=positives)


@pytest.mark.parametrize("bad", [-1, 6])
def test_no_kernel_reads_outside_d(
    bad: int, triton_path: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the assertion, a positive outside d reads its first or last row, never beyond."""
    monkeypatch.setattr(operators, "assert_values", lambda problem: None)
    surroundings = torch.full((18, 8), math.nan, device=triton_path)
    surroundings[6:12] = d.to(triton_path)
    leaves = [q.to(triton_path).requires_grad_(), surroundings[6:12].requires_grad_()]
    found = []
    for own in (bad, min(max(bad, 0), 5)):
        positives = torch.tensor([0, 1, 2, own], device=triton_path)
        loss = rf.info_nce(*leaves, positives=positives, symmetric=True)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(x.isfinite().all() for x in found[0])


@pytest.fixture
def warnings_forgotten() -> Iterator[None]:
    """Forgets the warnings that are issued once a process."""
    errors.warn_once.cache_clear()
    yield
    errors.warn_once.cache_clear()


def test_a_device_without_its_kernels_runs_the_reference(
    warnings_forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands for a GPU without triton."""
    monkeypatch.setitem(info_nce_module.KERNEL_DEVICES, "cpu", "install triton")
    leaves = [x.clone().requires_grad_() for x in (q, d)]
    with pytest.warns(RefineFastWarning, match="plain torch reference on cpu.*: install triton"):
        loss = rf.info_nce(*leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RefineFastWarning)
        assert torch.equal(rf.info_nce(*leaves), loss)
        compiled = torch.compile(rf.info_nce, backend="aot_eager")
        torch.testing.assert_close(compiled(*leaves), loss)
    gold = reference.info_nce(*leaves)
    assert torch.equal(loss, gold)
    found, wanted = (torch.autograd.grad(x, leaves) for x in (loss, gold))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class NoFloat64(TorchDispatchMode):
    """As a device without float64, such as Apple's."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = function(*args, **(kwargs or {}))
        assert getattr(found, "dtype", None) != torch.float64, function
        return found


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info_nce_module, "_has_kernel", lambda q: False)
    with NoFloat64():
        rf.info_nce(q.clone().requires_grad_(), d, temperature=0.05).backward()


def test_what_the_triton_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: object())
    for version, enough in (("2.9.1+cu128", False), ("2.11.0", True), ("2.13.0+cpu", True)):
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
        missing = triton_kernels.missing_requirement()
        wanted = None if enough else "install torch 2.11 or newer (found 2.9.1+cu128)"
        assert missing == wanted
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    assert triton_kernels.missing_requirement() == "install triton (pip install triton)"


PEAK = """
import re, sys, torch, refine_fast as rf
from pathlib import Path
N, isa, widths = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
torch.set_num_threads(1)
rf.force_isa(isa)
def peak(): return int(re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[0])
q, d = torch.randn(32, 8, requires_grad=True), torch.randn(N, 8, requires_grad=True)
rf.info_nce(q, d[:64], widths=widths)
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
before = peak()
loss = rf.info_nce(q, d, widths=widths)
print((peak() - before) * 1024 - q.nbytes - d.nbytes)
"""


@pytest.mark.parametrize("widths", [None, (4, 8)])
def test_memory_is_what_the_docstring_says(isa: str, widths: tuple[int, ...] | None) -> None:
    """24 MB of scores or m whole rows of them per width, and vectors of length N."""
    N, rows = 2_000_000, {"scalar": 4, "avx2": 6, "neon": 8, "amx": 32}.get(isa, 12)
    command = [sys.executable, "-c", PEAK, str(N), isa, str(widths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    scores = 4 * rows * N * len(widths or [8])
    assert int(done.stdout) <= max(24 << 20, scores) + 8 * N + (12 << 20)
