"""The terrace window of LoLCATs (arXiv:2410.10254, section 3.3): blocks of W tokens instead of a sliding window.

A token sees its own block up to itself, and the block before. Where window and memory are disjoint, the memory holds
what lies before, so it changes for readers at the beginning of a block alone. The published code trains so, and decodes
with a sliding window; here training and decoding are the same.

Legend: B batch, T tokens, H query heads, K features, W block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.mixers.context import SequenceContext

Tensors = dict[str, Tensor]
READ = "read_"  # before a state's name: what readers see of it until the next block begins


def terrace_reach(index: Tensor, block: int) -> Tensor:
    """Return how many tokens before it a token sees, from its place in its document."""
    return torch.minimum(index, block + index % block)


def terrace_memory(
    memory: Any, q: Tensor, entering: Tensors, index: Tensor, context: SequenceContext, block: int, cache: Tensors
) -> tuple[Tensor, Tensor | None, Tensors]:
    """Run a memory over packed tokens, so that all tokens of a block read it as it was when the block began.

    In each block all reads are put before all writes, as tokens that write nothing and tokens that nobody reads.

    Args:
        memory: of a mixer.
        q: features of the queries [B, T, H, K].
        entering: the stream, W tokens late.
        index: [B, T], place of each token in its document.
        context: lengths and documents.
        block: W.
        cache: states before this call, and what readers see of them, under the memory's names; or empty.

    Returns:
        Outputs, sums of weights or None, and what the cache holds afterwards.
    """
    (batch, length), device = q.shape[:2], q.device
    starts = torch.full((batch, length), -1, device=device) if context.starts is None else context.starts
    lengths = torch.full((batch,), length, device=device) if context.lengths is None else context.lengths
    token = torch.arange(length, device=device)
    goes_on = index % block > token  # the block began before this call
    first = (token - index % block).clamp(min=0)  # of the block, in this call
    final = (lengths - 1).clamp(min=0)[:, None]
    tail = first == first.gather(1, final)  # the block of the last token, which may still be read
    entering = _masked(entering, (starts < 0) | (token >= starts + block))
    states = {name: cache[name] for name in memory.state_names} if cache else None

    reads, writes = token + first, token + _block_ends(first)
    source = torch.zeros(batch, 2 * length, dtype=torch.long, device=device)
    source = source.scatter(1, reads, token.expand(batch, -1)).scatter(1, writes, token.expand(batch, -1))
    writing = torch.zeros_like(source, dtype=torch.bool).scatter(1, writes, ~tail)
    stream = _masked({name: _rows(t, source) for name, t in entering.items()}, writing)
    out, sums, seen = memory(_rows(q, source), stream, _rows(torch.where(starts < 0, -1, 2 * starts), source), states)
    out, sums = _rows(out, reads), None if sums is None else _rows(sums, reads)
    if cache:
        before = {name: cache[READ + name] for name in memory.state_names}
        silent = {name: torch.zeros_like(t) for name, t in entering.items()}
        early, early_sums, _ = memory(q, silent, None, before)
        out = torch.where(goes_on[..., None, None], early, out)
        sums = sums if sums is None or early_sums is None else torch.where(goes_on[..., None], early_sums, sums)

    rest = first.gather(1, final) + torch.arange(min(block, length), device=device)
    ends = {name: _rows(t, rest.clamp(max=length - 1)) for name, t in entering.items()}
    _, _, after = memory(_rows(q, rest.clamp(max=length - 1)), _masked(ends, rest < lengths[:, None]), None, seen)
    if cache:
        same = (goes_on.gather(1, final) | (lengths[:, None] == 0))[:, 0]
        seen = {name: torch.where(_wide(same, t), before[name], t) for name, t in seen.items()}
    return out, sums, {**after, **{READ + name: t for name, t in seen.items()}}


def terrace_step(
    memory: Any, q: Tensor, entering: Tensors, length: Tensor, block: int, cache: Tensors
) -> tuple[Tensor, Tensor | None]:
    """One token [B, heads, ...] after `length` others: it reads what its block reads, and its stream enters unread."""
    begins = length % block == 0
    before = {name: cache[READ + name] for name in memory.state_names}
    for name, state in before.items():
        state.copy_(torch.where(_wide(begins, state), cache[name], state))
    memory.step(q, entering, cache)
    out: tuple[Tensor, Tensor | None] = memory.step(
        q, {name: torch.zeros_like(t) for name, t in entering.items()}, before
    )
    return out


def _block_ends(first: Tensor) -> Tensor:
    """[B, T]: one past the last token of each token's block, in this call."""
    length = first.shape[1]
    token = torch.arange(length, device=first.device)
    begins = torch.where(first == token, token, length)
    return F.pad(begins[:, 1:], (0, 1), value=length).flip(1).cummin(1).values.flip(1)


def _rows(t: Tensor, index: Tensor) -> Tensor:
    """t [B, T, ...] at index [B, N]."""
    return t[torch.arange(t.shape[0], device=t.device)[:, None], index]


def _wide(mask: Tensor, t: Tensor) -> Tensor:
    """A mask [B] or [B, T] with axes added, to go with t."""
    return mask.view(*mask.shape, *(1,) * (t.dim() - mask.dim()))


def _masked(stream: Tensors, kept: Tensor) -> Tensors:
    """The stream with zeros for tokens that are not kept [B, T]."""
    return {name: t * _wide(kept, t).to(t.dtype) for name, t in stream.items()}
