"""One decode step of window attention, of gated linear or delta-rule memory, or of both, in one launch.

Legend: B batch, H query heads, G KV heads (value heads, where the delta rule has more of them), R = H // G, K key dim
of the window, KM of the memory, V value dim, W ring slots, S sinks, N block of slots.
Programs of one KV head share nothing: some own a block of the state's value columns, read it once, update it in place
and read it out for the R query heads; one more walks the ring. All sizes are known without a sync, so that the launch
can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.launch import Launch, play, unit_stride
from linearize.kernels.microscaling import stored_numbers


@triton.jit
def _numbers(at, cols, mask, D, MX: tl.constexpr):
    """Numbers [N, D] at rows' addresses `at` [N, 1]: as they are, or of MXINT8 (kernels/microscaling.py)."""
    x = tl.load(at + cols, mask=mask, other=0)
    if MX:
        exponent = tl.load(at + D + cols // 32, mask=mask, other=0).to(tl.int32)
        x = x.to(tl.int8, bitcast=True).to(tl.float32) * ((exponent << 23).to(tl.float32, bitcast=True) / 64)
    return x


@triton.jit
def _softmax_block(q, k_N, v_N, visible, acc, top, total, scale, PREC: tl.constexpr):
    k_N, v_N = k_N.to(q.dtype), v_N.to(q.dtype)
    s = tl.where(visible[None, :], tl.dot(q, tl.trans(k_N), input_precision=PREC) * scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp(s - shift[:, None])
    keep = tl.exp(top - shift)
    acc = tl.dot(p.to(v_N.dtype), v_N, acc * keep[:, None], input_precision=PREC)
    return acc, new_top, total * keep + tl.sum(p, 1)


@triton.jit
def _step(
    q_w, k_w, v_w, k_ring, v_ring, sink_k, sink_v, length, o_w, lse, row_max,
    q_m, k_m, v_m, gate, beta, state, norm, o_m, sums,
    G, W, S, scale_w, scale_m, eps,
    q_w_b, q_w_h, k_w_b, k_w_h, v_w_b, v_w_h, k_r_b, k_r_s, k_r_h, v_r_b, v_r_s, v_r_h,
    k_s_b, k_s_s, k_s_h, v_s_b, v_s_s, v_s_h, q_m_b, q_m_h, k_m_b, k_m_h, v_m_b, v_m_h, g_b, g_h, b_b, b_h,
    R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KM: tl.constexpr, BKM: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    FULL_V: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    MEMORY: tl.constexpr, WINDOW: tl.constexpr, WRITE: tl.constexpr, SINKS: tl.constexpr, GATE: tl.constexpr,
    NORM: tl.constexpr, DELTA: tl.constexpr, UNIT: tl.constexpr, MX: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    part, pair = tl.program_id(0), tl.program_id(1)
    b, g = (pair // G).to(tl.int64), pair % G
    if part < NV:
        if MEMORY:
            fs = tl.arange(0, BKM)  # names of its own: the window's key dim may be another, and a name has one shape
            in_f = fs < KM
            vs = part * BV + tl.arange(0, BV)
            in_v = vs < V
            tile = pair.to(tl.int64) * KM * V + fs[:, None] * V + vs[None, :]
            in_tile = in_f[:, None] & in_v[None, :]
            s = tl.load(state + tile, mask=in_tile, other=0.0)
            key = tl.load(k_m + b * k_m_b + g // SHARE * k_m_h + fs, mask=in_f, other=0.0).to(tl.float32)
            value = tl.load(v_m + b * v_m_b + g * v_m_h + vs, mask=in_v, other=0.0).to(tl.float32)
            decay = tl.full([BKM], 1.0, tl.float32)
            if GATE == 1:
                decay *= tl.exp(tl.load(gate + b * g_b + g * g_h).to(tl.float32))
            elif GATE == 2:
                decay = tl.exp(tl.load(gate + b * g_b + g * g_h + fs, mask=in_f, other=0.0).to(tl.float32))
            s *= decay[:, None]
            if UNIT:
                key *= tl.rsqrt(tl.sum(key * key) + eps)
            if DELTA:
                strength = tl.load(beta + b * b_b + g * b_h).to(tl.float32)
                value = strength * (value - tl.sum(key[:, None] * s, 0))
            s += key[:, None] * value[None, :]
            tl.store(state + tile, s, mask=in_tile)
            for r in tl.static_range(R):
                q = tl.load(q_m + b * q_m_b + (g // SHARE * R + r) * q_m_h + fs, mask=in_f, other=0.0).to(tl.float32)
                if UNIT:
                    q *= tl.rsqrt(tl.sum(q * q) + eps)
                q *= scale_m
                out = tl.sum(q[:, None] * s, 0)
                tl.store(o_m + (b * G * R + g * R + r) * V + vs, out.to(o_m.dtype.element_ty), mask=in_v)
            if NORM:  # noqa: SIM102
                if part == 0:
                    z = tl.load(norm + pair * KM + fs, mask=in_f, other=0.0) * decay + key
                    tl.store(norm + pair * KM + fs, z, mask=in_f)
                    for r in tl.static_range(R):
                        q = tl.load(q_m + b * q_m_b + (g * R + r) * q_m_h + fs, mask=in_f, other=0.0).to(tl.float32)
                        tl.store(sums + b * G * R + g * R + r, tl.sum(q * z, 0) * scale_m)
    else:
        if WINDOW:
            ks = tl.arange(0, BK)
            in_k = ks < K
            cols = tl.arange(0, FULL_V)
            in_cols = cols < V
            head = tl.arange(0, ROWS)
            n = tl.arange(0, N)
            past = tl.load(length + b)
            q_R = tl.load(
                q_w + b * q_w_b + (g * R + head)[:, None] * q_w_h + ks[None, :],
                mask=(head < R)[:, None] & in_k[None, :],
                other=0.0,
            )
            acc = tl.zeros([ROWS, FULL_V], tl.float32)
            top = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            new = past % W
            if WRITE:
                new_k = tl.load(k_w + b * k_w_b + g * k_w_h + ks, mask=in_k, other=0.0)
                new_v = tl.load(v_w + b * v_w_b + g * v_w_h + cols, mask=in_cols, other=0.0)
                top = tl.sum(q_R.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale_w
                total += 1.0
                acc += new_v.to(tl.float32)[None, :]
                tl.store(k_ring + b * k_r_b + new * k_r_s + g * k_r_h + ks, new_k, mask=in_k)
                tl.store(v_ring + b * v_r_b + new * v_r_s + g * v_r_h + cols, new_v, mask=in_cols)
                if SINKS:
                    skip = tl.where(
                        past < S, 0, K + V
                    )  # added to an index, it masks the store of a token past the sinks
                    tl.store(sink_k + b * k_s_b + past * k_s_s + g * k_s_h + ks, new_k, mask=ks + skip < K)
                    tl.store(sink_v + b * v_s_b + past * v_s_s + g * v_s_h + cols, new_v, mask=cols + skip < V)
            if SINKS:
                for n_0 in range(0, S, N):
                    a = n_0 + n
                    visible = (a < S) & (a <= past - W)
                    at = a.to(tl.int64)[:, None]
                    in_k_N, in_v_N = visible[:, None] & in_k[None, :], visible[:, None] & in_cols[None, :]
                    k_N = _numbers(sink_k + b * k_s_b + at * k_s_s + g * k_s_h, ks[None, :], in_k_N, K, MX)
                    v_N = _numbers(sink_v + b * v_s_b + at * v_s_s + g * v_s_h, cols[None, :], in_v_N, V, MX)
                    acc, top, total = _softmax_block(q_R, k_N, v_N, visible, acc, top, total, scale_w, PREC)
            for n_0 in range(0, tl.minimum(past + 1, W).to(tl.int32), N):
                a = n_0 + n
                visible = (a < W) & (a <= past)
                if WRITE:
                    visible = visible & (a != new)
                at = a.to(tl.int64)[:, None]
                in_k_N, in_v_N = visible[:, None] & in_k[None, :], visible[:, None] & in_cols[None, :]
                k_N = _numbers(k_ring + b * k_r_b + at * k_r_s + g * k_r_h, ks[None, :], in_k_N, K, MX)
                v_N = _numbers(v_ring + b * v_r_b + at * v_r_s + g * v_r_h, cols[None, :], in_v_N, V, MX)
                acc, top, total = _softmax_block(q_R, k_N, v_N, visible, acc, top, total, scale_w, PREC)
            row = b * G * R + g * R + head
            tl.store(
                o_w + row[:, None] * V + cols[None, :],
                (acc / total[:, None]).to(o_w.dtype.element_ty),
                mask=(head < R)[:, None] & in_cols[None, :],
            )
            tl.store(lse + row, top + tl.log(total), mask=head < R)
            tl.store(row_max + row, top, mask=head < R)


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()[:dims]


def _run(
    q_w: Tensor | None, k_w: Tensor | None, v_w: Tensor | None, k_ring: Tensor | None, v_ring: Tensor | None,
    sink_k: Tensor | None, sink_v: Tensor | None, length: Tensor | None, q_m: Tensor | None, k_m: Tensor | None,
    v_m: Tensor | None, gate: Tensor | None, beta: Tensor | None, state: Tensor | None, norm: Tensor | None,
    scale_w: float, scale_m: float, write: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q_w, k_w, v_w, q_m, k_m, v_m = (None if x is None else unit_stride(x) for x in (q_w, k_w, v_w, q_m, k_m, v_m))
    for name, x in (("state", state), ("norm", norm)):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} is updated in place and must be contiguous; got strides {x.stride()}.")
    given = (q_w, k_w, v_w, k_ring, v_ring, sink_k, sink_v, length, q_m, k_m, v_m, gate, beta, state, norm)
    numbers = (scale_w, scale_m, write, eps)
    return tuple(play(("step", numbers), given, lambda: _one_launch(*given, *numbers)))


def _one_launch(
    q_w, k_w, v_w, k_ring, v_ring, sink_k, sink_v, length, q_m, k_m, v_m, gate, beta, state, norm, scale_w, scale_m,
    write, eps,
):  # fmt: skip
    """The launch of a step, and its outputs."""
    q = q_m if q_w is None else q_w
    G, V = _values(v_m, v_ring)
    B, H, K = q.shape
    KM = K if q_m is None else q_m.shape[-1]
    H = max(H, G)
    memory, window = state is not None, k_ring is not None
    outputs = _outputs(q, v_m, v_ring, norm, memory, window)
    full_v = max(16, triton.next_power_of_2(V))
    block_v = min(32, full_v)
    parts = triton.cdiv(V, block_v) if memory else 0
    if gate is not None and gate.dim() == 1:
        gate = gate.expand(B, G)
    o_w, lse, row_max, o_m, sums = outputs
    args = (
        q_w, k_w, v_w, k_ring, v_ring, sink_k, sink_v, length, o_w, lse, row_max,
        q_m, k_m, v_m, gate, beta, state, norm, o_m, sums,
        G, k_ring.shape[1] if window else 1, 0 if sink_k is None else sink_k.shape[1], scale_w, scale_m, eps,
        *_strides(q_w, 2), *_strides(k_w, 2), *_strides(v_w, 2), *_strides(k_ring, 3), *_strides(v_ring, 3),
        *_strides(sink_k, 3), *_strides(sink_v, 3), *_strides(q_m, 2), *_strides(k_m, 2), *_strides(v_m, 2),
        *_strides(gate, 2), *_strides(beta, 2),
    )  # fmt: skip
    constants = {
        "R": H // G, "SHARE": 1 if k_m is None else G // k_m.shape[1], "K": K, "V": V,
        "BK": max(16, triton.next_power_of_2(K)), "KM": KM, "BKM": max(16, triton.next_power_of_2(KM)),
        "BV": block_v, "NV": parts, "FULL_V": full_v, "ROWS": max(16, triton.next_power_of_2(H // G)), "N": 32,
        "MEMORY": memory, "WINDOW": window, "WRITE": write, "SINKS": sink_k is not None,
        "GATE": 0 if gate is None else gate.dim() - 1, "NORM": norm is not None, "DELTA": beta is not None,
        "UNIT": eps > 0, "MX": window and k_ring.dtype == torch.uint8, "PREC": "tf32x3",
    }  # fmt: skip
    return [Launch(_step, (parts + int(window), B * G, 1), args, constants, {}, warps=4, stages=2)], outputs


def _values(v_m: Tensor | None, v_ring: Tensor | None) -> tuple[int, int]:
    """G and V."""
    G, V = (v_ring if v_m is None else v_m).shape[-2:]
    return G, stored_numbers(V) if v_m is None and v_ring.dtype == torch.uint8 else V


def _outputs(
    q: Tensor, v_m: Tensor | None, v_ring: Tensor | None, norm: Tensor | None, memory: bool, window: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B = q.shape[0]
    G, V = _values(v_m, v_ring)
    H = max(q.shape[1], G)
    rows = (B, H) if window else (0,)
    return (
        q.new_empty((B, H, V) if window else (0,)),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty(rows, dtype=torch.float32),
        (q if v_m is None else v_m).new_empty((B, H, V) if memory else (0,)),
        q.new_empty((B, H) if norm is not None else (0,), dtype=torch.float32),
    )


_op = torch.library.custom_op(
    "linearize::step", _run, mutates_args=("state", "norm", "k_ring", "v_ring", "sink_k", "sink_v")
)


def _launch(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.linearize.step(*arguments) if torch.compiler.is_compiling() else _run(*arguments)


@_op.register_fake
def _(
    q_w, k_w, v_w, k_ring, v_ring, sink_k, sink_v, length, q_m, k_m, v_m, gate, beta, state, norm, scale_w, scale_m,
    write, eps,
):  # fmt: skip
    q = q_m if q_w is None else q_w
    return _outputs(q, v_m, v_ring, norm, state is not None, k_ring is not None)


def gated_linear_step_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, norm: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Run `gated_linear_step` (see there for shapes) in one launch."""
    _, _, _, o, sums = _launch(
        None, None, None, None, None, None, None, None, q, k, v, log_decay, None, state, norm, 1.0, scale, False, 0.0
    )
    return o, None if norm is None else sums


def gated_delta_step_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, eps: float
) -> Tensor:
    """Run `gated_delta_step` (see there for shapes) in one launch; with `eps` above 0, q and k become unit first."""
    return _launch(
        None, None, None, None, None, None, None, None, q, k, v, log_decay, beta, state, None, 1.0, scale, False, eps
    )[3]


def window_step_triton(
    q: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    length: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `window_step` (see there for shapes) in one launch."""
    o, lse, row_max, _, _ = _launch(
        q, None, None, k_ring, v_ring, sink_k, sink_v, length, None, None, None, None, None, None, None, scale, 1.0,
        False, 0.0,
    )  # fmt: skip
    return o, lse, row_max


def hybrid_step_triton(
    q_w: Tensor, k_w: Tensor, v_w: Tensor, k_ring: Tensor, v_ring: Tensor, sink_k: Tensor | None, sink_v: Tensor | None,
    length: Tensor, q_m: Tensor, k_m: Tensor, v_m: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    state: Tensor, norm: Tensor | None, scale_w: float, scale_m: float, write: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Run `hybrid_step` (see there for shapes) in one launch."""
    o_w, lse, row_max, o_m, sums = _launch(
        q_w, k_w, v_w, k_ring, v_ring, sink_k, sink_v, length, q_m, k_m, v_m, log_decay, beta, state, norm, scale_w,
        scale_m, write, 0.0,
    )  # fmt: skip
    return o_w, lse, row_max, o_m, None if norm is None else sums
