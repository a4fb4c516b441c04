"""Mamba-1's selective scan on grouped KV heads: each value channel has a small state of its own, with its own decays.

Legend: B batch, T tokens, H query heads, G KV heads (H = G R), K key dim, V value dim, N entries of a channel's state,
S = K / N blocks of keys, P = V / S channels of a block, C chunk.

Keys and queries are cut into S blocks of N entries, and the value channels into S blocks too: block s of the values is
written with block s of the keys, and read with block s of the queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.kernels.backend import select

SCAN_CHUNK = 64


class ScanOutput(NamedTuple):
    """What the selective scan returns.

    Attributes:
        o: outputs [B, T, H, V] in v's dtype.
        state: [B, G, V, N] in fp32, as the last token sees it.
    """

    o: Tensor
    state: Tensor


def selective_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    rate: Tensor,
    *,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> ScanOutput:
    """Selective scan, `s_t = exp(-dt_t rate) s_{t-1} + dt_t v_t k_t` and `o_t = q_t . s_t` (arXiv:2312.00752, eq. 2).

    Mamba's C, B, x, and A are q, k, v, and -rate. Outputs come without the skip `D x`.

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, G, K], H a multiple of G.
        v: values [B, T, G, V].
        dt: step sizes of at least 0, [B, T, G, V]; a token with dt = 0 leaves the state as it is.
        rate: of the decay, at least 0, [G, V, N]; K is a multiple of N, and V of K / N.
        starts: int [B, T], first visible token of each token, as in `gated_linear_attention`.
        initial_state: [B, G, V, N] in fp32, zeros by default.

    Raises:
        ValueError: shapes do not fit together.
    """
    batch, length, heads, key_dim = q.shape
    groups, value_dim, size = rate.shape
    blocks = key_dim // size
    if (
        k.shape != (batch, length, groups, key_dim)
        or v.shape != (batch, length, groups, value_dim)
        or dt.shape != v.shape
        or heads % groups
        or key_dim % size
        or value_dim % blocks
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, dt {tuple(dt.shape)}, rate "
            f"{tuple(rate.shape)} do not fit: expected q [B, T, H, K], k [B, T, G, K], v and dt [B, T, G, V], rate "
            "[G, V, N] with H a multiple of G, K of N and V of K / N."
        )
    backend = select("scan", q)
    if backend == "reference":
        from linearize.kernels.reference import selective_scan_reference

        o, state = selective_scan_reference(q, k, v, dt, rate, starts=starts, initial_state=initial_state)
        return ScanOutput(o.to(v.dtype), state.float())
    dt, rate = dt.float(), rate.float()
    state = rate.new_zeros(batch, *rate.shape) if initial_state is None else initial_state.float()
    goes_on = torch.ones(batch, length, dtype=torch.float32, device=q.device)
    if starts is not None:
        goes_on = (starts == F.pad(starts[:, :-1], (1, 0), value=-1)).float().expand(batch, -1)
        visible = starts <= torch.arange(length, device=q.device)
        v = v * visible[..., None, None].to(v.dtype)
    if backend == "triton":
        from linearize.kernels.scan_triton import scan_triton

        return ScanOutput(*scan_triton(q, k, v, dt, rate, goes_on, state))
    return _chunked_scan(q, k, v, dt, rate, goes_on, state)


def selective_scan_step(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, state: Tensor) -> Tensor:
    """One token of the selective scan; `state` is updated in place.

    Args:
        q: [B, H, K].
        k: [B, G, K].
        v: [B, G, V].
        dt: [B, G, V].
        rate: [G, V, N].
        state: [B, G, V, N] in fp32.

    Returns:
        o [B, H, V] in v's dtype.
    """
    keep, write, read = _scan_tokens(q[:, None], k[:, None], v[:, None], dt[:, None], rate.float())
    blocked = state.unflatten(2, write.shape[3:5])  # [B, G, S, P, N]
    blocked = keep[:, 0] * blocked + write[:, 0]
    state.copy_(blocked.flatten(2, 3))
    return _scan_read(read, blocked[:, None])[:, 0].to(v.dtype)


def _scan_tokens(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each token keeps of the state and writes to it [B, T, G, S, P, N], and its queries [B, T, G, R, S, N]."""
    groups, value_dim, size = rate.shape
    blocks = q.shape[-1] // size
    step = dt.float().unflatten(3, (blocks, value_dim // blocks))[..., None]
    keep = (-step * rate.unflatten(1, (blocks, value_dim // blocks))).exp()
    values = v.float().unflatten(3, (blocks, value_dim // blocks))[..., None]
    write = step * values * k.float().unflatten(3, (blocks, size))[..., None, :]
    return keep, write, q.float().unflatten(3, (blocks, size)).unflatten(2, (groups, q.shape[2] // groups))


def _scan_read(queries: Tensor, states: Tensor) -> Tensor:
    """[B, T, G, R, S, N] and [B, T, G, S, P, N] -> outputs [B, T, H, V]."""
    out: Tensor = torch.einsum("btgrsn,btgspn->btgrsp", queries, states)
    return out.flatten(4).flatten(2, 3)


def _scan_one_chunk(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, goes_on: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of a chunk and the state behind it, by doubling: `write` sums ever more tokens, `keep` has their decays.

    Every factor lies in [0, 1], and nothing is divided or subtracted.
    """
    keep, write, queries = _scan_tokens(q, k, v, dt, rate)
    keep = keep * goes_on[..., None, None, None, None]
    reach = 1
    while reach < keep.shape[1]:
        later = (0,) * 8 + (reach, 0)
        write = write + keep * F.pad(write[:, :-reach], later)
        keep = keep * F.pad(keep[:, :-reach], later, value=1.0)
        reach *= 2
    states = write + keep * state.unflatten(2, write.shape[3:5])[:, None]
    return _scan_read(queries, states), states[:, -1].flatten(2, 3).clone()  # a view would keep all of `states` alive


def _chunked_scan(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, rate: Tensor, goes_on: Tensor, state: Tensor
) -> ScanOutput:
    """Chunk by chunk, each computed again in the backward pass, so that the states of one chunk at a time are kept."""
    outputs = []
    for begin in range(0, q.shape[1], SCAN_CHUNK):
        here = slice(begin, begin + SCAN_CHUNK)
        chunk = (*(t[:, here] for t in (q, k, v, dt)), rate, goes_on[:, here], state)
        if torch.is_grad_enabled() and any(t.requires_grad for t in chunk):
            out, state = checkpoint(_scan_one_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = _scan_one_chunk(*chunk)
        outputs.append(out)
    return ScanOutput(torch.cat(outputs, 1).to(v.dtype), state)
