"""Norms of gradients: clipped group by group, and told apart by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from linearize.processes import ALONE, Processes

LAYER = re.compile(r"(?:^|\.)(\d+)\.")
REST = "rest"


def layer_of(name: str) -> str:
    """Return the layer's index in a parameter's name (`model.layers.3.mlp.up_proj.weight`: 3), or `rest`."""
    found = LAYER.search(name)
    return found[1] if found else REST


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters in up to two lists: whole ones and sharded ones, which no operation takes together."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]


def squares(gradients: list[Tensor], processes: Processes = ALONE) -> Tensor:
    """Return the squared norm of each gradient in fp64; of a sharded one, of the whole."""
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    found = torch.stack(torch._foreach_norm(local)).double().square()
    sharded = [place for place, gradient in enumerate(gradients) if isinstance(gradient, DTensor)]
    if sharded:
        found[sharded] = processes.sum(found[sharded])
    return found


def layer_norms(trained: dict[str, nn.Parameter], processes: Processes = ALONE) -> dict[str, float]:
    """Return the norm of each layer's gradients before clipping, and that of what is in no layer.

    All in one go: four digits each, one host sync.

    Args:
        trained: parameters by name; those without a gradient are left out.
        processes: that share the work.
    """
    grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
    if not grads:
        return {}
    places: dict[str, int] = {}
    index = [places.setdefault(layer_of(name), len(places)) for name in grads]
    each = squares(list(grads.values()), processes)
    sums = each.new_zeros(len(places)).index_add_(0, torch.tensor(index, device=each.device), each)
    return {layer: float(f"{norm:.4g}") for layer, norm in zip(places, sums.sqrt().tolist(), strict=True)}


def clip(groups: list[list[nn.Parameter]], limit: float | None, processes: Processes = ALONE) -> float:
    """Clip each group to `limit` and return the largest norm before it."""
    norms = []
    for group in groups:
        used = [parameter for parameter in group if parameter.grad is not None]
        if not used:
            continue
        norm = squares([p.grad for p in used if p.grad is not None], processes).sum().sqrt().float()
        if limit is not None:
            for kind in alike(used):
                nn.utils.clip_grads_with_norm_(kind, limit, norm)
        norms.append(norm)
    return float(torch.stack(norms).max()) if norms else 0.0
