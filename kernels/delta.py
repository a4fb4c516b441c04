"""The gated delta rule on grouped KV heads: DeltaNet, Gated DeltaNet, KDA, and DeltaNet with negative eigenvalues.

Legend: B batch, T tokens, H query heads, G key heads, J value heads, K key dim, V value dim, C chunk, N chunks. Either
H = G * R and J = G (grouped queries), or J = G * R and H = G (grouped values, as in Qwen3-Next).
Layout [B, T, heads, dim]. The state lives per value head, and so do beta and gates; the Triton kernels repeat nothing.

Chunked (WY) form. With w_t = beta_t (v_t - k_t^T diag(exp g_t) S_{t-1}) the rule is gated linear attention with w for
v. In a chunk, w solves the unit lower triangular system (I + L) w = beta (v - (k exp gc) S), with
L_tj = beta_t k_t exp(gc_t - gc_j) k_j for j < t, where gc sums the chunk's gates and S is the state before the chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.backend import select
from linearize.kernels.gated_linear import (
    CHUNK,
    LinearOutput,
    _scores,
    _sum_after,
    starts_of,
)

L2_EPS = 1e-6


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    l2norm: bool = False,
) -> LinearOutput:
    """Gated delta rule, `S_t = (I - b_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T`, `o_t = scale * q_t^T S_t`.

    arXiv:2412.06464, eq. 10 (decay per head); arXiv:2510.26692, eq. 1 (decay per key channel).

    Args:
        q: queries [B, T, H, K], any strides.
        k: keys [B, T, G, K], H a multiple of G. The rule is stable for unit keys: see `l2norm`.
        v: values [B, T, J, V], J = G; or H = G and J a multiple of it: value head j reads q and k of head j G // J.
        beta: write strength b [B, T, J], in [0, 1], or [0, 2] for negative eigenvalues.
        log_decay: g in (-inf, 0]: None, [J], [B, T, J] or [B, T, J, K].
        scale: factor on the outputs.
        starts: int [B, T], first visible token of each token, as in `gated_linear_attention`.
        cu_seqlens: cumulative document lengths [N + 1] as the alternative to `starts` where B is 1.
        initial_state: [B, J, K, V] in fp32, zeros by default.
        l2norm: scale q and k to unit length first.

    Returns:
        Outputs [B, T, max(H, J), V] in v's dtype and final state [B, J, K, V] in fp32; no normalizer.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check_delta(q, k, v, beta, log_decay)
    starts = starts_of(starts, cu_seqlens, q)
    backend = select("delta", q)
    if backend == "triton":
        from linearize.kernels.delta_triton import gated_delta_triton, supported

        if supported(q.dtype, q.shape[-1], v.shape[-1]):
            eps = L2_EPS if l2norm else 0.0
            o, state = gated_delta_triton(q, k, v, beta, log_decay, scale, starts, initial_state, eps)
            return LinearOutput(o, None, state, None)
    if l2norm:
        q, k = _unit(q), _unit(k)
    if backend == "reference":
        from linearize.kernels.reference import gated_delta_reference

        o, state = gated_delta_reference(
            q, k, v, beta, log_decay, scale=scale, starts=starts, initial_state=initial_state
        )
        return LinearOutput(o.to(v.dtype), None, state.float(), None)
    return _delta_chunked(q, k, v, beta, log_decay, scale, starts, initial_state)


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    l2norm: bool = False,
) -> Tensor:
    """One token of the gated delta rule; `state` is updated in place.

    Args:
        q: [B, H, K].
        k: [B, G, K].
        v: [B, J, V].
        beta: [B, J].
        log_decay: None, [J], [B, J] or [B, J, K].
        state: [B, J, K, V] in fp32.
        scale: factor on the output.
        l2norm: scale q and k to unit length first.

    Returns:
        o [B, max(H, J), V] in v's dtype.
    """
    if select("step", q) == "triton":
        from linearize.kernels.step_triton import gated_delta_step_triton

        return gated_delta_step_triton(q, k, v, beta, log_decay, state, scale, L2_EPS if l2norm else 0.0)
    if l2norm:
        q, k = _unit(q), _unit(k)
    groups = v.shape[1]
    if groups > k.shape[1]:
        q, k = (x.repeat_interleave(groups // k.shape[1], 1) for x in (q, k))
    batch, heads, key_dim = q.shape
    if log_decay is not None:
        decay = log_decay.float().exp()
        state.mul_(decay[..., None] if decay.dim() == 3 else decay[..., None, None])
    key = k.float()[:, :, None]  # [B, G, 1, K]
    write = beta.float()[..., None, None] * (v.float()[:, :, None] - key @ state)
    state.add_(key.transpose(-1, -2) * write)
    rows = q.float().view(batch, groups, heads // groups, key_dim) * scale
    out: Tensor = (rows @ state).view(batch, heads, -1).to(v.dtype)
    return out


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    l2norm: bool = False,
) -> LinearOutput:
    """DeltaProduct: n steps of the delta rule a token, so n Householder factors a transition (arXiv:2502.10297, eq. 3).

    A token's state decays once, before its first step, and is read after its last.

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, n, G, K], H a multiple of G.
        v: values [B, T, n, J, V], J as in `gated_delta_rule`.
        beta: write strengths [B, T, n, J], in [0, 1], or [0, 2] for reflections.
        log_decay: None, [J], [B, T, J] or [B, T, J, K].
        scale: factor on the outputs.
        starts: int [B, T], as in `gated_delta_rule`.
        cu_seqlens: cumulative document lengths [N + 1] in tokens as the alternative to `starts` where B is 1.
        initial_state: [B, J, K, V] in fp32.
        l2norm: scale q and k to unit length first.

    Returns:
        As `gated_delta_rule`.

    Raises:
        ValueError: shapes do not fit together.
    """
    if k.dim() != 5 or k.shape[2] == 0 or beta.shape != v.shape[:-1] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, beta {tuple(beta.shape)} do not fit: expected k [B, T, n, G, K], "
            "v [B, T, n, J, V] and beta [B, T, n, J], n at least 1."
        )
    batch, length, steps, groups, _ = v.shape
    if q.shape[:2] != (batch, length):
        raise ValueError(f"q has shape {tuple(q.shape)}; expected {batch} rows of {length} tokens, as k.")
    starts = starts_of(starts, cu_seqlens, q)
    if log_decay is not None:
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(batch, length, groups)
        log_decay = F.pad(log_decay[:, :, None], (0, 0) * (log_decay.dim() - 2) + (0, steps - 1)).flatten(1, 2)
    if starts is not None:
        starts = torch.where(starts < 0, starts, starts * steps).repeat_interleave(steps, 1)
    out = gated_delta_rule(
        F.pad(q[:, :, None], (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2),
        k.flatten(1, 2),
        v.flatten(1, 2),
        beta.flatten(1, 2),
        log_decay,
        scale=scale,
        starts=starts,
        initial_state=initial_state,
        l2norm=l2norm,
    )
    return out._replace(o=out.o[:, steps - 1 :: steps])


def delta_product_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    l2norm: bool = False,
) -> Tensor:
    """One token of `delta_product`, in n steps; `state` is updated in place.

    Args:
        q: [B, H, K].
        k: [B, n, G, K].
        v: [B, n, J, V].
        beta: [B, n, J].
        log_decay: None, [J], [B, J] or [B, J, K].
        state: [B, J, K, V] in fp32.
        scale: factor on the output.
        l2norm: scale q and k to unit length first.

    Returns:
        o [B, max(H, J), V] in v's dtype.
    """
    for step in range(k.shape[1]):
        decay = log_decay if step == 0 else None
        out = gated_delta_step(q, k[:, step], v[:, step], beta[:, step], decay, state, scale=scale, l2norm=l2norm)
    return out


def _check_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    batch, length, heads, key_dim = q.shape
    keys, values = k.shape[2], v.shape[2]
    grouped = heads % keys == 0 if values == keys else heads == keys and values % keys == 0
    if not grouped or k.shape != (batch, length, keys, key_dim) or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: expected q [B, T, H, K], "
            "k [B, T, G, K], v [B, T, J, V] with J = G and H a multiple of G, or H = G and J a multiple of G."
        )
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta has shape {tuple(beta.shape)}; expected {tuple(v.shape[:3])}.")
    shapes = ((values,), (batch, length, values), (batch, length, values, key_dim))
    if log_decay is not None and tuple(log_decay.shape) not in shapes:
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; expected one of {shapes}.")


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    length: Tensor = x.square().sum(-1, keepdim=True) + L2_EPS
    return x * length.rsqrt()


def _delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> LinearOutput:
    """WY form in PyTorch: O(T) memory, differentiable, all exponents at most zero."""
    groups = v.shape[2]
    if groups > k.shape[2]:  # each value head decays its keys for itself
        q, k = (x.repeat_interleave(groups // k.shape[2], 2) for x in (q, k))
    batch, length, heads, _ = q.shape
    chunks = -(-length // CHUNK)
    pad = chunks * CHUNK - length

    def split(x: Tensor) -> Tensor:
        """[B, T, G, D] -> fp32 [B, G, N, C, D]"""
        parts: Tensor = F.pad(x.float(), (0, 0, 0, 0, 0, pad)).unflatten(1, (chunks, CHUNK)).movedim(3, 1)
        return parts

    queries = split(q).unflatten(1, (groups, heads // groups)) * scale  # [B, G, R, N, C, K]
    keys, values, strength = split(k), split(v), split(beta[..., None])
    reads, key_reads, writes, carry, decay = queries, keys, keys, None, None
    if log_decay is not None:
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(batch, length, groups)
        decay = split(log_decay if log_decay.dim() == 4 else log_decay[..., None])  # [B, G, N, C, 1 or K]
        running = decay.cumsum(3)
        reads, key_reads = queries * running.exp()[:, :, None], keys * running.exp()
        writes = keys * _sum_after(decay).exp()
        carry = running[:, :, :, -1].exp()  # [B, G, N, 1 or K]
    scores = _scores(queries, keys, decay)  # [B, G, R, N, C, C]
    overlap = _scores(keys[:, :, None], keys, decay)[:, :, 0].tril(-1)  # [B, G, N, C, C]
    if starts is not None:
        first = torch.cat([starts, starts[:, -1:].expand(batch, pad)], 1).view(batch, chunks, CHUNK)
        position = torch.arange(chunks * CHUNK, device=q.device).view(chunks, CHUNK)
        begin, last = position[:, :1], first[..., -1:]
        hidden = position[:, None] < first[..., None]  # [B, N, C, C]
        scores = scores.masked_fill(hidden[:, None, None], 0.0)
        overlap = overlap.masked_fill(hidden[:, None], 0.0)
        seen = (first < begin)[..., None]  # [B, N, C, 1]
        reads, key_reads = reads * seen[:, None, None], key_reads * seen[:, None]
        writes = writes * (position >= last)[:, None, ..., None]
        kept = (last < begin)[:, None].float()  # [B, 1, N, 1]
        carry = kept if carry is None else carry * kept
    right = torch.cat([strength * values, strength * key_reads], -1)
    solved = torch.linalg.solve_triangular(strength * overlap, right, upper=False, unitriangular=True)
    fresh, stale = solved.split([values.shape[-1], keys.shape[-1]], -1)

    state = keys.new_zeros(batch, groups, keys.shape[-1], values.shape[-1])
    if initial_state is not None:
        state = initial_state.float()
    outputs = []
    for n in range(chunks):
        new = fresh[:, :, n] - stale[:, :, n] @ state  # [B, G, C, V]
        outputs.append(reads[:, :, :, n] @ state[:, :, None] + scores[:, :, :, n] @ new[:, :, None])
        state = writes[:, :, n].transpose(-1, -2) @ new + (state if carry is None else state * carry[:, :, n, :, None])
    out = torch.stack(outputs, 3).flatten(1, 2).movedim(1, 3).flatten(1, 2)[:, :length]  # [B, T, H, V]
    return LinearOutput(out.to(v.dtype), None, state, None)
