"""What every part of a mixer is told about its layer, and the base class that keeps decays and states in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadShape:
    """The attention heads that a mixer replaces.

    Attributes:
        heads: H query heads.
        groups: G KV heads; query head h reads KV head h // (H // G).
        head_dim: width of queries, keys and values.
        hidden: width of the layer's input.
        layer: index of the layer.
        layers: how many layers the model has.
    """

    heads: int
    groups: int
    head_dim: int
    hidden: int
    layer: int = 0
    layers: int = 1


class Fp32Part(nn.Module):
    """A module whose floating-point tensors stay in fp32 through `.to(bfloat16)`, `.half()` and their like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Part:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(device=moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


def fp32_parameter(*shape: int, value: float = 0.0) -> nn.Parameter:
    """Return a constant parameter in fp32, whatever the default dtype is."""
    return nn.Parameter(torch.full(shape, value, dtype=torch.float32))


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Return fp32 numbers drawn evenly from [low, high), whatever the default dtype is."""
    return torch.rand(shape, dtype=torch.float32) * (high - low) + low


def step_bias(shortest: float, longest: float, *shape: int) -> Tensor:
    """Return b in fp32 such that `softplus(b)` is drawn log-evenly (Mamba, arXiv:2312.00752, section 3.6)."""
    steps = uniform(math.log(shortest), math.log(longest), *shape).exp().clamp(min=min(1e-4, longest))
    return steps + torch.log(-torch.expm1(-steps))
