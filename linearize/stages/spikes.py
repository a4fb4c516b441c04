"""Steps that must not be made: a loss or a gradient that is not finite, or a loss far above the last ones."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from linearize.data import PackedRows
from linearize.errors import LinearizeError
from linearize.modeling.classes import layers_of

RECENT = 64
FACTOR = 4.0
LIMIT = 10


class Spikes:
    """Decides, step by step, whether an optimizer step is made, and counts those that are not.

    A step is skipped where its loss or gradient norm is not finite, or where both are above `FACTOR` times the largest
    of the last `RECENT` steps. A finite loss counts among the recent ones even then, so that data that has become
    harder for good costs one step. The decision depends on the run's own numbers alone, and a checkpoint holds them.

    Args:
        steps: of the stage: where all of a short one would be skipped, it is not called done.

    Attributes:
        skipped: steps so far.
        streak: skipped steps in a row, up to now.
    """

    def __init__(self, steps: int = LIMIT) -> None:
        self.limit = min(LIMIT, steps)
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.norms: deque[float] = deque(maxlen=RECENT)
        self.skipped = 0
        self.streak = 0
        self.last = (0.0, 0.0)

    @property
    def too_many(self) -> bool:
        """Whether the run is to stop."""
        return self.streak >= self.limit

    def fit(self, loss: float, norm: float) -> bool:
        """Take a step's loss and gradient norm, and return whether the step is to be made."""
        self.last = (loss, norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        spike = len(self.losses) == RECENT and loss > FACTOR * max(self.losses) and norm > FACTOR * max(self.norms)
        if finite:
            self.losses.append(loss)
            self.norms.append(norm)
        if finite and not spike:
            self.streak = 0
            return True
        self.skipped += 1
        self.streak += 1
        return False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, as JSON values."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": self.skipped,
            "streak": self.streak,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.skipped, self.streak = int(state["skipped"]), int(state["streak"])

    def error(self, stage: str, step: int, kept: str, where: str) -> LinearizeError:
        """Return the error for a stage with too many such steps in a row.

        Args:
            stage: its name.
            step: the last one.
            kept: which checkpoint there is, in words.
            where: the layer, in words.
        """
        loss, norm = self.last
        return LinearizeError(
            f"Stage {stage!r} stopped at step {step}: {self.streak} steps in a row had a loss or gradient that is not "
            f"finite, or a spike (now loss {loss:.4g}, gradient norm {norm:.4g}), and were skipped; {where}. No weight "
            f"was changed by those steps; {kept}. Lower `optimizer.lr` and start anew with --fresh; the same command "
            "tries again from there."
        )


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a number that is not finite, of one that is sharded in its part here."""
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not bool(local.isfinite().all()):
            return name
    return None


def diagnose(runner: Any, rows: PackedRows, losses: dict[str, Any], norms: dict[str, float]) -> str:
    """Say which layer a loss or gradient that is not finite comes from, as far as one more forward pass tells.

    Args:
        runner: the stage.
        rows: the step's batch.
        losses: of the step; `layers` has those of each layer, where the stage has such.
        norms: of the gradients, by layer.
    """
    model = runner.run.model
    if name := not_finite(model.named_parameters()):
        return f"the weight {name} is not finite"
    layers = [index for index, loss in losses.get("layers", {}).items() if not math.isfinite(loss)]
    if layers:
        return f"the loss of layer {min(layers)} is not finite"
    with _broken_outputs(model) as broken:
        runner.held_out_loss(rows)
    if broken:
        return f"the output of layer {min(broken)} is not finite"
    wrong = [layer for layer, norm in norms.items() if not math.isfinite(norm)]
    if wrong:  # backward, the last layer comes first
        return (
            f"the gradient of layer {max(wrong, key=lambda layer: int(layer) if layer.isdigit() else -1)} is not finite"
        )
    largest = max(norms, key=lambda layer: norms[layer], default="none")
    return f"the numbers of every layer are finite, and the gradient of layer {largest} is the largest"


@contextlib.contextmanager
def _broken_outputs(model: Any) -> Iterator[set[int]]:
    """Collect the layers whose output has a number that is not finite, while they run."""
    broken: set[int] = set()

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden: Tensor = output if isinstance(output, Tensor) else output[0]
            if not bool(torch.isfinite(hidden).all()):
                broken.add(index)

        return hook

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers_of(model))]
    try:
        yield broken
    finally:
        for hook in hooks:
            hook.remove()
