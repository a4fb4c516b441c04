"""Attention with separate q, k, v and o projections: Llama, Mistral, Qwen2, Qwen3, Granite, SmolLM3 and their like.

Optional parts are found on the module: biases, per-head norms on q and k, a head dim unlike hidden / heads, any rotary
scaling, a sliding window, layers without rotary embedding. Mixtures of experts keep their experts as they are.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, ClassVar

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
    """How to find, read and write attention modules that have `q_proj`, `k_proj`, `v_proj` and `o_proj`.

    Attributes:
        layers: where the decoder keeps its layers.
        attention: the attention module's name in a layer.
        projections: what each of the four projections is called in the attention module. Names that are given twice
            are one fused projection.
        feed_forward: what `gate_proj`, `up_proj` and `down_proj` are called in a layer, likewise; None is what the
            family does not have.
        passes_context: the decoder hands unknown arguments on to its attention modules.
        causal: tokens see no later ones.
        isolates_documents: the teacher's softmax keeps packed documents apart by their `position_ids`.
    """

    layers = "layers"
    attention = "self_attn"
    projections = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    feed_forward: ClassVar[dict[str, str | None]] = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    passes_context = True
    causal = True
    isolates_documents = True

    @staticmethod
    def check(config: Any) -> None:
        """Raise LinearizeError where a model of the family has something that cannot be converted; nothing here."""

    @classmethod
    def module(cls, decoder: Any, index: int) -> nn.Module:
        """Return the attention module of a layer."""
        found: nn.Module = getattr(decoder.get_submodule(cls.layers)[index], cls.attention)
        return found

    @staticmethod
    def layer_output(hidden: Tensor) -> Any:
        """Return hidden states [B, T, hidden] as a layer of the teacher's decoder returns them."""
        return hidden

    @classmethod
    def replace(cls, decoder: Any, index: int, module: nn.Module) -> None:
        """Put another attention module into a layer."""
        setattr(decoder.get_submodule(cls.layers)[index], cls.attention, module)

    @staticmethod
    def convertible(config: Any) -> list[int]:
        """Return the layers that a recipe converts where it names none."""
        return list(range(config.num_hidden_layers))

    @staticmethod
    def heads(attention: nn.Module | None, config: Any) -> tuple[int, int, int]:
        """Return (H, G, D) of a teacher's attention modules; the configuration alone tells them."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads, config.num_key_value_heads, int(head_dim)

    @staticmethod
    def first_position(config: Any) -> int:
        """Return the position of a document's first token."""
        return 0

    @classmethod
    def cached_heads(cls, config: Any) -> int:
        """Return how many heads the teacher's own cache holds: G."""
        return cls.heads(None, config)[1]

    @staticmethod
    def scaling(attention: nn.Module, config: Any) -> float:
        """Return the teacher's factor on attention scores."""
        return float(attention.scaling)  # type: ignore[arg-type]

    @staticmethod
    def softcap(attention: nn.Module) -> float | None:
        """Return the teacher's cap on attention scores, c * tanh(score / c), or None."""
        return None

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

    @classmethod
    def output(cls, module: Any, o: Tensor) -> Tensor:
        """Project o [B, T, H, D] to [B, T, hidden]."""
        result: Tensor = module.get_submodule(cls.projections["o_proj"])(o.flatten(-2))
        return result

    @staticmethod
    def finish(module: Any, out: Tensor, x: Tensor) -> Tensor:
        """Return what the teacher's module makes of the projected output and its input x, both [B, T, hidden]."""
        return out

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
        queries = query_order(order, heads)
        for projection, chosen in (
            (module.q_proj, queries),
            (module.k_proj, order),
            (module.v_proj, order),
        ):
            reorder((projection.weight, projection.bias), chosen, head_dim)
        reorder([module.o_proj.weight], queries, head_dim, dim=1)


def query_order(order: list[int], heads: int) -> list[int]:
    """Return the order of H query heads that follows from an order of KV heads."""
    repeat = heads // len(order)
    return [g * repeat + r for g in order for r in range(repeat)]


def reorder(tensors: Iterable[Tensor | None], order: list[int], size: int, dim: int = 0) -> None:
    """Reorder the blocks of `size` entries along an axis of some parameters, in place; None is left out."""
    for tensor in tensors:
        if tensor is not None:
            blocks = tensor.unflatten(dim, (-1, size))
            tensor.copy_(blocks.index_select(dim, torch.tensor(order, device=tensor.device)).flatten(dim, dim + 1))
