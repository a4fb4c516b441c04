"""Gated linear attention on grouped KV heads: one op for linear attention, RetNet, GLA, HGRN2, Mamba-2, mLSTM.

Legend: B batch, T tokens, H query heads, G KV heads (H = G R), K key dim, V value dim, C chunk, N chunks, S sub-chunk.
Layout [B, T, heads, dim]. The state lives per KV head; K, V and gates are never repeated to the query heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.backend import select

CHUNK = 64
SUB_CHUNK = 8


class LinearOutput(NamedTuple):
    """What a linear-attention op returns.

    Attributes:
        o: outputs [B, T, H, V] in v's dtype, not divided by the normalizer.
        normalizer: sums of weights [B, T, H] in fp32, or None where not asked for.
        state: [B, G, K, V] in fp32, as the last token sees it.
        state_norm: [B, G, K] in fp32, or None where not asked for.
    """

    o: Tensor
    normalizer: Tensor | None
    state: Tensor
    state_norm: Tensor | None


def starts_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return `starts` [1, T] (first visible token of each token) from cumulative lengths [N + 1], without a sync."""
    positions = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
    return cu_seqlens[document.clamp(max=cu_seqlens.numel() - 2)].long()[None]


def starts_of(starts: Tensor | None, cu_seqlens: Tensor | None, q: Tensor) -> Tensor | None:
    """`starts` as given, or those of `cu_seqlens`; queries [B, T, ...].

    Raises:
        ValueError: both are given, or `cu_seqlens` with a batch.
    """
    if cu_seqlens is None:
        return starts
    if starts is not None or q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs batch 1 and no starts; got batch {q.shape[0]}.")
    return starts_from_cu_seqlens(cu_seqlens, q.shape[1])


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    with_normalizer: bool = False,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
) -> LinearOutput:
    """Gated linear attention, `S_t = exp(g_t) S_{t-1} + k_t v_t^T` and `o_t = scale * q_t^T S_t` (2312.06635, eq. 3).

    Args:
        q: queries [B, T, H, K], any strides.
        k: keys [B, T, G, K], H a multiple of G.
        v: values [B, T, G, V].
        log_decay: g in (-inf, 0]: None for no decay, [G] fixed per head, [B, T, G] per head and token, or
            [B, T, G, K] per key channel.
        scale: factor on outputs and normalizer.
        with_normalizer: also return `scale * q_t^T z_t` with `z_t = exp(g_t) z_{t-1} + k_t`.
        starts: int [B, T], the first token that each token may see, for packed documents: tokens before it and the
            initial state are invisible; -1 means that the document began before this call and sees the initial state.
            It may lie past the token itself, which then sees nothing. None is one sequence a row.
        cu_seqlens: cumulative document lengths [N + 1] as the alternative to `starts` where B is 1.
        initial_state: [B, G, K, V] in fp32, zeros by default.
        initial_norm: [B, G, K] in fp32, zeros by default.

    Returns:
        Outputs, normalizer and final state.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check_shapes(q, k, v, log_decay)
    starts = starts_of(starts, cu_seqlens, q)
    backend = select("gated_linear", q)
    if backend == "triton":
        from linearize.kernels.gated_linear_triton import gated_linear_triton, supported

        if supported(q.dtype, q.shape[-1], v.shape[-1]):
            return LinearOutput(
                *gated_linear_triton(q, k, v, log_decay, scale, with_normalizer, starts, initial_state, initial_norm)
            )
    if backend == "reference":
        from linearize.kernels.reference import gated_linear_reference

        o, z, state, norm = gated_linear_reference(
            q, k, v, log_decay, scale=scale, starts=starts, initial_state=initial_state, initial_norm=initial_norm
        )
        kept = (z.float(), norm.float()) if with_normalizer else (None, None)
        return LinearOutput(o.to(v.dtype), kept[0], state.float(), kept[1])
    return _chunked(q, k, v, log_decay, scale, with_normalizer, starts, initial_state, initial_norm)


def gated_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    state_norm: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """One token of gated linear attention; `state` and `state_norm` are updated in place.

    Args:
        q: [B, H, K].
        k: [B, G, K].
        v: [B, G, V].
        log_decay: None, [G], [B, G] or [B, G, K].
        state: [B, G, K, V] in fp32.
        state_norm: [B, G, K] in fp32, or None for no normalizer.
        scale: factor on outputs and normalizer.

    Returns:
        o [B, H, V] in v's dtype, and the normalizer [B, H] in fp32 or None.
    """
    if select("step", q) == "triton":
        from linearize.kernels.step_triton import gated_linear_step_triton

        return gated_linear_step_triton(q, k, v, log_decay, state, state_norm, scale)
    batch, heads, key_dim = q.shape
    groups = k.shape[1]
    if log_decay is not None:
        decay = log_decay.float().exp()
        if decay.dim() < 3:
            decay = decay[..., None]
        state.mul_(decay[..., None])
        if state_norm is not None:
            state_norm.mul_(decay)
    state.add_(k.float()[..., None] * v.float()[..., None, :])
    rows = q.float().view(batch, groups, heads // groups, key_dim) * scale
    o = (rows @ state).view(batch, heads, -1).to(v.dtype)
    if state_norm is None:
        return o, None
    state_norm.add_(k.float())
    return o, (rows @ state_norm[..., None]).view(batch, heads)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    batch, length, heads, key_dim = q.shape
    groups = k.shape[2]
    fits = k.shape == (batch, length, groups, key_dim) and v.shape[:3] == k.shape[:3] and heads % groups == 0
    if not fits:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: expected q [B, T, H, K], "
            "k [B, T, G, K], v [B, T, G, V] with H a multiple of G."
        )
    shapes = ((groups,), (batch, length, groups), (batch, length, groups, key_dim))
    if log_decay is not None and tuple(log_decay.shape) not in shapes:
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; expected one of {shapes}.")


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    with_normalizer: bool,
    starts: Tensor | None,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
) -> LinearOutput:
    """Chunked form in PyTorch: O(T) memory, differentiable, all exponents at most zero."""
    batch, length, heads, key_dim = q.shape
    groups, value_dim = k.shape[2], v.shape[-1]
    dtype = v.dtype
    chunks = -(-length // CHUNK)
    pad = chunks * CHUNK - length

    def split(x: Tensor) -> Tensor:
        """[B, T, G, ...] -> fp32 [B, G, N, C, ...]"""
        x = F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, pad))
        rows: Tensor = x.unflatten(1, (chunks, CHUNK)).movedim(3, 1)
        return rows

    if with_normalizer:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    queries = split(q).unflatten(1, (groups, heads // groups)) * scale  # [B, G, R, N, C, K]
    keys, values = split(k), split(v)  # [B, G, N, C, K], [B, G, N, C, V]
    reads, writes, carry, decay = queries, keys, None, None
    if log_decay is not None:
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(batch, length, groups)
        decay = split(log_decay if log_decay.dim() == 4 else log_decay[..., None])  # [B, G, N, C, 1 or K]
        running = decay.cumsum(3)
        reads = queries * running.exp()[:, :, None]
        writes = keys * _sum_after(decay).exp()
        carry = running[:, :, :, -1].exp()  # [B, G, N, 1 or K]
    scores = _scores(queries, keys, decay)  # [B, G, R, N, C, C]
    if starts is not None:
        first = torch.cat([starts, starts[:, -1:].expand(batch, pad)], 1).view(batch, chunks, CHUNK)
        position = torch.arange(chunks * CHUNK, device=q.device).view(chunks, CHUNK)
        begin, last = position[:, :1], first[..., -1:]
        scores = scores.masked_fill((position[:, None] < first[..., None])[:, None, None], 0.0)
        reads = reads * (first < begin)[:, None, None, ..., None]
        writes = writes * (position >= last)[:, None, ..., None]
        kept = (last < begin)[:, None].float()  # [B, 1, N, 1]
        carry = kept if carry is None else carry * kept
    updates = writes.transpose(-1, -2) @ values  # [B, G, N, K, V]

    state = _initial_state(updates, initial_state, initial_norm, with_normalizer)
    before = []
    for n in range(chunks):
        before.append(state)
        state = updates[:, :, n] + (state if carry is None else state * carry[:, :, n, :, None])
    out = scores @ values[:, :, None] + reads @ torch.stack(before, 2)[:, :, None]
    out = out.flatten(1, 2).movedim(1, 3).flatten(1, 2)[:, :length]  # [B, T, H, V]
    if not with_normalizer:
        return LinearOutput(out.to(dtype), None, state, None)
    return LinearOutput(
        out[..., :value_dim].to(dtype), out[..., value_dim], state[..., :value_dim], state[..., value_dim]
    )


def _initial_state(updates: Tensor, state: Tensor | None, norm: Tensor | None, with_normalizer: bool) -> Tensor:
    """fp32 [B, G, K, V], with the norm as one more value column if there is a normalizer."""
    zeros = torch.zeros_like(updates[:, :, 0])
    if not with_normalizer:
        return zeros if state is None else state.float()
    values = zeros[..., :-1] if state is None else state.float()
    return torch.cat([values, zeros[..., -1:] if norm is None else norm.float()[..., None]], -1)


def _sum_after(x: Tensor) -> Tensor:
    """Sum over the later entries of dim 3, exclusive, with no subtraction, so that -inf stays exact."""
    later = F.pad(x[:, :, :, 1:], (0, 0, 0, 1))
    return later.flip(3).cumsum(3).flip(3)


def _segment_sums(x: Tensor) -> Tensor:
    """x [..., S, D] -> [..., S, S, D]: at (i, j) the sum of x over j < l <= i; 0 for j >= i."""
    size = x.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)[..., None]
    return torch.where(later, x[..., None, :], 0.0).cumsum(-3)


def _scores(queries: Tensor, keys: Tensor, decay: Tensor | None) -> Tensor:
    """Causal decayed scores inside each chunk: [B, G, R, N, C, C]."""
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=queries.device).tril()
    if decay is not None and decay.shape[-1] > 1:
        return _vector_scores(queries, keys, decay)
    scores = queries @ keys[:, :, None].transpose(-1, -2)
    if decay is not None:
        scores = scores * _segment_sums(decay)[..., 0].exp()[:, :, None]
    return scores.masked_fill(~causal, 0.0)


def _vector_scores(queries: Tensor, keys: Tensor, decay: Tensor) -> Tensor:
    """Scores under a decay per key channel, by sub-chunks: each exponential is of a sum of gates, so none overflows."""
    causal = torch.ones(SUB_CHUNK, SUB_CHUNK, dtype=torch.bool, device=queries.device).tril()
    rows, earlier = [], keys[:, :, :, :0]
    for begin in range(0, CHUNK, SUB_CHUNK):
        here = slice(begin, begin + SUB_CHUNK)
        q, k, g = queries[:, :, :, :, here], keys[:, :, :, here], decay[:, :, :, here]
        running = g.cumsum(3)
        weighted = k[:, :, :, None] * _segment_sums(g).exp()  # [B, G, N, S (query), S (key), K]
        within = torch.einsum("bgrnik,bgnijk->bgrnij", q, weighted).masked_fill(~causal, 0.0)
        before = (q * running.exp()[:, :, None]) @ earlier[:, :, None].transpose(-1, -2)
        rows.append(F.pad(torch.cat([before, within], -1), (0, CHUNK - begin - SUB_CHUNK)))
        earlier = torch.cat([earlier * running[:, :, :, -1:].exp(), k * _sum_after(g).exp()], 3)
    return torch.cat(rows, -2)
