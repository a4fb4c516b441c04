"""Triton kernels of the gated delta rule on grouped KV heads, forward and backward.

Legend: B batch, T tokens, H query heads, G value heads, K key dim, V value dim, C chunk, N chunks. S_n [K, V] is the
state before chunk n, gc_i the sum of a chunk's gates up to and including token i, D the diagonal matrix of the chunk's
beta.

With w_t = beta_t y_t and y_t = v_t - k_t^T diag(exp g_t) S_{t-1} the rule is gated linear attention with w for v, and
the kernels of `gated_linear_triton` serve all that is not the rule's own. In a chunk
y = (I + M D)^-1 (v - (k exp gc) S_n)
with M_ij = k_i exp(gc_i - gc_j) k_j for j < i. Both (I + M D)^-1 = I - Z D and (I + D M)^-1 = I - D Z come from one
strictly lower Z, so that beta = 0 divides nothing; the identity is never rounded.

Forward: `_solve` finds Z of every chunk and, with it, what the walk needs: y = u - W S_n. `_delta_states` walks the
chunks of a [K, BV] tile of the state and writes S_n, y and w; then `_outputs`. Backward: the first two again (nothing
is kept), `_value_grads` for what the outputs bring to w and to the states, `_delta_state_grads` back over the chunks,
with dv = D (I - Z^T D) dw, and `_key_grads`, where the rule's reading of its state is one more query head: the keys,
strictly causal, with -dv as the gradient of their outputs. No atomics: two runs are equal to the bit.

With more value heads than key heads, each value head has a state of its own; a program finds its head of q and k by
division with SHARE, the number of value heads that read it, and the gradients of q and k are summed over these.

Gates enter the walks as factors that `_solve` stores: `reach` exp(gc), `rest` exp(the gates after a token), `carry` the
decay of the whole chunk, each 0 where documents hide the state. With a gate a key channel, keys with these factors are
stored instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.configs import DeltaTiles, delta_tiles
from linearize.kernels.gated_linear_triton import Call, gate_grad, prepared
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
from linearize.kernels.launch import Launch, contiguous, differentiable, play

ROWS = 16  # of q or k that a program scales to unit length


@triton.jit
def _exact_dot(a, b, DT: tl.constexpr):
    """a b of fp32 operands; where dots run in bf16, in three products of halves, right to about 2**-16."""
    if DT == tl.float32:  # noqa: SIM300
        return tl.dot(a, b, input_precision="tf32x3")
    a_high, b_high = a.to(DT), b.to(DT)
    a_low = (a - a_high.to(tl.float32)).to(DT)
    b_low = (b - b_high.to(tl.float32)).to(DT)
    return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@triton.jit(do_not_specialize=["T", "G", "N"])
def _solve(
    k, v, beta, gate, starts, z, w, u, reach, rest, carry, reads, writes, totals,
    T, G, N,
    k_b, k_t, k_h, v_b, v_t, v_h, b_b, b_t, b_h, g_b, g_t, g_h,
    SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, STEEP: tl.constexpr, STARTS: tl.constexpr, LIMIT: tl.constexpr,
    DT: tl.constexpr, GDT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    n, i_bg = tl.program_id(0), tl.program_id(1)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
    h_k = h // SHARE
    c = tl.arange(0, C)
    ks = tl.arange(0, BK)
    in_k = ks < K
    slot = i_bg.to(tl.int64) * N + n
    begin = n * C
    at = begin.to(tl.int64)
    t = begin + c
    in_t = t < T
    in_tk = in_t[:, None] & in_k[None, :]
    rows = slot * C + c
    if GATE == 2:
        p = gate + b * g_b + h * g_h + at * g_t
        g_C = tl.load(p + c[:, None] * g_t + ks[None, :], mask=in_tk, other=0.0).to(tl.float32)
        g_C = tl.maximum(g_C, -100.0)
        if STEEP:
            total = tl.load(totals + slot * K + ks, mask=in_k, other=0.0)
        else:
            total = tl.sum(g_C, 0)
            tl.store(totals + slot * K + ks, total, mask=in_k)
        if (tl.min(total) < -2.0 * LIMIT) != STEEP:
            return
    k_C = tl.load(k + b * k_b + h_k * k_h + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_tk, other=0.0)
    k_f = k_C.to(tl.float32)
    b_C = tl.load(beta + b * b_b + h * b_h + at * b_t + c * b_t, mask=in_t, other=0.0).to(tl.float32)
    later = c[:, None] > c[None, :]
    sees = in_t
    write = in_t
    keep = begin >= 0
    if STARTS:
        first = tl.load(starts + b * T + t, mask=in_t, other=T).to(tl.int32)
        later = later & (first[:, None] <= t[None, :])
        sees = first < begin
        end = tl.load(starts + b * T + tl.minimum(begin + C, T) - 1)
        write = in_t & (t >= end)
        keep = end < begin
    if GATE < 2:
        k_d = _cast(k_C, DT, HALF)
        m = tl.dot(k_d, tl.trans(k_d), input_precision=PREC)
        sees = tl.where(sees, 1.0, 0.0)
        write = tl.where(write, 1.0, 0.0)
        kept = tl.where(keep, 1.0, 0.0)
        if GATE == 1:
            p = gate + b * g_b + h * g_h + at * g_t
            g_C = tl.maximum(tl.load(p + c * g_t, mask=in_t, other=0.0).to(tl.float32), -100.0)
            after = tl.load(p + (c + 1) * g_t, mask=(c < C - 1) & (t + 1 < T), other=0.0).to(tl.float32)
            sees *= tl.exp(tl.cumsum(g_C, 0))
            write *= tl.exp(tl.cumsum(tl.maximum(after, -100.0), 0, reverse=True))
            kept *= tl.exp(tl.sum(g_C))
            m *= tl.exp(_segments(g_C, c, DT))
        tl.store(reach + rows, sees)
        tl.store(rest + rows, write)
        tl.store(carry + slot, kept)
    else:
        i, t_ = c[:, None], c[None, :]
        if not STEEP:
            gc = tl.cumsum(g_C, 0)
            x = gc - 0.5 * total[None, :]
            k_x = _cast(k_f * tl.exp(-x), DT, HALF)
            m = tl.dot(_cast(k_f * tl.exp(x), DT, HALF), tl.trans(k_x), input_precision=PREC)
            k_r = k_f * tl.exp(gc)
            k_w = k_f * tl.exp(tl.minimum(total[None, :] - gc, 0.0))
        else:
            in_Tk = in_t[None, :] & in_k[:, None]
            i_T, t_T = c[None, :], c[:, None]
            g_T = tl.load(p + c[None, :] * g_t + ks[:, None], mask=in_Tk, other=0.0).to(tl.float32)
            g_T = tl.maximum(g_T, -100.0)
            k_T = tl.load(
                k + b * k_b + h_k * k_h + at * k_t + c[None, :] * k_t + ks[:, None], mask=in_Tk, other=0.0
            ).to(tl.float32)
            x, level = _safe_block(g_C, i, t_, GDT, LIMIT)
            block = (i >> level) == (t_ >> level)
            k_xT = _cast(k_T * tl.exp(-_safe_block_T(g_T, i_T, t_T, level, GDT)), DT, HALF)
            m = tl.where(block, tl.dot(_cast(k_f * tl.exp(x), DT, HALF), k_xT, input_precision=PREC), 0.0)
            for level_ in range(level, LOG_C):
                k_l = _cast(k_f * tl.exp(_sums(_level_matrix(i, t_, level_), g_C, GDT)), DT, HALF)
                k_lT = _cast(k_T * tl.exp(_sums_T(g_T, _level_matrix(i_T, t_T, level_), GDT)), DT, HALF)
                m += tl.where(_level_pairs(i, t_, level_), tl.dot(k_l, k_lT, input_precision=PREC), 0.0)
            k_r = k_f * tl.exp(_sums(tl.where(t_ <= i, 1.0, 0.0), g_C, GDT))
            k_w = k_f * tl.exp(_sums(tl.where(t_ > i, 1.0, 0.0), g_C, GDT))
        if STARTS:
            k_r = tl.where(sees[:, None], k_r, 0.0)
            k_w = tl.where(write[:, None], k_w, 0.0)
        tile = rows[:, None] * K + ks[None, :]
        tl.store(reads + tile, k_r.to(reads.dtype.element_ty), mask=in_k[None, :] & (c >= 0)[:, None])
        tl.store(writes + tile, k_w.to(writes.dtype.element_ty), mask=in_k[None, :] & (c >= 0)[:, None])
        tl.store(carry + slot * K + ks, tl.where(keep, tl.exp(total), 0.0), mask=in_k)
    m = tl.where(later, m, 0.0)
    # Z by doubling blocks: where two blocks have theirs, the pairs between them are (I - Z D) M (I - D Z).
    inverse = tl.where(_level_pairs(c[:, None], c[None, :], 0), m, 0.0)
    for level_ in range(1, LOG_C):
        between = tl.where(_level_pairs(c[:, None], c[None, :], level_), m, 0.0)
        between -= _exact_dot(between * b_C[None, :], inverse, DT)
        inverse += between - _exact_dot(inverse * b_C[None, :], between, DT)
    tl.store(z + rows[:, None] * C + c[None, :], inverse.to(z.dtype.element_ty))
    z_C = _cast(inverse * b_C[None, :], DT, HALF)
    if GATE < 2:  # loaded anew: its registers served the products above
        k_C = tl.load(k + b * k_b + h_k * k_h + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_tk, other=0.0)
        k_r = k_C.to(tl.float32) * sees[:, None]
    k_r -= tl.dot(z_C, _cast(k_r, DT, HALF), input_precision=PREC)
    tl.store(w + rows[:, None] * K + ks[None, :], k_r.to(w.dtype.element_ty), mask=in_k[None, :] & (c >= 0)[:, None])
    v += b * v_b + h * v_h + at * v_t
    for v_0 in range(0, V, BV):
        vs = v_0 + tl.arange(0, BV)
        in_v = vs < V
        v_C = tl.load(v + c[:, None] * v_t + vs[None, :], mask=in_t[:, None] & in_v[None, :], other=0.0)
        u_C = v_C.to(tl.float32) - tl.dot(z_C, _cast(v_C, DT, HALF), input_precision=PREC)
        tl.store(
            u + rows[:, None] * V + vs[None, :], u_C.to(u.dtype.element_ty), mask=in_v[None, :] & (c >= 0)[:, None]
        )


@triton.jit(do_not_specialize=["T", "G", "N"])
def _delta_states(
    k, beta, w, u, rest, carry, state_0, states, y, values, state_T,
    T, G, N,
    k_b, k_t, k_h, b_b, b_t, b_h,
    SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VECTOR: tl.constexpr, INIT: tl.constexpr, FINAL: tl.constexpr,
    DT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_v, i_bg = tl.program_id(0), tl.program_id(1)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
    h_k = h // SHARE
    c = tl.arange(0, C)
    ks = tl.arange(0, BK)
    vs = i_v * BV + tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    in_cv = (c >= 0)[:, None] & in_v[None, :]
    row = i_bg.to(tl.int64)
    tile = ks[:, None] * V + vs[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if INIT:
        state = tl.load(state_0 + row * K * V + tile, mask=in_tile, other=0.0).to(tl.float32)
    k += b * k_b + h_k * k_h
    beta += b * b_b + h * b_h
    for n in range(0, N):
        slot = row * N + n
        tl.store(states + slot * K * V + tile, state.to(states.dtype.element_ty), mask=in_tile)
        begin = n * C
        at = begin.to(tl.int64)
        in_t = begin + c < T
        rows = slot * C + c
        at_v = rows[:, None] * V + vs[None, :]
        w_C = tl.load(w + rows[:, None] * K + ks[None, :], mask=(c >= 0)[:, None] & in_k[None, :], other=0.0)
        k_C = tl.load(k + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_t[:, None] & in_k[None, :], other=0.0)
        b_C = tl.load(beta + at * b_t + c * b_t, mask=in_t, other=0.0).to(tl.float32)
        y_C = tl.load(u + at_v, mask=in_cv, other=0.0).to(tl.float32)
        y_C -= tl.dot(_cast(w_C, DT, HALF), _cast(state, DT, HALF), input_precision=PREC)
        tl.store(y + at_v, y_C.to(y.dtype.element_ty), mask=in_cv)
        new = y_C * b_C[:, None]
        tl.store(values + at_v, new.to(values.dtype.element_ty), mask=in_cv)
        if VECTOR:
            state *= tl.load(carry + slot * K + ks, mask=in_k, other=0.0)[:, None]
        else:
            new *= tl.load(rest + rows)[:, None]
            state *= tl.load(carry + slot)
        state = tl.dot(tl.trans(_cast(k_C, DT, HALF)), _cast(new, DT, HALF), state, input_precision=PREC)
    if FINAL:
        tl.store(state_T + row * K * V + tile, state, mask=in_tile)


@triton.jit(do_not_specialize=["T", "G", "N"])
def _delta_state_grads(
    k, reads, beta, z, y, reach, rest, carry, parts, dw, d_state_T, d_states, dv, d_beta, d_state_0,
    T, G, N, d_beta_part,
    k_b, k_t, k_h, r_b, r_t, r_h, b_b, b_t, b_h,
    SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VECTOR: tl.constexpr, INIT: tl.constexpr, FINAL: tl.constexpr,
    DT: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_v, i_bg = tl.program_id(0), tl.program_id(1)
    b, h = (i_bg // G).to(tl.int64), i_bg % G
    h_k = h // SHARE
    c = tl.arange(0, C)
    ks = tl.arange(0, BK)
    vs = i_v * BV + tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    row = i_bg.to(tl.int64)
    tile = ks[:, None] * V + vs[None, :]
    in_tile = in_k[:, None] & in_v[None, :]
    grad = tl.zeros([BK, BV], tl.float32)
    if FINAL:
        grad = tl.load(d_state_T + row * K * V + tile, mask=in_tile, other=0.0).to(tl.float32)
    k += b * k_b + h_k * k_h
    reads += b * r_b + h_k * r_h
    beta += b * b_b + h * b_h
    for back in range(0, N):
        n = N - 1 - back
        slot = row * N + n
        tl.store(d_states + slot * K * V + tile, grad.to(d_states.dtype.element_ty), mask=in_tile)
        begin = n * C
        at = begin.to(tl.int64)
        t = begin + c
        in_t = t < T
        in_tk = in_t[:, None] & in_k[None, :]
        in_tv = in_t[:, None] & in_v[None, :]
        rows = slot * C + c
        token = (b * T + t) * G + h
        k_C = tl.load(k + at * k_t + c[:, None] * k_t + ks[None, :], mask=in_tk, other=0.0)
        b_C = tl.load(beta + at * b_t + c * b_t, mask=in_t, other=0.0).to(tl.float32)
        z_T = tl.load(z + (slot * C + c)[None, :] * C + c[:, None])
        y_C = tl.load(y + rows[:, None] * V + vs[None, :], mask=in_tv, other=0.0).to(tl.float32)
        dw_C = tl.load(dw + token[:, None] * V + vs[None, :], mask=in_tv, other=0.0).to(tl.float32)
        part = tl.load(parts + slot * K * V + tile, mask=in_tile, other=0.0).to(tl.float32)
        back_C = tl.dot(_cast(k_C, DT, HALF), _cast(grad, DT, HALF), input_precision=PREC)
        if VECTOR:
            grad *= tl.load(carry + slot * K + ks, mask=in_k, other=0.0)[:, None]
        else:
            back_C *= tl.load(rest + rows)[:, None]
            grad *= tl.load(carry + slot)
        grad += part
        dw_C += back_C
        dw_C -= tl.dot(_cast(z_T, DT, HALF), _cast(dw_C * b_C[:, None], DT, HALF), input_precision=PREC)
        tl.store(d_beta + i_v * d_beta_part + token, tl.sum(dw_C * y_C, 1), mask=in_t)
        dv_C = -dw_C * b_C[:, None]
        tl.store(dv + token[:, None] * V + vs[None, :], (-dv_C).to(dv.dtype.element_ty), mask=in_tv)
        if VECTOR:
            r_C = tl.load(reads + at * r_t + c[:, None] * r_t + ks[None, :], mask=in_tk, other=0.0)
        else:
            r_C = k_C
            dv_C *= tl.load(reach + rows)[:, None]
        grad = tl.dot(tl.trans(_cast(r_C, DT, HALF)), _cast(dv_C, DT, HALF), grad, input_precision=PREC)
    if INIT:
        tl.store(d_state_0 + row * K * V + tile, grad, mask=in_tile)


@triton.jit(do_not_specialize=["M", "T", "H"])
def _unit(
    x, dy, y, M, T, H, eps, x_b, x_t, x_h, d_b, d_t, d_h,
    K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, GRAD: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h, t, b = m % H, (m // H) % T, m // H // T
    ks = tl.arange(0, BK)
    inside = (m < M)[:, None] & (ks < K)[None, :]
    at = (b * x_b + t * x_t + h * x_h)[:, None] + ks[None, :]
    x_M = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_M * x_M, 1) + eps)[:, None]
    out = x_M * scale
    if GRAD:
        at = (b * d_b + t * d_t + h * SHARE * d_h)[:, None] + ks[None, :]
        dy_M = tl.zeros([ROWS, BK], tl.float32)
        for s in tl.static_range(SHARE):
            dy_M += tl.load(dy + s * d_h + at, mask=inside, other=0.0).to(tl.float32)
        out = (dy_M - out * tl.sum(out * dy_M, 1)[:, None]) * scale
    tl.store(y + m[:, None] * K + ks[None, :], out.to(y.dtype.element_ty), mask=inside)


def _unit_launch(x: Tensor, dy: Tensor | None, eps: float) -> tuple[Launch, Tensor]:
    """The launch that scales the rows of x [B, T, H, K] to unit length, or takes dy back through it; and its result.

    dy may have more heads: those that one head of x was read for are summed.
    """
    B, T, H, K = x.shape
    y = x.new_empty(x.shape)
    given, share = ((0, 0, 0), 1) if dy is None else (dy.stride()[:3], dy.shape[2] // H)
    args = (x, dy, y, B * T * H, T, H, eps, *x.stride()[:3], *given)
    constants = {"K": K, "BK": max(16, triton.next_power_of_2(K)), "ROWS": ROWS, "GRAD": dy is not None, "SHARE": share}
    return Launch(_unit, (-(-B * T * H // ROWS), 1, 1), args, constants, {}, warps=4, stages=1), y


@torch.compiler.assume_constant_result
def supported(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether the kernels serve these head dims and this dtype."""
    return delta_tiles(dtype, key_dim, value_dim, 1, 1, 1) is not None


class DeltaCall(Call):
    """What the launches of one call share (inputs as `_prepared`); to `Call`'s launches, w stands for the values."""

    table = staticmethod(delta_tiles)
    tiles: DeltaTiles

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, starts: Tensor | None,
        initial_state: Tensor | None, scale: float, eps: float,
    ) -> None:  # fmt: skip
        raw, first = (q, k), ()
        if eps > 0:
            first, (q, k) = zip(*(_unit_launch(x, None, eps) for x in raw), strict=True)
        super().__init__(q, k, v, log_decay, starts, initial_state, None, scale, False)
        self.raw, self.first, self.eps = raw, first, eps
        self.beta = beta
        self.given = self.v
        self.given_strides = self.strides[2]
        self.vector = self.constants["GATE"] == 2
        self.share = self.constants["SHARE"]
        self.key_share = (
            1 if self.vector else self.share
        )  # with a gate a key channel, the walks read a state's own keys
        self.constants |= {"DELTA": True, "VECTOR": self.vector}
        self.v = self.rows(self.V)
        self.strides[2] = self.v.stride()[:3]

    def rows(self, width: int, when: bool = True) -> Tensor | None:
        """A buffer [B, T padded to whole chunks, G, width] that lies as [B, G, N, C, width]."""
        if not when:
            return None
        size = (self.B, self.G, self.N * self.tiles.chunk, width)
        return self.q.new_empty(size, dtype=self.state_dtype).transpose(1, 2)

    def walk(self, final: bool) -> tuple[list[Launch], Tensor, Tensor | None, Tensor]:
        """The launches of `_solve` and `_delta_states`; states, gate sums and the last state that they fill."""
        C, N, pairs = self.tiles.chunk, self.N, self.B * self.G
        self.z, self.y = self.rows(C), self.rows(self.V)
        self.u = self.new(N * C, self.V)
        self.reads, self.writes = (self.rows(self.K, when=self.vector) for _ in range(2))
        self.reach, self.rest = (self.scratch(N * C, when=not self.vector) for _ in range(2))
        self.carry = self.new(N, self.K if self.vector else 1)
        totals = self.scratch(N, self.K, when=self.vector)
        w = self.rows(self.K)
        _, k_s, _, g_s = self.strides
        b_s = self.beta.stride()
        tile = self.tiles.solve
        args: tuple[object, ...] = (
            self.k, self.given, self.beta, self.gate, self.starts, self.z, w, self.u, self.reach, self.rest, self.carry,
            self.reads, self.writes, totals, *self.sizes, *k_s, *self.given_strides, *b_s, *g_s,
        )  # fmt: skip
        shape = {"BK": tile.key, "BV": tile.value}
        launches = [*self.first]
        launches += [self.launch(_solve, (N, pairs, 1), tile, args, STEEP=steep, **shape) for steep in self.slopes]
        states = self.q.new_empty((pairs, N, self.K, self.V), dtype=self.state_dtype)
        last = self.new(self.K, self.V, when=final)
        tile = self.tiles.states
        keys = self.writes if self.vector else self.k
        args = (
            keys, self.beta, w, self.u, self.rest, self.carry, self.s_0, states, self.y, self.v, last, *self.sizes,
            *keys.stride()[:3], *b_s,
        )  # fmt: skip
        grid = (-(-self.V // tile.value), pairs, 1)
        shape = {"BK": tile.key, "BV": tile.value, "SHARE": self.key_share}
        launches.append(self.launch(_delta_states, grid, tile, args, FINAL=final, **shape))
        return launches, states, totals, last

    def forward(self) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
        """Launches of the forward, and o and the last state."""
        launches, states, totals, last = self.walk(final=True)
        o = self.given.new_empty((self.B, self.T, self.H, self.V))
        return launches + self.outputs((states, None, totals), o, None), (o, last)

    def backward(self, do: Tensor, d_state: Tensor | None) -> tuple[list[Launch], tuple[Tensor, ...]]:
        """Launches of the backward, and the gradients of q, k, v, beta (in parts), gates (in parts), first state."""
        launches, states, totals, _ = self.walk(final=False)
        size = (self.B, self.T, self.G)
        dw = self.u.view(-1)[: self.B * self.T * self.G * self.V]  # u is read by then
        parts, d_states = torch.empty_like(states), torch.empty_like(states)
        launches += self.value_grads(do, None, totals, dw, parts)
        tile = self.tiles.state_grads
        columns = -(-self.V // tile.value)
        dv = self.given.new_empty((*size, self.V))
        d_beta = self.q.new_empty((columns, *size), dtype=torch.float32)
        ds_0 = self.new(self.K, self.V, when=bool(self.constants["INIT"]))
        keys, reads = (self.writes, self.reads) if self.vector else (self.k, self.k)
        args = (
            keys, reads, self.beta, self.z, self.y, self.reach, self.rest, self.carry, parts, dw, d_state, d_states,
            dv, d_beta, ds_0, *self.sizes, self.B * self.T * self.G, *keys.stride()[:3], *reads.stride()[:3],
            *self.beta.stride(),
        )  # fmt: skip
        given = d_state is not None
        shape = {"BK": tile.key, "BV": tile.value, "FINAL": given, "SHARE": self.key_share}
        launches.append(self.launch(_delta_state_grads, (columns, self.B * self.G, 1), tile, args, **shape))
        # What a unit key's gradient holds along the key falls away: round after that.
        dtypes = (torch.float32 if self.share > 1 else None, torch.float32 if self.eps > 0 or self.share > 1 else None)
        more, (dq, dk, dg) = self.key_grads(do, None, (states, None, totals), d_states, None, dv, *dtypes)
        if self.eps > 0:
            last = [_unit_launch(x, grad, self.eps) for x, grad in zip(self.raw, (dq, dk), strict=True)]
            more, (dq, dk) = [*more, *(launch for launch, _ in last)], (grad for _, grad in last)
        return launches + more, (dq, dk, dv, d_beta, dg, ds_0)


def _prepared(q, k, v, beta, log_decay, starts, initial_state):
    """The inputs as the kernels read them."""
    q, k, v, log_decay, starts, initial_state, _ = prepared(q, k, v, log_decay, starts, initial_state, None, False)
    return q, k, v, beta, log_decay, starts, initial_state


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, starts: Tensor | None,
    initial_state: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = _prepared(q, k, v, beta, log_decay, starts, initial_state)

    def later(outputs):
        return DeltaCall(*given, scale, eps).backward(outputs[0], None)[0] if q.requires_grad else []

    return tuple(play(("gated_delta", scale, eps), given, lambda: DeltaCall(*given, scale, eps).forward(), later))


def _run_backward(
    do: Tensor | None, d_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    starts: Tensor | None, initial_state: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = _prepared(q, k, v, beta, log_decay, starts, initial_state)
    if do is None:
        do = v.new_zeros(_sizes(q, v)[0])
    grads = contiguous(do, d_state)
    name = ("gated_delta_grad", scale, eps)
    dq, dk, dv, d_beta, dg, ds_0 = play(
        name, (*given, *grads), lambda: DeltaCall(*given, scale, eps).backward(*grads)
    )  # fmt: skip
    dq, dk = (
        x if x.shape == y.shape else x.unflatten(2, (y.shape[2], -1)).sum(3).to(y.dtype) for x, y in ((dq, q), (dk, k))
    )
    return dq, dk, dv, d_beta.sum(0).to(beta.dtype), gate_grad(dg, log_decay), ds_0


def _sizes(q, v):
    """Sizes of the outputs, a row for each query head or each value head, and of the state."""
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    return (B, T, max(H, G), V), (B, G, K, V)


def _fake(q, k, v, beta, log_decay, starts, initial_state, scale, eps):
    o, state = _sizes(q, v)
    return v.new_empty(o), q.new_empty(state, dtype=torch.float32)


def _fake_grad(do, d_state, q, k, v, beta, log_decay, starts, initial_state, scale, eps):
    dg = q.new_empty((0,)) if log_decay is None else log_decay.new_empty(log_decay.shape)
    ds_0 = q.new_empty((0,) if initial_state is None else _sizes(q, v)[1], dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v, beta)), dg, ds_0


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, backward, *grads):
    *_, log_decay, _, initial_state = ctx.saved_tensors
    dq, dk, dv, d_beta, dg, ds_0 = backward(*grads, *ctx.saved_tensors, ctx.scale, ctx.eps)
    dg, ds_0 = None if log_decay is None else dg, None if initial_state is None else ds_0
    return dq, dk, dv, d_beta, dg, None, ds_0, None, None


_op = differentiable("gated_delta", _run_forward, _run_backward, (_fake, _fake_grad), _save, _gradients)


def gated_delta_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, starts: Tensor | None,
    initial_state: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run `gated_delta_rule` (see there for shapes) through the registered op `linearize::gated_delta`.

    With `eps` above 0, rows of q and k are scaled to unit length first, by `(x x + eps)^-1/2`.
    """
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.float().expand(*v.shape[:3])
    return _op(q, k, v, beta, log_decay, starts, initial_state, scale, eps)
