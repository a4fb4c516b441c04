"""Convert pretrained Transformers into gated-linear and hybrid models.

Importing this package imports neither torch nor transformers: every public name is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from linearize.errors import LinearizeError, UnknownNameError

if TYPE_CHECKING:
    from linearize.api import Result, linearize, load, plan
    from linearize.planning import Plan
    from linearize.recipe import (
        Data,
        Finetune,
        Lora,
        Mixer,
        Optimizer,
        Part,
        Quick,
        Recipe,
        Transfer,
        Window,
    )
    from linearize.registry import register_combine, register_feature_map, register_gate, register_memory

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("Result", "linearize", "load", "plan"), "linearize.api"),
    "Plan": "linearize.planning",
    **dict.fromkeys(
        ("Data", "Finetune", "Lora", "Mixer", "Optimizer", "Part", "Quick", "Recipe", "Transfer", "Window"),
        "linearize.recipe",
    ),
    **dict.fromkeys(
        ("register_combine", "register_feature_map", "register_gate", "register_memory"), "linearize.registry"
    ),
}

__all__ = [
    "Data",
    "Finetune",
    "LinearizeError",
    "Lora",
    "Mixer",
    "Optimizer",
    "Part",
    "Plan",
    "Quick",
    "Recipe",
    "Result",
    "Transfer",
    "UnknownNameError",
    "Window",
    "__version__",
    "linearize",
    "load",
    "plan",
    "register_combine",
    "register_feature_map",
    "register_gate",
    "register_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
