"""The short convolution: each channel of what the memory reads mixes its last few tokens.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim, C channels ((H + 2 G) D for q, k and v), K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.mixers.context import SequenceContext
from linearize.mixers.parts import Fp32Part, uniform


class ShortConvolution(Fp32Part):
    """A causal depthwise convolution in fp32, `y_t = f(sum_i w_i x_{t-i} + b)` over i < K.

    From H3 and Mamba (arXiv:2312.00752) to Gated DeltaNet (arXiv:2412.06464).

    Args:
        heads: how many heads each input has.
        head_dim: D.
        taps: K.
        silu: f is SiLU, as in Mamba; else nothing.
        identity: start at w_0 = 1, the other taps and b at 0. Mamba's start is that of `nn.Conv1d`, uniform in
            +-1/sqrt(K).
    """

    def __init__(
        self, heads: tuple[int, ...], head_dim: int, taps: int, *, silu: bool = False, identity: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.taps = taps
        self.silu = silu
        channels = sum(heads) * head_dim
        if identity:
            weight, bias = torch.zeros(channels, taps, dtype=torch.float32), torch.zeros(channels, dtype=torch.float32)
            weight[:, 0] = 1
        else:
            reach = taps**-0.5
            weight, bias = uniform(-reach, reach, channels, taps), uniform(-reach, reach, channels)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def empty(self, batch: int, like: Tensor) -> Tensor:
        """Return the past of a new document, zeros [B, K - 1, C]."""
        return like.new_zeros(batch, self.taps - 1, self.weight.shape[0])

    def forward(self, inputs: tuple[Tensor, ...], context: SequenceContext, past: Tensor | None) -> list[Tensor]:
        """Convolve packed tokens.

        Args:
            inputs: q [B, T, H, D], k and v [B, T, G, D], or some of them, packed.
            context: lengths and documents.
            past: the K - 1 inputs before these [B, K - 1, C], zeros where the document has fewer; None is all zeros.

        Returns:
            The outputs, shaped like the inputs, and then the past of what follows.
        """
        x = torch.cat([t.flatten(2) for t in inputs], 2)
        batch, length, _ = x.shape
        before = self.taps - 1
        joined = torch.cat([self.empty(batch, x) if past is None else past.to(x.dtype), x], 1)
        place = torch.arange(length, device=x.device)
        out = self.bias.expand(batch, length, -1)
        for back in range(self.taps):
            earlier = joined[:, before - back : before - back + length]
            if context.starts is not None:
                seen = (context.starts < 0) | (place - back >= context.starts)
                earlier = earlier * seen[..., None].to(x.dtype)
            out = out + self.weight[:, back] * earlier.float()
        lengths = torch.full((batch,), length, device=x.device) if context.lengths is None else context.lengths
        index = lengths[:, None] + torch.arange(before, device=x.device)  # in `joined`; the call begins at K - 1
        recent = joined.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        if context.starts is not None:
            start = context.starts.gather(1, (lengths - 1).clamp(min=0)[:, None])
            seen = (start < 0) | (lengths == 0)[:, None] | (index - before >= start)
            recent = recent * seen[..., None].to(x.dtype)
        return [*self._split(out, x.dtype), recent]

    def step(self, inputs: tuple[Tensor, ...], past: Tensor) -> list[Tensor]:
        """Convolve one token [B, heads, D]; `past` is updated in place."""
        x = torch.cat([t.flatten(1) for t in inputs], 1)
        joined = torch.cat([past, x[:, None].to(past.dtype)], 1)
        out = (joined.float() * self.weight.T.flip(0)).sum(1) + self.bias
        past.copy_(joined[:, 1:])
        return self._split(out, x.dtype)

    def _split(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        x = F.silu(x) if self.silu else x
        parts = x.to(dtype).split([n * self.head_dim for n in self.heads], -1)
        return [t.unflatten(-1, (-1, self.head_dim)) for t in parts]
