"""GPT-NeoX (Pythia) and Falcon: q, k and v in one projection, KV head by KV head.

The fused projection's outputs are, for each KV head, its R query heads, its key and its value: GPT-NeoX has R = 1,
Falcon any R (one KV head in its multi-query form). Parallel residuals, partial rotary embeddings and norms are the
layer's or the rotary module's own business.

Legend: B batch, T tokens, H query heads, G KV heads, R = H / G, D head dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.families.separate import SeparateProjections, query_order, reorder
from linearize.registry import families


@families.register("gpt_neox")
class InterleavedProjections(SeparateProjections):
    """As `SeparateProjections`, with `query_key_value` [G, R + 2, D] and `dense`."""

    attention = "attention"
    projections = {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "query_key_value"), "o_proj": "dense"}
    feed_forward: ClassVar[dict[str, str | None]] = {
        "gate_proj": None,
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    }

    @staticmethod
    def heads(attention: nn.Module | None, config: Any) -> tuple[int, int, int]:
        """Return (H, G, D): every query head has a KV head of its own."""
        heads = config.num_attention_heads
        return heads, heads, config.hidden_size // heads

    @staticmethod
    def max_window(attention: nn.Module, config: Any) -> int | None:
        """Return None: there is no sliding window."""
        return None

    @staticmethod
    def project(module: Any, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, T, hidden] to q [B, T, H, D], k and v [B, T, G, D], before the rotary embedding."""
        fused = module.query_key_value(x)
        groups = (fused.shape[-1] - module.dense.in_features) // (2 * head_dim)
        blocks = fused.unflatten(-1, (groups, -1, head_dim))
        return blocks[..., :-2, :].flatten(-3, -2), blocks[..., -2, :], blocks[..., -1, :]

    @staticmethod
    @torch.no_grad()
    def permute(module: Any, order: list[int], heads: int, head_dim: int) -> None:
        """Reorder KV heads, and their query heads with them, in place; arguments as in the base class."""
        fused = module.query_key_value
        reorder((fused.weight, fused.bias), order, (heads // len(order) + 2) * head_dim)
        reorder([module.dense.weight], query_order(order, heads), head_dim, dim=1)


@families.register("falcon")
class FalconProjections(InterleavedProjections):
    """As `InterleavedProjections`, with any number of KV heads."""

    layers = "h"
    attention = "self_attention"
    passes_context = False
    isolates_documents = False

    @staticmethod
    def check(config: Any) -> None:
        """Refuse the variants with ALiBi.

        Raises:
            LinearizeError: the model adds a bias to its attention scores.
        """
        if config.alibi:
            raise LinearizeError(
                "This Falcon model adds ALiBi biases to its attention scores (`alibi: true`), which neither the "
                "window nor exact heads have, so its softmax cannot be reproduced; use a Falcon with rotary "
                "embeddings, such as falcon-7b or falcon-40b."
            )

    @staticmethod
    def heads(attention: nn.Module | None, config: Any) -> tuple[int, int, int]:
        """Return (H, G, D): grouped in the new decoder architecture, else one KV head or as many as query heads."""
        heads = config.num_attention_heads
        grouped = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
        return heads, grouped, config.hidden_size // heads

    @staticmethod
    def layer_output(hidden: Tensor) -> Any:
        """Return hidden states as a layer of the teacher's decoder returns them: first in a tuple."""
        return (hidden,)

    @classmethod
    def cached_heads(cls, config: Any) -> int:
        """Return how many heads the teacher's own cache holds: the grouped form caches keys once per query head."""
        return config.num_attention_heads if config.new_decoder_architecture else cls.heads(None, config)[1]

    @classmethod
    def scaling(cls, attention: nn.Module, config: Any) -> float:
        """Return the teacher's factor on attention scores."""
        return float(cls.heads(None, config)[2] ** -0.5)
