"""Where padding lies and where documents begin: computed once a forward pass, used by every mixer.

Legend: B batch, T tokens. Mixers work on rows whose padding has been moved to the right, in order, so that left, right
and inner padding all give the same numbers as none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceContext:
    """The layout of one call.

    Attributes:
        order: [B, T], token at each place after padding moved to the right; None where there is no padding.
        lengths: [B], real tokens of each row; None where there is no padding.
        starts: [B, T] in the moved order: first token of each token's document, -1 if it began before this call; None
            where every row is one document.
    """

    order: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is no padding and no new document."""
        return self.order is None and self.starts is None

    def pack(self, x: Tensor) -> Tensor:
        """Move the padding of x [B, T, ...] to the right."""
        if self.order is None:
            return x
        return x.gather(1, self.order.view(*self.order.shape, *(1,) * (x.dim() - 2)).expand_as(x))

    def unpack(self, x: Tensor) -> Tensor:
        """Undo `pack`; padding gets zeros."""
        if self.order is None:
            return x
        index = self.order.view(*self.order.shape, *(1,) * (x.dim() - 2)).expand_as(x)
        return torch.zeros_like(x).scatter(1, index, x * self.real(x))

    def real(self, x: Tensor) -> Tensor:
        """Return 1 for tokens and 0 for padding, in x's dtype, shaped to multiply packed x [B, T, ...]."""
        assert self.lengths is not None
        places = torch.arange(x.shape[1], device=x.device)
        return (places < self.lengths[:, None]).view(*x.shape[:2], *(1,) * (x.dim() - 2)).to(x.dtype)


def sequence_context(
    batch: int,
    length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    past: int = 0,
) -> SequenceContext:
    """Read padding and documents from what transformers passes to a model.

    In a compiled or captured decode step (one token, with a cache) no row may be padding or begin a document: what the
    tensors hold cannot be read there.

    Args:
        batch: B.
        length: T, tokens of this call.
        attention_mask: [B, past + T], 0 on padding; None where there is none.
        position_ids: [1 or B, T]; a document begins where they do not go on from token to token (by one, or by the
            padding between them), and behind a cache where they begin at 0.
        cu_seqlens: cumulative document lengths [N + 1] over the flattened tokens, as `cu_seq_lens_q`. Behind a cache a
            row's first segment goes on in the cached document.
        past: tokens in the cache, padding included.

    Raises:
        ValueError: the mask is not two-dimensional: mixers cannot serve arbitrary masks.
    """
    order, lengths = None, None
    decodes, traced = length == 1 and past > 0, _is_traced()
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; a linearized model takes a mask "
                "[batch, tokens] that marks padding."
            )
        real = attention_mask[:, -length:].bool()
        if not decodes if traced else not bool(real.all()):
            order = torch.argsort(~real, dim=1, stable=True)
            lengths = real.sum(1)
    context = SequenceContext(order, lengths)
    starts = None
    if cu_seqlens is not None:
        if not decodes:
            starts = _document_starts(context.pack(_first_tokens(cu_seqlens, batch, length, past)))
    elif position_ids is not None and not (decodes and traced):
        positions = context.pack(position_ids.expand(batch, length))
        step = positions.diff(dim=1)
        goes_on = step == 1 if order is None else (step == 1) | (step == order.diff(dim=1))
        begins = positions[:, :1] == 0 if past else torch.zeros_like(positions[:, :1], dtype=torch.bool)
        first = torch.cat([begins, ~goes_on], 1)
        if lengths is not None:
            first &= torch.arange(length, device=first.device) < lengths[:, None]
        if traced or bool(first.any()):
            starts = _document_starts(first)
    return SequenceContext(order, lengths, starts)


def default_positions(
    batch: int, length: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None, past: int = 0
) -> Tensor | None:
    """Return position_ids [B, T] where a caller gives none: padding does not count, and a document begins at 0.

    Arguments are those of `sequence_context`. None means the row's own order, which is the decoder's default.
    """
    if cu_seqlens is not None:
        places = torch.arange(length, device=cu_seqlens.device)
        starts = _document_starts(_first_tokens(cu_seqlens, batch, length, past))
        return places - torch.where(starts < 0, -past, starts)
    if attention_mask is not None and attention_mask.shape[-1] == past + length:
        return (attention_mask.bool().cumsum(1)[:, past:] - 1).clamp(min=0)
    return None


def _first_tokens(cu_seqlens: Tensor, batch: int, length: int, past: int) -> Tensor:
    """[B, T]: where a document begins, from cumulative lengths [N + 1] over the flattened tokens."""
    first = torch.zeros(batch * length, dtype=torch.bool, device=cu_seqlens.device)
    first = first.index_fill(0, cu_seqlens[:-1].long().clamp(max=batch * length - 1), True).view(batch, length)
    if past:
        first[:, 0] = False
    return first


def _is_traced() -> bool:
    """Whether a compiler or a CUDA graph records this call, so that no tensor's value may be read."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _document_starts(first: Tensor) -> Tensor:
    """[B, T] marks of first tokens -> index of the latest mark, -1 before any."""
    places = torch.arange(first.shape[1], device=first.device)
    return torch.where(first, places, -1).cummax(1).values


def visible_mask(context: SequenceContext, batch: int, length: int, causal: bool, device: torch.device) -> Tensor:
    """Return which tokens a softmax layer lets see which, [B, 1, T, T] bool: tokens of their own document, no padding.

    Args:
        context: of a call without a cache.
        batch: B.
        length: T.
        causal: tokens see no later ones.
        device: of the result.
    """
    place = torch.arange(length, device=device)
    first = place.new_zeros(batch, length) if context.starts is None else context.starts.clamp(min=0)
    mask = first[:, :, None] == first[:, None, :]
    if causal:
        mask = mask & (place[None, :] <= place[:, None])
    if context.order is None or context.lengths is None:
        return mask[:, None]
    real = place < context.lengths[:, None]
    mask = mask & (real[:, None, :] | (place[None, :] == place[:, None]))  # padding sees itself: no row is empty
    back = context.order.argsort(1)
    mask = mask.gather(1, back[:, :, None].expand_as(mask)).gather(2, back[:, None, :].expand_as(mask))
    return mask[:, None]
