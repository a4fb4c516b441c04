"""LoRA adapters through peft: put in, and merged out again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize.errors import LinearizeError, UnknownNameError
from linearize.modeling.classes import family_of
from linearize.recipe_stages import Lora


def lora_targets(model: Any, targets: list[str]) -> list[str]:
    """Return a recipe's LoRA targets by the names that they have in a model.

    A recipe names attention's projections `q_proj`, `k_proj`, `v_proj` and `o_proj`, and the feed-forward part's
    `gate_proj`, `up_proj` and `down_proj`; where a family calls them otherwise, they are found through it, and of the
    latter those that a model has not, such as a gate in GPT-2 or what experts hold, are left out. Any other name is a
    linear module's own.

    Args:
        model: a teacher or a converted model of a known family.
        targets: names in the recipe.

    Returns:
        Names, or last parts of names, of linear modules.

    Raises:
        LinearizeError: a target names one of several projections that the model has in one piece.
        UnknownNameError: a target matches no linear module.
    """
    family = family_of(model.config)
    linear = _linear_names(model)
    wanted = {target: _resolve(family, target, targets, linear, family.attention) for target in targets}
    present = {target: name for target, name in wanted.items() if not _lacks(model, family, name, linear)}
    for target, name in (present or wanted).items():
        if not any(_matches(known, name) for known in linear):
            raise UnknownNameError(
                "LoRA target", target, {known.rpartition(".")[2] for known in linear}, "lora.targets"
            )
    return list(dict.fromkeys(present.values()))


def attention_targets(family: Any, targets: list[str]) -> list[str]:
    """Return the names of projections inside a family's attention module.

    Args:
        family: how the model is read.
        targets: of `q_proj`, `k_proj`, `v_proj` and `o_proj`.

    Raises:
        LinearizeError: as for `lora_targets`.
    """
    return list(dict.fromkeys(_resolve(family, target, targets, set()) for target in targets))


def _resolve(family: Any, target: str, targets: list[str], linear: set[str], parent: str = "") -> str:
    """One target's name in the model; a name that the model has itself is taken as it is."""
    own = family.feed_forward if target in family.feed_forward else family.projections
    name = own.get(target)
    if name is None or name == target or any(_matches(known, target) for known in linear):
        return target
    absent = [other for other, fused in own.items() if fused == name and other not in targets]
    if absent:
        raise LinearizeError(
            f"The LoRA target {target!r} without {' and '.join(map(repr, absent))} does not fit this model, which has "
            f"them fused in one projection, {name}; name all of them, or {name!r}."
        )
    return f"{parent}.{name}" if parent and own is family.projections else str(name)


def _lacks(model: Any, family: Any, name: str, linear: set[str]) -> bool:
    """Whether a model has no such projection, for a reason: its family has none, or experts stand in the place."""
    if name not in family.feed_forward or any(_matches(known, name) for known in linear):
        return False
    experts = any(module.endswith(".experts") for module, _ in model.named_modules())
    return experts or family.feed_forward[name] is None


def _linear_names(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def add_lora(module: nn.Module, lora: Lora, targets: list[str]) -> None:
    """Wrap the target projections of `module` in LoRA adapters, in place; only the adapters can train.

    Args:
        module: a model, or one attention module.
        lora: rank and scale.
        targets: names, or last parts of names, of linear modules in it.
    """
    transposed = any(isinstance(child, Conv1D) for child in module.modules())
    config = LoraConfig(r=lora.r, lora_alpha=int(lora.alpha), lora_dropout=lora.dropout, target_modules=set(targets))
    config.fan_in_fan_out = transposed
    if lora.alpha != int(lora.alpha):
        config.lora_alpha = lora.alpha
    inject_adapter_in_model(config, module)


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name."""
    return {name: p for name, p in module.named_parameters() if "lora_" in name}


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Replace every adapted projection by a plain one that carries the sum.

    The projection that the adapter wrapped is left as it is, because the teacher may still use it.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, LoraLayer):
                continue
            plain: Any = copy.deepcopy(child.get_base_layer())
            for adapter in child.active_adapters:
                delta = child.get_delta_weight(adapter)
                plain.weight.copy_(plain.weight.float() + delta.float())
            setattr(parent, name, plain)
    if hasattr(module, "peft_config"):  # peft would warn the next stage of a second adapter
        del module.peft_config
