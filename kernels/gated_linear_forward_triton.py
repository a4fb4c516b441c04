"""Triton kernels of gated linear attention, forward: the states before all chunks, then all chunks at once.

Legend: B batch, T tokens, H query heads, G KV heads, R = H // G query heads of a KV head, K key dim, V value dim,
C chunk, N chunks. S_n [K, V] is the state before chunk n, gc_i the sum of a chunk's gates up to and including token i.

`_states` walks the chunks of one [BK, BV] tile of a KV head's state and writes every S_n; `_outputs` then serves all
chunks at once, the R query heads of a KV head sharing one load of K, V, gates and state.

A walk over all chunks is a long chain of small steps. Where there are few KV heads to walk (a long row at batch 1), it
is cut into segments: a first launch (`SUMMARY`) finds what each segment adds and how much it keeps, the walks of all
segments then begin where the earlier ones end. Decays: see `gates_triton`.
"""

import triton
import triton.language as tl

from linearize.kernels.gates_triton import (
    _cast,
    _level_matrix,
    _level_pairs,
    _safe_block,
    _safe_block_T,
    _segments,
    _sums,
    _sums_T,
)


@triton.jit(do_not_specialize=["T", "G", "N", "segment"])
def _states(
    k, v, gate, starts, state_0, norm_0, parts, part_norms, part_decays, states, norms, totals, state_T, norm_T,
    T, G, N, segment,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STARTS: tl.constexpr, INIT: tl.constexpr, NORM: tl.constexpr, FINAL: tl.constexpr,
    SEGMENTS: tl.constexpr, SUMMARY: tl.constexpr,
    DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_k, i_v, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2) // SEGMENTS
    i_s = tl.program_id(2) % SEGMENTS
    b, h = (i_bg // G).to(tl.int64), i_bg % G
    c = tl.arange(0, C)
    ks = i_k * BK + tl.arange(0, BK)
    vs = i_v * BV + tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    row = i_bg.to(tl.int64)
    tile = ks[:, None] * V + vs[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    norm = tl.zeros([BK], tl.float32)
    kept = tl.full([BK], 1.0, tl.float32)
    # The norm is `norm` and the sum of `columns`: Triton 3.6 fails to compile some loop-carried sums of a reduction.
    columns = tl.zeros([BK, C], tl.float32)
    if INIT and not SUMMARY:
        state = tl.load(state_0 + row * K * V + tile, mask=in_tile, other=0.0).to(tl.float32)
        if NORM:
            norm = tl.load(norm_0 + row * K + ks, mask=in_k, other=0.0).to(tl.float32)
    if SEGMENTS > 1 and not SUMMARY:
        for s in range(0, i_s):
            part = row * SEGMENTS + s
            decay = tl.load(part_decays + part * K + ks, mask=in_k, other=0.0)
            state = state * decay[:, None] + tl.load(parts + part * K * V + tile, mask=in_tile, other=0.0)
            if NORM:
                norm = norm * decay + tl.load(part_norms + part * K + ks, mask=in_k, other=0.0)
    if GATE > 0:
        gate += b * g_b + h * g_h
    for n in range(i_s * segment, tl.minimum((i_s + 1) * segment, N)):
        if not SUMMARY:
            tl.store(states + (row * N + n) * K * V + tile, state.to(states.dtype.element_ty), mask=in_tile)
            if NORM:
                tl.store(norms + (row * N + n) * K + ks, norm + tl.sum(columns, 1), mask=ks + i_v * K < K)
        begin = n * C
        t = begin + c
        first = tl.full([], 0, tl.int64)
        at = begin.to(tl.int64)
        in_t = t < T
        write = in_t
        keep = True
        if STARTS:
            last = tl.minimum(begin + C, T) - 1
            first = tl.load(starts + b * T + last).to(tl.int64)
            write = in_t & (t >= first)
            keep = first < begin
        k_T = tl.load(k + at * k_t + c[None, :] * k_t + ks[:, None], mask=write[None, :] & in_k[:, None], other=0.0)
        v_C = tl.load(v + at * v_t + c[:, None] * v_t + vs[None, :], mask=in_t[:, None] & in_v[None, :], other=0.0)
        after = in_t & (c < C - 1) & (t + 1 < T)
        if GATE == 1:
            later = tl.load(gate + at * g_t + (c + 1) * g_t, mask=after, other=0.0).to(tl.float32)
            later = tl.maximum(later, -100.0)
            suffix = tl.cumsum(later, 0, reverse=True)
            total = tl.sum(later) + tl.maximum(tl.load(gate + at * g_t).to(tl.float32), -100.0)
            k_T = k_T.to(tl.float32) * tl.exp(suffix)[None, :]
            decay = tl.where(keep, tl.exp(total), 0.0)
            state *= decay
            norm *= decay
            kept *= decay
            columns *= decay
        elif GATE == 2:
            g_T = tl.load(
                gate + at * g_t + c[None, :] * g_t + ks[:, None], mask=in_t[None, :] & in_k[:, None], other=0.0
            )
            g_T = tl.maximum(g_T.to(tl.float32), -100.0)
            suffix = _sums_T(g_T, tl.where(c[:, None] > c[None, :], 1.0, 0.0), GDT)
            total = tl.sum(g_T, 1)
            if not SUMMARY:
                tl.store(totals + (row * N + n) * K + ks, total, mask=ks + i_v * K < K)
            k_T = k_T.to(tl.float32) * tl.exp(suffix)
            decay = tl.where(keep, tl.exp(total), 0.0)
            state *= decay[:, None]
            norm *= decay
            kept *= decay
            columns *= decay[:, None]
        elif STARTS:
            decay = tl.where(keep, 1.0, 0.0)
            state *= decay
            norm *= decay
            kept *= decay
            columns *= decay
        if NORM:
            columns += k_T.to(tl.float32)
        state += tl.dot(_cast(k_T, DT, HALF), _cast(v_C, DT, HALF), input_precision=PREC)
    if SUMMARY:
        part = row * SEGMENTS + i_s
        tl.store(parts + part * K * V + tile, state, mask=in_tile)
        tl.store(part_decays + part * K + ks, kept, mask=ks + i_v * K < K)
        if NORM:
            tl.store(part_norms + part * K + ks, tl.sum(columns, 1), mask=ks + i_v * K < K)
    elif FINAL:
        past = (SEGMENTS - 1 - i_s) * K  # added to an index, it masks the store of all but the last segment
        tl.store(state_T + row * K * V + tile, state, mask=in_tile & (ks + past < K)[:, None])
        if NORM:
            tl.store(norm_T + row * K + ks, norm + tl.sum(columns, 1), mask=ks + i_v * K + past < K)


@triton.jit(do_not_specialize=["T", "G", "N"])
def _outputs(
    q, k, v, gate, starts, states, norms, totals, o, sums,
    T, G, N, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STEEP: tl.constexpr, STARTS: tl.constexpr, NORM: tl.constexpr, LIMIT: tl.constexpr,
    DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    n, i_v, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
    h_k = h // SHARE
    H = G * R
    c = tl.arange(0, C)
    ks = tl.arange(0, BK)
    vs = i_v * BV + tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    slot = i_bg.to(tl.int64) * N + n
    if GATE == 2:
        decay = tl.load(totals + slot * K + ks, mask=in_k, other=0.0)
        if (tl.min(decay) < -2.0 * LIMIT) != STEEP:
            return
    begin = n * C
    at = begin.to(tl.int64)
    t = begin + c
    in_t = t < T
    in_tk = in_t[:, None] & in_k[None, :]
    in_tv = in_t[:, None] & in_v[None, :]
    k_C = tl.load(k + b * k_b + h_k * k_h + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_tk, other=0.0)
    v_C = tl.load(v + b * v_b + h * v_h + at * v_t + c[:, None] * v_t + vs[None, :], mask=in_tv, other=0.0)
    v_C = _cast(v_C, DT, HALF)
    state = tl.load(
        states + slot * K * V + ks[:, None] * V + vs[None, :], mask=in_k[:, None] & in_v[None, :], other=0.0
    )
    state = _cast(state, DT, HALF)
    if NORM:
        norm = tl.load(norms + slot * K + ks, mask=in_k, other=0.0)
    visible = c[:, None] >= c[None, :]
    sees = in_t
    if STARTS:
        first = tl.load(starts + b * T + t, mask=in_t, other=T).to(tl.int32)
        visible = visible & (first[:, None] <= t[None, :])
        sees = first < begin
    if GATE == 1:
        g_C = tl.load(gate + b * g_b + h * g_h + at * g_t + c * g_t, mask=in_t, other=0.0).to(tl.float32)
        g_C = tl.maximum(g_C, -100.0)
        gc = tl.cumsum(g_C, 0)
        reach = tl.exp(gc) * scale
        weight = tl.where(visible, tl.exp(_segments(g_C, c, DT)) * scale, 0.0)
    elif GATE == 0:
        reach = tl.full([C], 1.0, tl.float32) * scale
        weight = tl.where(visible, scale, 0.0)
    if STARTS and GATE < 2:
        reach = tl.where(sees, reach, 0.0)
    q += b * q_b + h_k * R * q_h + at * q_t
    rows = (b * T + t) * H + h * R
    if GATE < 2:
        k_d = _cast(k_C, DT, HALF)
        for r in range(0, R):
            q_C = tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0)
            q_d = _cast(q_C, DT, HALF)
            out = tl.dot(q_d, state, input_precision=PREC) * reach[:, None]
            a = tl.dot(q_d, tl.trans(k_d), input_precision=PREC) * weight
            if NORM:
                total = tl.sum(q_C.to(tl.float32) * norm[None, :], 1) * reach + tl.sum(a, 1)
                tl.store(sums + rows + r, total, mask=t + i_v * T < T)
            out += tl.dot(_cast(a, DT, HALF), v_C, input_precision=PREC)
            tl.store(o + (rows + r)[:, None] * V + vs[None, :], out.to(o.dtype.element_ty), mask=in_tv)
    else:
        g_C = tl.load(gate + b * g_b + h * g_h + at * g_t + c[:, None] * g_t + ks[None, :], mask=in_tk, other=0.0)
        g_C = tl.maximum(g_C.to(tl.float32), -100.0)
        if not STEEP:
            x = tl.cumsum(g_C, 0) - 0.5 * decay[None, :]
            half = tl.exp(0.5 * decay)
            e = tl.exp(x) * scale
            k_x = _cast(k_C.to(tl.float32) * tl.exp(-x), DT, HALF)
            state = _cast(state.to(tl.float32) * half[:, None], DT, HALF)
            for r in range(0, R):
                q_C = tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0)
                q_f = q_C.to(tl.float32) * e
                q_x = _cast(q_f, DT, HALF)
                a = tl.where(visible, tl.dot(q_x, tl.trans(k_x), input_precision=PREC), 0.0)
                out = tl.dot(q_x, state, input_precision=PREC)
                if STARTS:
                    out = tl.where(sees[:, None], out, 0.0)
                if NORM:
                    total = tl.where(sees, tl.sum(q_f * (half * norm)[None, :], 1), 0.0) + tl.sum(a, 1)
                    tl.store(sums + rows + r, total, mask=t + i_v * T < T)
                out = tl.dot(_cast(a, DT, HALF), v_C, out, input_precision=PREC)
                tl.store(o + (rows + r)[:, None] * V + vs[None, :], out.to(o.dtype.element_ty), mask=in_tv)
        else:
            g_T = tl.load(
                gate + b * g_b + h * g_h + at * g_t + c[None, :] * g_t + ks[:, None],
                mask=in_t[None, :] & in_k[:, None],
                other=0.0,
            )
            g_T = tl.maximum(g_T.to(tl.float32), -100.0)
            k_T = tl.load(
                k + b * k_b + h_k * k_h + at * k_t + c[None, :] * k_t + ks[:, None],
                mask=in_t[None, :] & in_k[:, None],
                other=0.0,
            ).to(tl.float32)
            i, t_ = c[:, None], c[None, :]
            i_T, t_T = c[None, :], c[:, None]
            x, level = _safe_block(g_C, i, t_, GDT, LIMIT)
            block = visible & ((c[:, None] >> level) == (c[None, :] >> level))
            k_xT = _cast(k_T * tl.exp(-_safe_block_T(g_T, i_T, t_T, level, GDT)), DT, HALF)
            reach = tl.exp(_sums(tl.where(t_ <= i, 1.0, 0.0), g_C, GDT))
            if STARTS:
                reach = tl.where(sees[:, None], reach, 0.0)
            for r in range(0, R):
                q_C = tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0)
                q_f = q_C.to(tl.float32) * scale
                out = tl.dot(_cast(q_f * reach, DT, HALF), state, input_precision=PREC)
                a = tl.where(block, tl.dot(_cast(q_f * tl.exp(x), DT, HALF), k_xT, input_precision=PREC), 0.0)
                for level_ in range(level, LOG_C):
                    q_l = _cast(q_f * tl.exp(_sums(_level_matrix(i, t_, level_), g_C, GDT)), DT, HALF)
                    k_lT = _cast(k_T * tl.exp(_sums_T(g_T, _level_matrix(i_T, t_T, level_), GDT)), DT, HALF)
                    a += tl.where(visible & _level_pairs(i, t_, level_), tl.dot(q_l, k_lT, input_precision=PREC), 0.0)
                if NORM:
                    total = tl.sum(q_f * reach * norm[None, :], 1) + tl.sum(a, 1)
                    tl.store(sums + rows + r, total, mask=t + i_v * T < T)
                out += tl.dot(_cast(a, DT, HALF), v_C, input_precision=PREC)
                tl.store(o + (rows + r)[:, None] * V + vs[None, :], out.to(o.dtype.element_ty), mask=in_tv)
