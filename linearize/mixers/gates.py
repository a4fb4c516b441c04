"""Gates: how much of the memory each token keeps, as a log-decay in (-inf, 0].

Legend: B batch, T tokens, G KV heads, D head dim. Every gate is a module
`gate(x [..., hidden], k [..., G, D]) -> None | [..., G] | [..., G, D]` in fp32, where x is the layer's input and k the
teacher's keys before the rotary embedding. A gate of the second shape, one decay per channel, sets `per_channel`.

A gate that is tied to what is written sets `writes_keys` and has `keys(k [..., G, D]) -> [..., G, D]`: the memory
writes these in the place of the feature map of the keys. One that says how strongly a token is written, too, sets
`scales_writes` and returns both, the log-decay and the factor [..., G] on what is written.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.mixers.parts import Fp32Part, HeadShape, fp32_parameter, step_bias, uniform
from linearize.registry import gates


@gates.register("none")
class NoGate(Fp32Part):
    """Nothing is forgotten (linear attention, arXiv:2006.16236)."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()

    def forward(self, x: Tensor, k: Tensor) -> Tensor | None:
        return None


@gates.register("fixed")
class FixedGate(Fp32Part):
    """One constant decay per KV head, `1 - 2^-(5 + i)` (RetNet, arXiv:2307.08621).

    Args:
        first: exponent of head 0: it keeps `1 - 2^-first` a token.
        last: exponent of the last head; the others lie evenly between. RetNet's steps of 1 by default.
        slopes: keep `exp(-2^(-8 (j + 1) / G))` in head j instead, ALiBi's slopes (SUPRA, arXiv:2405.06640). The formula
            serves any G, where ALiBi's own patches powers of two together.
    """

    def __init__(
        self, shape: HeadShape, *, first: float = 5.0, last: float | None = None, slopes: bool = False
    ) -> None:
        super().__init__()
        if slopes:
            if first != 5.0 or last is not None:
                raise ValueError("`slopes` sets all decays; drop `first` and `last`.")
            exponents = torch.arange(1, shape.groups + 1, dtype=torch.float64) * (8 / shape.groups)
            self.register_buffer("log_decay", -torch.exp2(-exponents).float())
            return
        end = first + shape.groups - 1 if last is None else last
        if min(first, end) <= 0:
            raise ValueError(f"exponents must lie above 0, got {first} to {end}.")
        exponents = torch.linspace(first, end, shape.groups, dtype=torch.float64)
        self.register_buffer("log_decay", torch.log1p(-torch.exp2(-exponents)).float())

    def forward(self, x: Tensor, k: Tensor) -> Tensor | None:
        assert isinstance(self.log_decay, Tensor)
        return self.log_decay.expand(k.shape[:-1])


@gates.register("key")
class KeyGate(Fp32Part):
    """The key projection is the gate: `logsigmoid(k + bias) / normalizer` per key channel (Liger, arXiv:2503.01496).

    Args:
        normalizer: divides the log-decay (the published code: 16).
        bias: starting value of a learned bias per channel; none by default, as published.
    """

    per_channel = True

    def __init__(self, shape: HeadShape, *, normalizer: float = 16.0, bias: float | None = None) -> None:
        super().__init__()
        self.normalizer = _positive(normalizer)
        self.bias = None if bias is None else fp32_parameter(shape.groups, shape.head_dim, value=bias)

    def forward(self, x: Tensor, k: Tensor) -> Tensor | None:
        logits = k.float() if self.bias is None else k.float() + self.bias
        return F.logsigmoid(logits) / self.normalizer


@gates.register("scalar")
class ScalarGate(Fp32Part):
    """A learned scalar per KV head and token, `logsigmoid(x W + b) / normalizer` (Lizard, arXiv:2507.09025).

    Args:
        normalizer: divides the log-decay.
        bias: starting value of b. W starts at zero, so 6.0 keeps 0.9975 a token at first.
    """

    def __init__(self, shape: HeadShape, *, normalizer: float = 1.0, bias: float = 6.0) -> None:
        super().__init__()
        self.normalizer = _positive(normalizer)
        self.weight = fp32_parameter(shape.groups, shape.hidden)
        self.bias = fp32_parameter(shape.groups, value=bias)

    def forward(self, x: Tensor, k: Tensor) -> Tensor | None:
        return F.logsigmoid(F.linear(x.float(), self.weight, self.bias)) / self.normalizer


@gates.register("hgrn2")
class Hgrn2Gate(Fp32Part):
    """Keep `sigmoid(k)` per key channel and write the rest, `1 - sigmoid(k)`, as the key (HGRN2, arXiv:2404.07904).

    The key projection is the gate, as in Liger (arXiv:2503.01496); there is no lower bound.
    """

    per_channel = True
    writes_keys = True

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()

    def forward(self, x: Tensor, k: Tensor) -> Tensor | None:
        return F.logsigmoid(k.float())

    def keys(self, k: Tensor) -> Tensor:
        """Return what the memory writes, `1 - sigmoid(k)`, in k's dtype."""
        return torch.sigmoid(-k.float()).to(k.dtype)


@gates.register("lower_bounded")
class LowerBoundedGate(Fp32Part):
    """As `hgrn2`, but at least a bound b is kept, `b + (1 - b) sigmoid(k)`, and the rest written (arXiv:2404.07904).

    The bound rises with depth, from 0 in the first layer. HGRN2 trains it from this start; here it stays.

    Args:
        highest: what the bound would be behind the last layer.
    """

    per_channel = True
    writes_keys = True

    def __init__(self, shape: HeadShape, *, highest: float = 1.0) -> None:
        super().__init__()
        if not 0 <= highest <= 1:
            raise ValueError(f"`highest` must lie between 0 and 1, got {highest}.")
        self.bound = highest * shape.layer / shape.layers

    def forward(self, x: Tensor, k: Tensor) -> Tensor | None:
        forgets = math.log1p(-self.bound) + F.logsigmoid(k.float())
        return forgets if self.bound == 0 else forgets.logaddexp(torch.tensor(math.log(self.bound), device=k.device))

    def keys(self, k: Tensor) -> Tensor:
        """Return what the memory writes, what is not kept, in k's dtype."""
        return ((1 - self.bound) * torch.sigmoid(-k.float())).to(k.dtype)


@gates.register("key_softplus")
class KeySoftplusGate(Fp32Part):
    """The key projection in Mamba-2's form, a log-decay of `-softplus(k)` per key channel (Liger, arXiv:2503.01496)."""

    per_channel = True

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()

    def forward(self, x: Tensor, k: Tensor) -> Tensor | None:
        return -F.softplus(k.float())


@gates.register("dt")
class StepGate(Fp32Part):
    """Mamba-2's step size: keep `exp(-exp(A) dt)` and write `dt`-fold, `dt = softplus(x W + b)` (arXiv:2405.21060).

    W starts as a linear layer does, A at the logarithm of an even draw, b so that dt is log-evenly drawn where x W = 0.

    Args:
        shortest: smallest dt of the draw.
        longest: largest dt of the draw.
        fastest: largest `exp(A)` of the draw; the smallest is 1, or this where it is less.
    """

    scales_writes = True

    def __init__(
        self, shape: HeadShape, *, shortest: float = 1e-3, longest: float = 0.1, fastest: float = 16.0
    ) -> None:
        super().__init__()
        if not 0 < shortest <= longest:
            raise ValueError(f"`shortest` ({shortest:g}) must lie above 0 and not above `longest` ({longest:g}).")
        slowest = min(1.0, _positive(fastest, "fastest"))
        reach = shape.hidden**-0.5
        self.weight = nn.Parameter(uniform(-reach, reach, shape.groups, shape.hidden))
        self.bias = nn.Parameter(step_bias(shortest, longest, shape.groups))
        self.log_rate = nn.Parameter(uniform(slowest, fastest, shape.groups).log())

    def forward(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(F.linear(x.float(), self.weight, self.bias))
        return -self.log_rate.exp() * dt, dt


def _positive(value: float, name: str = "normalizer") -> float:
    if value <= 0:
        raise ValueError(f"`{name}` must lie above 0, got {value}: a decay cannot grow the state.")
    return value
