"""Triton kernels of sliding-window softmax attention with sinks on grouped KV heads, forward and backward.

Legend: B batch, T tokens, H query heads, G KV heads, R = H // G, K key dim, V value dim, W window, M block of queries,
N block of keys. Layout [B, T, heads, dim]; `first` is the first visible token of a query, at least 0.

A program of the forward, and of the pass for dq, owns M queries of one query head, and walks the key blocks that its
window reaches, after the sinks of the document of its first query (a later document's sinks lie inside the reach).
The pass for dk and dv owns N keys of one KV head and walks the queries of all its R query heads that can see them, so
that nothing is repeated and no atomics are needed: two runs are equal to the bit. Sinks are seen to the end of their
document: what comes after the chunk of `CHUNK` queries in which a block's own reach ends is summed before, chunk by
chunk, and added there. `row_max` is differentiable: the
forward keeps where it was reached. `ADD_Q`, `ADD_K` and `ADD_V` add to gradients that are there already: the hybrid's
backward sums its branches so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.configs import Blocks, window_tiles
from linearize.kernels.launch import Launch, contiguous, differentiable, play, unit_stride

CHUNK = 256  # or as many as there are sinks, so that the sums take no more than keys and values


@triton.jit
def _attend(q, k_p, v_p, k_t, v_t, j, i, first, limit, acc, top, total, arg, in_k, in_v, scale,
            W: tl.constexpr, S: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """One block of keys j [N] of the online softmax; `limit` is one past the last key that counts here."""
    k_N = tl.load(k_p, mask=(j < limit)[:, None] & in_k[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k_N), input_precision=PREC) * scale
    near = i[:, None] - j[None, :] < W
    if S > 0:
        near = near | (j[None, :] - first[:, None] < S)
    visible = (j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]) & (j < limit)[None, :] & near
    s = tl.where(visible, s, -float("inf"))
    block_top = tl.max(s, 1)
    new_top = tl.maximum(top, block_top)
    at = tl.max(tl.where(visible & (s == block_top[:, None]), j[None, :], -1), 1)
    arg = tl.where(block_top > top, at, arg)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp(s - shift[:, None])
    keep = tl.exp(top - shift)
    total = total * keep + tl.sum(p, 1)
    v_N = tl.load(v_p, mask=(j < limit)[:, None] & in_v[None, :], other=0.0)
    acc = tl.dot(p.to(v_N.dtype), v_N, acc * keep[:, None], input_precision=PREC)
    return acc, new_top, total, arg


@triton.jit(do_not_specialize=["T", "G"])
def _forward_kernel(
    q, k, v, starts, o, lse, row_max, row_arg, T, G, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, S: tl.constexpr, STARTS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    h, i_m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = G * R
    begin = i_m * M
    i = begin + tl.arange(0, M)
    n = tl.arange(0, N)
    ks, vs = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v, in_t = ks < K, vs < V, i < T
    k += b * k_b + (h // R) * k_h + ks[None, :]
    v += b * v_b + (h // R) * v_h + vs[None, :]
    q_M = tl.load(
        q + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_t + ks[None, :],
        mask=in_t[:, None] & in_k[None, :],
        other=0.0,
    )
    first = tl.zeros([M], tl.int32)
    base = begin * 0
    if STARTS:
        first = tl.maximum(tl.load(starts + b * T + i, mask=in_t, other=T).to(tl.int32), 0)
        base = tl.maximum(tl.load(starts + b * T + begin).to(tl.int32), 0)
    low = tl.maximum(begin - W + 1, base) // N * N
    acc = tl.zeros([M, BV], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    arg = tl.full([M], -1, tl.int32)
    if S > 0:
        limit = tl.minimum(base + S, low)
        for j_0 in range(base, limit, N):
            j = j_0 + n
            rows = j.to(tl.int64)[:, None]
            acc, top, total, arg = _attend(
                q_M, k + rows * k_t, v + rows * v_t, k_t, v_t, j, i, first, limit, acc, top, total, arg, in_k, in_v,
                scale, W, S, PREC,
            )  # fmt: skip
    for j_0 in range(low, tl.minimum(begin + M, T), N):
        j = j_0 + n
        rows = j.to(tl.int64)[:, None]
        acc, top, total, arg = _attend(
            q_M, k + rows * k_t, v + rows * v_t, k_t, v_t, j, i, first, T, acc, top, total, arg, in_k, in_v,
            scale, W, S, PREC,
        )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    row = (b * T + i) * H + h
    tl.store(
        o + row[:, None] * V + vs[None, :],
        (acc / safe[:, None]).to(o.dtype.element_ty),
        mask=in_t[:, None] & in_v[None, :],
    )
    tl.store(lse + row, tl.where(total > 0, top + tl.log(safe), -float("inf")), mask=in_t)
    tl.store(row_max + row, top, mask=in_t)
    tl.store(row_arg + row, arg, mask=in_t)


@triton.jit
def _query_block(q, do, k_p, v_p, j, i, first, limit, lse, delta, d_max, arg, dq, in_k, in_v, scale,
                 W: tl.constexpr, S: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Add one block of keys to dq (before the factor `scale`)."""
    k_N = tl.load(k_p, mask=(j < limit)[:, None] & in_k[None, :], other=0.0)
    v_N = tl.load(v_p, mask=(j < limit)[:, None] & in_v[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k_N), input_precision=PREC) * scale
    near = i[:, None] - j[None, :] < W
    if S > 0:
        near = near | (j[None, :] - first[:, None] < S)
    visible = (j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]) & (j < limit)[None, :] & near
    p = tl.where(visible, tl.exp(s - lse[:, None]), 0.0)
    dp = tl.dot(do, tl.trans(v_N), input_precision=PREC)
    ds = p * (dp - delta[:, None]) + tl.where(j[None, :] == arg[:, None], d_max[:, None], 0.0)
    return tl.dot(ds.to(k_N.dtype), k_N, dq, input_precision=PREC)


@triton.jit(do_not_specialize=["T", "G"])
def _query_grads(
    q, k, v, starts, o, do, lse, d_lse, d_max, row_arg, delta, dq, T, G, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, S: tl.constexpr, STARTS: tl.constexpr, PREC: tl.constexpr,
    ADD_Q: tl.constexpr,
):  # fmt: skip
    h, i_m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H = G * R
    begin = i_m * M
    i = begin + tl.arange(0, M)
    n = tl.arange(0, N)
    ks, vs = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v, in_t = ks < K, vs < V, i < T
    k += b * k_b + (h // R) * k_h + ks[None, :]
    v += b * v_b + (h // R) * v_h + vs[None, :]
    q_M = tl.load(
        q + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_t + ks[None, :],
        mask=in_t[:, None] & in_k[None, :],
        other=0.0,
    )
    row = (b * T + i) * H + h
    in_tv = in_t[:, None] & in_v[None, :]
    do_M = tl.load(do + row[:, None] * V + vs[None, :], mask=in_tv, other=0.0)
    o_M = tl.load(o + row[:, None] * V + vs[None, :], mask=in_tv, other=0.0)
    lse_M = tl.load(lse + row, mask=in_t, other=0.0)
    delta_M = tl.sum(o_M.to(tl.float32) * do_M.to(tl.float32), 1)
    if d_lse is not None:
        delta_M -= tl.load(d_lse + row, mask=in_t, other=0.0)
    tl.store(delta + row, delta_M, mask=in_t)
    d_max_M = tl.zeros([M], tl.float32)
    if d_max is not None:
        d_max_M = tl.load(d_max + row, mask=in_t, other=0.0)
    arg = tl.load(row_arg + row, mask=in_t, other=-1)
    lse_M = tl.where(lse_M == -float("inf"), 0.0, lse_M)
    first = tl.zeros([M], tl.int32)
    base = begin * 0
    if STARTS:
        first = tl.maximum(tl.load(starts + b * T + i, mask=in_t, other=T).to(tl.int32), 0)
        base = tl.maximum(tl.load(starts + b * T + begin).to(tl.int32), 0)
    low = tl.maximum(begin - W + 1, base) // N * N
    dq_M = tl.zeros([M, BK], tl.float32)
    if S > 0:
        limit = tl.minimum(base + S, low)
        for j_0 in range(base, limit, N):
            j = j_0 + n
            rows = j.to(tl.int64)[:, None]
            dq_M = _query_block(
                q_M, do_M, k + rows * k_t, v + rows * v_t, j, i, first, limit, lse_M, delta_M, d_max_M, arg, dq_M,
                in_k, in_v, scale, W, S, PREC,
            )  # fmt: skip
    for j_0 in range(low, tl.minimum(begin + M, T), N):
        j = j_0 + n
        rows = j.to(tl.int64)[:, None]
        dq_M = _query_block(
            q_M, do_M, k + rows * k_t, v + rows * v_t, j, i, first, T, lse_M, delta_M, d_max_M, arg, dq_M,
            in_k, in_v, scale, W, S, PREC,
        )  # fmt: skip
    out = dq + row[:, None] * K + ks[None, :]
    in_tk = in_t[:, None] & in_k[None, :]
    dq_M *= scale
    if ADD_Q:
        dq_M += tl.load(out, mask=in_tk, other=0.0).to(tl.float32)
    tl.store(out, dq_M.to(dq.dtype.element_ty), mask=in_tk)


@triton.jit
def _walk(
    q, do, starts, lse, delta, d_max, row_arg, k_N, v_N, dk, dv, j, begin, stop, end, b, g, T, G, scale, q_b, q_t, q_h,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, S: tl.constexpr, STARTS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add queries before `end` to dk (before the factor `scale`) and dv of keys j: those of blocks in [begin, stop)."""
    H = G * R
    m, ks, vs = tl.arange(0, M), tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    q_p = q + b * q_b + g * R * q_h + ks[None, :]
    for step in range(0, tl.cdiv(stop - begin, M) * R):
        r = step % R
        i = begin + (step // R) * M + m
        at = i.to(tl.int64)
        in_t = i < end
        first = tl.zeros([M], tl.int32)
        if STARTS:
            first = tl.maximum(tl.load(starts + b * T + i, mask=in_t, other=T).to(tl.int32), 0)
        row = (b * T + at) * H + g * R + r
        q_M = tl.load(q_p + r * q_h + at[:, None] * q_t, mask=in_t[:, None] & in_k[None, :], other=0.0)
        do_M = tl.load(do + row[:, None] * V + vs[None, :], mask=in_t[:, None] & in_v[None, :], other=0.0)
        lse_M = tl.load(lse + row, mask=in_t, other=0.0)
        lse_M = tl.where(lse_M == -float("inf"), 0.0, lse_M)
        s_T = tl.dot(k_N, tl.trans(q_M), input_precision=PREC) * scale
        near = i[None, :] - j[:, None] < W
        if S > 0:
            near = near | (j[:, None] - first[None, :] < S)
        visible = (j[:, None] <= i[None, :]) & (j[:, None] >= first[None, :]) & in_t[None, :] & near
        p_T = tl.where(visible, tl.exp(s_T - lse_M[None, :]), 0.0)
        dv = tl.dot(p_T.to(do_M.dtype), do_M, dv, input_precision=PREC)
        dp_T = tl.dot(v_N, tl.trans(do_M), input_precision=PREC)
        ds_T = p_T * (dp_T - tl.load(delta + row, mask=in_t, other=0.0)[None, :])
        if d_max is not None:
            arg = tl.load(row_arg + row, mask=in_t, other=-1)
            ds_T += tl.where(j[:, None] == arg[None, :], tl.load(d_max + row, mask=in_t, other=0.0)[None, :], 0.0)
        dk = tl.dot(ds_T.to(q_M.dtype), q_M, dk, input_precision=PREC)
    return dk, dv


@triton.jit
def _reach(begin, T, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """One past the last query that the key block at `begin` walks for its windows."""
    return begin + tl.cdiv(tl.minimum(begin + N + W - 1, T) - begin, M) * M


@triton.jit(do_not_specialize=["T", "G"])
def _sink_grads(
    q, k, v, starts, do, lse, d_max, row_arg, delta, sums_k, sums_v, T, G, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, S: tl.constexpr, STARTS: tl.constexpr, PREC: tl.constexpr,
    BS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = (S + BS - 1) // BS
    g, place, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = (place // PARTS + 1) * CHUNK
    base = begin * 0
    if STARTS:
        base = tl.maximum(tl.load(starts + b * T + begin).to(tl.int32), 0)
    sink = place % PARTS * BS + tl.arange(0, BS)
    j = base + sink
    here = (sink < S) & (j < T) & (begin >= tl.cdiv(_reach(j // N * N, T, M, N, W), CHUNK) * CHUNK)
    if tl.max(here.to(tl.int32)) > 0:
        ks, vs = tl.arange(0, BK), tl.arange(0, BV)
        in_k, in_v = here[:, None] & (ks < K)[None, :], here[:, None] & (vs < V)[None, :]
        rows = j.to(tl.int64)[:, None]
        k_N = tl.load(k + b * k_b + g * k_h + rows * k_t + ks[None, :], mask=in_k, other=0.0)
        v_N = tl.load(v + b * v_b + g * v_h + rows * v_t + vs[None, :], mask=in_v, other=0.0)
        end = tl.minimum(begin + CHUNK, T)
        dk_N, dv_N = _walk(
            q, do, starts, lse, delta, d_max, row_arg, k_N, v_N, tl.zeros([BS, BK], tl.float32),
            tl.zeros([BS, BV], tl.float32), j, begin, end, end, b, g, T, G, scale, q_b, q_t, q_h,
            R, K, V, BK, BV, M, W, S, STARTS, PREC,
        )  # fmt: skip
        out = (((b * (tl.cdiv(T, CHUNK) - 1) + place // PARTS) * G + g) * S + sink)[:, None]
        tl.store(sums_k + out * K + ks[None, :], dk_N, mask=in_k)
        tl.store(sums_v + out * V + vs[None, :], dv_N, mask=in_v)


@triton.jit(do_not_specialize=["T", "G"])
def _key_grads(
    q, k, v, starts, do, lse, d_max, row_arg, delta, sums_k, sums_v, dk, dv, T, G, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, S: tl.constexpr, STARTS: tl.constexpr, PREC: tl.constexpr,
    CHUNK: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr,
):  # fmt: skip
    g, i_n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = i_n * N
    j = begin + tl.arange(0, N)
    ks, vs = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v, in_t = ks < K, vs < V, j < T
    rows = j.to(tl.int64)[:, None]
    k_N = tl.load(k + b * k_b + g * k_h + rows * k_t + ks[None, :], mask=in_t[:, None] & in_k[None, :], other=0.0)
    v_N = tl.load(v + b * v_b + g * v_h + rows * v_t + vs[None, :], mask=in_t[:, None] & in_v[None, :], other=0.0)
    stop = _reach(begin, T, M, N, W)
    end = T
    c = tl.cdiv(stop, CHUNK)
    last = tl.minimum(begin + N, T) - 1
    base = begin * 0
    if S > 0:
        # A block with a document's first tokens is visible to the end of that document.
        goes_on = stop < T
        if STARTS:
            base = tl.maximum(tl.load(starts + b * T + last).to(tl.int32), 0)
            goes_on = goes_on & (tl.load(starts + b * T + tl.minimum(stop, T - 1)).to(tl.int32) <= last)
        if goes_on & (begin < base + S):
            end = tl.minimum(c * CHUNK, T)
            stop = end
    dk_N, dv_N = _walk(
        q, do, starts, lse, delta, d_max, row_arg, k_N, v_N, tl.zeros([N, BK], tl.float32),
        tl.zeros([N, BV], tl.float32), j, begin, stop, end, b, g, T, G, scale, q_b, q_t, q_h,
        R, K, V, BK, BV, M, W, S, STARTS, PREC,
    )  # fmt: skip
    if S > 0:
        sink = j - base
        mine = in_t & (sink >= 0) & (sink < S)
        go = (c * CHUNK < T) & (begin < base + S)
        if STARTS:
            go = go & (tl.load(starts + b * T + tl.minimum(c * CHUNK, T - 1)).to(tl.int32) <= last)
        while go:
            part = (((b * (tl.cdiv(T, CHUNK) - 1) + c - 1) * G + g) * S + sink)[:, None]
            dk_N += tl.load(sums_k + part * K + ks[None, :], mask=mine[:, None] & in_k[None, :], other=0.0)
            dv_N += tl.load(sums_v + part * V + vs[None, :], mask=mine[:, None] & in_v[None, :], other=0.0)
            c += 1
            go = c * CHUNK < T
            if STARTS:
                go = go & (tl.load(starts + b * T + tl.minimum(c * CHUNK, T - 1)).to(tl.int32) <= last)
    out = ((b * T + j) * G + g)[:, None]
    in_tk, in_tv = in_t[:, None] & in_k[None, :], in_t[:, None] & in_v[None, :]
    dk_N *= scale
    if ADD_K:
        dk_N += tl.load(dk + out * K + ks[None, :], mask=in_tk, other=0.0).to(tl.float32)
    if ADD_V:
        dv_N += tl.load(dv + out * V + vs[None, :], mask=in_tv, other=0.0).to(tl.float32)
    tl.store(dk + out * K + ks[None, :], dk_N.to(dk.dtype.element_ty), mask=in_tk)
    tl.store(dv + out * V + vs[None, :], dv_N.to(dv.dtype.element_ty), mask=in_tv)


def _shared(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, window: int, sinks: int) -> dict[str, object]:
    """Compile-time constants of all launches of one call."""
    return {
        "R": q.shape[2] // k.shape[2],
        "K": q.shape[-1],
        "V": v.shape[-1],
        "BK": max(16, triton.next_power_of_2(q.shape[-1])),
        "BV": max(16, triton.next_power_of_2(v.shape[-1])),
        "W": min(window, max(16, triton.next_power_of_2(q.shape[1]))),
        "S": sinks,
        "STARTS": starts is not None,
        "PREC": "tf32x3",
    }


def _launch(kernel: object, heads: int, rows: int, T: int, B: int, tile: Blocks, args: tuple, shared: dict) -> Launch:
    """A launch over blocks of `rows` tokens."""
    more = {"M": tile.queries, "N": tile.keys}
    return Launch(kernel, (heads, -(-T // rows), B), args, shared, more, tile.warps, tile.stages)


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launch of the forward, and o, lse, row_max and where the largest score was; q, k, v as from `unit_stride`."""
    B, T, H, _ = q.shape
    o = q.new_empty((B, T, H, v.shape[-1]))
    lse = q.new_empty((B, T, H), dtype=torch.float32)
    row_max, row_arg = torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int32)
    tile = window_tiles(q.dtype, q.shape[-1], v.shape[-1]).forward
    args = (q, k, v, starts, o, lse, row_max, row_arg, T, k.shape[2], scale)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shared = _shared(q, k, v, starts, window, sinks)
    launch = _launch(_forward_kernel, H, tile.queries, T, B, tile, (*args, *strides), shared)
    return [launch], (o, lse, row_max, row_arg)


def grad_launches(
    do: Tensor, d_lse: Tensor | None, d_max: Tensor | None, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None,
    o: Tensor, lse: Tensor, row_arg: Tensor, window: int, sinks: int, scale: float,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The launches of the backward, and dq, dk, dv: fresh ones, or those of `into` with this op's share added."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) if y is None else y for x, y in zip((q, k, v), into, strict=True))
    delta = torch.empty_like(lse)
    adds = {name: x is not None for name, x in zip(("ADD_Q", "ADD_K", "ADD_V"), into, strict=True)}
    shared = _shared(q, k, v, starts, window, sinks) | adds
    last = (T, G, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    tiles = window_tiles(q.dtype, q.shape[-1], v.shape[-1])
    by_query, by_key = tiles.query_grads, tiles.key_grads
    args = (q, k, v, starts, o, do, lse, d_lse, d_max, row_arg, delta, dq, *last)
    first = _launch(_query_grads, H, by_query.queries, T, B, by_query, args, shared)
    launches, sums = [first], (delta, delta)
    kept = (q, k, v, starts, do, lse, d_max, row_arg, delta)
    chunk = max(CHUNK, triton.next_power_of_2(sinks))
    shared |= {"BS": min(64, max(16, triton.next_power_of_2(sinks))), "CHUNK": chunk}
    if sinks and window < T and chunk < T:
        chunks = -(-T // chunk) - 1
        sums = tuple(lse.new_empty((B, chunks, G, sinks, x.shape[-1])) for x in (q, v))
        programs = chunks * -(-sinks // shared["BS"])
        launches += [_launch(_sink_grads, G, 1, programs, B, by_key, (*kept, *sums, *last), shared)]
    launches += [_launch(_key_grads, G, by_key.keys, T, B, by_key, (*kept, *sums, dk, dv, *last), shared)]
    return launches, (dq, dk, dv)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (unit_stride(q), unit_stride(k), unit_stride(v), *contiguous(starts))
    numbers = (window, sinks, scale)

    def later(outputs):
        o, lse, _, row_arg = outputs
        return grad_launches(o, None, None, *given, o, lse, row_arg, *numbers)[0] if q.requires_grad else []

    return tuple(play(("window", numbers), given, lambda: forward_launches(*given, *numbers), later))


def _run_backward(
    do: Tensor | None, d_lse: Tensor | None, d_max: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    starts: Tensor | None, o: Tensor, lse: Tensor, row_arg: Tensor, window: int, sinks: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    do = torch.zeros_like(o) if do is None else do
    given = (
        *contiguous(do, d_lse, d_max), unit_stride(q), unit_stride(k), unit_stride(v), *contiguous(starts), o, lse,
        row_arg,
    )  # fmt: skip
    numbers = (window, sinks, scale)
    return tuple(play(("window_grad", numbers), given, lambda: grad_launches(*given, *numbers)))


def _fake(q, k, v, starts, window, sinks, scale):
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)
    o = q.new_empty((*q.shape[:3], v.shape[-1]))
    return o, rows, torch.empty_like(rows), torch.empty_like(rows, dtype=torch.int32)


def _fake_grad(do, d_lse, d_max, q, k, v, starts, o, lse, row_arg, window, sinks, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.window, ctx.sinks, ctx.scale = inputs
    o, lse, _, row_arg = output
    ctx.save_for_backward(*tensors, o, lse, row_arg)
    ctx.mark_non_differentiable(row_arg)


def _gradients(ctx, backward, do, d_lse, d_max, _):
    grads = backward(do, d_lse, d_max, *ctx.saved_tensors, ctx.window, ctx.sinks, ctx.scale)
    return *grads, None, None, None, None


_op = differentiable("window", _run_forward, _run_backward, (_fake, _fake_grad), _save, _gradients)


def window_triton(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `window_attention` (see there for shapes) through the registered op `linearize::window`."""
    o, lse, row_max, _ = _op(q, k, v, starts, window, sinks, scale)
    return o, lse, row_max
