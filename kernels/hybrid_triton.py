"""Window and gated linear memory as one op: one list of launches forward, one backward, gradients summed in place.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim. The backward runs the memory's launches
first; the window's then add to the gradients of the tensors that both branches read (its programs own whole rows of
them: no atomics, and no elementwise sums afterwards). Branches keep their own kernels: a program that did both would
hold the accumulators of both, and the memory's already fill the registers (docs/kernels.md).
"""

import torch
from torch import Tensor

from linearize.kernels.gated_linear_triton import Call, gate_grad, supported
from linearize.kernels.launch import compile_all, is_new, layout, run, unit_stride
from linearize.kernels.window_triton import forward_launches, grad_launches

__all__ = ["hybrid_triton", "supported"]


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
    op = torch.ops.linearize.hybrid if torch.compiler.is_compiling() else _Eager.apply
    near, lse, top, _, far, sums, state, norm = op(
        q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
        window, sinks, scale, memory_scale, with_normalizer,
    )  # fmt: skip
    return near, lse, top, far, sums if with_normalizer else None, state, norm if with_normalizer else None


def _memory(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None,
    log_decay: Tensor | None, starts: Tensor | None, memory_starts: Tensor | None, initial_state: Tensor | None,
    initial_norm: Tensor | None, memory_scale: float, with_normalizer: bool,
) -> Call:  # fmt: skip
    return Call(
        q if memory_q is None else memory_q, k if memory_k is None else memory_k, v if memory_v is None else memory_v,
        log_decay, starts if memory_starts is None else memory_starts, initial_state, initial_norm, memory_scale,
        with_normalizer,
    )  # fmt: skip


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None,
    log_decay: Tensor | None, starts: Tensor | None, memory_starts: Tensor | None, initial_state: Tensor | None,
    initial_norm: Tensor | None, window: int, sinks: int, scale: float, memory_scale: float, with_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    memory = _memory(
        q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
        memory_scale, with_normalizer,
    )  # fmt: skip
    near_q, near_k, near_v = unit_stride(q), unit_stride(k), unit_stride(v)
    starts = None if starts is None else starts.contiguous()
    far_launches, far = memory.forward()
    near_launches, near = forward_launches(near_q, near_k, near_v, starts, window, sinks, scale)
    key = ("hybrid", memory.key, layout(near_q, near_k, near_v, starts), window, sinks, scale)
    if is_new(q, key):
        later = []
        if q.requires_grad:
            o, lse, _, arg = near
            later = memory.backward(far[0], far[1] if with_normalizer else None, None, None)[0]
            given = (o, None, None, near_q, near_k, near_v, starts, o, lse, arg)
            into = _into(memory_q, memory_k, memory_v, near_q, near_k, near_v)
            later += grad_launches(*given, window, sinks, scale, into)[0]
        compile_all(far_launches + near_launches + later)
    run(far_launches + near_launches, key)
    return *near, *far


def _into(
    memory_q: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the memory that the window adds to: those of the tensors that both branches read."""
    return (
        dq if memory_q is None else None,
        dk if memory_k is None else None,
        dv if memory_v is None else None,
    )


def _run_backward(
    do: Tensor | None, d_lse: Tensor | None, d_max: Tensor | None, d_far: Tensor | None, d_sums: Tensor | None,
    d_state: Tensor | None, d_norm: Tensor | None, o: Tensor, lse: Tensor, row_arg: Tensor, q: Tensor, k: Tensor,
    v: Tensor, memory_q: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None, log_decay: Tensor | None,
    starts: Tensor | None, memory_starts: Tensor | None, initial_state: Tensor | None, initial_norm: Tensor | None,
    window: int, sinks: int, scale: float, memory_scale: float, with_normalizer: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, memory_q, memory_k, memory_v, log_decay, initial_state, initial_norm; empty where none."""
    memory = _memory(
        q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
        memory_scale, with_normalizer,
    )  # fmt: skip
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    starts = None if starts is None else starts.contiguous()
    do = torch.zeros_like(o) if do is None else do.contiguous()
    d_far = v.new_zeros((*memory.q.shape[:3], memory.V)) if d_far is None else d_far.contiguous()
    if with_normalizer:
        d_sums = q.new_zeros(q.shape[:3], dtype=torch.float32) if d_sums is None else d_sums.contiguous()
    else:
        d_sums = None
    d_lse, d_max, d_state, d_norm = (None if x is None else x.contiguous() for x in (d_lse, d_max, d_state, d_norm))
    launches, (dq_m, dk_m, dv_m, dg, ds_0, dz_0) = memory.backward(d_far, d_sums, d_state, d_norm)
    near = (do, d_lse, d_max, q, k, v, starts, o, lse, row_arg)
    into = _into(memory_q, memory_k, memory_v, dq_m, dk_m, dv_m)
    more, (dq, dk, dv) = grad_launches(*near, window, sinks, scale, into)
    shared = tuple(x is not None for x in into)
    key = ("hybrid_grad", memory.key, layout(*near[:7], d_far, d_sums, d_state, d_norm), window, sinks, scale, shared)
    if is_new(q, key):
        compile_all(launches + more)
    run(launches + more, key)
    apart = (q.new_empty(0) if own else x for own, x in zip(shared, (dq_m, dk_m, dv_m), strict=True))
    return [dq, dk, dv, *apart, gate_grad(dg, log_decay), ds_0, dz_0]


_forward = torch.library.custom_op("linearize::hybrid", _run_forward, mutates_args=())
_backward = torch.library.custom_op("linearize::hybrid_grad", _run_backward, mutates_args=())


@_forward.register_fake
def _(
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


@_backward.register_fake
def _(
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
    ctx.set_materialize_grads(False)


def _gradients(ctx, op, do, d_lse, d_max, _, *far):
    numbers = (ctx.window, ctx.sinks, ctx.scale, ctx.memory_scale, ctx.with_normalizer)
    inputs = ctx.saved_tensors[3:]
    grads = op(do, d_lse, d_max, *far, *ctx.saved_tensors, *numbers)
    dq, dk, dv, dq_m, dk_m, dv_m, dg, ds_0, dz_0 = grads
    given = (dq, dk, dv, dq_m, dk_m, dv_m, dg, None, None, ds_0, dz_0)
    return *(None if x is None else grad for x, grad in zip(inputs, given, strict=True)), *(None,) * len(numbers)


def _differentiate(ctx, *grads):
    return _gradients(ctx, torch.ops.linearize.hybrid_grad, *grads)


_forward.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same op without the dispatcher, whose cost a launch would show outside `torch.compile`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _run_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return _gradients(ctx, _run_backward, *grads)
