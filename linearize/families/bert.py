"""BERT and RoBERTa: encoders, whose attention holds q, k and v in one child and the output projection in another.

The module that is replaced includes the residual sum and the norm behind the projection.

Legend: B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.families.gpt_neox import InterleavedProjections
from linearize.families.separate import reorder
from linearize.registry import families


@families.register("bert")
class EncoderProjections(InterleavedProjections):
    """As many KV heads as query heads, no rotary embedding, and no order in time."""

    layers = "encoder.layer"
    attention = "attention"
    projections = {
        "q_proj": "self.query",
        "k_proj": "self.key",
        "v_proj": "self.value",
        "o_proj": "output.dense",
    }
    feed_forward: ClassVar[dict[str, str | None]] = {}  # whose second name ends as that of attention's output does
    causal = False
    isolates_documents = False

    @staticmethod
    def check(config: Any) -> None:
        """Refuse encoders that are set up as decoders.

        Raises:
            LinearizeError: the model is a decoder or attends to another one.
        """
        if config.is_decoder or config.add_cross_attention:
            raise LinearizeError(
                f"This {config.model_type} model is set up as a decoder (`is_decoder` or `add_cross_attention`), which "
                "is not served; use it as an encoder, or a family of decoders (`linearize ls families`)."
            )

    @staticmethod
    def scaling(attention: nn.Module, config: Any) -> float:
        """Return the teacher's factor on attention scores."""
        return float((config.hidden_size // config.num_attention_heads) ** -0.5)

    @staticmethod
    def project(module: Any, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, T, hidden] to q, k and v [B, T, H, D]."""
        own = module.self
        q, k, v = (p(x).unflatten(-1, (-1, head_dim)) for p in (own.query, own.key, own.value))
        return q, k, v

    @staticmethod
    def rotates(attention: nn.Module) -> bool:
        """Return False: positions are learned embeddings."""
        return False

    @staticmethod
    def finish(module: Any, out: Tensor, x: Tensor) -> Tensor:
        """Add the input to the projected output and normalize, as the teacher does."""
        result: Tensor = module.output.LayerNorm(module.output.dropout(out) + x)
        return result

    @staticmethod
    @torch.no_grad()
    def permute(module: Any, order: list[int], heads: int, head_dim: int) -> None:
        """Reorder heads in place; arguments as in the base class."""
        own = module.self
        for projection in (own.query, own.key, own.value):
            reorder((projection.weight, projection.bias), order, head_dim)
        reorder([module.output.dense.weight], order, head_dim, dim=1)


@families.register("roberta")
class OffsetProjections(EncoderProjections):
    """As `EncoderProjections`, with positions that are counted from behind the padding token's."""

    @staticmethod
    def first_position(config: Any) -> int:
        """Return the position of a document's first token."""
        return int(config.pad_token_id) + 1
