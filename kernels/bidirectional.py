"""Gated linear attention in both directions: a token sees all tokens of its document, earlier and later ones.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim.

Each side is a causal pass, the later one over the reversed sequence; what the token itself adds is in both, and is
taken out once. With a constant decay a the weights are a^|i - j| (LION-D, arXiv:2502.16249); with a decay per token the
earlier side has prod_{t=j+1..i} a_t and the later side prod_{t=i..j-1} a_t, the recurrence run from either end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.backend import select
from linearize.kernels.gated_linear import gated_linear_attention


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    with_normalizer: bool = False,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention of each token to all tokens of its document.

    A token whose key, value and log-decay are 0, such as padding behind a row, adds nothing to what others see.

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, G, K], H a multiple of G.
        v: values [B, T, G, V].
        log_decay: g in (-inf, 0]: None for no decay, [G], [B, T, G], or [B, T, G, K] per key channel.
        scale: factor on outputs and normalizer.
        with_normalizer: also return the sums of weights.
        starts: int [B, T], the first token of each token's document; values below 0 count as 0. None is one document.

    Returns:
        Outputs [B, T, H, V] in q's dtype, and sums of weights [B, T, H] in fp32 or None.
    """
    if select("bidirectional", q) == "reference":
        from linearize.kernels.reference import bidirectional_reference

        o, normalizer = bidirectional_reference(q, k, v, log_decay, scale=scale, starts=starts)
        return o.to(q.dtype), normalizer.float() if with_normalizer else None
    if log_decay is None and starts is None:
        return _undecayed(q, k, v, scale, with_normalizer)
    before = gated_linear_attention(
        q, k, v, log_decay, scale=scale, with_normalizer=with_normalizer, starts=_from_zero(starts)
    )
    decay = log_decay.flip(1) if log_decay is not None and log_decay.dim() > 1 else log_decay
    behind = gated_linear_attention(
        q.flip(1),
        k.flip(1),
        v.flip(1),
        decay,
        scale=scale,
        with_normalizer=with_normalizer,
        starts=_reversed_starts(starts),
    )
    own = scale * (_grouped(q.float(), k) * k.float()[..., None, :]).sum(-1)  # [B, T, G, R]
    both = _grouped(before.o.float() + behind.o.float().flip(1), k)
    o = (both - own[..., None] * v.float()[..., None, :]).flatten(2, 3).to(q.dtype)
    if before.normalizer is None or behind.normalizer is None:
        return o, None
    return o, before.normalizer + behind.normalizer.flip(1) - own.flatten(2)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, T, G, R, D]"""
    grouped: Tensor = x.unflatten(2, (k.shape[2], -1))
    return grouped


def _undecayed(q: Tensor, k: Tensor, v: Tensor, scale: float, with_normalizer: bool) -> tuple[Tensor, Tensor | None]:
    """One state for the whole row: O(T), without a scan."""
    queries, keys = _grouped(q.float() * scale, k), k.float()
    state = torch.einsum("btgk,btgv->bgkv", keys, v.float())
    o = torch.einsum("btgrk,bgkv->btgrv", queries, state).flatten(2, 3).to(q.dtype)
    if not with_normalizer:
        return o, None
    return o, torch.einsum("btgrk,bgk->btgr", queries, keys.sum(1)).flatten(2)


def _from_zero(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.clamp(min=0)


def _reversed_starts(starts: Tensor | None) -> Tensor | None:
    """[B, T]: the first token of each token's document in the reversed row."""
    if starts is None:
        return None
    length = starts.shape[1]
    place = torch.arange(length, device=starts.device)
    heads = torch.where(starts == place, place, length)  # where a document begins, else past the end
    following = F.pad(heads[:, 1:], (0, 1), value=length).flip(1).cummin(1).values.flip(1)
    return (length - following).flip(1)
