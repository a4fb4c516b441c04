"""Window and gated linear memory as one op: one list of launches forward, one backward, gradients summed in place.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim. The backward runs the memory's launches
first; the window's then add to the gradients of the tensors that both branches read (its programs own whole rows of
them: no atomics, and no elementwise sums afterwards). Branches keep their own kernels: a program that did both would
hold the accumulators of both, and the memory's already fill the registers (docs/kernels.md).
"""

import torch
from torch import Tensor

from linearize.kernels.gated_linear_triton import Call, gate_grad, output_grads, prepared, supported
from linearize.kernels.launch import contiguous, differentiable, play, unit_stride
from linearize.kernels.window_triton import forward_launches, grad_launches

__all__ = ["hybrid_triton", "supported"]


def _prepared(
    q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
    with_normalizer,
):  # fmt: skip
    """What the window's and the memory's kernels read, in the order of `Call` and then q, k, v, starts."""
    near = (unit_stride(q), unit_stride(k), unit_stride(v), *contiguous(starts))
    far = prepared(
        q if memory_q is None else memory_q, k if memory_k is None else memory_k, v if memory_v is None else memory_v,
        log_decay, starts if memory_starts is None else memory_starts, initial_state, initial_norm, with_normalizer,
    )  # fmt: skip
    return far, near


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None,
    log_decay: Tensor | None, starts: Tensor | None, memory_starts: Tensor | None, initial_state: Tensor | None,
    initial_norm: Tensor | None, window: int, sinks: int, scale: float, memory_scale: float, with_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    far, near = _prepared(
        q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
        with_normalizer,
    )  # fmt: skip
    numbers, memory_numbers = (window, sinks, scale), (memory_scale, with_normalizer)
    apart = (memory_q is not None, memory_k is not None, memory_v is not None)

    def build():
        far_launches, far_outputs = Call(*far, *memory_numbers).forward()
        near_launches, near_outputs = forward_launches(*near, *numbers)
        return far_launches + near_launches, (*near_outputs, *far_outputs)

    def later(outputs):
        o, lse, _, arg, far_o, sums, _, _ = outputs
        if not q.requires_grad:
            return []
        grads = (far_o, sums if with_normalizer else None, None, None)
        return _grad_launches((o, None, None), (o, lse, arg), grads, far, near, apart, numbers, memory_numbers)[0]

    return tuple(play(("hybrid", numbers, memory_numbers), (*far, *near), build, later))


def _grad_launches(near_grads, kept, far_grads, far, near, apart, numbers, memory_numbers):
    """The backward's launches, and the gradients of q, k, v, then of the memory's q, k, v, gates, state and norm.

    The window adds to the memory's gradients of tensors that both branches read (not `apart`), which are then empty.
    """
    launches, (*own, dg, ds_0, dz_0) = Call(*far, *memory_numbers).backward(*far_grads)
    into = tuple(None if alone else x for alone, x in zip(apart, own, strict=True))
    more, near_outputs = grad_launches(*near_grads, *near, *kept, *numbers, into)
    own = (x if alone else x.new_empty(0) for alone, x in zip(apart, own, strict=True))
    return launches + more, (*near_outputs, *own, dg, ds_0, dz_0)


def _run_backward(
    do: Tensor | None, d_lse: Tensor | None, d_max: Tensor | None, d_far: Tensor | None, d_sums: Tensor | None,
    d_state: Tensor | None, d_norm: Tensor | None, o: Tensor, lse: Tensor, row_arg: Tensor, q: Tensor, k: Tensor,
    v: Tensor, memory_q: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None, log_decay: Tensor | None,
    starts: Tensor | None, memory_starts: Tensor | None, initial_state: Tensor | None, initial_norm: Tensor | None,
    window: int, sinks: int, scale: float, memory_scale: float, with_normalizer: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, memory_q, memory_k, memory_v, log_decay, initial_state, initial_norm; empty where none."""
    far, near = _prepared(
        q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
        with_normalizer,
    )  # fmt: skip
    near_grads = contiguous(torch.zeros_like(o) if do is None else do, d_lse, d_max)
    far_grads = output_grads(d_far, d_sums, d_state, d_norm, far[0], far[2], with_normalizer)
    kept = (o, lse, row_arg)
    numbers, memory_numbers = (window, sinks, scale), (memory_scale, with_normalizer)
    apart = (memory_q is not None, memory_k is not None, memory_v is not None)
    dq, dk, dv, *own, dg, ds_0, dz_0 = play(
        ("hybrid_grad", numbers, memory_numbers, apart),
        (*far, *near, *near_grads, *kept, *far_grads),
        lambda: _grad_launches(near_grads, kept, far_grads, far, near, apart, numbers, memory_numbers),
    )
    return [dq, dk, dv, *own, gate_grad(dg, log_decay), ds_0, dz_0]


def _fake(
    q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
    window, sinks, scale, memory_scale, with_normalizer,
):  # fmt: skip
    B, T, H, _ = q.shape
    G, V = (v if memory_v is None else memory_v).shape[2:]
    K = (k if memory_k is None else memory_k).shape[-1]
    line = q.new_empty((B, T, H), dtype=torch.float32)
    sums = q.new_empty((B, T, H) if with_normalizer else (0,), dtype=torch.float32)
    norm = q.new_empty((B, G, K) if with_normalizer else (0,), dtype=torch.float32)
    state = q.new_empty((B, G, K, V), dtype=torch.float32)
    far = (v if memory_v is None else memory_v).new_empty((B, T, H, V))
    return (
        q.new_empty((B, T, H, v.shape[-1])), line, torch.empty_like(line), torch.empty_like(line, dtype=torch.int32),
        far, sums, state, norm,
    )  # fmt: skip


def _fake_grad(
    do, d_lse, d_max, d_far, d_sums, d_state, d_norm, o, lse, row_arg, q, k, v, memory_q, memory_k, memory_v,
    log_decay, starts, memory_starts, initial_state, initial_norm, window, sinks, scale, memory_scale, with_normalizer,
):  # fmt: skip
    def like(x):
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    init = initial_state is not None or initial_norm is not None
    B, (G, V) = q.shape[0], (v if memory_v is None else memory_v).shape[2:]
    K = (k if memory_k is None else memory_k).shape[-1]
    ds_0 = q.new_empty((B, G, K, V) if init else (0,), dtype=torch.float32)
    dz_0 = q.new_empty((B, G, K) if init and with_normalizer else (0,), dtype=torch.float32)
    return [*(like(x) for x in (q, k, v, memory_q, memory_k, memory_v, log_decay)), ds_0, dz_0]


def _save(ctx, inputs, output):
    *tensors, ctx.window, ctx.sinks, ctx.scale, ctx.memory_scale, ctx.with_normalizer = inputs
    near, lse, _, row_arg, *_ = output
    ctx.save_for_backward(near, lse, row_arg, *tensors)
    ctx.mark_non_differentiable(row_arg)


def _gradients(ctx, backward, do, d_lse, d_max, _, *far):
    numbers = (ctx.window, ctx.sinks, ctx.scale, ctx.memory_scale, ctx.with_normalizer)
    inputs = ctx.saved_tensors[3:]
    grads = backward(do, d_lse, d_max, *far, *ctx.saved_tensors, *numbers)
    dq, dk, dv, dq_m, dk_m, dv_m, dg, ds_0, dz_0 = grads
    given = (dq, dk, dv, dq_m, dk_m, dv_m, dg, None, None, ds_0, dz_0)
    return *(None if x is None else grad for x, grad in zip(inputs, given, strict=True)), *(None,) * len(numbers)


_op = differentiable("hybrid", _run_forward, _run_backward, (_fake, _fake_grad), _save, _gradients)


def hybrid_triton(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None,
    log_decay: Tensor | None, starts: Tensor | None, memory_starts: Tensor | None, initial_state: Tensor | None,
    initial_norm: Tensor | None, window: int, sinks: int, scale: float, memory_scale: float, with_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Run `hybrid_attention` (see there for shapes) through the registered op `linearize::hybrid`.

    Returns:
        The window's outputs, log-sum-exp and largest score; the memory's outputs, normalizer, state and norm.
    """
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.float().expand(*(v if memory_v is None else memory_v).shape[:3])
    if initial_norm is not None and not with_normalizer:
        initial_norm = None
    near, lse, top, _, far, sums, state, norm = _op(
        q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
        window, sinks, scale, memory_scale, with_normalizer,
    )  # fmt: skip
    return near, lse, top, far, sums if with_normalizer else None, state, norm if with_normalizer else None
