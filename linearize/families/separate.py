"""Attention with separate q, k, v and o projections: Llama, Mistral, Qwen2, Qwen3, Granite, SmolLM3 and their like.

Optional parts are found on the module: biases, per-head norms on q and k, a head dim unlike hidden / heads, any rotary
scaling, a sliding window, layers without rotary embedding. Mixtures of experts keep their experts as they are.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from linearize.registry import families


@families.register("llama")
@families.register("mistral")
@families.register("qwen2")
@families.register("qwen3")
@families.register("granite")
@families.register("smollm3")
@families.register("mixtral")
@families.register("qwen3_moe")
class SeparateProjections:
    """How to read and write attention modules that have `q_proj`, `k_proj`, `v_proj` and `o_proj`."""

    @staticmethod
    def heads(attention: nn.Module, config: Any) -> tuple[int, int, int]:
        """Return (H, G, D) of a teacher's attention module."""
        head_dim = int(attention.head_dim)  # type: ignore[arg-type]
        return config.num_attention_heads, config.num_key_value_heads, head_dim

    @staticmethod
    def max_window(attention: nn.Module, config: Any) -> int | None:
        """Return the teacher's own sliding window on this layer, in tokens, or None."""
        if hasattr(attention, "sliding_window"):
            window: int | None = attention.sliding_window  # type: ignore[assignment]
            return window
        if not hasattr(type(config), "sliding_window"):  # a stray entry that this family's attention does not read
            return None
        return getattr(config, "sliding_window", None)

    @staticmethod
    def project(module: Any, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, T, hidden] to q [B, T, H, D], k and v [B, T, G, D], before the rotary embedding."""
        q, k, v = (p(x).unflatten(-1, (-1, head_dim)) for p in (module.q_proj, module.k_proj, module.v_proj))
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        return q, k, v

    @staticmethod
    def rotates(attention: nn.Module) -> bool:
        """Return whether the teacher rotates queries and keys on this layer (SmolLM3 leaves every fourth alone)."""
        return bool(getattr(attention, "use_rope", True))

    @staticmethod
    def rotate(teacher_class: type, q: Tensor, k: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Apply the teacher's own rotary embedding to q and k [B, T, heads, D]."""
        apply = sys.modules[teacher_class.__module__].apply_rotary_pos_emb
        q, k = apply(q, k, *positions, unsqueeze_dim=2)
        return q, k

    @staticmethod
    def output(module: Any, o: Tensor) -> Tensor:
        """Project o [B, T, H, D] to [B, T, hidden]."""
        result: Tensor = module.o_proj(o.flatten(-2))
        return result

    @staticmethod
    @torch.no_grad()
    def permute(module: Any, order: list[int], heads: int, head_dim: int) -> None:
        """Reorder KV heads, and their query heads with them, in place.

        Args:
            module: holds the projections.
            order: new place -> KV head now there.
            heads: H.
            head_dim: D.
        """
        repeat = heads // len(order)
        queries = [g * repeat + r for g in order for r in range(repeat)]
        for projection, chosen in (
            (module.q_proj, queries),
            (module.k_proj, order),
            (module.v_proj, order),
        ):
            for tensor in (projection.weight, projection.bias):
                if tensor is not None:
                    tensor.copy_(tensor.unflatten(0, (-1, head_dim))[chosen].flatten(0, 1))
        weight = module.o_proj.weight
        weight.copy_(weight.unflatten(1, (-1, head_dim))[:, queries].flatten(1, 2))
