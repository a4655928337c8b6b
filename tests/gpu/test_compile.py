"""What runs on no GPU here is at least built for one: every Triton kernel to machine code, its
registers and instructions read back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from refine_fast import _native

triton = pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# bytes a thread: what the epilogue of a tile spills outside the inner loop (none with triton 3.6,
# 112 with 3.9)
STACK_LIMIT = 128
SHARED_LIMIT = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, object]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_triton.py"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_no_kernel_spills_and_each_fits(kernels: list[dict[str, object]]) -> None:
    programs = {(k["kernel"], k["dtype"], k["capability"], k["form"]) for k in kernels}
    assert len(programs) == 7 * 8 + 2
    for kernel in kernels:
        # rows of an odd D are loaded element by element, which takes too many registers
        assert kernel["stack_bytes"] <= STACK_LIMIT or kernel["form"] == "odd D", kernel
        assert kernel["shared"] <= SHARED_LIMIT[kernel["capability"]], kernel


def test_tiles_are_multiplied_on_the_tensor_cores(kernels: list[dict[str, object]]) -> None:
    """wgmma on sm_90, mma on sm_80, operands copied asynchronously on both; sm_75 does without in
    today's Triton."""
    tiles = [k for k in kernels if "BLOCK_M" in k["constants"] and k["capability"] >= 80]
    assert len(tiles) == 2 * 6 + 2
    for kernel in tiles:
        assert kernel["wgmma" if kernel["capability"] == 90 else "mma"] > 0, kernel
        # 4 bytes at least are copied so
        assert kernel["async_copies"] > 0 or kernel["form"] == "odd D", kernel
        # the row sums; weights go 16 bytes at a time, which a mask of columns would prevent
        assert kernel["narrow_stores"] <= 2, kernel


def test_no_cuda_kernel_spills() -> None:
    """Of the extension as it is installed, for each architecture: a spill takes a stack."""
    cuda = _native.cuda_module()
    if cuda is None or hasattr(cuda, "emulate"):
        pytest.skip("_cuda was not built: put nvcc of CUDA 12 or newer on PATH and install again")
    assert cuda.__file__
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cuda.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    stacks: dict[str, dict[str, int]] = {}  # architecture -> kernel -> bytes a thread
    for code in usage.split("Fatbin elf code:")[1:]:
        kernels = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", code)
        stacks.setdefault(re.search(r"arch = (\w+)", code)[1], {}).update(
            (name, int(stack)) for name, stack in kernels
        )
    assert "sm_90" in stacks
    sources = [path for path in CUDA.glob("*.cu") if "__global__" in path.read_text()]
    assert len(sources) == 4  # band_topk.cu is host code
    for kernels in stacks.values():
        assert all(any(f"_{path.stem}_cu_" in name for name in kernels) for path in sources)
        assert not any(kernels.values()), kernels
