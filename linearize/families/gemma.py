"""Gemma, Gemma 2 and the text models of Gemma 3: separate projections; from Gemma 2 on, local and global layers.

Local layers (a sliding window, in Gemma 3 with rotary frequencies of their own) cost a cache of constant size already:
they stay softmax unless a recipe names them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from linearize.errors import LinearizeError
from linearize.families.separate import SeparateProjections
from linearize.registry import families

families.register("gemma")(SeparateProjections)


@families.register("gemma3_text")
class LocalGlobalProjections(SeparateProjections):
    """As `SeparateProjections`, with the factor `query_pre_attn_scalar` and local layers that stay."""

    @staticmethod
    def check(config: Any) -> None:
        """Refuse encoders.

        Raises:
            LinearizeError: the model attends in both directions.
        """
        if getattr(config, "use_bidirectional_attention", False):
            raise LinearizeError(
                "This Gemma model attends in both directions (`use_bidirectional_attention: true`), with a window on "
                "either side in its local layers, which no mixer reproduces; use a Gemma that generates text."
            )

    @staticmethod
    def convertible(config: Any) -> list[int]:
        """Return the global layers, or all where there is no local one."""
        kinds = config.layer_types
        return [index for index in range(config.num_hidden_layers) if kinds[index] != "sliding_attention"]


@families.register("gemma2")
class CappedProjections(LocalGlobalProjections):
    """As `LocalGlobalProjections`, with capped scores (Gemma 3 has the setting, and its attention does not read it)."""

    @staticmethod
    def softcap(attention: nn.Module) -> float | None:
        """Return the teacher's cap on attention scores, or None."""
        cap: float | None = attention.attn_logit_softcapping  # type: ignore[assignment]
        return cap
