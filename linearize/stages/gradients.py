"""Norms of gradients: clipped group by group, and told apart by layer."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

LAYER = re.compile(r"(?:^|\.)(\d+)\.")
REST = "rest"


def layer_of(name: str) -> str:
    """Return the layer's index in a parameter's name (`model.layers.3.mlp.up_proj.weight`: 3), or `rest`."""
    found = LAYER.search(name)
    return found[1] if found else REST


def layer_norms(trained: dict[str, nn.Parameter]) -> dict[str, float]:
    """Return the norm of each layer's gradients before clipping, and that of what is in no layer.

    All in one go: four digits each, one host sync.

    Args:
        trained: parameters by name; those without a gradient are left out.
    """
    grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
    if not grads:
        return {}
    places: dict[str, int] = {}
    index = [places.setdefault(layer_of(name), len(places)) for name in grads]
    norms: list[Tensor] = list(torch._foreach_norm(list(grads.values())))
    squares = torch.stack([norm.double() for norm in norms]).square()
    sums = squares.new_zeros(len(places)).index_add_(0, torch.tensor(index, device=squares.device), squares)
    return {layer: float(f"{norm:.4g}") for layer, norm in zip(places, sums.sqrt().tolist(), strict=True)}


def clip(groups: list[list[nn.Parameter]], limit: float | None) -> float:
    """Clip each group to `limit` and return the largest norm before it."""
    norms = []
    for group in groups:
        if any(p.grad is not None for p in group):
            norms.append(torch.nn.utils.clip_grad_norm_(group, math.inf if limit is None else limit))
    return float(torch.stack(norms).max()) if norms else 0.0
