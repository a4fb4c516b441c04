"""Combines: how the window's and the memory's outputs become one.

Legend: H query heads, V value dim. Every combine is a module
`combine(window: WindowOutput | None, memory [..., H, V] | None, normalizer [..., H] | None) -> [..., H, V]`; the class
says with `uses_window`, `uses_memory` and `shares_denominator` what it needs. One that says `reads_input` is given the
layer's input as well, `x=[..., hidden]`; one that says `log_weights` needs a memory that does, whose normalizer is the
log-sum-exp of its scores.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.window import WindowOutput
from linearize.mixers.parts import Fp32Part, HeadShape, fp32_parameter
from linearize.registry import combines


class Combine(Fp32Part):
    """Base of all combines."""

    uses_window = True
    uses_memory = True
    shares_denominator = False
    reads_input = False
    log_weights = False

    def forward(self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how it combines: define forward().")


@combines.register("window_only")
class WindowOnly(Combine):
    """The window alone: the control that published gains are measured against.

    The recipe's feature map, gate and memory are not built: `mixer.combine=window_only` makes any recipe's control.
    """

    uses_memory = False

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()

    def forward(self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None) -> Tensor:
        assert window is not None
        return window.o


@combines.register("memory_only")
class MemoryOnly(Combine):
    """The memory alone."""

    uses_window = False

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()

    def forward(self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None) -> Tensor:
        assert memory is not None
        return memory


@combines.register("average")
class Average(Combine):
    """A fixed mix, `(1 - memory) * window + memory * memory's output` (Liger: 0.5).

    Args:
        memory: the memory's share.
    """

    def __init__(self, shape: HeadShape, *, memory: float = 0.5) -> None:
        super().__init__()
        self.share = memory

    def forward(self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None) -> Tensor:
        assert window is not None and memory is not None
        return window.o * (1 - self.share) + memory.to(window.o.dtype) * self.share


@combines.register("learned")
class Learned(Combine):
    """A learned mix per query head, `a * window + b * memory`, in fp32.

    Args:
        window: starting value of a.
        memory: starting value of b; small, so that the first forward is close to the window's.
    """

    def __init__(self, shape: HeadShape, *, window: float = 1.0, memory: float = 0.1) -> None:
        super().__init__()
        self.window = fp32_parameter(shape.heads, value=window)
        self.memory = fp32_parameter(shape.heads, value=memory)

    def forward(self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None) -> Tensor:
        assert window is not None and memory is not None
        mixed = self.window[:, None] * window.o.float() + self.memory[:, None] * memory.float()
        return mixed.to(window.o.dtype)


@combines.register("gated")
class Gated(Combine):
    """A mix that each token sets, `2 sigmoid(x w) a * window + 2 sigmoid(x w') b * memory` per query head, in fp32.

    A head that finds something far back at one token and attends near at the next weighs its memory accordingly. w and
    w' start at zero, where this is `learned`.

    Args:
        window: starting value of a.
        memory: starting value of b; small, so that the first forward is close to the window's.
    """

    reads_input = True

    def __init__(self, shape: HeadShape, *, window: float = 1.0, memory: float = 0.1) -> None:
        super().__init__()
        self.window = fp32_parameter(shape.heads, value=window)
        self.memory = fp32_parameter(shape.heads, value=memory)
        self.weight = fp32_parameter(2 * shape.heads, shape.hidden)

    def forward(
        self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None, x: Tensor | None = None
    ) -> Tensor:
        assert window is not None and memory is not None and x is not None
        near, far = (2 * F.linear(x.float(), self.weight).sigmoid()).chunk(2, -1)
        mixed = (near * self.window)[..., None] * window.o.float() + (far * self.memory)[..., None] * memory.float()
        return mixed.to(window.o.dtype)


@combines.register("shared_softmax")
class SharedSoftmax(Combine):
    """One numerator and one denominator over window and memory (LoLCATs, arXiv:2410.10254, eq. 7).

    The window's weights are `factor * exp(score - c)`, the memory's `memory * phi(q) . phi(k)`, where c is the largest
    score in the window as published. With `shift: false` c is 0, so that both are on the scale of one softmax, whose
    weights outside the window the features then stand for.

    Args:
        factor: starting value of the window factor, learned through a sigmoid per query head (LoLCATs: 0.1).
        memory: starting value of the memory's factor, learned through its logarithm; None fixes it at 1, as published.
        shift: subtract the largest score.
    """

    shares_denominator = True

    def __init__(
        self, shape: HeadShape, *, factor: float = 0.1, memory: float | None = None, shift: bool = True
    ) -> None:
        super().__init__()
        if not 0 < factor < 1:
            raise ValueError(f"`factor` must lie between 0 and 1, got {factor}.")
        if memory is not None and memory <= 0:
            raise ValueError(f"`memory` must lie above 0, got {memory}.")
        self.shift = shift
        self.factor = fp32_parameter(shape.heads, value=math.log(factor / (1 - factor)))
        self.log_memory = None if memory is None else fp32_parameter(shape.heads, value=math.log(memory))

    def forward(self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None) -> Tensor:
        assert window is not None and memory is not None and normalizer is not None
        inside = window.lse - window.row_max if self.shift else window.lse
        odds = F.logsigmoid(self.factor) + inside - normalizer.clamp(min=1e-20).log()
        if self.log_memory is not None:
            odds = odds - self.log_memory
        share = odds.sigmoid().masked_fill(normalizer <= 0, 1.0).masked_fill(window.row_max == -torch.inf, 0.0)
        share = share[..., None]
        outside = memory.float() / normalizer.clamp(min=1e-20)[..., None]
        return (share * window.o.float() + (1 - share) * outside).to(window.o.dtype)


@combines.register("joint")
class Joint(Combine):
    """One softmax over window and memory: `(e^lse_w window + e^lse_m memory) / (e^lse_w + e^lse_m)`, in fp32."""

    shares_denominator = True
    log_weights = True

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()

    def forward(self, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None) -> Tensor:
        assert window is not None and memory is not None and normalizer is not None
        lowest = torch.finfo(normalizer.dtype).min
        share = (window.lse - normalizer.clamp(min=lowest)).sigmoid()[..., None]  # no NaN where both are empty
        return (share * window.o.float() + (1 - share) * memory.float()).to(window.o.dtype)
