"""info_nce on a GPU: the order of the kernels and their workspace, with reasons.

    logits    x = (q d^T) log2(e) / tau, masked
    weights   e = exp2(x - shift), 0 where d_j is not a negative of q_i
    loss      log(1 + odds), odds = sum_j e_ij / e_i,positive
    gradient  dq = g / tau (P d - (1 - p) d_positive), dd = (g / tau P)^T q - ...,
              with P = e / row sum

Roofline, per pair of a row and a column of D numbers: S, dq and dd are 2 D FLOPs each, so 6 D is
the floor. The weights cannot stay on chip between S and both gradients: a row's sum must be known
first, and a tile serves one gradient by rows and the other by columns. Either they are written
once, 2 bytes in bf16, and read twice, 6 bytes against 6 D FLOPs (at D = 768 an H100's data sheet
gives 1.8 ps for the bytes and 5.8 ps for the FLOPs at 800 TFLOP/s, and the two overlap), or they
are recomputed, 2 D FLOPs more each time. Hence two plans, chosen by shape:

    waves   R rows at a time against all columns. e is R x N; dq is finished wave by wave, dd is
            summed over the waves in float32, N x D. 6 D FLOPs with the gradients in the forward.
            Each wave reads and writes that sum once, next to the 2 R N D FLOPs of dd alone: 8 N D
            bytes and the 2 R N of e take as long as those FLOPs at R of about 1,600 (D = 768), and
            less than the other plan's 4 D more from R = 512. Hence R = 2,048 at N = 65,536, if the
            workspace holds it.
    tiles   where the workspace cannot hold that: blocks of R x R, once for dq and once for dd:
            2 D for the loss + 4 D + 4 D = 10 D FLOPs, in any workspace down to 16 MB, whatever B
            and N.

The products with e are plain matrix products and use cuBLAS (torch.addmm, float32 sums). S is a
Triton kernel because the masks and the exponential belong in its registers. Two things make one
pass enough. (1) No running maximum: prepare_kernel bounds each row's largest logit from both
sides, and any shift within 150 powers of two of it serves, since bf16 and float32 have 8 bits of
exponent. For unit vectors that holds at every tau >= 0.02; a row for which it does not is found on
the device and gets its exact log-sum from one more pass over its block. (2) e stays unnormalized:
q is scaled by 1 / row sum instead. The positive is not part of e: the share of the negatives,
1 - p, is computed from their sum, without the cancellation of p - 1.

Predicted, not measured, for an H100 (798 TFLOP/s and 3.0 TB/s measured there by others), bf16,
B = 65,536, R = 2,048, from the sm_90 code: a tile of 128 x 256 takes 15,400 cycles of wgmma
m64n256k16 at D = 768 (L2 brings 48 KB a step of 64, about 80% of the peak's need), some 1,200 until
its first operands arrive, and an epilogue of 900 instructions a warp, no less than the 2,048 cycles
that 16 exponentials a cycle take: nothing overlaps those two. dd is bound by memory at D = 384
(224 us of bytes for 258 us of FLOPs at 768, 156 for 129 at 384).

    D       S     dd    dq, at 90%   with launches   the floor   fraction, or with 17% more per part
    384     210   160   143          533 us          387 us      0.73, 0.62
    768     351   275   287          933 us          775 us      0.83, 0.71
    1,024   444   360   382          1,206 us        1,033 us    0.86, 0.73

To be measured first (benchmarks/bench_gpu.py parts): tiles that overlap, 128 x 128 with two blocks
a processor (its operands take a third more of L2), or a persistent kernel whose next tile loads
during the epilogue; and whether cuBLAS splits dq's sum over N as it must: its R x D result at
D = 768 is 48 tiles for 132 processors. Where it does not, waves of 4,096 rows.

float32 inputs: S in tf32x3, or tf32 where torch's own switch for cuBLAS says so; e in float32 and
its products as torch is set. float16: S as given; e and its products in bf16, since e does not fit
float16's exponent. symmetric: both directions in turn, 12 D FLOPs, the first one's gradients held
beside the workspace. No host synchronization and no atomics: equal inputs give equal bits, and a
call can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..profiling import in_stage
from ..workspace import MIN_BYTES, VARIABLE, workspace_bytes
from . import info_nce_kernels as kernels
from .info_nce_plan import plan, tiling

COMBINE_BLOCK = 128
"""Rows per program of combine_kernel."""
TARGET_PROGRAMS = 8 * 132
"""Of the log-sum pass: the columns are split where the row blocks alone are fewer."""


@dataclass(frozen=True)
class Gradients:
    """dL/d of each input, in the input's dtype, but float32 for the temperature and for float16,
    whose exponent does not hold the gradient of a mean; ``hard`` is None without hard
    negatives."""

    q: Tensor
    d: Tensor
    hard: Tensor | None
    temperature: Tensor


@dataclass(frozen=True)
class _Rows:
    """Buffers that are filled row by row: the gradients of q and of its hard negatives, and the
    row's part of the temperature's."""

    q: Tensor
    hard: Tensor | None
    tau: Tensor


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the gradients of inputs in ``dtype``."""
    return torch.float32 if dtype == torch.float16 else dtype


@in_stage("gradients")
def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), out=out)


def _float32_precision() -> str:
    """tf32 where torch multiplies float32 so. If the newer of torch's two switches is set, reading
    the older one is an error."""
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):
        return "tf32" if switch.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if switch.allow_tf32 else "tf32x3"


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class Direction:
    """One direction of the loss, from the rows q to the columns d: its vectors of length B and N,
    and the kernels over them."""

    def __init__(
        self,
        q: Tensor,
        d: Tensor,
        positives: Tensor | None,
        ids: Tensor | None,
        hard: Tensor | None,
        hard_mask: Tensor | None,
        temperature: Tensor,
        margin: float | None,
        normalize: bool,
    ) -> None:
        q, d = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, d))
        self.q, self.d, self.temperature = q, d, temperature
        self.normalize, self.margin = normalize, margin
        self.B, self.N, self.D = len(q), len(d), q.shape[1]
        rows = torch.arange(self.N, device=q.device, dtype=torch.int32)
        # A positive outside d is the caller's to refuse; whatever it does, no kernel reads there.
        positives = None if positives is None else positives.clamp(0, self.N - 1)
        self.order, self.starts = _segments(positives, self.B, self.N, rows)
        self.positives = self.order if positives is None else positives
        ids = rows if ids is None else ids if ids.dtype == torch.int32 else _ranks(ids)
        self.row_ids = ids[self.positives]
        self.K = 0 if hard is None else hard.shape[1]
        self.hard = q if hard is None else hard if hard.stride(-1) == 1 else hard.contiguous()
        self.hard_mask = None if hard_mask is None else hard_mask.contiguous()
        norms = torch.linalg.vector_norm(d, dim=1, dtype=torch.float32)
        self.d_bound = norms.amax()
        self.col_scale = norms.clamp_min_(1e-12).reciprocal_() if normalize else norms
        # 1 / |d_j| belongs to both gradients; only its ratio to the largest enters the weights, so
        # that they keep their range
        self.fold_top = self.col_scale.amax() if normalize else torch.ones_like(self.d_bound)
        fold = self.col_scale / self.fold_top if normalize else self.col_scale
        (
            self.x_pos,
            self.row_scale,
            self.ceiling,
            self.shift,
            self.inverse,
            self.share,
            self.loss,
        ) = (self.new(self.B) for _ in range(7))
        self.hard_x, self.wide = self.new(self.B, self.K), self.new(self.B, dtype=torch.int8)
        self.element = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
        self.tile = tiling(capability, q.element_size())
        # padded to whole tiles, so that no kernel masks columns: the bias of a padded one is -inf
        beyond = -self.N % self.tile.n
        self.col_ids, self.col_scale, self.fold = (
            F.pad(x, (0, beyond)) for x in (ids, self.col_scale, fold)
        )
        self.col_bias = F.pad(torch.zeros_like(norms), (0, beyond), value=-math.inf)
        self.form = {"NORMALIZE": normalize, "MARGIN": margin is not None}
        self.tile_form = {
            **self.form,
            **self.tile.constants,
            "EVEN_K": self.D % self.tile.k == 0,
            "PRECISION": _float32_precision(),
        }
        self.row_form = {
            "BLOCK_D": triton.next_power_of_2(self.D),
            "num_warps": 4 if self.D <= 1024 else 8,
        }
        kernels.prepare_kernel[(self.B,)](
            q, d, self.hard, self.positives, self.hard_mask, temperature, self.d_bound,
            self.x_pos, self.hard_x, self.row_scale, self.ceiling, self.shift, self.wide,
            0.0 if margin is None else margin, self.D, self.K, q.stride(0), d.stride(0),
            *self.hard_strides, HARD_MASK=hard_mask is not None, **self.form, **self.row_form,
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized tensor on the device."""
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    @property
    def hard_strides(self) -> tuple[int, int]:
        """The strides of a row's hard negatives and of one of them; 0 without any."""
        return (self.hard.stride(0), self.hard.stride(1)) if self.K else (0, 0)

    @in_stage("softmax")
    def sum_wide_rows(self) -> None:
        """Computes the exact log-sum, as shift and loss, of the rows marked ``wide``."""
        tiles = triton.cdiv(self.N, self.tile.n)
        blocks = triton.cdiv(self.B, self.tile.m)
        per_split = triton.cdiv(tiles, max(1, min(tiles, TARGET_PROGRAMS // blocks)))
        splits = triton.cdiv(tiles, per_split)
        top, total = self.new(splits, self.B), self.new(splits, self.B)
        kernels.negatives_kernel[(blocks, splits)](
            self.q, self.d, self.row_scale, self.col_scale, self.col_bias, self.row_ids,
            self.col_ids, self.ceiling, self.wide, top, total, self.B, self.N, self.D,
            self.q.stride(0), self.d.stride(0), per_split, **self.tile_form,
        )  # fmt: skip
        kernels.combine_kernel[(triton.cdiv(self.B, COMBINE_BLOCK),)](
            top, total, self.wide, self.x_pos, self.hard_x, self.shift, self.loss,
            self.B, self.K, splits, BLOCK=COMBINE_BLOCK,
        )  # fmt: skip

    def losses(self) -> Tensor:
        """(B,) by the log-sum of every row; sets the shifts that make the weights
        probabilities."""
        self.wide.fill_(1)
        self.sum_wide_rows()
        return self.loss

    def shift_by(self, loss: Tensor) -> None:
        """As ``losses``, from the losses (B,) of an earlier call."""
        self.loss = loss
        self.shift = torch.add(self.x_pos, loss, alpha=1 / math.log(2))

    @in_stage("weights")
    def weights(self, rows: slice, cols: slice, e: Tensor) -> tuple[Tensor, Tensor]:
        """The block's weights, a view into the buffer e of whole tiles, and the row sums of its
        tiles."""
        q, d, c = self.q[rows], self.d[cols], slice(cols.start, None)
        tiles = triton.cdiv(len(d), self.tile.n)
        part = self.new(len(q), tiles)
        kernels.weights_kernel[(triton.cdiv(len(q), self.tile.m) * tiles,)](
            q, d, self.row_scale[rows], self.col_scale[c], self.col_bias[c], self.fold[c],
            self.row_ids[rows], self.col_ids[c], self.ceiling[rows], self.shift[rows], e, part,
            len(q), len(d), self.D, q.stride(0), d.stride(0), e.stride(0), tiles,
            **self.tile_form,
        )  # fmt: skip
        return e[: len(q), : len(d)], part

    @in_stage("pack")
    def scaled_q(self, rows: slice, g: Tensor, part: Tensor | None) -> Tensor:
        """g / tau / row sum * q, with the row sums of ``part``, or 1 where the shift already is the
        row's log-sum."""
        q = self.q[rows]
        out = self.new(len(q), self.D, dtype=self.element)
        tiles = 0 if part is None else part.shape[1]
        kernels.rows_kernel[(len(q),)](
            q, g[rows], self.temperature, self.x_pos[rows], self.hard_x[rows],
            self.row_scale[rows], self.shift[rows], part, self.loss[rows], self.inverse[rows],
            self.share[rows], out, self.D, self.K, q.stride(0), tiles,
            BLOCK_T=min(1024, triton.next_power_of_2(max(tiles, 1))), SUMMED=part is not None,
            **self.row_form,
        )  # fmt: skip
        return out

    @in_stage("finish")
    def finish_rows(
        self, rows: slice, g: Tensor, acc: Tensor, extra: Tensor | None, out: _Rows
    ) -> None:
        """Writes the gradients of ``rows`` from acc = sum_j e_ij d_j, plus ``extra`` (B, D)."""
        q = self.q[rows]
        kernels.finish_rows_kernel[(len(q),)](
            q, self.d, self.hard[rows], self.positives[rows], g[rows], self.temperature,
            self.fold_top, self.hard_x[rows], self.row_scale[rows], self.shift[rows],
            self.inverse[rows], self.share[rows], acc,
            None if extra is None else extra[rows], out.q[rows],
            (out.q if out.hard is None else out.hard)[rows], out.tau[rows],
            self.D, self.K, q.stride(0), self.d.stride(0), *self.hard_strides,
            EXTRA=extra is not None, NORMALIZE=self.normalize, **self.row_form,
        )  # fmt: skip

    @in_stage("finish")
    def finish_cols(
        self, cols: slice, g: Tensor, acc: Tensor, extra: Tensor | None, out: Tensor
    ) -> None:
        """Writes the gradients of the documents ``cols`` from acc = sum_i e_ij q_i, plus the rows
        of ``extra`` (B, D) whose positive they are."""
        d = self.d[cols]
        kernels.finish_cols_kernel[(len(d),)](
            self.q, d, self.order, self.starts[cols.start : cols.stop + 1], g, self.fold_top,
            self.row_scale, self.share, acc, extra, out[cols], self.D, self.q.stride(0),
            d.stride(0), EXTRA=extra is not None, NORMALIZE=self.normalize, **self.row_form,
        )  # fmt: skip

    def gradients(
        self,
        g: Tensor,
        *,
        loss: Tensor | None,
        workspace: int,
        extra: Gradients | None = None,
    ) -> Gradients:
        """The gradients of sum_i g_i loss_i.

        Args:
            g: (B,), the upstream gradient of each row's loss.
            loss: (B,) of an earlier call, or None to compute it on the way, as ``self.loss``.
            workspace: bytes.
            extra: gradients to add: its ``d`` by row of q, its ``q`` by the row's positive.
        """
        dtype, copies = gradient_dtype(self.q.dtype), self.q.dtype != self.element
        block = plan(
            self.B, self.N, self.D, element_bytes=self.element.itemsize, copies=copies,
            workspace=workspace, tile=self.tile,
        )  # fmt: skip
        if loss is not None:
            self.shift_by(loss)
        elif block.waves:
            self.sum_wide_rows()
        else:
            self.losses()
        hard = self.new(self.B, self.K, self.D, dtype=dtype) if self.K else None
        rows = _Rows(self.new(self.B, self.D, dtype=dtype), hard, self.new(self.B))
        to_q, to_d = (None, None) if extra is None else (extra.d, extra.q)
        if block.waves:
            acc = self._waves(block.rows, g, to_q, rows, summed=loss is None)
            dd = self.new(self.N, self.D, dtype=dtype)
            self.finish_cols(slice(0, self.N), g, acc, to_d, dd)
        else:
            dd = self.new(self.N, self.D, dtype=dtype)
            self._tiles(block.rows, block.cols, g, to_q, to_d, rows, dd)
        return Gradients(rows.q, dd, hard, rows.tau.sum())

    def weights_buffer(self, rows: int, cols: int) -> Tensor:
        """An uninitialized buffer for the weights of a block, in whole tiles."""
        sizes = (triton.cdiv(x, t) * t for x, t in ((rows, self.tile.m), (cols, self.tile.n)))
        return self.new(*sizes, dtype=self.element)

    def _waves(
        self, size: int, g: Tensor, to_q: Tensor | None, out: _Rows, *, summed: bool
    ) -> Tensor:
        """Finishes the gradients of the rows; returns the sum over them, for each document, in
        float32."""
        d, dd = self.d.to(self.element), self.new(self.N, self.D).zero_()
        e = self.weights_buffer(min(size, self.B), self.N)
        for r in _blocks(self.B, size):
            weights, part = self.weights(r, slice(0, self.N), e)
            _add_product(dd, weights.T, self.scaled_q(r, g, part if summed else None))
            dq = self.new(len(weights), self.D).zero_()
            _add_product(dq, weights, d)
            self.finish_rows(r, g, dq, to_q, out)
        return dd

    def _tiles(
        self,
        height: int,
        width: int,
        g: Tensor,
        to_q: Tensor | None,
        to_d: Tensor | None,
        out: _Rows,
        out_d: Tensor,
    ) -> None:
        """Finishes all gradients, block by block."""
        e = self.weights_buffer(min(height, self.B), min(width, self.N))
        for r in _blocks(self.B, height):
            dq = self.new(r.stop - r.start, self.D).zero_()
            self.scaled_q(r, g, None)
            for c in _blocks(self.N, width):
                _add_product(dq, self.weights(r, c, e)[0], self.d[c].to(self.element))
            self.finish_rows(r, g, dq, to_q, out)
        for c in _blocks(self.N, width):
            dd = self.new(c.stop - c.start, self.D).zero_()
            for r in _blocks(self.B, height):
                _add_product(dd, self.weights(r, c, e)[0].T, self.scaled_q(r, g, None))
            self.finish_cols(c, g, dd, to_d, out_d)


def _ranks(ids: Tensor) -> Tensor:
    """(N,) int32, equal where the ids are: the tiles compare 32 bits."""
    ranked = torch.sort(ids)
    changes = ranked.values[1:] != ranked.values[:-1]
    steps = F.pad(changes, (1, 0)).cumsum(0, dtype=torch.int32)
    return torch.empty_like(steps).scatter_(0, ranked.indices, steps)


def _segments(positives: Tensor | None, B: int, N: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(order, starts): the rows whose positive is j are order[starts[j]:starts[j + 1]],
    ascending."""
    if positives is None:
        starts = torch.arange(N + 1, device=rows.device, dtype=torch.int32)
        return rows[:B], starts.clamp_(max=B)
    ranked = torch.sort(positives, stable=True)
    boundaries = torch.arange(N + 1, device=rows.device)
    starts = torch.searchsorted(ranked.values, boundaries, out_int32=True)
    return ranked.indices.int(), starts


def _directions(
    q: Tensor,
    d: Tensor,
    *,
    temperature: Tensor,
    positives: Tensor | None,
    doc_ids: Tensor | None,
    hard: Tensor | None,
    hard_mask: Tensor | None,
    margin: float | None,
    symmetric: bool,
    normalize: bool,
) -> list[Direction]:
    there = Direction(q, d, positives, doc_ids, hard, hard_mask, temperature, margin, normalize)
    if not symmetric:
        return [there]
    own = there.d[there.positives]
    back = Direction(
        own, there.q, None, there.row_ids, None, None, temperature, margin, normalize
    )  # fmt: skip
    return [there, back]


@contextmanager
def _on(q: Tensor, workspace: int = 0) -> Iterator[None]:
    """Launches go to q's device, on torch's current stream there."""
    try:
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        room = "its vectors; lower the batch size"
        if workspace:
            room = (
                f"{workspace >> 20} MB of workspace besides its gradients; lower {VARIABLE}"
                f" (at least {MIN_BYTES >> 20}) or the batch size"
            )
        message = f"info_nce of {len(q)} rows found no room for {room}"
        raise torch.OutOfMemoryError(message) from error


def losses(q: Tensor, d: Tensor, **problem: Any) -> Tensor:
    """Each row's loss (directions, B), where directions is 2 if symmetric, else 1.

    2 D FLOPs per pair and direction. The keyword arguments are those of `refine_fast.info_nce`:
    temperature (a 0-d tensor), positives, doc_ids, hard, hard_mask, margin, symmetric and
    normalize; all given, None where absent. The caller checks them.
    """
    if len(q) == 0:
        return q.new_zeros((2 if problem["symmetric"] else 1, 0), dtype=torch.float32)
    with _on(q):
        return torch.stack([direction.losses() for direction in _directions(q, d, **problem)])


def gradients(
    g: Tensor,
    q: Tensor,
    d: Tensor,
    *,
    losses: Tensor | None = None,
    workspace: int | None = None,
    **problem: Any,
) -> tuple[Tensor, Gradients]:
    """The losses (directions, B) and the gradients of ``sum_i g_i mean_direction loss_i``.

    Args:
        g: (B,) float32.
        losses: what ``losses`` returned for the same problem, where g became known only
            afterwards; without it one pass computes both (6 D FLOPs per pair instead of 2 + 6).
        workspace: bytes; default ``workspace_bytes()``.
        problem: as for ``losses``.
    """
    workspace = workspace_bytes() if workspace is None else workspace
    if len(q) == 0:
        dtype, hard = gradient_dtype(q.dtype), problem["hard"]
        zeros = Gradients(
            torch.zeros_like(q, dtype=dtype),
            torch.zeros_like(d, dtype=dtype),
            None if hard is None else torch.zeros_like(hard, dtype=dtype),
            torch.zeros((), device=q.device),
        )
        return q.new_zeros((2 if problem["symmetric"] else 1, 0), dtype=torch.float32), zeros
    with _on(q, workspace):
        there, *back = _directions(q, d, **problem)
        g = g.float().contiguous() / (1 + len(back))
        known = (None, None) if losses is None else losses
        if not back:
            grads = there.gradients(g, loss=known[0], workspace=workspace)
            return there.loss[None], grads
        extra = back[0].gradients(g, loss=known[1], workspace=workspace)
        grads = there.gradients(g, loss=known[0], workspace=workspace, extra=extra)
        both = torch.stack([there.loss, back[0].loss])
        return both, replace(grads, temperature=grads.temperature + extra.temperature)
