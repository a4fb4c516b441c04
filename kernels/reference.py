"""Naive forms in fp64, recurrences one token at a time: the ground truth that all others are compared with.

Legend: B batch, T tokens, H query heads, G KV heads (query head h reads KV head h // (H // G)), K key dim, V value dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gated_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gated linear attention by its recurrence, `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale q_t^T S_t`.

    Args:
        q: [B, T, H, K].
        k: [B, T, G, K].
        v: [B, T, G, V].
        log_decay: None, [G], [B, T, G] or [B, T, G, K].
        scale: factor on the outputs.
        starts: [B, T], first visible token of each token; -1 goes on with the initial state (`gated_linear_attention`).
            A row's entry may change only at a token that is not past the new start.
        initial_state: [B, G, K, V].
        initial_norm: [B, G, K].

    Returns:
        o [B, T, H, V], normalizer [B, T, H], state [B, G, K, V], norm [B, G, K], all fp64.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, length, heads, key_dim = q.shape
    groups, value_dim = k.shape[2], v.shape[-1]
    repeat = heads // groups
    if log_decay is None:
        log_decay = q.new_zeros(groups)
    g = log_decay.double()
    if g.dim() == 1:
        g = g.expand(batch, length, groups)
    if g.dim() == 3:
        g = g[..., None].expand(batch, length, groups, key_dim)
    outputs, normalizers = [], []
    state = q.new_zeros(batch, groups, key_dim, value_dim) if initial_state is None else initial_state.double()
    norm = q.new_zeros(batch, groups, key_dim) if initial_norm is None else initial_norm.double()
    previous = q.new_full((batch,), -1)
    for t in range(length):
        write = q.new_ones(batch, 1, 1)
        if starts is not None:
            fresh = (starts[:, t] != previous).view(batch, 1, 1)
            state, norm = state.masked_fill(fresh[..., None], 0.0), norm.masked_fill(fresh, 0.0)
            write = (starts[:, t] <= t).view(batch, 1, 1).double()
            previous = starts[:, t].double()
        decay = g[:, t].exp()
        state = state * decay[..., None] + write[..., None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        norm = norm * decay + write * k[:, t]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state.repeat_interleave(repeat, 1)))
        normalizers.append(scale * torch.einsum("bhk,bhk->bh", q[:, t], norm.repeat_interleave(repeat, 1)))
    return torch.stack(outputs, 1), torch.stack(normalizers, 1), state, norm


def bidirectional_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated linear attention in both directions, pair by pair.

    Args:
        q: [B, T, H, K].
        k: [B, T, G, K].
        v: [B, T, G, V].
        log_decay: None, [G], [B, T, G] or [B, T, G, K].
        scale: factor on the outputs.
        starts: [B, T], first token of each token's document.

    Returns:
        o [B, T, H, V] and normalizer [B, T, H], both fp64: token j weighs q_i . (k_j * d_ij), where d_ij is the product
        of the decays of j + 1 to i for earlier j, and of i to j - 1 for later ones.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, length, heads, key_dim = q.shape
    groups = k.shape[2]
    g = q.new_zeros(groups) if log_decay is None else log_decay.double()
    if g.dim() == 1:
        g = g.expand(batch, length, groups)
    if g.dim() == 3:
        g = g[..., None].expand(batch, length, groups, key_dim)
    first = torch.zeros(batch, length) if starts is None else starts.clamp(min=0)
    outputs, normalizers = [], []
    for i in range(length):
        o, total = q.new_zeros(batch, heads, v.shape[-1]), q.new_zeros(batch, heads)
        for j in range(length):
            between = g[:, j + 1 : i + 1] if j <= i else g[:, i:j]
            key = k[:, j] * between.sum(1).exp()
            weight = scale * (q[:, i] * key.repeat_interleave(heads // groups, 1)).sum(-1)
            weight = weight * (first[:, i] == first[:, j])[:, None]
            o = o + weight[..., None] * v[:, j].repeat_interleave(heads // groups, 1)
            total = total + weight
        outputs.append(o)
        normalizers.append(total)
    return torch.stack(outputs, 1), torch.stack(normalizers, 1)


def window_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    starts: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sliding softmax attention with sinks through its full [T, T] mask.

    Args:
        q: [B, T, H, K].
        k: [B, T, G, K].
        v: [B, T, G, V].
        window: visible tokens, the query's own included.
        sinks: first tokens of a document that stay visible.
        scale: factor on the scores; K**-0.5 by default.
        starts: [B, T], first visible token of each token.
        softcap: c caps the scaled scores, c * tanh(s / c).

    Returns:
        o [B, T, H, V], log-sum-exp [B, T, H] and largest score [B, T, H], fp64; o is 0 where nothing is visible.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, length, heads, key_dim = q.shape
    repeat = heads // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * (key_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(length, device=q.device)[:, None]
    j = torch.arange(length, device=q.device)[None, :]
    first = torch.zeros(batch, length, 1, device=q.device, dtype=torch.long)
    if starts is not None:
        first = starts.long().clamp(min=0)[..., None]
    visible = (j >= first) & (j <= i) & ((i - j < window) | (j - first < sinks))
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(visible[:, None], (scores - lse[..., None].clamp(min=-1e300)).exp(), 0.0)
    o = torch.einsum("bhij,bjhv->bihv", weights, v)
    return o, lse.transpose(1, 2), scores.amax(-1).transpose(1, 2)


def gated_delta_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule by its recurrence, `S_t = (I - b k k^T) diag(exp g) S_{t-1} + b k v^T`, `o_t = scale q_t^T S_t`.

    Args:
        q: [B, T, H, K].
        k: [B, T, G, K].
        v: [B, T, G, V], or [B, T, J, V] with J a multiple of G and H = G: value head j reads q and k of head j G // J.
        beta: [B, T, J].
        log_decay: None, [J], [B, T, J] or [B, T, J, K].
        scale: factor on the outputs.
        starts: [B, T], first visible token of each token, as in `gated_linear_reference`.
        initial_state: [B, J, K, V].

    Returns:
        o [B, T, max(H, J), V] and state [B, J, K, V], fp64.
    """
    q, k, v, beta = q.double(), k.double(), v.double(), beta.double()
    batch, length, _, key_dim = q.shape
    share, (groups, value_dim) = v.shape[2] // k.shape[2], v.shape[2:]
    if share > 1:
        q, k = q.repeat_interleave(share, 2), k.repeat_interleave(share, 2)
    heads = q.shape[2]
    g = (q.new_zeros(groups) if log_decay is None else log_decay).double()
    if g.dim() == 1:
        g = g.expand(batch, length, groups)
    if g.dim() == 3:
        g = g[..., None].expand(batch, length, groups, key_dim)
    outputs = []
    state = q.new_zeros(batch, groups, key_dim, value_dim) if initial_state is None else initial_state.double()
    previous = q.new_full((batch,), -1)
    for t in range(length):
        write = beta[:, t]
        if starts is not None:
            state = state.masked_fill((starts[:, t] != previous).view(batch, 1, 1, 1), 0.0)
            write = write * (starts[:, t] <= t).view(batch, 1)
            previous = starts[:, t].double()
        state = state * g[:, t].exp()[..., None]
        key = k[:, t, :, None]  # [B, G, 1, K]
        state = state + key.transpose(-1, -2) * (write[..., None, None] * (v[:, t, :, None] - key @ state))
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state.repeat_interleave(heads // groups, 1)))
    return torch.stack(outputs, 1), state


def selective_scan_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    rate: Tensor,
    *,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's selective scan by its recurrence, `s_tvn = exp(-dt_tv rate_vn) s_(t-1)vn + dt_tv v_tv k_tn`.

    Args:
        q: [B, T, H, K].
        k: [B, T, G, K].
        v: [B, T, G, V].
        dt: [B, T, G, V].
        rate: [G, V, N]; channel v reads entries `N * (v * K // (N * V))` and on of q and k.
        starts: [B, T], first visible token of each token, as in `gated_linear_reference`.
        initial_state: [B, G, V, N].

    Returns:
        o [B, T, H, V] and state [B, G, V, N], fp64.
    """
    q, k, v, dt, rate = q.double(), k.double(), v.double(), dt.double(), rate.double()
    batch, length, heads, key_dim = q.shape
    groups, value_dim, size = rate.shape
    block = torch.arange(value_dim, device=q.device) * (key_dim // size) // value_dim
    entry = block[:, None] * size + torch.arange(size, device=q.device)  # [V, N]
    state = q.new_zeros(batch, groups, value_dim, size) if initial_state is None else initial_state.double()
    outputs = []
    previous = q.new_full((batch,), -1)
    for t in range(length):
        step = dt[:, t, ..., None]  # [B, G, V, 1]
        decay, write = (-step * rate).exp(), step * v[:, t, ..., None] * k[:, t][..., entry]
        if starts is not None:
            state = state.masked_fill((starts[:, t] != previous).view(batch, 1, 1, 1), 0.0)
            write = write * (starts[:, t] <= t).view(batch, 1, 1, 1)
            previous = starts[:, t].double()
        state = decay * state + write
        outputs.append((q[:, t][..., entry] * state.repeat_interleave(heads // groups, 1)).sum(-1))
    return torch.stack(outputs, 1), state


def mxint8_reference(x: Tensor) -> Tensor:
    """Each 32 numbers of x [..., D], and what is left, as n / 64 of the power of two of their largest, in fp64.

    Every n from -127 to 127 is tried; of two that are as near, the even one is taken. No power is below 2 ** -120.
    """
    levels, blocks = torch.arange(-127, 128).double(), []
    for block in x.double().split(32, -1):
        powers = [2.0 ** max(math.frexp(m)[1] - 1, -120) for m in block.abs().amax(-1).flatten().tolist()]
        step = torch.tensor(powers, dtype=torch.float64).view(*block.shape[:-1], 1) / 64
        distance = ((block / step)[..., None] - levels).abs()
        nearest = distance == distance.amin(-1, keepdim=True)
        blocks.append(levels[torch.where(nearest, levels.abs() % 2, 2).argmin(-1)] * step)
    return torch.cat(blocks, -1)
