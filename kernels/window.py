"""Causal sliding-window softmax attention with sink tokens, on grouped KV heads.

Legend: B batch, T tokens, H query heads, G KV heads (H = G * R), K key dim, V value dim, W window, S sinks,
C block of queries, N blocks, J keys of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.backend import select
from linearize.kernels.gated_linear import starts_of
from linearize.kernels.microscaling import numbers

BLOCK = 64


class WindowOutput(NamedTuple):
    """What window attention returns.

    Attributes:
        o: outputs [B, T, H, V] in q's dtype; 0 where nothing is visible.
        lse: log-sum-exp of the visible scaled scores [B, T, H] in fp32; -inf where nothing is visible.
        row_max: largest visible scaled score [B, T, H] in fp32; -inf where nothing is visible.
    """

    o: Tensor
    lse: Tensor
    row_max: Tensor


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
) -> WindowOutput:
    """Softmax attention of each token to the last `window` tokens, itself included, and its document's first `sinks`.

    Sinks follow StreamingLLM (arXiv:2309.17453), without its position shift.

    Args:
        q: queries [B, T, H, K], any strides.
        k: keys [B, T, G, K], H a multiple of G.
        v: values [B, T, G, V].
        window: visible tokens, at least 1.
        sinks: always visible first tokens of a document.
        scale: factor on the scores; K**-0.5 by default.
        starts: int [B, T], first token of each token's document; values below 0 count as 0. Without sinks it may be any
            first visible token, as long as it does not fall from one token to the next.
        cu_seqlens: cumulative document lengths [N + 1] as the alternative to `starts` where B is 1.
        softcap: c caps the scaled scores, c * tanh(s / c), as Gemma 2 does; the PyTorch form serves it on any device.

    Returns:
        Outputs, log-sum-exp and largest score; all differentiable.

    Raises:
        ValueError: shapes do not fit, `window` is below 1, or `softcap` is not above 0.
    """
    check_window(q, k, v, window)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must lie above 0, got {softcap}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = starts_of(starts, cu_seqlens, q)
    backend = select("window", q)
    if backend == "triton" and softcap is None:
        from linearize.kernels.window_triton import window_triton

        q, k = q.to(v.dtype), k.to(v.dtype)
        return WindowOutput(*window_triton(q, k, v, window, sinks, scale, starts))
    if backend == "reference":
        from linearize.kernels.reference import window_reference

        o, lse, row_max = window_reference(
            q, k, v, window=window, sinks=sinks, scale=scale, starts=starts, softcap=softcap
        )
        return WindowOutput(o.to(q.dtype), lse.float(), row_max.float())
    return _blocked(q, k, v, window, sinks, scale, starts, softcap)


def check_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> None:
    """Raise ValueError where shapes do not fit or `window` is below 1."""
    batch, length, heads, key_dim = q.shape
    if k.shape[:2] != (batch, length) or v.shape[:3] != k.shape[:3] or k.shape[-1] != key_dim or heads % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: expected q [B, T, H, K], "
            "k [B, T, G, K], v [B, T, G, V] with H a multiple of G."
        )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")


def window_step(
    q: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    length: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    reach: Tensor | None = None,
) -> WindowOutput:
    """One token of window attention, after its key and value were written to slot `length % W` of the rings.

    Args:
        q: [B, H, K].
        k_ring: last W keys [B, W, G, K]; token t lies in slot t % W. Rings and sinks of uint8 are stored numbers of
            MXINT8 (`kernels.microscaling`), so that their last axis is longer.
        v_ring: [B, W, G, V].
        sink_k: first S keys [B, S, G, K], or None.
        sink_v: [B, S, G, V], or None.
        length: int [B], tokens of the row before this one.
        scale: factor on the scores; K**-0.5 by default.
        softcap: as in `window_attention`; neither it nor `reach` has a Triton form.
        reach: int [B], how many tokens of the ring before it the token sees; all of them by default.

    Returns:
        o [B, H, V], log-sum-exp [B, H], largest score [B, H].
    """
    if softcap is None and reach is None and select("step", q) == "triton":
        from linearize.kernels.step_triton import window_step_triton

        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return WindowOutput(*window_step_triton(q, k_ring, v_ring, sink_k, sink_v, length, scale))
    window = k_ring.shape[1]
    slot = torch.arange(window, device=q.device)
    visible = slot <= length[:, None]
    if reach is not None:
        visible = visible & ((length[:, None] - slot) % window <= reach[:, None])
    keys, values = numbers(k_ring, torch.float32), numbers(v_ring, torch.float32)
    if sink_k is not None and sink_v is not None:
        sink = torch.arange(sink_k.shape[1], device=q.device)
        visible = torch.cat([sink <= length[:, None] - window, visible], 1)
        first_keys, first_values = numbers(sink_k, torch.float32), numbers(sink_v, torch.float32)
        keys, values = torch.cat([first_keys, keys], 1), torch.cat([first_values, values], 1)
    batch, heads, key_dim = q.shape
    groups = keys.shape[2]
    queries = q.float().view(batch, groups, heads // groups, 1, key_dim) * (key_dim**-0.5 if scale is None else scale)
    columns = keys.float().movedim(2, 1)[:, :, None], values.float().movedim(2, 1)
    o, lse, row_max = masked_softmax(queries, *columns, visible[:, None, None, None], softcap)
    return WindowOutput(o.flatten(1, 3).to(q.dtype), lse.flatten(1), row_max.flatten(1))


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """Return `c * tanh(scores / c)`, or the scores as they are where there is no cap."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def masked_softmax(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked softmax attention: queries [B, G, R, ..., C, K], keys [B, G, 1, ..., J, K], values [B, G, ..., J, V]."""
    scores = cap_scores(queries @ keys.transpose(-1, -2), softcap).masked_fill(~visible, -torch.inf)
    row_max = scores.amax(-1, keepdim=True)
    weights = (scores - row_max.masked_fill(row_max == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    o = (weights @ values[:, :, None]) / total.masked_fill(empty, 1.0)
    lse = total.masked_fill(empty, 1.0).log() + row_max
    return o, lse[..., 0], row_max[..., 0]


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    scale: float,
    starts: Tensor | None,
    softcap: float | None,
) -> WindowOutput:
    """Blocks of C <= W queries against the blocks that their windows reach, so that memory is linear in T."""
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    block = length if length <= 2 * window else min(window, BLOCK)
    blocks = -(-length // block)
    pad = blocks * block - length
    reach = min(-(-(window - 1) // block), blocks - 1)

    def split(x: Tensor) -> Tensor:
        """[B, T, G, D] -> fp32 [B, G, N, C, D]"""
        rows: Tensor = F.pad(x.float(), (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, block)).movedim(3, 1)
        return rows

    def with_earlier(x: Tensor) -> Tensor:
        """[B, G, N, C, D] -> [B, G, N, (reach + 1) * C, D], each block behind the `reach` blocks before it."""
        return torch.cat([F.pad(x, (0, 0, 0, 0, n, 0))[:, :, :blocks] for n in range(reach, -1, -1)], 3)

    queries = split(q * scale).unflatten(1, (groups, heads // groups))
    keys, values = with_earlier(split(k)), with_earlier(split(v))
    position = torch.arange(blocks * block, device=q.device).view(blocks, block)
    i = position[None, :, :, None]  # [1, N, C, 1]
    j = (position[:, :1] - reach * block + torch.arange((reach + 1) * block, device=q.device))[None, :, None]
    first = torch.zeros_like(i)
    if starts is not None:
        first = F.pad(starts.clamp(min=0), (0, pad)).view(batch, blocks, block, 1).to(i.dtype)
    visible = (j >= first) & (j <= i) & ((i - j < window) | (j - first < sinks) & (blocks == 1))
    if sinks and blocks > 1:
        begin = first[:, :, :1]  # [B or 1, N, 1, 1]
        sink = begin + torch.arange(sinks, device=q.device)
        visible = torch.cat([visible, (sink <= i - window) & (first == begin)], -1)
        at = sink.view(sink.shape[0], -1).clamp(max=length - 1).expand(batch, -1)
        rows = torch.arange(batch, device=q.device)[:, None]
        keys = torch.cat([keys, k.float()[rows, at].unflatten(1, (blocks, sinks)).movedim(3, 1)], 3)
        values = torch.cat([values, v.float()[rows, at].unflatten(1, (blocks, sinks)).movedim(3, 1)], 3)
    o, lse, row_max = masked_softmax(queries, keys[:, :, None], values, visible[:, None, None], softcap)

    def join(x: Tensor) -> Tensor:
        """[B, G, R, N, C, ...] -> [B, T, H, ...]"""
        return x.flatten(1, 2).movedim(1, 3).flatten(1, 2)[:, :length]

    return WindowOutput(join(o).to(q.dtype), join(lse), join(row_max))
