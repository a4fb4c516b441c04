"""Triton kernels of gated linear attention, backward.

Legend: as in `gated_linear_forward_triton`, whose `_states` runs again first (S is not kept). `_state_grads` walks back
over the chunks and writes the gradients of S_{n+1}, in segments as `_states`; `_value_grads` and `_key_grads` do the
rest of a chunk, in blocks of V and of K so that the accumulators fit in registers. Gradients of K, V and gates are
summed over the R query heads in registers: no atomics, two runs are equal to the bit. The delta rule uses the last two
(`DELTA`, see `delta_triton`).
"""

import triton
import triton.language as tl

from linearize.kernels.gates_triton import (
    _block_matrix,
    _cast,
    _from_here,
    _level_matrix,
    _level_pairs,
    _safe_block,
    _segments,
    _segments_T,
    _sums,
    _sums_T,
)


@triton.jit(do_not_specialize=["T", "G", "N", "segment"])
def _state_grads(
    q, do, gate, starts, d_sums, d_state_T, d_norm_T, parts, part_norms, part_decays, d_states, d_norms,
    d_state_0, d_norm_0,
    T, G, N, segment, scale,
    q_b, q_t, q_h, g_b, g_t, g_h,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STARTS: tl.constexpr, INIT: tl.constexpr, NORM: tl.constexpr,
    FINAL: tl.constexpr, NORM_FINAL: tl.constexpr, SEGMENTS: tl.constexpr, SUMMARY: tl.constexpr,
    DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_k, i_v, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2) // SEGMENTS
    i_s = tl.program_id(2) % SEGMENTS
    b, h = (i_bg // G).to(tl.int64), i_bg % G
    H = G * R
    c = tl.arange(0, C)
    ks = i_k * BK + tl.arange(0, BK)
    vs = i_v * BV + tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    row = i_bg.to(tl.int64)
    tile = ks[:, None] * V + vs[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    grad = tl.zeros([BK, BV], tl.float32)
    d_norm = tl.zeros([BK], tl.float32)
    kept = tl.full([BK], 1.0, tl.float32)
    columns = tl.zeros([BK, C], tl.float32)  # of the norm's gradient, as in `_states`
    if FINAL and not SUMMARY:
        grad = tl.load(d_state_T + row * K * V + tile, mask=in_tile, other=0.0)
    if NORM_FINAL and not SUMMARY:
        d_norm = tl.load(d_norm_T + row * K + ks, mask=in_k, other=0.0)
    if SEGMENTS > 1 and not SUMMARY:
        for later in range(0, SEGMENTS - 1 - i_s):
            part = row * SEGMENTS + SEGMENTS - 1 - later
            decay = tl.load(part_decays + part * K + ks, mask=in_k, other=0.0)
            grad = grad * decay[:, None] + tl.load(parts + part * K * V + tile, mask=in_tile, other=0.0)
            if NORM:
                d_norm = d_norm * decay + tl.load(part_norms + part * K + ks, mask=in_k, other=0.0)
    q += b * q_b + h * R * q_h
    do += (b * T * H + h * R) * V
    if GATE > 0:
        gate += b * g_b + h * g_h
    end = tl.minimum((i_s + 1) * segment, N)
    for back in range(0, end - i_s * segment):
        n = end - 1 - back
        if not SUMMARY:
            tl.store(d_states + (row * N + n) * K * V + tile, grad.to(d_states.dtype.element_ty), mask=in_tile)
            if NORM:
                tl.store(d_norms + (row * N + n) * K + ks, d_norm, mask=ks + i_v * K < K)
        begin = n * C
        at = begin.to(tl.int64)
        t = begin + c
        in_t = t < T
        sees = in_t
        keep = True
        if STARTS:
            seen = tl.load(starts + b * T + t, mask=in_t, other=T).to(tl.int32)
            sees = seen < begin
            keep = tl.load(starts + b * T + tl.minimum(begin + C, T) - 1) < begin
        if GATE == 1:
            g_C = tl.load(gate + at * g_t + c * g_t, mask=in_t, other=0.0).to(tl.float32)
            g_C = tl.maximum(g_C, -100.0)
            e = tl.exp(tl.cumsum(g_C, 0)) * scale
            e = tl.where(sees, e, 0.0)[None, :]
            decay = tl.where(keep, tl.exp(tl.sum(g_C)), 0.0)
            grad *= decay
            kept *= decay
            columns *= decay
        elif GATE == 2:
            g_T = tl.load(
                gate + at * g_t + c[None, :] * g_t + ks[:, None], mask=in_t[None, :] & in_k[:, None], other=0.0
            ).to(tl.float32)
            g_T = tl.maximum(g_T, -100.0)
            e = tl.exp(_sums_T(g_T, tl.where(c[:, None] <= c[None, :], 1.0, 0.0), GDT)) * scale
            if STARTS:
                e = tl.where(sees[None, :], e, 0.0)
            decay = tl.where(keep, tl.exp(tl.sum(g_T, 1)), 0.0)
            grad *= decay[:, None]
            kept *= decay
            columns *= decay[:, None]
        else:
            e = tl.where(sees, scale, 0.0)[None, :]
            decay = tl.where(keep, 1.0, 0.0)
            if STARTS:
                grad *= decay
                kept *= decay
                columns *= decay
        if NORM:
            d_norm *= decay
        for r in tl.static_range(R):
            q_T = tl.load(
                q + r * q_h + at * q_t + c[None, :] * q_t + ks[:, None], mask=in_t[None, :] & in_k[:, None], other=0.0
            )
            q_e = q_T.to(tl.float32) * e
            do_C = tl.load(
                do + at * H * V + c[:, None] * (H * V) + r * V + vs[None, :],
                mask=in_t[:, None] & in_v[None, :],
                other=0.0,
            )
            grad += tl.dot(_cast(q_e, DT, HALF), _cast(do_C, DT, HALF), input_precision=PREC)
            if NORM:
                d_sum = tl.load(d_sums + (b * T + t) * H + h * R + r, mask=in_t, other=0.0)
                if SUMMARY:
                    columns += q_e * d_sum[None, :]
                else:
                    d_norm = tl.fma(d_norm, tl.full([BK], 1.0, tl.float32), tl.sum(q_e * d_sum[None, :], 1))
    if SUMMARY:
        part = row * SEGMENTS + i_s
        tl.store(parts + part * K * V + tile, grad, mask=in_tile)
        tl.store(part_decays + part * K + ks, kept, mask=ks + i_v * K < K)
        if NORM:
            tl.store(part_norms + part * K + ks, tl.sum(columns, 1), mask=ks + i_v * K < K)
    elif INIT:
        past = i_s * K  # added to an index, it masks the store of all but the first segment
        tl.store(d_state_0 + row * K * V + tile, grad, mask=in_tile & (ks + past < K)[:, None])
        if NORM:
            tl.store(d_norm_0 + row * K + ks, d_norm, mask=ks + i_v * K + past < K)


@triton.jit(do_not_specialize=["T", "G", "N"])
def _value_grads(
    q, k, gate, starts, do, d_states, totals, dv, parts,
    T, G, N, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h,
    R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STEEP: tl.constexpr, STARTS: tl.constexpr, DELTA: tl.constexpr, LIMIT: tl.constexpr,
    DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    # DELTA: without the part that d_states brings, whose first summands go to `parts` (see `delta_triton`).
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
    tile = slot * K * V + ks[:, None] * V + vs[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    if DELTA:
        part = tl.zeros([BK, BV], tl.float32)
    else:
        d_state = _cast(tl.load(d_states + tile, mask=in_tile, other=0.0), DT, HALF)
    visible_T = c[:, None] <= c[None, :]
    write = in_t
    sees = in_t
    if STARTS:
        first = tl.load(starts + b * T + t, mask=in_t, other=T).to(tl.int32)
        sees = first < begin
        visible_T = visible_T & (first[None, :] <= t[:, None])
        write = in_t & (t >= tl.load(starts + b * T + tl.minimum(begin + C, T) - 1))
    q += b * q_b + h_k * R * q_h + at * q_t
    rows = (b * T + t) * H + h * R
    out = dv + ((b * T + t) * G + h)[:, None] * V + vs[None, :]
    if GATE < 2:
        k_d = _cast(k_C, DT, HALF)
        if DELTA:
            dv_C = tl.zeros([C, BV], tl.float32)
            reach = tl.where(sees, scale, 0.0)
        else:
            dv_C = tl.dot(k_d, d_state, input_precision=PREC)
        if GATE == 1:
            p = gate + b * g_b + h * g_h + at * g_t
            g_C = tl.maximum(tl.load(p + c * g_t, mask=in_t, other=0.0).to(tl.float32), -100.0)
            if DELTA:
                reach *= tl.exp(tl.cumsum(g_C, 0))
            else:
                after = tl.load(p + (c + 1) * g_t, mask=(c < C - 1) & (t + 1 < T), other=0.0).to(tl.float32)
                dv_C *= tl.exp(tl.cumsum(tl.maximum(after, -100.0), 0, reverse=True))[:, None]
            weight_T = tl.where(visible_T, tl.exp(_segments_T(g_C, c, DT)) * scale, 0.0)
        else:
            weight_T = tl.where(visible_T, scale, 0.0)
        if STARTS and not DELTA:
            dv_C = tl.where(write[:, None], dv_C, 0.0)
        for r in range(0, R):
            q_C = _cast(tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0), DT, HALF)
            do_C = _cast(tl.load(do + (rows + r)[:, None] * V + vs[None, :], mask=in_tv, other=0.0), DT, HALF)
            a_T = tl.dot(k_d, tl.trans(q_C), input_precision=PREC) * weight_T
            dv_C = tl.dot(_cast(a_T, DT, HALF), do_C, dv_C, input_precision=PREC)
            if DELTA:
                do_e = _cast(do_C.to(tl.float32) * reach[:, None], DT, HALF)
                part = tl.dot(tl.trans(q_C), do_e, part, input_precision=PREC)
        tl.store(out, dv_C.to(dv.dtype.element_ty), mask=in_tv)
    else:
        g_C = tl.load(gate + b * g_b + h * g_h + at * g_t + c[:, None] * g_t + ks[None, :], mask=in_tk, other=0.0)
        g_C = tl.maximum(g_C.to(tl.float32), -100.0)
        if not STEEP:
            x = tl.cumsum(g_C, 0) - 0.5 * decay[None, :]
            e = tl.exp(x) * scale
            k_x = _cast(k_C.to(tl.float32) * tl.exp(-x), DT, HALF)
            if DELTA:
                dv_C = tl.zeros([C, BV], tl.float32)
            else:
                d_state = _cast(d_state.to(tl.float32) * tl.exp(0.5 * decay)[:, None], DT, HALF)
                dv_C = tl.dot(k_x, d_state, input_precision=PREC)
            if STARTS and not DELTA:
                dv_C = tl.where(write[:, None], dv_C, 0.0)
            for r in range(0, R):
                q_C = tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0)
                do_C = _cast(tl.load(do + (rows + r)[:, None] * V + vs[None, :], mask=in_tv, other=0.0), DT, HALF)
                q_x = _cast(q_C.to(tl.float32) * e, DT, HALF)
                a_T = tl.where(visible_T, tl.dot(k_x, tl.trans(q_x), input_precision=PREC), 0.0)
                dv_C = tl.dot(_cast(a_T, DT, HALF), do_C, dv_C, input_precision=PREC)
                if DELTA:
                    if STARTS:
                        do_C = tl.where(sees[:, None], do_C, 0.0)
                    part = tl.dot(tl.trans(q_x), do_C, part, input_precision=PREC)
            if DELTA:
                part *= tl.exp(0.5 * decay)[:, None]
            tl.store(out, dv_C.to(dv.dtype.element_ty), mask=in_tv)
        else:
            in_Tk = in_t[None, :] & in_k[:, None]
            g_T = tl.load(
                gate + b * g_b + h * g_h + at * g_t + c[None, :] * g_t + ks[:, None], mask=in_Tk, other=0.0
            ).to(tl.float32)
            g_T = tl.maximum(g_T, -100.0)
            i, t_ = c[:, None], c[None, :]
            i_T, t_T = c[None, :], c[:, None]
            k_f = k_C.to(tl.float32)
            if DELTA:
                dv_C = tl.zeros([C, BV], tl.float32)
                reach_T = tl.exp(_sums_T(g_T, tl.where(t_T <= i_T, 1.0, 0.0), GDT))
                reach_T = tl.where(sees[None, :], reach_T, 0.0)
            else:
                rest = tl.exp(_sums(tl.where(t_ > i, 1.0, 0.0), g_C, GDT))
                dv_C = tl.dot(_cast(k_f * rest, DT, HALF), d_state, input_precision=PREC)
            if STARTS and not DELTA:
                dv_C = tl.where(write[:, None], dv_C, 0.0)
            _, level = _safe_block(g_C, i, t_, GDT, LIMIT)
            for r in range(0, R):
                q_T = tl.load(q + r * q_h + c[None, :] * q_t + ks[:, None], mask=in_Tk, other=0.0)
                do_C = _cast(tl.load(do + (rows + r)[:, None] * V + vs[None, :], mask=in_tv, other=0.0), DT, HALF)
                q_f = q_T.to(tl.float32) * scale
                a_T = tl.zeros([C, C], tl.float32)
                # One round for the pairs inside a block, then one a level: a separate first product would be laid out
                # as the transpose of an accumulator.
                for round_ in range(level - 1, LOG_C):
                    level_ = tl.maximum(round_, 0)
                    within = round_ < level
                    safe = tl.where(level > 0, 1.0, 0.0)
                    sums = tl.where(within, -safe * _block_matrix(i, t_, 4), _level_matrix(i, t_, level_))
                    sums_T = tl.where(within, safe * _block_matrix(i_T, t_T, 4), _level_matrix(i_T, t_T, level_))
                    pairs_T = tl.where(within, (i >> level) == (t_ >> level), _level_pairs(i_T, t_T, level_))
                    k_l = _cast(k_f * tl.exp(_sums(sums, g_C, GDT)), DT, HALF)
                    q_lT = _cast(q_f * tl.exp(_sums_T(g_T, sums_T, GDT)), DT, HALF)
                    a_T += tl.where(visible_T & pairs_T, tl.dot(k_l, q_lT, input_precision=PREC), 0.0)
                dv_C += tl.dot(_cast(a_T, DT, HALF), do_C, input_precision=PREC)
                if DELTA:
                    part += tl.dot(_cast(q_f * reach_T, DT, HALF), do_C, input_precision=PREC)
            tl.store(out, dv_C.to(dv.dtype.element_ty), mask=in_tv)
    if DELTA:
        tl.store(parts + tile, part.to(parts.dtype.element_ty), mask=in_tile)


@triton.jit(do_not_specialize=["T", "G", "N"])
def _key_grads(
    q, k, v, gate, starts, do, d_sums, states, norms, d_states, d_norms, totals, dv, dq, dk, dg,
    T, G, N, scale, dg_part,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STEEP: tl.constexpr, STARTS: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
    LIMIT: tl.constexpr, DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_k, n, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
    h_k = h // SHARE
    H = G * R
    c = tl.arange(0, C)
    ks = i_k * BK + tl.arange(0, BK)
    vs = tl.arange(0, BV)
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
    tile = slot * K * V + ks[:, None] * V + vs[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    state = _cast(tl.load(states + tile, mask=in_tile, other=0.0), DT, HALF)
    d_state = _cast(tl.load(d_states + tile, mask=in_tile, other=0.0), DT, HALF)

    later = c[:, None] > c[None, :]
    later_T = c[:, None] < c[None, :]
    same = c[:, None] == c[None, :]
    sees = in_t
    write = in_t
    keep = begin >= 0
    if STARTS:
        first = tl.load(starts + b * T + t, mask=in_t, other=T).to(tl.int32)
        later = later & (first[:, None] <= t[None, :])
        later_T = later_T & (first[None, :] <= t[:, None])
        same = same & (first <= t)[:, None]
        sees = first < begin
        end = tl.load(starts + b * T + tl.minimum(begin + C, T) - 1)
        write = in_t & (t >= end)
        keep = end < begin
    q += b * q_b + h_k * R * q_h + at * q_t
    rows = (b * T + t) * H + h * R
    out_row = (b * T + t) * G + h
    dk += out_row[:, None] * K + ks[None, :]
    if NORM:
        norm = tl.load(norms + slot * K + ks, mask=in_k, other=0.0)
        d_norm = tl.load(d_norms + slot * K + ks, mask=in_k, other=0.0)

    if DELTA:
        # The rule reads its state with the keys: one more query head, strictly causal, whose outputs' gradient is -dv.
        dv += out_row[:, None] * V + vs[None, :]
    # In every branch the diagonal, which no gate enters, joins dq and dk in fp32 so that it cancels in dg.
    if GATE < 2:
        weight = tl.full([C, C], 1.0, tl.float32)
        if not DELTA:
            weight *= scale
        weight_T = weight
        rest = tl.where(write, 1.0, 0.0)[:, None]
        reach = tl.where(sees, scale, 0.0)[:, None]
        if GATE == 1:
            p = gate + b * g_b + h * g_h + at * g_t
            g_C = tl.maximum(tl.load(p + c * g_t, mask=in_t, other=0.0).to(tl.float32), -100.0)
            after = tl.load(p + (c + 1) * g_t, mask=(c < C - 1) & (t + 1 < T), other=0.0).to(tl.float32)
            rest *= tl.exp(tl.cumsum(tl.maximum(after, -100.0), 0, reverse=True))[:, None]
            reach *= tl.exp(tl.cumsum(g_C, 0))[:, None]
            weight *= tl.exp(_segments(g_C, c, DT))
            weight_T *= tl.exp(_segments_T(g_C, c, DT))
            through = tl.sum(state.to(tl.float32) * d_state.to(tl.float32))
            if NORM:
                through += tl.sum(norm * d_norm)
            through *= tl.where(keep, tl.exp(tl.sum(g_C)), 0.0)
        k_d = _cast(k_C, DT, HALF)
        dk_C = tl.dot(v_C, tl.trans(d_state), input_precision=PREC)
        if NORM:
            dk_C += d_norm[None, :]
        dk_C *= rest
        if GATE == 1:
            through += tl.sum(k_C.to(tl.float32) * dk_C)
            push = tl.zeros([C], tl.float32)
        for r in range(0, R):
            q_C = tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0)
            do_C = _cast(tl.load(do + (rows + r)[:, None] * V + vs[None, :], mask=in_tv, other=0.0), DT, HALF)
            q_d = _cast(q_C, DT, HALF)
            da = tl.dot(do_C, tl.trans(v_C), input_precision=PREC)
            da_T = tl.dot(v_C, tl.trans(do_C), input_precision=PREC)
            dq_C = tl.dot(do_C, tl.trans(state), input_precision=PREC)
            if NORM:
                d_sum = tl.load(d_sums + rows + r, mask=in_t, other=0.0)
                da += d_sum[:, None]
                da_T += d_sum[None, :]
                dq_C += d_sum[:, None] * norm[None, :]
            dq_C *= reach
            diagonal = tl.sum(tl.where(same, da, 0.0), 1)[:, None] * scale
            if DELTA:
                da *= scale
                da_T *= scale
            da = tl.where(later, da * weight, 0.0)
            da_T = tl.where(later_T, da_T * weight_T, 0.0)
            dq_C = tl.dot(_cast(da, DT, HALF), k_d, dq_C, input_precision=PREC)
            dk_C = tl.dot(_cast(da_T, DT, HALF), q_d, dk_C, input_precision=PREC)
            dq_C += diagonal * k_C.to(tl.float32)
            dk_C += diagonal * q_C.to(tl.float32)
            if GATE == 1:
                push += tl.sum(q_C.to(tl.float32) * dq_C, 1)
            tl.store(dq + (rows + r)[:, None] * K + ks[None, :], dq_C.to(dq.dtype.element_ty), mask=in_tk)
        if DELTA:
            dr_C = _cast(tl.load(dv, mask=in_tv, other=0.0), DT, HALF)
            da = tl.dot(dr_C, tl.trans(v_C), input_precision=PREC)
            da_T = tl.dot(v_C, tl.trans(dr_C), input_precision=PREC)
            dq_C = tl.dot(dr_C, tl.trans(state), input_precision=PREC)
            dq_C *= tl.where(sees, 1.0, 0.0)[:, None]
            if GATE == 1:
                dq_C *= tl.exp(tl.cumsum(g_C, 0))[:, None]
            da = tl.where(later, da * weight, 0.0)
            da_T = tl.where(later_T, da_T * weight_T, 0.0)
            dq_C = tl.dot(_cast(da, DT, HALF), k_d, dq_C, input_precision=PREC)
            dk_C -= tl.dot(_cast(da_T, DT, HALF), k_d, input_precision=PREC)
            if GATE == 1:
                push -= tl.sum(k_C.to(tl.float32) * dq_C, 1)
        if GATE == 1:
            push -= tl.sum(k_C.to(tl.float32) * dk_C, 1)
        if DELTA:
            dk_C -= dq_C
        tl.store(dk, dk_C.to(dk.dtype.element_ty), mask=in_tk)
        if GATE == 1:
            dg_C = tl.cumsum(push, 0, reverse=True) + through
            tl.store(dg + i_k * dg_part + out_row, dg_C.to(dg.dtype.element_ty), mask=in_t)
    else:
        g_C = tl.load(gate + b * g_b + h * g_h + at * g_t + c[:, None] * g_t + ks[None, :], mask=in_tk, other=0.0)
        g_C = tl.maximum(g_C.to(tl.float32), -100.0)
        i, t_ = c[:, None], c[None, :]
        k_f = k_C.to(tl.float32)
        dg += out_row[:, None] * K + ks[None, :]
        push = tl.zeros([C, BK], tl.float32)
        through = tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        dk_C = tl.dot(v_C, tl.trans(d_state), input_precision=PREC)
        if NORM:
            through += norm * d_norm
            dk_C += d_norm[None, :]
        through *= tl.where(keep, tl.exp(decay), 0.0)
        if not STEEP:
            # Gradients of k exp(-x) and q exp(x) as they were rounded: then pairs on one side of a gate cancel in dg.
            half = tl.exp(0.5 * decay)
            x = _sums(_block_matrix(i, t_, LOG_C), g_C, GDT)
            e = tl.exp(x)
            k_x = _cast(k_f * tl.exp(-x), DT, HALF)
            dk_C *= half[None, :]
            if STARTS:
                dk_C = tl.where(write[:, None], dk_C, 0.0)
            through += tl.sum(k_x.to(tl.float32) * dk_C, 0)
            for r in range(0, R):
                q_C = tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0)
                do_C = _cast(tl.load(do + (rows + r)[:, None] * V + vs[None, :], mask=in_tv, other=0.0), DT, HALF)
                da = tl.dot(do_C, tl.trans(v_C), input_precision=PREC)
                dq_C = tl.dot(do_C, tl.trans(state), input_precision=PREC)
                if NORM:
                    d_sum = tl.load(d_sums + rows + r, mask=in_t, other=0.0)
                    da += d_sum[:, None]
                    dq_C += d_sum[:, None] * norm[None, :]
                dq_C *= half[None, :]
                if STARTS:
                    dq_C = tl.where(sees[:, None], dq_C, 0.0)
                diagonal = tl.sum(tl.where(same, da, 0.0), 1)[:, None]
                dq_C = tl.dot(_cast(tl.where(later, da, 0.0), DT, HALF), k_x, dq_C, input_precision=PREC)
                dq_C += diagonal * k_x.to(tl.float32)
                q_x = _cast(q_C.to(tl.float32) * (e * scale), DT, HALF)
                push += q_x.to(tl.float32) * dq_C
                dq_C *= e * scale
                tl.store(dq + (rows + r)[:, None] * K + ks[None, :], dq_C.to(dq.dtype.element_ty), mask=in_tk)
                da_T = tl.dot(v_C, tl.trans(do_C), input_precision=PREC)
                if NORM:
                    da_T += d_sum[None, :]
                dk_C = tl.dot(_cast(tl.where(later_T, da_T, 0.0), DT, HALF), q_x, dk_C, input_precision=PREC)
                dk_C += diagonal * q_x.to(tl.float32)
            if DELTA:
                dr_C = _cast(tl.load(dv, mask=in_tv, other=0.0), DT, HALF)
                dq_C = tl.dot(dr_C, tl.trans(state), input_precision=PREC) * half[None, :]
                if STARTS:
                    dq_C = tl.where(sees[:, None], dq_C, 0.0)
                da = tl.where(later, tl.dot(dr_C, tl.trans(v_C), input_precision=PREC), 0.0)
                da_T = tl.where(later_T, tl.dot(v_C, tl.trans(dr_C), input_precision=PREC), 0.0)
                dq_C = tl.dot(_cast(da, DT, HALF), k_x, dq_C, input_precision=PREC)
                q_x = _cast(k_f * e, DT, HALF)
                dk_C -= tl.dot(_cast(da_T, DT, HALF), q_x, input_precision=PREC)
                push -= q_x.to(tl.float32) * dq_C
            push -= k_x.to(tl.float32) * dk_C
            dk_C /= e
            if DELTA:
                dk_C -= dq_C * e
            dg_C = _from_here(push, i, t_, DT) + through[None, :]
            tl.store(dk, dk_C.to(dk.dtype.element_ty), mask=in_tk)
            tl.store(dg, dg_C.to(dg.dtype.element_ty), mask=in_tk)
        else:
            x, level = _safe_block(g_C, i, t_, GDT, LIMIT)
            block = (c[:, None] >> level) == (c[None, :] >> level)
            e_x = tl.exp(x)
            k_x = _cast(k_f * tl.exp(-x), DT, HALF)
            reach = tl.exp(_sums(tl.where(t_ <= i, 1.0, 0.0), g_C, GDT))
            rest = tl.exp(_sums(tl.where(t_ > i, 1.0, 0.0), g_C, GDT))
            if STARTS:
                reach = tl.where(sees[:, None], reach, 0.0)
                rest = tl.where(write[:, None], rest, 0.0)
            dk_C *= rest
            through += tl.sum(k_f * dk_C, 0)
            push -= k_f * dk_C
            for r in range(0, R):
                q_C = tl.load(q + r * q_h + c[:, None] * q_t + ks[None, :], mask=in_tk, other=0.0)
                do_C = _cast(tl.load(do + (rows + r)[:, None] * V + vs[None, :], mask=in_tv, other=0.0), DT, HALF)
                da = tl.dot(do_C, tl.trans(v_C), input_precision=PREC)
                da_T = tl.dot(v_C, tl.trans(do_C), input_precision=PREC)
                dq_C = tl.dot(do_C, tl.trans(state), input_precision=PREC)
                if NORM:
                    d_sum = tl.load(d_sums + rows + r, mask=in_t, other=0.0)
                    da += d_sum[:, None]
                    da_T += d_sum[None, :]
                    dq_C += d_sum[:, None] * norm[None, :]
                dq_C *= reach
                q_f = q_C.to(tl.float32) * scale
                push += q_f * dq_C
                diagonal = tl.sum(tl.where(same, da, 0.0), 1)[:, None]
                dq_C += diagonal * k_f
                dk_C += diagonal * q_f
                da = tl.where(later, da, 0.0)
                da_T = tl.where(later_T, da_T, 0.0)
                q_x = _cast(q_f * e_x, DT, HALF)
                dq_l = tl.dot(_cast(tl.where(block, da, 0.0), DT, HALF), k_x, input_precision=PREC)
                dk_l = tl.dot(_cast(tl.where(block, da_T, 0.0), DT, HALF), q_x, input_precision=PREC)
                push += q_x.to(tl.float32) * dq_l - k_x.to(tl.float32) * dk_l
                dq_C += dq_l * e_x
                dk_C += dk_l / e_x
                for level_ in range(level, LOG_C):
                    e = tl.exp(_sums(_level_matrix(i, t_, level_), g_C, GDT))
                    k_l = _cast(k_f * e, DT, HALF)
                    q_l = _cast(q_f * e, DT, HALF)
                    da_l = tl.where(_level_pairs(i, t_, level_), da, 0.0)
                    da_lT = tl.where(_level_pairs(t_, i, level_), da_T, 0.0)
                    dq_l = tl.dot(_cast(da_l, DT, HALF), k_l, input_precision=PREC)
                    dk_l = tl.dot(_cast(da_lT, DT, HALF), q_l, input_precision=PREC)
                    push += q_l.to(tl.float32) * dq_l - k_l.to(tl.float32) * dk_l
                    dq_C += dq_l * e
                    dk_C += dk_l * e
                dq_C *= scale
                tl.store(dq + (rows + r)[:, None] * K + ks[None, :], dq_C.to(dq.dtype.element_ty), mask=in_tk)
            if DELTA:
                dr_C = _cast(tl.load(dv, mask=in_tv, other=0.0), DT, HALF)
                da = tl.where(later, tl.dot(dr_C, tl.trans(v_C), input_precision=PREC), 0.0)
                da_T = tl.where(later_T, tl.dot(v_C, tl.trans(dr_C), input_precision=PREC), 0.0)
                dq_C = tl.dot(dr_C, tl.trans(state), input_precision=PREC) * reach
                push -= k_f * dq_C
                dk_C -= dq_C
                q_x = _cast(k_f * e_x, DT, HALF)
                dq_l = tl.dot(_cast(tl.where(block, da, 0.0), DT, HALF), k_x, input_precision=PREC)
                dk_l = tl.dot(_cast(tl.where(block, da_T, 0.0), DT, HALF), q_x, input_precision=PREC)
                push -= q_x.to(tl.float32) * dq_l - k_x.to(tl.float32) * dk_l
                dk_C -= dq_l * e_x + dk_l / e_x
                for level_ in range(level, LOG_C):
                    e = tl.exp(_sums(_level_matrix(i, t_, level_), g_C, GDT))
                    k_l = _cast(k_f * e, DT, HALF)
                    da_l = tl.where(_level_pairs(i, t_, level_), da, 0.0)
                    da_lT = tl.where(_level_pairs(t_, i, level_), da_T, 0.0)
                    dq_l = tl.dot(_cast(da_l, DT, HALF), k_l, input_precision=PREC)
                    dk_l = tl.dot(_cast(da_lT, DT, HALF), k_l, input_precision=PREC)
                    push -= k_l.to(tl.float32) * (dq_l - dk_l)
                    dk_C -= (dq_l + dk_l) * e
            dg_C = _from_here(push, i, t_, DT) + through[None, :]
            tl.store(dk, dk_C.to(dk.dtype.element_ty), mask=in_tk)
            tl.store(dg, dg_C.to(dg.dtype.element_ty), mask=in_tk)
