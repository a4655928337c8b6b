"""Interpolation where the tensors are: the bits of the reference, on the GPU where there is one,
and through fuse_into's lanes."""

from __future__ import annotations

import ast
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import OnGPU
from safetensors.torch import save_file
from torch import nn

from refine_fast import _native, reference
from refine_fast.errors import RefineFastError
from refine_fast.fuse import fuse_into, into, stream_to_device
from refine_fast.ops import lerp
from refine_fast.ops.lerp import lerp_

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8)


def emulated_lerp(base: torch.Tensor, tuned: torch.Tensor, weight: float) -> None:
    """The CUDA kernel over tests/cuda_emulation, on CPU tensors."""
    codes = _native.DTYPES
    _native.cuda_module().lerp(
        base.data_ptr(),
        codes[base.dtype],
        tuned.data_ptr(),
        codes[tuned.dtype],
        base.numel(),
        weight,
        0,
    )


def draw(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers with the values that go wrong first: infinities, zeros of both signs,
    denormals, the largest."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    special = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), 1e-40, -1e-7, 65504.0, 1.0], dtype=torch.float64
    )
    x[: min(n, 8)] = special[: min(n, 8)]
    return x.to(dtype)


@pytest.mark.parametrize("base_dtype", FLOATS)
@pytest.mark.parametrize("tuned_dtype", FLOATS)
@pytest.mark.parametrize(
    "n", [0, 1, 7, 8, 4099], ids=["none", "one", "less than a pack", "one pack", "a ragged tail"]
)
def test_bits_of_the_reference(
    base_dtype: torch.dtype, tuned_dtype: torch.dtype, n: int, device: torch.device
) -> None:
    kernels = {"this device's": lerp_} | (
        {"emulated CUDA": emulated_lerp} if hasattr(_native.cuda_module(), "emulate") else {}
    )
    for offset in (0, 1):  # 1: no access of 16 bytes is aligned
        for weight in (0.35, -0.2, 0.5, 0.0, 1.0):
            base, tuned = draw(n + offset, base_dtype, 1), draw(n + offset, tuned_dtype, 2)
            tuned[8:16] = base[8:16].to(tuned_dtype)
            wanted = reference.lerp(base, tuned, weight)
            for name, interpolate in kernels.items():
                found = base.to(device, copy=True)
                interpolate(found[offset:], tuned.to(device)[offset:], weight)
                same = (bits(found[offset:]) == bits(wanted[offset:])) | found[
                    offset:
                ].cpu().isnan().repeat_interleave(base.itemsize)
                assert same.all(), (name, offset, weight)
                assert torch.equal(found.cpu().isnan()[offset:], wanted.isnan()[offset:])


class Small(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        for i, dtype in enumerate([*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2]):
            self.register_parameter(
                f"weight{i}",
                nn.Parameter(
                    torch.randn(37, 53, generator=torch.Generator().manual_seed(seed + i)).to(dtype)
                ),
            )
        self.strided = nn.Parameter(
            torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)).T
        )
        self.register_buffer("steps", torch.arange(3))


@pytest.fixture
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of 1 KiB, so that a parameter takes many chunks."""
    monkeypatch.setattr(stream_to_device, "BUFFER_BYTES", 1024)
    monkeypatch.setattr(into, "BUFFER_BYTES", 1024)


@pytest.mark.parametrize(
    "tuned_dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=["own dtypes", "bf16", "fp8"]
)
@pytest.mark.parametrize("with_base", [False, True])
def test_fuse_into(
    tuned_dtype: torch.dtype | None,
    with_base: bool,
    tmp_path: Path,
    small_lanes: None,
    device: torch.device,
) -> None:
    model, tuned, base = Small(1).to(device), Small(2), Small(3)
    for name, module in (("tuned", tuned), ("base", base)):
        content = {key: value.contiguous() for key, value in module.state_dict().items()}
        if name == "tuned" and tuned_dtype is not None:
            content = {
                key: value.to(tuned_dtype) if value.is_floating_point() else value
                for key, value in content.items()
            }
        save_file(content, tmp_path / f"{name}.safetensors")
    start = base if with_base else Small(1)
    fuse_into(
        model,
        tmp_path / "tuned.safetensors",
        0.35,
        base=tmp_path / "base.safetensors" if with_base else None,
    )
    for (name, found), ours, theirs in zip(
        model.named_parameters(), start.parameters(), tuned.parameters(), strict=True
    ):
        wanted = reference.lerp(
            ours, theirs if tuned_dtype is None else theirs.to(tuned_dtype), 0.35
        )
        assert torch.equal(bits(found), bits(wanted)), name
    assert model.strided.stride() == (1, 24)
    assert torch.equal(model.steps.cpu(), torch.arange(3))


def test_a_failed_read_ends_the_others_and_is_raised(
    tmp_path: Path, small_lanes: None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    save_file(
        {key: value.contiguous() for key, value in Small(2).state_dict().items()},
        tmp_path / "tuned.safetensors",
    )
    stream = into.stream_to_device

    def truncate_and_stream(*arguments: object) -> None:
        os.truncate(tmp_path / "tuned.safetensors", 2048)
        stream(*arguments)

    monkeypatch.setattr(into, "stream_to_device", truncate_and_stream)
    with pytest.raises(RefineFastError, match="was truncated while it was read"):
        fuse_into(Small(1).to(device), tmp_path / "tuned.safetensors")


def test_cuda_module_imports_without_a_driver() -> None:
    cuda = _native.cuda_module()
    if cuda is None:
        pytest.skip("_cuda was not built: put nvcc of CUDA 12 or newer on PATH and install again")
    tree = ast.parse((Path(_native.__file__).parent / "_cuda.pyi").read_text())
    stub = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert stub == {name for name in dir(cuda) if name[0] != "_"} - {"emulate"}
    if not (torch.cuda.is_available() or hasattr(cuda, "emulate")):
        with pytest.raises(RuntimeError, match=r"CUDA error: .*driver"):
            cuda.lerp(0, 0, 0, 0, 16, 0.5, 0)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_too_old_for_the_kernel(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has torch's expression; CPU tensors stand for those on the GPU."""
    called = []
    kernel = SimpleNamespace(lerp=lambda *arguments: called.append(arguments))
    for module in (_native, lerp):
        monkeypatch.setattr(module, "cuda_module", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    base, tuned = draw(20, torch.float32, 1), draw(20, torch.float32, 2)
    wanted = reference.lerp(base, tuned, 0.35) if capability < (7, 5) else base.clone()
    lerp_(base.as_subclass(OnGPU), tuned.as_subclass(OnGPU), 0.35)
    assert len(called) == (capability >= (7, 5))
    assert torch.equal(bits(base), bits(wanted))
