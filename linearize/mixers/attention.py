"""The module that stands where the teacher's attention stood.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim, E exact KV heads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from linearize.kernels.microscaling import microscaled
from linearize.mixers.context import SequenceContext
from linearize.mixers.exact import ExactAttention
from linearize.mixers.mixer import TokenMixer
from linearize.mixers.parts import HeadShape


def sharing(module: nn.Module) -> nn.Module:
    """Return a module that shares another's leaves, so that one's projection can be replaced and not the other's."""
    if not any(True for _ in module.children()):
        return module
    twin = copy.copy(module)
    twin._modules = {name: None if child is None else sharing(child) for name, child in module._modules.items()}
    return twin


class LinearizedAttention(nn.Module):
    """A layer's KV heads, partitioned: the first E keep exact softmax, the others share one token mixer.

    The teacher's projections become children under their own names, so that checkpoints and LoRA targets keep theirs;
    modules that hold them, as in BERT, are this module's own.

    Args:
        teacher: the attention module to replace.
        family: how to read it.
        config: the teacher's configuration.
        layer: index of the layer.
        spec: the recipe's `mixer`, as plain data.
        exact: E.
    """

    def __init__(
        self, teacher: nn.Module, family: Any, config: Any, layer: int, spec: dict[str, Any], exact: int
    ) -> None:
        super().__init__()
        for name, child in teacher.named_children():
            self.add_module(name, sharing(child))
        self.family = family
        self.teacher_class = type(teacher)
        self.layer_idx = layer
        self.rotates = family.rotates(teacher)
        heads, groups, self.head_dim = family.heads(teacher, config)
        self.repeat = heads // groups
        self.exact_groups = exact
        self.context: SequenceContext | None = None
        self.microscaled = spec.get("cache_dtype", "model") == "mxint8"
        scaling, window = family.scaling(teacher, config), family.max_window(teacher, config)
        softcap = family.softcap(teacher)
        self.exact = ExactAttention(scaling, window, softcap, family.causal, self.microscaled) if exact else None
        self.mixer: TokenMixer | None = None
        if exact < groups:
            rest = groups - exact
            shape = HeadShape(
                rest * self.repeat, rest, self.head_dim, config.hidden_size, layer, config.num_hidden_layers
            )
            self.mixer = TokenMixer(shape, spec, scaling, window, softcap, family.causal)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        sequence_context: SequenceContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens, with the signature of the teacher's attention.

        Args:
            hidden_states: [B, T, hidden].
            *args: attention masks, not read; padding and documents come in `sequence_context`.
            position_embeddings: cos and sin from the teacher's rotary module, if it has one.
            past_key_values: a `LinearizedCache`, or None.
            layer_past: the same, as older decoders call it.
            sequence_context: padding and documents; by default what the attribute `context` holds, set where a decoder
                does not hand on what it does not know, else none of either.
            **kwargs: what the teacher's decoder passes besides; not read.

        Returns:
            [B, T, hidden], and None in the place of attention weights.
        """
        cache = layer_past if past_key_values is None else past_key_values
        layer = None if cache is None else cache.layers[self.layer_idx]
        context = sequence_context or self.context or SequenceContext()
        heads = self.heads(hidden_states, position_embeddings, context, layer)
        out: Tensor = self.family.finish(self, self.family.output(self, heads), hidden_states)
        return out, None

    def heads(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        context: SequenceContext,
        layer: Any = None,
    ) -> Tensor:
        """Return the heads' outputs before the output projection, [B, T, H, D]."""
        q, k, q_rotated, k_rotated, v = self.projected(self, x, position_embeddings)
        q_rotated, k_rotated = q_rotated.to(v.dtype), k_rotated.to(v.dtype)  # under autocast the rotary tables are fp32
        if self.microscaled:
            k_rotated, v = microscaled(k_rotated), microscaled(v)
        cache = None if layer is None else layer.tensors
        if layer is not None:
            layer.advance(x.shape[1])
        exact: Tensor | None = None
        e, eh = self.exact_groups, self.exact_groups * self.repeat
        if self.exact is not None:
            places = None if layer is None else layer.max_length
            exact = self.exact(q_rotated[:, :, :eh], k_rotated[:, :, :e], v[:, :, :e], context, cache, places)
        if self.mixer is None:
            assert exact is not None
            return exact
        mixed: Tensor = self.mixer(
            x,
            (q[:, :, eh:], k[:, :, e:]),
            (q_rotated[:, :, eh:], k_rotated[:, :, e:]),
            v[:, :, e:],
            context,
            cache,
            lambda queries, keys: self._rotate(queries, keys, position_embeddings, context),
        )
        return mixed if exact is None else torch.cat([exact, mixed], 2)

    def projected(
        self, attention: nn.Module, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return what an attention, this or its teacher's, makes of its input x [B, T, hidden].

        Returns:
            Queries [B, T, H, D] and keys [B, T, G, D], the same behind the rotary embedding, and values [B, T, G, D].
        """
        q, k, v = self.family.project(attention, x, self.head_dim)
        rotated = self.family.rotate(self.teacher_class, q, k, position_embeddings) if self.rotates else (q, k)
        return q, k, *rotated, v

    def _rotate(
        self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, context: SequenceContext
    ) -> tuple[Tensor, Tensor]:
        """The teacher's rotary embedding on packed queries and keys [B, T, heads, D]."""
        if not self.rotates or position_embeddings is None:
            return q, k
        if context.order is not None:
            cos, sin = (context.pack(t.expand(q.shape[0], -1, -1)) for t in position_embeddings)
            position_embeddings = cos, sin
        rotated = self.family.rotate(self.teacher_class, q, k, position_embeddings)
        return rotated[0].to(q.dtype), rotated[1].to(k.dtype)
