"""Gated slot attention on grouped KV heads: M slots of keys and values, written and forgotten alike, read by a softmax.

Legend: B batch, T tokens, H query heads, G KV heads (H = G * R), K key dim, V value dim, M slots, C chunk.

Two passes. The first, here, reads the slots' keys, linear attention whose decay is on the side that is read out:
`score_tm = sum_{j <= t} (q_t . k_j) s_jm exp(sum_{j < i <= t} g_im)`. The second, the softmax of it over the slots as
queries, the write strengths as keys and the same decay, is `gated_linear_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.gated_linear import gated_linear_attention, gated_linear_step

SLOT_CHUNK = 16


class SlotOutput(NamedTuple):
    """What gated slot attention returns.

    Attributes:
        o: outputs [B, T, H, V] in v's dtype.
        keys: the slots' keys behind the last token [B, G, K, M] in fp32.
        values: the slots' values [B, G, M, V] in fp32.
    """

    o: Tensor
    keys: Tensor
    values: Tensor


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    starts: Tensor | None = None,
    initial_keys: Tensor | None = None,
    initial_values: Tensor | None = None,
) -> SlotOutput:
    """Gated slot attention, `o_t = softmax(scale * q_t^T K_t) V_t` (GSA, arXiv:2409.07146, eq. 8 to 10).

    Slot m keeps `exp(g_tm)` of its key and its value and takes the rest, `s_tm = 1 - exp(g_tm)`, of the token's.

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, G, K], H a multiple of G.
        v: values [B, T, G, V].
        log_decay: g [B, T, G, M] in (-inf, 0]; a token with g = 0 writes nothing.
        scale: factor on the scores of the slots.
        starts: int [B, T], first visible token of each token, as in `gated_linear_attention`.
        initial_keys: [B, G, K, M] in fp32, zeros by default.
        initial_values: [B, G, M, V] in fp32, zeros by default.
    """
    strength = -torch.expm1(log_decay.float())
    scores, keys = _slot_scores(q, k, strength, log_decay, starts, initial_keys)
    chosen = (scores * scale).softmax(-1)
    out = gated_linear_attention(chosen, strength, v, log_decay, starts=starts, initial_state=initial_values)
    return SlotOutput(out.o, keys, out.state)


def gated_slot_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, keys: Tensor, values: Tensor, *, scale: float = 1.0
) -> Tensor:
    """One token of gated slot attention; `keys` and `values` are updated in place.

    Args:
        q: [B, H, K].
        k: [B, G, K].
        v: [B, G, V].
        log_decay: [B, G, M].
        keys: [B, G, K, M] in fp32.
        values: [B, G, M, V] in fp32.
        scale: factor on the scores of the slots.

    Returns:
        o [B, H, V] in v's dtype.
    """
    strength = -torch.expm1(log_decay.float())
    keys.mul_(log_decay.float().exp()[:, :, None]).add_(k.float()[..., None] * strength[:, :, None])
    rows = q.float().view(q.shape[0], k.shape[1], -1, q.shape[-1])
    chosen = ((rows @ keys) * scale).softmax(-1).flatten(1, 2)
    return gated_linear_step(chosen, strength, v, log_decay, values, None)[0]


def _slot_scores(
    q: Tensor, k: Tensor, strength: Tensor, log_decay: Tensor, starts: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The first pass: scores [B, T, H, M] and the slots' keys [B, G, K, M], in fp32; all exponents at most zero."""
    batch, length, heads, key_dim = q.shape
    groups, slots = log_decay.shape[2:]
    chunks = -(-length // SLOT_CHUNK)
    pad = chunks * SLOT_CHUNK - length

    def slot_chunks(x: Tensor) -> Tensor:
        """[B, T, heads, D] -> fp32 [B, heads, N, C, D]"""
        parts: Tensor = F.pad(x.float(), (0, 0, 0, 0, 0, pad)).unflatten(1, (chunks, SLOT_CHUNK)).movedim(3, 1)
        return parts

    queries = slot_chunks(q).unflatten(1, (groups, heads // groups))  # [B, G, R, N, C, K]
    keys, writes, decay = slot_chunks(k), slot_chunks(strength), slot_chunks(log_decay)
    running = decay.cumsum(3)  # [B, G, N, C, M]
    place = torch.arange(SLOT_CHUNK, device=q.device)
    if starts is None:
        starts = torch.full((batch, length), -1, device=q.device)
    first = torch.cat([starts, starts[:, -1:].expand(batch, pad)], 1).unflatten(1, (chunks, SLOT_CHUNK))
    state = k.new_zeros(batch, groups, key_dim, slots, dtype=torch.float32) if state is None else state.float()
    outputs = []
    for n in range(chunks):
        begin, start = n * SLOT_CHUNK, first[:, n]
        visible = (place[:, None] >= place) & (begin + place >= start[..., None])  # [B, C, C]
        since = running[:, :, n, :, None] - running[:, :, n, None]  # [B, G, C, C, M]
        since = since.masked_fill(~visible[:, None, ..., None], -torch.inf)
        products = queries[:, :, :, n] @ keys[:, :, None, n].transpose(-1, -2)  # [B, G, R, C, C]
        inside = torch.einsum("bgrtj,bgtjm->bgrtm", products, since.exp() * writes[:, :, n, None])
        seen = (start < begin)[:, None, :, None].float()  # [B, 1, C, 1]
        before = (queries[:, :, :, n] @ state[:, :, None]) * (running[:, :, n].exp() * seen)[:, :, None]
        outputs.append(inside + before)
        last = start[:, -1]
        kept = (begin + place >= last[:, None])[:, None, :, None].float()
        left = (running[:, :, n, -1:] - running[:, :, n]).exp() * writes[:, :, n] * kept  # [B, G, C, M]
        goes_on = (last < begin)[:, None, None].float()
        carry = running[:, :, n, -1].exp() * goes_on  # [B, G, M]
        state = state * carry[:, :, None] + keys[:, :, n].transpose(-1, -2) @ left
    scores = torch.stack(outputs, 3).flatten(3, 4)[:, :, :, :length]  # [B, G, R, T, M]
    return scores.flatten(1, 2).transpose(1, 2), state
