"""Triton kernels of the selective scan on grouped KV heads, forward and backward.

Legend: B batch, T tokens, H query heads, G KV heads, R = H // G, K key dim, V value dim, N entries of a channel's
state, S = K // N blocks, P = V // S channels of a block, C chunk.

A program owns one block of one KV head of one row: it walks the tokens with the state [P, N] in registers, and reads it
with all R query heads, so that nothing is repeated and no atomics are needed. The forward keeps the state before each
chunk; the backward goes through the chunks from the last to the first, computes the states of one again into a scratch
of its own, and walks back over them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.launch import Launch, contiguous, differentiable, play

SCAN_TOKENS = 64  # of a chunk


@triton.jit
def _token(k, v, dt, goes_on, rate, b, t, g, s, T, G, n, p, in_n, in_p,
           S: tl.constexpr, N: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """A token's key [n], value [p], step [p] and what it keeps of the state [p, n]."""
    row = (b * T + t) * G + g
    k_n = tl.load(k + row * (S * N) + s * N + n, mask=in_n, other=0.0).to(tl.float32)
    v_p = tl.load(v + row * (S * P) + s * P + p, mask=in_p, other=0.0).to(tl.float32)
    dt_p = tl.load(dt + row * (S * P) + s * P + p, mask=in_p, other=0.0)
    keep = tl.exp(-dt_p[:, None] * rate) * tl.load(goes_on + b * T + t)
    return k_n, v_p, dt_p, keep


@triton.jit(do_not_specialize=["T", "G"])
def _scan_forward(
    q, k, v, dt, rate, goes_on, initial, o, final, kept, T, G,
    R: tl.constexpr, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    s, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r, n, p = tl.arange(0, BR), tl.arange(0, BN), tl.arange(0, BP)
    in_r, in_n, in_p = r < R, n < N, p < P
    inside = in_p[:, None] & in_n[None, :]
    own = (s * P + p)[:, None] * N + n[None, :]
    head = S * P * N
    rate_pn = tl.load(rate + g * head + own, mask=inside, other=0.0)
    state = tl.load(initial + (b * G + g) * head + own, mask=inside, other=0.0)
    chunks = tl.cdiv(T, C)
    for t in range(0, T):
        if t % C == 0:
            tl.store(kept + ((b * chunks + t // C) * G + g) * head + own, state, mask=inside)
        k_n, v_p, dt_p, keep = _token(k, v, dt, goes_on, rate_pn, b, t, g, s, T, G, n, p, in_n, in_p, S, N, P)
        state = keep * state + (dt_p * v_p)[:, None] * k_n[None, :]
        rows = ((b * T + t) * G + g) * R + r
        q_rn = tl.load(
            q + rows[:, None] * (S * N) + s * N + n[None, :], mask=in_r[:, None] & in_n[None, :], other=0.0
        ).to(tl.float32)
        o_rp = tl.sum(q_rn[:, None, :] * state[None, :, :], 2)
        tl.store(
            o + rows[:, None] * (S * P) + s * P + p[None, :],
            o_rp.to(o.dtype.element_ty),
            mask=in_r[:, None] & in_p[None, :],
        )
    tl.store(final + (b * G + g) * head + own, state, mask=inside)


@triton.jit(do_not_specialize=["T", "G"])
def _scan_backward(
    q, k, v, dt, rate, goes_on, kept, do, d_final, scratch, dq, dk, dv, d_dt, d_rate, d_initial, T, G,
    R: tl.constexpr, S: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    s, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r, n, p = tl.arange(0, BR), tl.arange(0, BN), tl.arange(0, BP)
    in_r, in_n, in_p = r < R, n < N, p < P
    inside = in_p[:, None] & in_n[None, :]
    own = (s * P + p)[:, None] * N + n[None, :]
    head = S * P * N
    rate_pn = tl.load(rate + g * head + own, mask=inside, other=0.0)
    d_state = tl.load(d_final + (b * G + g) * head + own, mask=inside, other=0.0)
    d_rate_pn = tl.zeros([BP, BN], tl.float32)
    chunks = tl.cdiv(T, C)
    scratch += ((b * G + g) * S + s) * (C * BP * BN) + p[:, None] * BN + n[None, :]
    for back in range(0, chunks):
        begin = (chunks - 1 - back) * C
        end = tl.minimum(begin + C, T)
        state = tl.load(kept + ((b * chunks + begin // C) * G + g) * head + own, mask=inside, other=0.0)
        for t in range(begin, end):
            tl.store(scratch + (t - begin) * (BP * BN), state)
            k_n, v_p, dt_p, keep = _token(k, v, dt, goes_on, rate_pn, b, t, g, s, T, G, n, p, in_n, in_p, S, N, P)
            state = keep * state + (dt_p * v_p)[:, None] * k_n[None, :]
        tl.debug_barrier()
        for late in range(0, end - begin):
            t = end - 1 - late
            k_n, v_p, dt_p, keep = _token(k, v, dt, goes_on, rate_pn, b, t, g, s, T, G, n, p, in_n, in_p, S, N, P)
            before = tl.load(scratch + (t - begin) * (BP * BN))
            state = keep * before + (dt_p * v_p)[:, None] * k_n[None, :]
            rows = ((b * T + t) * G + g) * R + r
            at_q = rows[:, None] * (S * N) + s * N + n[None, :]
            q_rn = tl.load(q + at_q, mask=in_r[:, None] & in_n[None, :], other=0.0).to(tl.float32)
            do_rp = tl.load(
                do + rows[:, None] * (S * P) + s * P + p[None, :], mask=in_r[:, None] & in_p[None, :], other=0.0
            ).to(tl.float32)
            dq_rn = tl.sum(do_rp[:, :, None] * state[None, :, :], 1)
            tl.store(dq + at_q, dq_rn.to(dq.dtype.element_ty), mask=in_r[:, None] & in_n[None, :])
            d_state += tl.sum(do_rp[:, :, None] * q_rn[:, None, :], 0)
            d_decay = d_state * before * keep  # by the exponent, -dt rate
            d_rate_pn -= d_decay * dt_p[:, None]
            by_key = tl.sum(d_state * k_n[None, :], 1)
            row = (b * T + t) * G + g
            at_p = row * (S * P) + s * P + p
            tl.store(d_dt + at_p, by_key * v_p - tl.sum(d_decay * rate_pn, 1), mask=in_p)
            tl.store(dv + at_p, (by_key * dt_p).to(dv.dtype.element_ty), mask=in_p)
            dk_n = tl.sum(d_state * (dt_p * v_p)[:, None], 0)
            tl.store(dk + row * (S * N) + s * N + n, dk_n.to(dk.dtype.element_ty), mask=in_n)
            d_state = keep * d_state
        tl.debug_barrier()
    tl.store(d_rate + (b * G + g) * head + own, d_rate_pn, mask=inside)
    tl.store(d_initial + (b * G + g) * head + own, d_state, mask=inside)


def _sizes(q: Tensor, v: Tensor, rate: Tensor) -> dict[str, object]:
    """Compile-time constants of all launches of one call."""
    groups, value_dim, size = rate.shape
    blocks, repeat = q.shape[-1] // size, q.shape[2] // groups
    channels = value_dim // blocks
    powers = {f"B{name}": triton.next_power_of_2(x) for name, x in (("R", repeat), ("N", size), ("P", channels))}
    return {"R": repeat, "S": blocks, "N": size, "P": channels, **powers, "C": SCAN_TOKENS}


def _launch(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, goes_on: Tensor, state: Tensor
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    (B, T, H, _), G, sizes = q.shape, rate.shape[0], _sizes(q, v, rate)
    o, final = v.new_empty((B, T, H, v.shape[-1])), torch.empty_like(state)
    kept = state.new_empty((B, -(-T // SCAN_TOKENS), *rate.shape))
    args = (q, k, v, dt, rate, goes_on, state, o, final, kept, T, G)
    return [Launch(_scan_forward, (sizes["S"], G, B), args, sizes, {}, warps=1, stages=1)], (o, final, kept)


def _grad_launch(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, goes_on: Tensor,
    kept: Tensor,
) -> tuple[list[Launch], tuple[Tensor, ...]]:  # fmt: skip
    (B, T, _, _), G, sizes = q.shape, rate.shape[0], _sizes(q, v, rate)
    scratch = rate.new_empty((B, G, sizes["S"], SCAN_TOKENS, sizes["BP"], sizes["BN"]))
    dq, dk, dv, d_dt = (torch.empty_like(x) for x in (q, k, v, dt))
    d_rate, d_initial = rate.new_empty((B, *rate.shape)), torch.empty_like(d_final)
    args = (q, k, v, dt, rate, goes_on, kept, do, d_final, scratch, dq, dk, dv, d_dt, d_rate, d_initial, T, G)
    launch = Launch(_scan_backward, (sizes["S"], G, B), args, sizes, {}, warps=1, stages=1)
    return [launch], (dq, dk, dv, d_dt, d_rate, d_initial)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, goes_on: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    needs_grad = any(x.requires_grad for x in (q, k, v, dt, rate, state))
    given = contiguous(q, k, v, dt, rate, goes_on, state)

    def later(outputs):
        o, final, kept = outputs
        return _grad_launch(o, final, *given[:6], kept)[0] if needs_grad else []

    return tuple(play("scan", given, lambda: _launch(*given), later))


def _run_backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, goes_on: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = contiguous(do, d_final, q, k, v, dt, rate, goes_on, kept)
    dq, dk, dv, d_dt, d_rate, d_initial = play("scan_grad", given, lambda: _grad_launch(*given))
    return dq, dk, dv, d_dt, d_rate.sum(0), d_initial


def _fake(q, k, v, dt, rate, goes_on, state):
    kept = state.new_empty((q.shape[0], -(-q.shape[1] // SCAN_TOKENS), *rate.shape))
    return v.new_empty((*q.shape[:3], v.shape[-1])), torch.empty_like(state), kept


def _fake_grad(do, d_final, q, k, v, dt, rate, goes_on, kept):
    return (*(x.new_empty(x.shape) for x in (q, k, v, dt, rate)), torch.empty_like(d_final))


def _save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(True)


def _gradients(ctx, backward, do, d_final, _):
    dq, dk, dv, d_dt, d_rate, d_initial = backward(do, d_final, *ctx.saved_tensors)
    return dq, dk, dv, d_dt, d_rate, None, d_initial


_op = differentiable("scan", _run_forward, _run_backward, (_fake, _fake_grad), _save, _gradients)


def scan_triton(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, goes_on: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run `selective_scan` (see there for shapes) through the registered op `linearize::scan`.

    Args:
        q: queries.
        k: keys.
        v: values, 0 where nobody may see them.
        dt: step sizes in fp32.
        rate: in fp32.
        goes_on: [B, T] in fp32, 0 where the state is empty before a token.
        state: before the first token, in fp32.
    """
    o, final, _ = _op(q, k, v, dt, rate, goes_on, state)
    return o, final
