'''Convert pretrained Transformers into gated-linear and hybrid models.

Importing this package imports neither torch nor transformers: every public name is loaded at its first use.

A gate of your own in a recipe of your own, as a file that runs (tests/test_example.py runs it):

```python
from torch import Tensor
from torch.nn.functional import logsigmoid

import linearize
from linearize.mixers.parts import Fp32Part, HeadShape, fp32_parameter


@linearize.register_gate("key_length")
class KeyLengthGate(Fp32Part):
    """Forgets more at long keys: one log-decay per KV head and token."""

    def __init__(self, shape: HeadShape, *, bias: float = 6.0) -> None:
        super().__init__()
        self.bias = fp32_parameter(shape.groups, value=bias)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return logsigmoid(self.bias - k.float().norm(dim=-1))


recipe = linearize.Recipe(
    name="key-length",
    mixer=linearize.Mixer(
        feature_map=linearize.Part(name="softmax"),
        gate=linearize.Part(name="key_length", bias=5.0),
        window=linearize.Window(size=32, sinks=2),
    ),
    stages=[linearize.Transfer(tokens=2_000, batch=4), linearize.Finetune(tokens=2_000, batch=4)],
    data=linearize.Data(source="builtin", length=128, held_out=4),
)
print(linearize.plan("./teacher", recipe).stages)
result = linearize.linearize("./teacher", recipe, output="out")
print(result.results["rows"][-1])
model = linearize.load("out")
```
'''

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from linearize.errors import LinearizeError, UnknownNameError

if TYPE_CHECKING:
    from linearize.api import Result, linearize, load, plan
    from linearize.planning import Plan
    from linearize.recipe import Data, Quick, Recipe
    from linearize.recipe_mixer import Mixer, Part, Window
    from linearize.recipe_stages import Distill, Finetune, Lora, Optimizer, Preference, Transfer
    from linearize.registry import register_combine, register_feature_map, register_gate, register_memory

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("Result", "linearize", "load", "plan"), "linearize.api"),
    "Plan": "linearize.planning",
    **dict.fromkeys(("Data", "Quick", "Recipe"), "linearize.recipe"),
    **dict.fromkeys(("Mixer", "Part", "Window"), "linearize.recipe_mixer"),
    **dict.fromkeys(("Distill", "Finetune", "Lora", "Optimizer", "Preference", "Transfer"), "linearize.recipe_stages"),
    **dict.fromkeys(
        ("register_combine", "register_feature_map", "register_gate", "register_memory"), "linearize.registry"
    ),
}

__all__ = [
    "Data",
    "Distill",
    "Finetune",
    "LinearizeError",
    "Lora",
    "Mixer",
    "Optimizer",
    "Part",
    "Plan",
    "Preference",
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
