"""What runs on no GPU here is at least built for one: every Triton kernel to machine code, its
registers and instructions read back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name
)
def test_cuda_sources_compile_without_spills(source: Path, arch: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc on PATH, of CUDA 12 or newer")
    target = f"arch={arch.replace('sm', 'compute')},code={arch}"
    command = [
        nvcc,
        "-std=c++17",
        f"-I{ROOT / 'csrc'}",
        "-gencode",
        target,
        "-Xptxas",
        "-v",
        "-cubin",
        "-o",
        os.devnull,
        str(source),
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    has_kernels = "__global__" in source.read_text()
    assert ("Used" in report) == has_kernels  # band_topk.cu is host code
    found = {int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", report)}
    assert found == ({0} if has_kernels else set())
