"""The shape of a logits tile, and how much of the weight matrix is in memory at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton

MIN_WAVE = 512
"""Rows of a wave; with fewer, dd's sum costs more than the two products of the other plan."""
TARGET_WEIGHTS = 1 << 27
"""Weights of a wave; at B = 65,536 more take memory and gain little."""


@dataclass(frozen=True)
class Tiling:
    """A logits tile, m rows by n columns in steps of k, and its warps and pipeline stages.

    The choice is bound by shared memory: stages x (m + n) x k x element size.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the keyword arguments of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tiling(capability: tuple[int, int], element_bytes: int) -> Tiling:
    """The largest tile whose accumulators fit the registers and whose operands fit a block's
    shared memory: 227 KB on sm_90, 163 on sm_80, 99 on consumer parts, 64 on sm_75.

    wgmma (sm_90) needs 64 x 256 per warpgroup. tf32x3 splits both operands in registers, and on
    sm_75 Triton multiplies without tensor cores from registers: both take smaller tiles.
    """
    if capability < (8, 0):
        return Tiling(64, 64, 32, warps=8, stages=2)
    if element_bytes == 4:
        return Tiling(64, 128, 32, warps=8, stages=3)
    if capability[0] == 9:
        return Tiling(128, 256, 64, warps=8, stages=4)
    if capability == (8, 0):
        return Tiling(128, 128, 64, warps=8, stages=4)
    return Tiling(128, 128, 32, warps=8, stages=3)


@dataclass(frozen=True)
class Plan:
    """The block of weights that is in memory at once: rows x cols; ``waves``: all columns."""

    rows: int
    cols: int
    waves: bool


def plan(
    B: int, N: int, D: int, *, element_bytes: int, copies: bool, workspace: int, tile: Tiling
) -> Plan:
    """The block, in whole tiles, that fits ``workspace`` bytes.

    A wave has no more rows than keep the GPU busy; a square block is as large as fits. The
    gradient of d is written after the last wave, where the weights were.

    Args:
        B: rows. N: columns. D: width.
        element_bytes: of a weight and of q and d, 2 or 4.
        copies: whether d has to be copied to bf16 (float16 inputs).
        workspace: bytes.
        tile: the logits tile.
    """
    copy = 2 * D if copies else 0
    gradient = (2 if element_bytes == 2 and not copies else 4) * D
    # weights, scaled q, dq, row sums
    per_row = element_bytes * (N + tile.n + D) + 4 * D + 4 * triton.cdiv(N, tile.n)
    rows = (workspace - N * (4 * D + copy - gradient)) // per_row // tile.m * tile.m
    if rows >= min(MIN_WAVE, B) and workspace >= 4 * N * D:
        rows = min(rows, max(MIN_WAVE, TARGET_WEIGHTS // N) // tile.m * tile.m)
        waves = triton.cdiv(B, rows)
        return Plan(triton.cdiv(triton.cdiv(B, waves), tile.m) * tile.m, N, waves=True)
    # of a square block: scaled q and a float32 gradient on either side
    per_side = (element_bytes + 8) * D + copy
    area = element_bytes + 4 / tile.n
    side = (math.sqrt(per_side**2 + 4 * area * workspace) - per_side) / (2 * area)
    size = max(int(side) // tile.n * tile.n, tile.n)
    return Plan(size, size, waves=False)
