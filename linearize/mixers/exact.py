"""Exact heads: full softmax attention with a growing cache, for the KV heads that a recipe keeps.

Legend: B batch, T tokens of this call, P cached places, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.kernels.microscaling import as_stored, numbers
from linearize.kernels.window import cap_scores
from linearize.mixers.context import SequenceContext, visible_mask

Tensors = dict[str, Tensor]


class ExactAttention(nn.Module):
    """Softmax attention through PyTorch's SDPA, causal unless an encoder's.

    Its cache holds the keys and values of the current document, token t in place t: `exact_k` and `exact_v`
    [B, P, G, D], and how many places are filled, `exact_length` [B]. P grows with every call, or is `capacity`.

    Args:
        scaling: the teacher's factor on attention scores.
        max_window: the teacher's own sliding window, if it has one.
        softcap: the teacher's cap on attention scores, if it has one: scores then exist as [B, H, T, P].
        causal: tokens see no later ones; without it there is no cache, window or cap.
        microscaled: keys and values come rounded to MXINT8, and the cache holds their bytes.
    """

    def __init__(
        self,
        scaling: float,
        max_window: int | None = None,
        softcap: float | None = None,
        causal: bool = True,
        microscaled: bool = False,
    ) -> None:
        super().__init__()
        self.microscaled = microscaled
        self.causal = causal
        self.softcap = softcap
        self.scaling = scaling
        self.max_window = max_window

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: SequenceContext,
        cache: Tensors | None = None,
        capacity: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: rotated queries [B, T, H, D].
            k: rotated keys [B, T, G, D].
            v: values [B, T, G, D].
            context: padding and documents of this call.
            cache: this layer's cached tensors, brought up to date in place; an empty dict on the first call.
            capacity: places of a static cache, or None for a growing one.

        Returns:
            [B, T, H, D], 0 on padding (an encoder's padding sees itself).
        """
        if not self.causal:
            mask = None if context.is_plain else visible_mask(context, q.shape[0], q.shape[1], False, q.device)
            return self._attend(q, k, v, mask)
        if cache is None:
            q, k, v = (context.pack(t) for t in (q, k, v))
            return context.unpack(self._attend(q, k, v, self._new_mask(q, context)))
        fresh = "exact_length" not in cache
        if fresh:
            cache["exact_length"] = torch.zeros(q.shape[0], dtype=torch.long, device=q.device)
            for name, t in (("exact_k", k), ("exact_v", v)):
                cache[name] = as_stored(t.new_zeros(t.shape[0], capacity or 0, *t.shape[2:]), self.microscaled)
        if q.shape[1] == 1 and context.is_plain and not fresh:
            return self._step(q, k, v, cache, capacity)
        q, k, v = (context.pack(t) for t in (q, k, v))
        mask = self._new_mask(q, context)
        if fresh:
            out = self._attend(q, k, v, mask)
        else:
            past = [numbers(cache[name], v.dtype) for name in ("exact_k", "exact_v")]
            keys, values = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
            out = self._attend(q, keys, values, self._with_past(mask, q, context, cache))
        self._remember(k, v, context, cache, capacity)
        return context.unpack(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """SDPA on [B, T, heads, D]; no mask means causal, or in an encoder all tokens."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.softcap is not None:
            return self._capped(q, k, v, mask).transpose(1, 2)
        grouped = q.shape[1] != k.shape[1]
        if grouped and mask is not None and q.shape[2] == 1:
            # Few of SDPA's kernels take a mask beside grouped heads; a group's heads are queries of one head here.
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=self.scaling)
            return out.reshape(q.shape[0], 1, q.shape[1], q.shape[3])
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and self.causal, scale=self.scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Capped attention on [B, heads, T, D], the softmax in fp32 as the teacher's own is; SDPA has no cap."""
        queries = q.unflatten(1, (k.shape[1], -1))
        scores = cap_scores(queries @ k[:, :, None].transpose(-1, -2) * self.scaling, self.softcap)
        seen = self._causal(q.shape[2], q.device, None) if mask is None else mask
        weights = scores.float().masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num()
        return (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2)

    def _new_mask(self, q: Tensor, context: SequenceContext) -> Tensor | None:
        """Which tokens of this call see which: [B or 1, 1, T, T], or None where plain causal serves."""
        length = q.shape[1]
        limited = self.max_window is not None and self.max_window < length
        if context.starts is None and not limited:
            return None
        return self._causal(length, q.device, context.starts)

    def _causal(self, length: int, device: torch.device, starts: Tensor | None) -> Tensor:
        i, j = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None]
        mask = (j <= i) & (i - j < (self.max_window or length))
        return mask[None, None] if starts is None else mask & (j >= starts[:, None, :, None])

    def _with_past(self, mask: Tensor | None, q: Tensor, context: SequenceContext, cache: Tensors) -> Tensor:
        """The mask over cached places and this call's tokens, [B, 1, T, P + T]."""
        length, past = q.shape[1], cache["exact_length"][:, None, None, None]
        place = torch.arange(cache["exact_k"].shape[1], device=q.device)
        old = (place < past).expand(-1, 1, length, -1)
        if context.starts is not None:
            old = old & (context.starts < 0)[:, None, :, None]
        if self.max_window is not None:
            token = past + torch.arange(length, device=q.device)[:, None]
            old = old & (token - place < self.max_window)
        new = self._causal(length, q.device, context.starts) if mask is None else mask
        return torch.cat([old, new.expand(q.shape[0], -1, -1, -1)], -1)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensors, capacity: int | None) -> Tensor:
        length = cache["exact_length"]
        self._grow(cache, 1, capacity)
        rows = torch.arange(length.shape[0], device=q.device)
        cache["exact_k"].index_put_((rows, length), as_stored(k[:, 0], self.microscaled))
        cache["exact_v"].index_put_((rows, length), as_stored(v[:, 0], self.microscaled))
        place = torch.arange(cache["exact_k"].shape[1], device=q.device)
        visible = place <= length[:, None]
        if self.max_window is not None:
            visible &= length[:, None] - place < self.max_window
        keys, values = (numbers(cache[name], v.dtype) for name in ("exact_k", "exact_v"))
        out = self._attend(q, keys, values, visible[:, None, None])
        length.add_(1)
        return out

    @staticmethod
    def _grow(cache: Tensors, places: int, capacity: int | None) -> None:
        if capacity is None:
            for name in ("exact_k", "exact_v"):
                cache[name] = F.pad(cache[name], (0, 0, 0, 0, 0, places))

    def _remember(self, k: Tensor, v: Tensor, context: SequenceContext, cache: Tensors, capacity: int | None) -> None:
        """Write this call's tokens of the row's current document behind the cached ones."""
        batch, length = k.shape[:2]
        self._grow(cache, length, capacity)
        before = cache["exact_length"].clone()
        lengths = torch.full_like(before, length) if context.lengths is None else context.lengths
        if context.starts is not None:
            last = context.starts.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
            before = torch.where((last < 0) | (lengths == 0), before, -last)
        place = torch.arange(cache["exact_k"].shape[1], device=k.device)
        index = place - before[:, None]
        fits = ((index >= 0) & (index < lengths[:, None]))[..., None, None]
        rows = torch.arange(batch, device=k.device)[:, None]
        for name, tensor in (("exact_k", k), ("exact_v", v)):
            moved = as_stored(tensor, self.microscaled)[rows, index.clamp(0, length - 1)]
            cache[name].copy_(torch.where(fits, moved, cache[name]))
        cache["exact_length"].copy_(before + lengths)
