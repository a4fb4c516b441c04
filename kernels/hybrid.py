"""Window attention and gated linear memory of the same tokens in one op, as every hybrid mixer uses them.

Legend: B batch, T tokens, H query heads, G KV heads (H = G * R), K key dim, V value dim, W window, S sinks.
The branches' results come back apart, with all that a combine needs: `average` and `learned` mix the two outputs; a
`shared_softmax` (LoLCATs, arXiv:2410.10254, eq. 6) has the numerator exp(lse) * window + memory and the denominator
exp(lse) + normalizer. Queries and keys may differ between the branches, as where one is rotated and the other is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linearize.kernels.backend import select
from linearize.kernels.delta import gated_delta_step
from linearize.kernels.gated_linear import _check_shapes, gated_linear_attention, gated_linear_step, starts_of
from linearize.kernels.microscaling import as_stored
from linearize.kernels.window import check_window, window_attention, window_step


class HybridOutput(NamedTuple):
    """What a hybrid op returns.

    Attributes:
        window: outputs of the softmax window [B, T, H, V] (a step: [B, H, V]), normalised.
        lse: log-sum-exp of the window's scores [B, T, H] in fp32.
        row_max: largest score in the window [B, T, H] in fp32.
        memory: outputs of the memory [B, T, H, V], not normalised.
        normalizer: of the memory [B, T, H] in fp32, or None where not asked for.
        state: [B, G, K, V] in fp32, as the last token sees it.
        state_norm: [B, G, K] in fp32, or None.
    """

    window: Tensor
    lse: Tensor
    row_max: Tensor
    memory: Tensor
    normalizer: Tensor | None
    state: Tensor
    state_norm: Tensor | None


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    memory_q: Tensor | None = None,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    scale: float | None = None,
    memory_scale: float = 1.0,
    with_normalizer: bool = False,
    starts: Tensor | None = None,
    memory_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
) -> HybridOutput:
    """`window_attention` of q, k, v and `gated_linear_attention` of memory_q, memory_k, memory_v, over the same tokens.

    Args:
        q: queries of the window [B, T, H, K], any strides.
        k: keys of the window [B, T, G, K].
        v: values [B, T, G, V].
        log_decay: of the memory: None, [G], [B, T, G] or [B, T, G, K].
        window: visible tokens, the query's own included.
        sinks: always visible first tokens of a document.
        memory_q: queries of the memory [B, T, H, K'], q by default.
        memory_k: keys of the memory [B, T, G, K'], k by default.
        memory_v: values of the memory [B, T, G, V], v by default; shifted by the window for disjoint branches.
        scale: factor on the window's scores; K**-0.5 by default.
        memory_scale: factor on the memory's outputs and normalizer.
        with_normalizer: also return the memory's normalizer.
        starts: int [B, T], first visible token of each token, as in `gated_linear_attention`.
        memory_starts: the same for the memory where it differs, as where the memory lags behind the window.
        cu_seqlens: cumulative document lengths [N + 1] as the alternative to `starts` where B is 1.
        initial_state: [B, G, K', V] in fp32.
        initial_norm: [B, G, K'] in fp32.

    Returns:
        Both branches' outputs, apart.

    Raises:
        ValueError: shapes do not fit together.
    """
    keys = k if memory_k is None else memory_k
    same_dtype = all(x is None or x.dtype == q.dtype for x in (k, v, memory_q, memory_k, memory_v))
    if select("hybrid", q) == "triton" and same_dtype:
        from linearize.kernels.hybrid_triton import hybrid_triton, supported

        if supported(q.dtype, keys.shape[-1], v.shape[-1]):
            check_window(q, k, v, window)
            _check_shapes(q if memory_q is None else memory_q, keys, v if memory_v is None else memory_v, log_decay)
            if cu_seqlens is not None:
                starts = starts_of(starts, cu_seqlens, q)
            results = hybrid_triton(
                q, k, v, memory_q, memory_k, memory_v, log_decay, starts, memory_starts, initial_state, initial_norm,
                window, sinks, q.shape[-1] ** -0.5 if scale is None else scale, memory_scale, with_normalizer,
            )  # fmt: skip
            return HybridOutput(*results)
    near = window_attention(q, k, v, window=window, sinks=sinks, scale=scale, starts=starts, cu_seqlens=cu_seqlens)
    far_out = gated_linear_attention(
        q if memory_q is None else memory_q,
        keys,
        v if memory_v is None else memory_v,
        log_decay,
        scale=memory_scale,
        with_normalizer=with_normalizer,
        starts=starts if memory_starts is None else memory_starts,
        cu_seqlens=cu_seqlens if memory_starts is None else None,
        initial_state=initial_state,
        initial_norm=initial_norm,
    )
    return HybridOutput(
        near.o, near.lse, near.row_max, far_out.o, far_out.normalizer, far_out.state, far_out.state_norm
    )


def hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    length: Tensor,
    *,
    beta: Tensor | None = None,
    state_norm: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    memory_q: Tensor | None = None,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    scale: float | None = None,
    memory_scale: float = 1.0,
) -> HybridOutput:
    """One token of both branches in one launch; state, norm, rings and sinks are updated in place.

    Unlike `window_step` it writes the token into the rings itself (slot `length % W`) and, while `length < S`, into the
    sinks; the caller adds 1 to `length` afterwards.

    Args:
        q: [B, H, K].
        k: [B, G, K].
        v: [B, G, V].
        log_decay: None, [G], [B, G] or [B, G, K'].
        state: [B, G, K', V] in fp32, contiguous.
        k_ring: last W keys [B, W, G, K]. Rings and sinks of uint8 are stored numbers of MXINT8
            (`kernels.microscaling`), to which k and v were rounded; writing them is then a launch of its own.
        v_ring: last W values [B, W, G, V].
        length: int64 [B], tokens of the row before this one.
        beta: [B, G], write strength: the memory then follows the gated delta rule (and has no norm), with memory_k of
            length 1.
        state_norm: [B, G, K'] in fp32, contiguous, or None.
        sink_k: first S keys [B, S, G, K], or None.
        sink_v: [B, S, G, V], or None.
        memory_q: [B, H, K'], q by default.
        memory_k: [B, G, K'], k by default.
        memory_v: [B, G, V], v by default.
        scale: factor on the window's scores; K**-0.5 by default.
        memory_scale: factor on the memory's output and normalizer.

    Returns:
        Both branches' outputs [B, H, ...] and the updated state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    memory_q, memory_k = q if memory_q is None else memory_q, k if memory_k is None else memory_k
    memory_v = v if memory_v is None else memory_v
    if beta is not None and state_norm is not None:
        raise ValueError("the delta rule has no normalizer: give `beta` or `state_norm`, not both.")
    stored = k_ring.dtype == torch.uint8
    triton = select("step", q) == "triton" and memory_k.shape[1] == memory_v.shape[1] == k.shape[1]
    if stored or not triton:
        new_k, new_v = as_stored(k, stored), as_stored(v, stored)
        _write(k_ring, new_k, length % k_ring.shape[1])
        _write(v_ring, new_v, length % k_ring.shape[1])
        if sink_k is not None and sink_v is not None:
            last = sink_k.shape[1] - 1
            fills = (length <= last)[:, None, None]
            slot = length.clamp(max=last)
            _write(sink_k, new_k.where(fills, _read(sink_k, slot)), slot)
            _write(sink_v, new_v.where(fills, _read(sink_v, slot)), slot)
    if triton:
        from linearize.kernels.step_triton import hybrid_step_triton

        near_o, lse, row_max, o, sums = hybrid_step_triton(
            q, k, v, k_ring, v_ring, sink_k, sink_v, length, memory_q, memory_k, memory_v, log_decay, beta, state,
            state_norm, scale, memory_scale, write=not stored,
        )  # fmt: skip
        return HybridOutput(near_o, lse, row_max, o, sums, state, state_norm)
    near = window_step(q, k_ring, v_ring, sink_k, sink_v, length, scale=scale)
    if beta is not None:
        o = gated_delta_step(memory_q, memory_k, memory_v, beta, log_decay, state, scale=memory_scale)
        return HybridOutput(near.o, near.lse, near.row_max, o, None, state, None)
    o, sums = gated_linear_step(memory_q, memory_k, memory_v, log_decay, state, state_norm, scale=memory_scale)
    return HybridOutput(near.o, near.lse, near.row_max, o, sums, state, state_norm)


def _index(x: Tensor, slot: Tensor) -> Tensor:
    return slot.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])


def _write(ring: Tensor, x: Tensor, slot: Tensor) -> None:
    ring.scatter_(1, _index(ring, slot), x[:, None].to(ring.dtype))


def _read(ring: Tensor, slot: Tensor) -> Tensor:
    return ring.gather(1, _index(ring, slot))[:, 0]
