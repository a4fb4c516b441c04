"""Phi-3 and Phi-4: q, k and v in one projection, and a rotary embedding that may turn a part of each head only.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from linearize.families.separate import SeparateProjections, query_order, reorder
from linearize.registry import families


@families.register("phi3")
class FusedProjections(SeparateProjections):
    """As `SeparateProjections`, with `qkv_proj` whose outputs are those of q, then k, then v."""

    projections = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "o_proj": "o_proj"}
    feed_forward: ClassVar[dict[str, str | None]] = {
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    }

    @staticmethod
    def project(module: Any, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, T, hidden] to q [B, T, H, D], k and v [B, T, G, D], before the rotary embedding."""
        fused = module.qkv_proj(x)
        queries = module.o_proj.in_features
        keys = (fused.shape[-1] - queries) // 2
        q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in fused.split([queries, keys, keys], -1))
        return q, k, v

    @staticmethod
    @torch.no_grad()
    def permute(module: Any, order: list[int], heads: int, head_dim: int) -> None:
        """Reorder KV heads, and their query heads with them, in place; arguments as in the base class."""
        groups, queries = len(order), query_order(order, heads)
        rows = [*queries, *(heads + g for g in order), *(heads + groups + g for g in order)]
        reorder([module.qkv_proj.weight], rows, head_dim)
        reorder([module.o_proj.weight], queries, head_dim, dim=1)
