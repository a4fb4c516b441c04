"""OLMo-2: separate projections whose norms on q and k span all heads at once.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.families.separate import SeparateProjections, query_order, reorder
from linearize.registry import families


@families.register("olmo2")
class WideNormProjections(SeparateProjections):
    """As `SeparateProjections`, with `q_norm` and `k_norm` on [B, T, heads * D]."""

    @staticmethod
    def project(module: Any, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, T, hidden] to q [B, T, H, D], k and v [B, T, G, D], before the rotary embedding."""
        wide = module.q_norm(module.q_proj(x)), module.k_norm(module.k_proj(x)), module.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in wide)
        return q, k, v

    @staticmethod
    @torch.no_grad()
    def permute(module: Any, order: list[int], heads: int, head_dim: int) -> None:
        """Reorder KV heads, and their query heads and norms with them, in place; arguments as in the base class."""
        SeparateProjections.permute(module, order, heads, head_dim)
        for norm, chosen in ((module.q_norm, query_order(order, heads)), (module.k_norm, order)):
            reorder([norm.weight], chosen, head_dim)
