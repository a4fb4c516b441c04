"""LoRA adapters through peft: put in, and merged out again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from linearize.errors import UnknownNameError
from linearize.recipe import Lora


def add_lora(module: nn.Module, lora: Lora) -> None:
    """Wrap the target projections of `module` in LoRA adapters, in place; only the adapters can train.

    Args:
        module: a model, or one attention module.
        lora: rank, scale and target names.

    Raises:
        UnknownNameError: a target matches no linear module.
    """
    linear = {name.rpartition(".")[2] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for target in lora.targets:
        if target not in linear:
            raise UnknownNameError("LoRA target", target, linear, "lora.targets")
    config = LoraConfig(
        r=lora.r, lora_alpha=int(lora.alpha), lora_dropout=lora.dropout, target_modules=set(lora.targets)
    )
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
