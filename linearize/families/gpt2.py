"""GPT-2: q, k and v in one transposed projection (Conv1D), learned positions, no rotary embedding.

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


@families.register("gpt2")
class Conv1dProjections(InterleavedProjections):
    """As many KV heads as query heads; `c_attn` [hidden, q then k then v] and `c_proj` are stored transposed."""

    layers = "h"
    attention = "attn"
    projections = {**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "c_attn"), "o_proj": "c_proj"}
    feed_forward: ClassVar[dict[str, str | None]] = {
        "gate_proj": None,
        "up_proj": "mlp.c_fc",
        "down_proj": "mlp.c_proj",
    }

    @staticmethod
    def check(config: Any) -> None:
        """Refuse decoders that attend to an encoder.

        Raises:
            LinearizeError: the model has cross attention.
        """
        if config.add_cross_attention:
            raise LinearizeError(
                "This GPT-2 model has cross attention (`add_cross_attention: true`), which cannot be linearized; use a "
                "decoder without it."
            )

    @staticmethod
    def scaling(attention: nn.Module, config: Any) -> float:
        """Return the teacher's factor on attention scores, which some models divide by the layer's number."""
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5 if config.scale_attn_weights else 1.0
        layer: Any = attention.layer_idx
        return float(scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale)

    @staticmethod
    def project(module: Any, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, T, hidden] to q, k and v [B, T, H, D]."""
        q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in module.c_attn(x).chunk(3, -1))
        return q, k, v

    @staticmethod
    def rotates(attention: nn.Module) -> bool:
        """Return False: positions are learned embeddings."""
        return False

    @staticmethod
    def finish(module: Any, out: Tensor, x: Tensor) -> Tensor:
        """Apply the teacher's dropout to the projected output."""
        result: Tensor = module.resid_dropout(out)
        return result

    @staticmethod
    @torch.no_grad()
    def permute(module: Any, order: list[int], heads: int, head_dim: int) -> None:
        """Reorder heads in place; arguments as in the base class."""
        columns = [part * heads + head for part in range(3) for head in order]
        reorder([module.c_attn.weight], columns, head_dim, dim=1)
        reorder([module.c_attn.bias], columns, head_dim)
        reorder([module.c_proj.weight], order, head_dim)
