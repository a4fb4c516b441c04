"""Triton kernels of gated linear attention on grouped KV heads, forward and backward.

Legend: B batch, T tokens, H query heads, G KV heads, R = H // G query heads of a KV head, K key dim, V value dim,
C chunk, N chunks. S_n [K, V] is the state before chunk n, gc_i the sum of a chunk's gates up to and including token i.

Forward: `_states` walks the chunks of one [BK, BV] tile of a KV head's state and writes every S_n; `_outputs` then
serves all chunks at once, the R query heads of a KV head sharing one load of K, V, gates and state. Backward:
`_states` again (S is not kept), `_state_grads` walks back and writes the gradients of S_{n+1}; `_value_grads` and
`_key_grads` do the rest of a chunk, in blocks of V and of K so that the accumulators fit in registers. Gradients of
K, V and gates are summed over the R query heads in registers: no atomics, two runs are equal to the bit.

A walk over all chunks is a long chain of small steps. Where there are few KV heads to walk (a long row at batch 1), it
is cut into segments: a first launch (`SUMMARY`) finds what each segment adds and how much it keeps, the walks of all
segments then begin where the earlier ones end.

Decays. With one gate a token, the [C, C] score is multiplied by exp(gc_i - gc_j). With a gate a key channel the score
is a product of q exp(x) and k exp(-x), x being gc from the middle of the chunk; |x| <= LIMIT there. Chunks that decay
by more than exp(-2 LIMIT) are steep: a second launch of the same kernel serves them and leaves the others. It covers
the pairs inside blocks of 16 tokens (of 1, if those are steep as well) in that way, and the rest by doubling levels:
in a block twice as large, the exponents of rows (later half) and columns (earlier half) are sums of gates up to the
boundary, so at most 0. This is exact for any gate and needs no elementwise [C, C, K] work.

The transpose of an accumulator is never fed to a dot (Triton 3.4 to 3.7.0 miscompile that on Hopper, also through a
transposed layout in shared memory that no `tl.trans` shows): A^T is its own product, and operands that are made from
accumulators are made in the orientation that they are used in. `tests/kernels/test_compiled.py` scans for it.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.configs import Tile, Tiles, gated_linear_tiles
from linearize.kernels.launch import Launch, compile_all, is_new, layout, run, unit_stride

MIN_GATE = -100.0  # exp(-100) is 0 in fp32; keeps -inf out of sums


@triton.jit
def _cast(x, LIKE: tl.constexpr, HALF: tl.constexpr):
    """x in the dtype that dots run in; fp16 inputs run as fp32 rounded to tf32, so that products cannot overflow."""
    x = x.to(LIKE)
    if HALF:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _block_matrix(i, t, LEVEL: tl.constexpr):
    """M with (M g)_i = gc_i from the middle of the block of 2**LEVEL tokens that holds i."""
    return tl.where((i >> LEVEL) == (t >> LEVEL), tl.where(t <= i, 0.5, -0.5), 0.0)


@triton.jit
def _level_matrix(i, t, level):
    """M with (M g)_i = the sum of gates between i and the middle boundary of its block of 2**(level + 1) tokens."""
    middle = ((i >> (level + 1)) << (level + 1)) + (1 << level)
    later = (i >= middle) & (t >= middle) & (t <= i)
    earlier = (i < middle) & (t > i) & (t < middle)
    return tl.where(later | earlier, 1.0, 0.0)


@triton.jit
def _level_pairs(i, j, level):
    """Pairs (i, j) with i in the later and j in the earlier half of one block of 2**(level + 1) tokens."""
    return ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) > (j >> level))


@triton.jit
def _sums(m, gate, GDT: tl.constexpr):
    """Sums of gates [C, BK] over the tokens named by a row of m [C, C]: a product, exact for 16-bit gates.

    GDT is the dtype of the product, or "split": fp32 gates in two halves of bf16, right to about 2**-17.
    """
    if GDT == "split":
        high = gate.to(tl.bfloat16)
        low = (gate - high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(m.to(tl.bfloat16), low, tl.dot(m.to(tl.bfloat16), high))
    else:
        sums = tl.dot(m.to(GDT), gate.to(GDT), input_precision="tf32x3")
    return sums


@triton.jit
def _sums_T(gate_T, m_T, GDT: tl.constexpr):
    """The same for gates [BK, C]: the transpose of an accumulator must not reach a dot, so it is computed anew."""
    if GDT == "split":
        high = gate_T.to(tl.bfloat16)
        low = (gate_T - high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(low, m_T.to(tl.bfloat16), tl.dot(high, m_T.to(tl.bfloat16)))
    else:
        sums = tl.dot(gate_T.to(GDT), m_T.to(GDT), input_precision="tf32x3")
    return sums


@triton.jit
def _from_here(x, i, t, DT: tl.constexpr):
    """Sums of x [C, BK] over t >= i, by a product with ones."""
    ones = tl.where(t >= i, 1.0, 0.0)
    if DT == tl.float32:  # noqa: SIM300
        return tl.dot(ones, x, input_precision="tf32x3")
    high = x.to(DT)
    low = (x - high.to(tl.float32)).to(DT)
    return tl.dot(ones.to(DT), low, tl.dot(ones.to(DT), high))


@triton.jit
def _safe_block(gate, i, t, GDT: tl.constexpr, LIMIT: tl.constexpr):
    """Exponents x [C, BK] inside blocks of 16 tokens if they are safe, else 0 for blocks of 1; log2 of the block."""
    level = tl.full([], 4, tl.int32)
    x = _sums(_block_matrix(i, t, 4), gate, GDT)
    if tl.max(tl.abs(x)) > LIMIT:
        level = tl.full([], 0, tl.int32)
        x = x * 0.0
    return x, level


@triton.jit
def _safe_block_T(gate_T, i_T, t_T, level, GDT: tl.constexpr):
    """The exponents of `_safe_block` as [BK, C], for the level that it found."""
    x = _sums_T(gate_T, _block_matrix(i_T, t_T, 4), GDT)
    return tl.where(level > 0, x, 0.0)


@triton.jit
def _segments(gate, c, DT: tl.constexpr):
    """Sums of gates [C] over j < t <= i as [C (i), C (j)], for i >= j; differences are exact enough for bf16."""
    if DT == tl.bfloat16:  # noqa: SIM300
        gc = tl.cumsum(gate, 0)
        return tl.minimum(gc[:, None] - gc[None, :], 0.0)
    return tl.cumsum(tl.where(c[:, None] > c[None, :], gate[:, None], 0.0), 0)


@triton.jit
def _segments_T(gate, c, DT: tl.constexpr):
    """The transpose of `_segments`."""
    if DT == tl.bfloat16:  # noqa: SIM300
        gc = tl.cumsum(gate, 0)
        return tl.minimum(gc[None, :] - gc[:, None], 0.0)
    return tl.cumsum(tl.where(c[:, None] < c[None, :], gate[None, :], 0.0), 1)


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
    columns = tl.zeros([BK, C], tl.float32)  # of the norm: summed at the end, see below
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
                tl.store(norms + (row * N + n) * K + ks, norm, mask=ks + i_v * K < K)
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
            # Triton 3.6 fails to compile a loop-carried sum of a reduction in some layouts, all the more where nothing
            # in the loop reads it.
            if SUMMARY:
                columns += k_T.to(tl.float32)
            else:
                norm = tl.fma(norm, tl.full([BK], 1.0, tl.float32), tl.sum(k_T.to(tl.float32), 1))
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
            tl.store(norm_T + row * K + ks, norm, mask=ks + i_v * K + past < K)


@triton.jit(do_not_specialize=["T", "G", "N"])
def _outputs(
    q, k, v, gate, starts, states, norms, totals, o, sums,
    T, G, N, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STEEP: tl.constexpr, STARTS: tl.constexpr, NORM: tl.constexpr, LIMIT: tl.constexpr,
    DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    n, i_v, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
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
    k_C = tl.load(k + b * k_b + h * k_h + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_tk, other=0.0)
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
    q += b * q_b + h * R * q_h + at * q_t
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
                k + b * k_b + h * k_h + at * k_t + c[None, :] * k_t + ks[:, None],
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
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STEEP: tl.constexpr, STARTS: tl.constexpr, DELTA: tl.constexpr, LIMIT: tl.constexpr,
    DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    # DELTA: without the part that d_states brings, whose first summands go to `parts` (see `delta_triton`).
    n, i_v, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
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
    k_C = tl.load(k + b * k_b + h * k_h + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_tk, other=0.0)
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
    q += b * q_b + h * R * q_h + at * q_t
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
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STEEP: tl.constexpr, STARTS: tl.constexpr, NORM: tl.constexpr, DELTA: tl.constexpr,
    LIMIT: tl.constexpr, DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_k, n, i_bg = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
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
    k_C = tl.load(k + b * k_b + h * k_h + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_tk, other=0.0)
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
    q += b * q_b + h * R * q_h + at * q_t
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


GATE_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@torch.compiler.assume_constant_result
def supported(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether the kernels serve these head dims and this dtype."""
    return gated_linear_tiles(dtype, key_dim, value_dim, 1, 1, 1) is not None


def gated_linear_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    with_normalizer: bool,
    starts: Tensor | None,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Run `gated_linear_attention` (see there for shapes) through the registered op `linearize::gated_linear`."""
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.float().expand(*k.shape[:3])
    if initial_norm is not None and not with_normalizer:
        initial_norm = None
    given = (q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer)
    op = torch.ops.linearize.gated_linear if torch.compiler.is_compiling() else _Eager.apply
    o, sums, state, norm = op(*given)
    return (o, sums, state, norm) if with_normalizer else (o, None, state, None)


def _gate_dtype(dtype: torch.dtype, bf16: bool) -> object:
    """What sums of gates are computed in: see `_sums`."""
    return "split" if bf16 and dtype == torch.float32 else GATE_DTYPES[dtype]


def _gate_mode(log_decay: Tensor | None) -> int:
    return 0 if log_decay is None else log_decay.dim() - 2


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class Call:
    """Shapes, strides and compile-time constants that the launches of one call share."""

    @staticmethod
    def table(dtype: torch.dtype, key_dim: int, value_dim: int, pairs: int, repeat: int, tokens: int) -> Tiles | None:
        """The tiles of a shape."""
        return gated_linear_tiles(dtype, key_dim, value_dim, pairs, repeat, tokens)

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor | None,
        initial_state: Tensor | None, initial_norm: Tensor | None, scale: float, with_normalizer: bool,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = unit_stride(q), unit_stride(k), unit_stride(v)
        self.gate = log_decay if log_decay is None or log_decay.dim() < 4 else unit_stride(log_decay)
        self.starts = None if starts is None else starts.contiguous()
        self.B, self.T, self.H, self.K = q.shape
        self.G, self.V = k.shape[2], v.shape[-1]
        self.R = self.H // self.G
        self.scale, self.norm = scale, with_normalizer
        mode = _gate_mode(log_decay)
        tiles = self.table(q.dtype, self.K, self.V, self.B * self.G, self.R, self.T)
        if tiles is None:
            raise ValueError(f"no Triton kernel for {q.dtype} with key dim {self.K} and value dim {self.V}.")
        self.tiles: Tiles = tiles
        self.N = _blocks(self.T, tiles.chunk)
        self.segment = _blocks(self.N, tiles.segments)
        self.slopes = (False, True) if mode == 2 else (False,)
        self.sizes = (self.T, self.G, self.N)
        gate_strides = (0, 0, 0) if self.gate is None else self.gate.stride()[:3]
        self.strides = [x.stride()[:3] for x in (self.q, self.k, self.v)] + [gate_strides]
        bf16 = q.dtype == torch.bfloat16
        self.state_dtype = torch.bfloat16 if bf16 else torch.float32
        self.constants = {
            "GATE": mode,
            "STARTS": starts is not None,
            "NORM": with_normalizer,
            "DELTA": False,
            "INIT": initial_state is not None or initial_norm is not None,
            "R": self.R,
            "K": self.K,
            "V": self.V,
            "C": tiles.chunk,
            "LOG_C": tiles.chunk.bit_length() - 1,
            "LIMIT": 20.0,
            "DT": tl.bfloat16 if bf16 else tl.float32,
            "GDT": tl.float32 if self.gate is None else _gate_dtype(self.gate.dtype, bf16),
            "HALF": q.dtype == torch.float16,
            "PREC": "tf32" if q.dtype == torch.float16 else "tf32x3",
            "SEGMENTS": tiles.segments,
        }
        self.s_0, self.z_0 = initial_state, initial_norm
        if self.constants["INIT"]:
            self.s_0 = self.new(self.K, self.V).zero_() if initial_state is None else initial_state.contiguous()
            if with_normalizer:
                self.z_0 = self.new(self.K).zero_() if initial_norm is None else initial_norm.contiguous()

        given = layout(self.q, self.k, self.v, self.gate, self.starts, self.s_0, self.z_0)
        self.key = ("gated_linear", given, scale, with_normalizer)

    def scratch(self, *dims: int, when: bool) -> Tensor | None:
        """A buffer [B, G, *dims] in fp32 between launches, or None."""
        return self.q.new_empty((self.B, self.G, *dims), dtype=torch.float32) if when else None

    def new(self, *dims: int, when: bool = True) -> Tensor:
        """An fp32 tensor a state: [B, G, *dims], or an empty one."""
        return self.q.new_empty((self.B, self.G, *dims) if when else (0,), dtype=torch.float32)

    def launch(
        self, kernel: object, grid: tuple[int, int, int], tile: Tile, args: tuple[object, ...], **constants: object
    ) -> Launch:
        """A launch of `kernel` with what all launches share."""
        return Launch(kernel, grid, args, self.constants, constants, tile.warps, tile.stages)

    def segmented(
        self, kernel: object, tile: Tile, args: Callable[..., tuple[object, ...]], **more: object
    ) -> list[Launch]:
        """The launches of a walk over the chunks; `args` takes the buffers of the segments' summaries."""
        segments = self.tiles.segments
        split = segments > 1
        summaries = (
            self.scratch(segments, self.K, self.V, when=split),
            self.scratch(segments, self.K, when=split and self.norm),
            self.scratch(segments, self.K, when=split),
        )
        grid = (_blocks(self.K, tile.key), _blocks(self.V, tile.value), self.B * self.G * segments)
        more |= {"BK": tile.key, "BV": tile.value}
        return [
            self.launch(kernel, grid, tile, args(*summaries), SUMMARY=summary, **more)
            for summary in ((True, False) if split else (False,))
        ]

    def states(self, final: bool) -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        """The launches of `_states`, and what they fill: states, norms, gate sums of chunks; last state, last norm."""
        vector = self.constants["GATE"] == 2
        before = (
            self.q.new_empty((self.B * self.G, self.N, self.K, self.V), dtype=self.state_dtype),
            self.scratch(self.N, self.K, when=self.norm),
            self.scratch(self.N, self.K, when=vector),
        )
        last = (None, None)
        if final:
            last = self.new(self.K, self.V), self.new(self.K, when=self.norm)
        _, k_s, v_s, g_s = self.strides

        def args(*summaries: Tensor | None) -> tuple[object, ...]:
            given = (self.k, self.v, self.gate, self.starts, self.s_0, self.z_0)
            return *given, *summaries, *before, *last, *self.sizes, self.segment, *k_s, *v_s, *g_s

        return self.segmented(_states, self.tiles.states, args, FINAL=final), (*before, *last)

    def forward(self) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Launches of the forward, and o, sums, last state, last norm."""
        first, (*before, s_T, z_T) = self.states(final=True)
        o = self.v.new_empty((self.B, self.T, self.H, self.V))
        sums = self.q.new_empty((self.B, self.T, self.H) if self.norm else (0,), dtype=torch.float32)
        return [*first, *self.outputs(before, o, sums)], (o, sums, s_T, z_T)

    def outputs(self, before: Sequence[Tensor | None], o: Tensor, sums: Tensor | None) -> list[Launch]:
        """The launches of `_outputs`, which fill o and sums; `before` as `states` fills it."""
        tile = self.tiles.outputs
        grid = (self.N, _blocks(self.V, tile.value), self.B * self.G)
        args = (
            self.q, self.k, self.v, self.gate, self.starts, *before, o, sums, *self.sizes, self.scale,
            *(n for s in self.strides for n in s),
        )  # fmt: skip
        shape = {"BK": tile.key, "BV": tile.value}
        return [self.launch(_outputs, grid, tile, args, STEEP=steep, **shape) for steep in self.slopes]

    def backward(
        self, do: Tensor, d_sums: Tensor | None, d_state: Tensor | None, d_norm: Tensor | None
    ) -> tuple[list[Launch], tuple[Tensor, ...]]:
        """Launches of the backward, and the gradients of q, k, v, gates (in parts), first state, first norm."""
        first, (*before, _, _) = self.states(final=False)
        d_states, d_norms = torch.empty_like(before[0]), self.scratch(self.N, self.K, when=self.norm)
        init = bool(self.constants["INIT"])
        ds_0, dz_0 = self.new(self.K, self.V, when=init), self.new(self.K, when=init and self.norm)
        q_s, _, _, g_s = self.strides
        given = (self.q, do, self.gate, self.starts, d_sums, d_state, d_norm)

        def walked(*summaries: Tensor | None) -> tuple[object, ...]:
            filled = (d_states, d_norms, ds_0, dz_0)
            return *given, *summaries, *filled, *self.sizes, self.segment, self.scale, *q_s, *g_s

        ends = {"FINAL": d_state is not None, "NORM_FINAL": self.norm and d_norm is not None}
        second = self.segmented(_state_grads, self.tiles.state_grads, walked, **ends)
        dv = self.v.new_empty(self.v.shape)
        values = self.value_grads(do, d_states, before[2], dv)
        keys, (dq, dk, dg) = self.key_grads(do, d_sums, before, d_states, d_norms)
        return [*first, *second, *values, *keys], (dq, dk, dv, dg, ds_0, dz_0)

    def value_grads(
        self, do: Tensor, d_states: Tensor | None, totals: Tensor | None, dv: Tensor, parts: Tensor | None = None
    ) -> list[Launch]:
        """The launches of `_value_grads`, which fill dv, and parts for the delta rule."""
        tile = self.tiles.value_grads
        q_s, k_s, _, g_s = self.strides
        args = (
            self.q, self.k, self.gate, self.starts, do, d_states, totals, dv, parts, *self.sizes, self.scale,
            *q_s, *k_s, *g_s,
        )  # fmt: skip
        grid = (self.N, _blocks(self.V, tile.value), self.B * self.G)
        shape = {"BK": tile.key, "BV": tile.value}
        return [self.launch(_value_grads, grid, tile, args, STEEP=steep, **shape) for steep in self.slopes]

    def key_grads(
        self, do: Tensor, d_sums: Tensor | None, before: Sequence[Tensor | None], d_states: Tensor,
        d_norms: Tensor | None, dv: Tensor | None = None, key_dtype: torch.dtype | None = None,
    ) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
        """The launches of `_key_grads`, and the gradients of q, k and gates (in parts); dv for the delta rule."""
        tile = self.tiles.key_grads
        blocks = _blocks(self.K, tile.key)
        dq, dk = self.q.new_empty(self.q.shape), self.k.new_empty(self.k.shape, dtype=key_dtype)
        if self.gate is None:
            dg = self.q.new_empty((0,))
        elif self.gate.dim() == 4:
            dg = self.gate.new_empty(self.gate.shape)
        else:
            dg = self.gate.new_empty((blocks, *self.gate.shape), dtype=torch.float32)
        states, norms, totals = before
        args = (
            self.q, self.k, self.v, self.gate, self.starts, do, d_sums, states, norms, d_states, d_norms, totals, dv,
            dq, dk, dg, *self.sizes, self.scale, self.B * self.T * self.G, *(n for s in self.strides for n in s),
        )  # fmt: skip
        grid = (blocks, self.N, self.B * self.G)
        shape = {"BK": tile.key, "BV": tile.value}
        launches = [self.launch(_key_grads, grid, tile, args, STEEP=steep, **shape) for steep in self.slopes]
        return launches, (dq, dk, dg)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
    scale: float,
    with_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer)
    launches, outputs = call.forward()
    if is_new(q, call.key):
        later = call.backward(outputs[0], outputs[1], None, None)[0] if q.requires_grad else []
        compile_all(launches + later)
    run(launches, call.key)
    return outputs


def _run_backward(
    do: Tensor | None,
    d_sums: Tensor | None,
    d_state: Tensor | None,
    d_norm: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
    scale: float,
    with_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer)
    do = v.new_zeros((*q.shape[:3], v.shape[-1])) if do is None else do.contiguous()
    if with_normalizer:
        d_sums = q.new_zeros(q.shape[:3], dtype=torch.float32) if d_sums is None else d_sums.contiguous()
    d_state, d_norm = (None if x is None else x.contiguous() for x in (d_state, d_norm))
    launches, (dq, dk, dv, dg, ds_0, dz_0) = call.backward(do, d_sums, d_state, d_norm)
    key = (*call.key, layout(do, d_sums, d_state, d_norm))
    if is_new(q, key):
        compile_all(launches)
    run(launches, key)
    return dq, dk, dv, gate_grad(dg, log_decay), ds_0, dz_0


def gate_grad(dg: Tensor, log_decay: Tensor | None) -> Tensor:
    """The gradient of the gates from what `Call.backward` left, in parts for one gate a token."""
    return dg.sum(0).to(log_decay.dtype) if log_decay is not None and log_decay.dim() == 3 else dg


_forward = torch.library.custom_op("linearize::gated_linear", _run_forward, mutates_args=())
_backward = torch.library.custom_op("linearize::gated_linear_grad", _run_backward, mutates_args=())


@_forward.register_fake
def _(q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer):
    B, T, H, K = q.shape
    G, V = k.shape[2], v.shape[-1]
    o = v.new_empty((B, T, H, V))
    sums = q.new_empty((B, T, H) if with_normalizer else (0,), dtype=torch.float32)
    state = q.new_empty((B, G, K, V), dtype=torch.float32)
    return o, sums, state, q.new_empty((B, G, K) if with_normalizer else (0,), dtype=torch.float32)


@_backward.register_fake
def _(do, d_sums, d_state, d_norm, q, k, v, log_decay, starts, initial_state, initial_norm, scale, with_normalizer):
    dg = q.new_empty((0,)) if log_decay is None else log_decay.new_empty(log_decay.shape)
    init = initial_state is not None or initial_norm is not None
    B, _, _, K = q.shape
    G, V = k.shape[2], v.shape[-1]
    ds_0 = q.new_empty((B, G, K, V) if init else (0,), dtype=torch.float32)
    dz_0 = q.new_empty((B, G, K) if init and with_normalizer else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, ds_0, dz_0


def _save(ctx, inputs, output):
    q, k, v, log_decay, starts, initial_state, initial_norm, ctx.scale, ctx.with_normalizer = inputs
    ctx.save_for_backward(q, k, v, log_decay, starts, initial_state, initial_norm)


def _gradients(ctx, op, *grads):
    q, k, v, log_decay, starts, initial_state, initial_norm = ctx.saved_tensors
    dq, dk, dv, dg, ds_0, dz_0 = op(
        *grads, q, k, v, log_decay, starts, initial_state, initial_norm, ctx.scale, ctx.with_normalizer
    )
    return (
        dq, dk, dv, None if log_decay is None else dg, None,
        None if initial_state is None else ds_0, None if initial_norm is None else dz_0, None, None,
    )  # fmt: skip


def _differentiate(ctx, *grads):
    return _gradients(ctx, torch.ops.linearize.gated_linear_grad, *grads)


_forward.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same op without the dispatcher, whose cost a launch would show outside `torch.compile`."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        ctx.set_materialize_grads(False)
        return _run_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return _gradients(ctx, _run_backward, *grads)
