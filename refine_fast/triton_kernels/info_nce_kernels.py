"""The Triton kernels of info_nce. info_nce.py describes their purpose and the order they run in.

The tile kernels (``negatives_kernel``, ``weights_kernel``) compute a BLOCK_M x BLOCK_N tile of
logits on the tensor cores and reduce it in registers: they carry the cost. The row kernels take
one row of D numbers per program and are bound by memory.

Logits are kept in base 2 and called x: ``x_ij = s_ij * log2(e) / tau``, so that a weight is one
``exp2``. Row and column counts fit int32; every offset is int64. Nothing here is added atomically:
each output has one writer, and equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EPSILON = tl.constexpr(1e-12)  # of F.normalize
# of |q| |d|: a tile's sum may exceed the sum of a pair's products by this much, in tf32x3 too
TIE = tl.constexpr(2.0**-20)
# a row's weights stay below 2^60, so that their sum times a document stays inside float32 ...
HEADROOM = tl.constexpr(60.0)
# ... and above 2^-90: underflow loses only what is below 2^-36 of the largest weight
WINDOW = tl.constexpr(150.0)


@triton.jit
def _logits(
    q, d, row_scale, col_scale, col_bias, row_id, col_id, ceiling, rows, cols, B, N, D,
    stride_q, stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NORMALIZE: tl.constexpr, MARGIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x of a tile; -inf where the column is not a negative of the row."""
    row_in, col_in = rows < B, cols < N
    r = tl.where(row_in, rows, 0).to(tl.int64)
    c = tl.where(col_in, cols, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    q_at = q + r[:, None] * stride_q + k[None, :]
    d_at = d + c[None, :] * stride_d + k[:, None]
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(q_at), tl.load(d_at)
        else:
            a = tl.load(q_at, mask=(k < D - start)[None, :], other=0.0)
            b = tl.load(d_at, mask=(k < D - start)[:, None], other=0.0)
        s = tl.dot(a, b, s, input_precision=PRECISION)
        q_at += BLOCK_K
        d_at += BLOCK_K
    x = s * tl.load(row_scale + rows, mask=row_in, other=0.0)[:, None]
    if NORMALIZE:
        x *= tl.load(col_scale + cols)[None, :]
    x += tl.load(col_bias + cols)[None, :]
    own_id = tl.load(row_id + rows, mask=row_in, other=0)[:, None]
    negative = own_id != tl.load(col_id + cols)[None, :]
    if MARGIN:
        negative &= x <= tl.load(ceiling + rows, mask=row_in, other=0.0)[:, None]
    return tl.where(negative, x, float("-inf"))


@triton.jit
def negatives_kernel(
    q, d, row_scale, col_scale, col_bias, row_id, col_id, ceiling, wide, part_max, part_sum,
    B, N, D, stride_q, stride_d, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NORMALIZE: tl.constexpr, MARGIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp2 over a split of the columns: part_max, part_sum (splits, B). A block
    without a ``wide`` row returns at once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    if tl.max(tl.load(wide + rows, mask=rows < B, other=0), 0) != 0:
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(N, BLOCK_N))
        for tile in range(split * tiles_per_split, last):
            cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            x = _logits(
                q, d, row_scale, col_scale, col_bias, row_id, col_id, ceiling, rows, cols,
                B, N, D, stride_q, stride_d,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, NORMALIZE, MARGIN, PRECISION,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(x, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # no negative yet: exp2(-inf) = 0
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
            top = new
        at = split.to(tl.int64) * B + rows
        tl.store(part_max + at, top, mask=rows < B)
        tl.store(part_sum + at, total, mask=rows < B)


@triton.jit
def weights_kernel(
    q, d, row_scale, col_scale, col_bias, fold, row_id, col_id, ceiling, shift, e, part_sum,
    B, N, D, stride_q, stride_d, stride_e, tiles_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NORMALIZE: tl.constexpr, MARGIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """e_ij = fold_j * exp2(x_ij - shift_i), 0 where j is not a negative of i; part_sum
    (B, tiles_n): the tile's row sums without ``fold``."""
    # rows run fastest: programs in flight share one stripe of d, and a wave's rows stay in L2
    tiles_m = tl.cdiv(B, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _logits(
        q, d, row_scale, col_scale, col_bias, row_id, col_id, ceiling, rows, cols, B, N, D,
        stride_q, stride_d,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, NORMALIZE, MARGIN, PRECISION,
    )  # fmt: skip
    row_in = rows < B
    weight = tl.exp2(x - tl.load(shift + rows, mask=row_in, other=0.0)[:, None])
    r = rows.to(tl.int64)
    tl.store(part_sum + r * tiles_n + tile_n, tl.sum(weight, 1), mask=row_in)
    if NORMALIZE:
        weight *= tl.load(fold + cols)[None, :]
    tl.store(e + r[:, None] * stride_e + cols[None, :], weight.to(e.dtype.element_ty))


@triton.jit
def prepare_kernel(
    q, d, hard, positives, hard_mask, temperature, d_bound, x_pos, hard_x, row_scale, ceiling,
    shift, wide, margin, D, K, stride_q, stride_d, stride_hb, stride_hk,
    BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, MARGIN: tl.constexpr, HARD_MASK: tl.constexpr,
):  # fmt: skip
    """What a row needs before its tiles: the logits of its positive and of its own hard negatives,
    its ceiling, and a shift.

    The row's largest logit M lies in [lo, hi]: the positive and the hard negatives bound it from
    below, |q| max|d| from above. Where that span is below WINDOW, shift = hi - HEADROOM serves as
    well as M; elsewhere the row is ``wide`` and negatives_kernel computes its log-sum.
    """
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D)
    inside = k < D
    rate = LOG2E / tl.load(temperature).to(tl.float32)
    qv = tl.load(q + i * stride_q + k, mask=inside, other=0.0).to(tl.float32)
    own = d + tl.load(positives + i).to(tl.int64) * stride_d
    dv = tl.load(own + k, mask=inside, other=0.0).to(tl.float32)
    q_norm, d_norm = tl.sqrt(tl.sum(qv * qv, 0)), tl.sqrt(tl.sum(dv * dv, 0))
    scale, pos = rate, tl.sum(qv * dv, 0)
    reach, hi = q_norm * d_norm * rate, q_norm * tl.load(d_bound) * rate
    if NORMALIZE:
        scale = rate / tl.maximum(q_norm, EPSILON)
        pos = pos / tl.maximum(d_norm, EPSILON)
        reach, hi = rate, rate
    pos *= scale
    # TIE: a document that occurs twice ties with itself, and a margin of 0 keeps it
    top = pos + margin * rate + TIE * reach
    if MARGIN:
        hi = tl.minimum(hi, top)
    lo = pos
    for j in range(K):
        at = hard + i * stride_hb + j * stride_hk
        hv = tl.load(at + k, mask=inside, other=0.0).to(tl.float32)
        x = tl.sum(qv * hv, 0) * scale
        if NORMALIZE:
            x = x / tl.maximum(tl.sqrt(tl.sum(hv * hv, 0)), EPSILON)
        if HARD_MASK:
            x = tl.where(tl.load(hard_mask + i * K + j), x, float("-inf"))
        if MARGIN:
            x = tl.where(x <= top, x, float("-inf"))
        lo = tl.maximum(lo, x)
        tl.store(hard_x + i * K + j, x)
    hi = tl.maximum(hi, lo)
    tl.store(x_pos + i, pos)
    tl.store(row_scale + i, scale)
    tl.store(ceiling + i, top)
    tl.store(shift + i, hi - HEADROOM)
    tl.store(wide + i, (hi - lo > WINDOW).to(tl.int8))


@triton.jit
def _loss(log2_odds):
    """(loss, share) of a row whose negatives together weigh 2^log2_odds times its positive:
    log(1 + odds) and odds / (1 + odds), accurate where the odds are tiny (Kahan's log1p) and where
    they overflow."""
    small = tl.exp2(-tl.abs(log2_odds))
    one = 1.0 + small
    log1p = tl.where(one == 1.0, small, tl.log(one) * small / tl.where(one == 1.0, 1.0, one - 1.0))
    positive = log2_odds > 0
    return log1p + tl.where(positive, log2_odds * LN2, 0.0), tl.where(positive, 1.0, small) / one


@triton.jit
def combine_kernel(
    part_max, part_sum, wide, x_pos, hard_x, shift, loss, B, K, splits, BLOCK: tl.constexpr
):  # fmt: skip
    """For ``wide`` rows: adds the splits and the hard negatives; writes the loss and, as shift, the
    row's log-sum over everything."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(wide + rows, mask=rows < B, other=0) != 0
    r = rows.to(tl.int64)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(splits + K):
        if part < splits:
            x = tl.load(part_max + part * B + r, mask=chosen, other=float("-inf"))
            weight = tl.load(part_sum + part * B + r, mask=chosen, other=0.0)
        else:
            at = hard_x + r * K + (part - splits)
            x = tl.load(at, mask=chosen, other=float("-inf"))
            weight = tl.full((BLOCK,), 1.0, tl.float32)
        new = tl.maximum(top, x)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + weight * tl.exp2(x - base)
        top = new
    pos = tl.load(x_pos + rows, mask=chosen, other=0.0)
    row_loss, _ = _loss(tl.log2(total) + tl.where(total == 0.0, 0.0, top) - pos)
    tl.store(loss + rows, row_loss, mask=chosen)
    tl.store(shift + rows, pos + row_loss * LOG2E, mask=chosen)


@triton.jit
def rows_kernel(
    q, g, temperature, x_pos, hard_x, row_scale, shift, tile_sums, loss, inverse, share, scaled_q,
    D, K, stride_q, tiles_n,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """A row's normalizer 1 / sum(weights), the share of its negatives 1 - p_positive, and
    ``g / tau * normalizer * q``, which multiplies its weights in the gradient of d. SUMMED: from
    tile_sums, and the loss is an output; else shift is the log-sum, and the loss is given."""
    i = tl.program_id(0).to(tl.int64)
    tau = tl.load(temperature).to(tl.float32)
    if SUMMED:
        base, pos = tl.load(shift + i), tl.load(x_pos + i)
        t = tl.arange(0, BLOCK_T)
        sums = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, tiles_n, BLOCK_T):
            at = start + t
            sums += tl.load(tile_sums + i * tiles_n + at, mask=at < tiles_n, other=0.0)
        negatives = tl.sum(sums, 0)
        for j in range(K):
            negatives += tl.exp2(tl.load(hard_x + i * K + j) - base)
        row_loss, row_share = _loss(tl.log2(negatives) + base - pos)
        normalizer = 1.0 / (negatives + tl.exp2(pos - base))
        tl.store(loss + i, row_loss)
    else:
        row_loss = tl.load(loss + i)
        p = tl.exp(-row_loss)
        row_share = 1.0 - p
        if (row_loss < 1.0) & (p < 1.0):  # 1 - p, accurate where p is close to 1
            row_share = row_share * row_loss / -tl.log(p)
        elif row_loss < 1.0:
            row_share = row_loss
        normalizer = 1.0
    tl.store(inverse + i, normalizer)
    tl.store(share + i, row_share)
    k = tl.arange(0, BLOCK_D)
    qv = tl.load(q + i * stride_q + k, mask=k < D, other=0.0).to(tl.float32)
    unit = tl.load(row_scale + i) * tau / LOG2E  # 1 / |q|, or 1
    scaled = qv * (unit * tl.load(g + i) / tau * normalizer)
    tl.store(scaled_q + i * D + k, scaled.to(scaled_q.dtype.element_ty), mask=k < D)


@triton.jit
def finish_rows_kernel(
    q, d, hard, positives, g, temperature, fold_top, hard_x, row_scale, shift, inverse, share,
    acc, extra, dq, dhard, dtau,
    D, K, stride_q, stride_d, stride_hb, stride_hk,
    BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """dq_i = g_i / tau * (sum_j p_ij d_j - (1 - p_i) d_positive), with the hard negatives, their
    gradients, and that of the temperature: the loss depends on q / tau alone, so
    tau * dL/dtau = -q . dL/dq. ``extra``: added to dq (the other direction's gradient)."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D)
    inside = k < D
    tau = tl.load(temperature).to(tl.float32)
    rate = tl.load(g + i) / tau
    unit = tl.load(row_scale + i) * tau / LOG2E
    normalizer, base = tl.load(inverse + i), tl.load(shift + i)
    qv = tl.load(q + i * stride_q + k, mask=inside, other=0.0).to(tl.float32) * unit
    own = d + tl.load(positives + i).to(tl.int64) * stride_d
    dv = tl.load(own + k, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        dv = dv / tl.maximum(tl.sqrt(tl.sum(dv * dv, 0)), EPSILON)
    grad = tl.load(acc + i * D + k, mask=inside, other=0.0) * (normalizer * tl.load(fold_top))
    grad -= tl.load(share + i) * dv
    for j in range(K):
        p = tl.exp2(tl.load(hard_x + i * K + j) - base) * normalizer
        read = tl.where(p != 0, D, 0)  # a masked one may hold anything
        at = hard + i * stride_hb + j * stride_hk
        hv = tl.load(at + k, mask=k < read, other=0.0).to(tl.float32)
        dh = qv * (p * rate)
        if NORMALIZE:
            h_unit = 1.0 / tl.maximum(tl.sqrt(tl.sum(hv * hv, 0)), EPSILON)
            hv = hv * h_unit
            dh = (dh - tl.sum(dh * hv, 0) * hv) * h_unit
        grad += p * hv
        tl.store(dhard + (i * K + j) * D + k, dh.to(dhard.dtype.element_ty), mask=inside)
    grad = grad * rate
    radial = tl.sum(grad * qv, 0)
    tl.store(dtau + i, -radial / tau)
    if NORMALIZE:
        grad = (grad - radial * qv) * unit
    if EXTRA:
        grad += tl.load(extra + i * D + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(dq + i * D + k, grad.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def finish_cols_kernel(
    q, d, order, starts, g, fold_top, row_scale, share, acc, extra, dd, D, stride_q, stride_d,
    BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """dd_j = acc_j - sum over the rows i whose positive is j of g_i / tau * (1 - p_i) q_i. Those
    rows are order[starts[j]:starts[j + 1]]: a fixed order, so that rows that share a positive add
    up the same way every time. ``extra`` (B, D): added per such row."""
    j = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D)
    inside = k < D
    grad = tl.load(acc + j * D + k, mask=inside, other=0.0) * tl.load(fold_top)
    dv = tl.load(d + j * stride_d + k, mask=inside, other=0.0).to(tl.float32)
    unit = 1.0
    if NORMALIZE:
        unit = 1.0 / tl.maximum(tl.sqrt(tl.sum(dv * dv, 0)), EPSILON)
    added = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(tl.load(starts + j), tl.load(starts + j + 1)):
        i = tl.load(order + t).to(tl.int64)
        rate = tl.load(g + i) * tl.load(share + i) * tl.load(row_scale + i) / LOG2E
        qv = tl.load(q + i * stride_q + k, mask=inside, other=0.0).to(tl.float32)
        grad -= qv * (rate * unit)
        if EXTRA:
            added += tl.load(extra + i * D + k, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        grad -= tl.sum(grad * dv, 0) * (unit * unit) * dv
    tl.store(dd + j * D + k, (grad + added).to(dd.dtype.element_ty), mask=inside)
