"""Feature maps: queries and keys -> the features that a linear memory multiplies.

Legend: B batch, T tokens, J heads (query or KV), D head dim, F features. Every map is a module
`map(x [..., J, D]) -> [..., J, F]`, built once for the queries and once for the keys. Its `feature_dim` is F, and
`positive` says whether no product phi(q) . phi(k) is below 0, which a normalizer needs; `widens`, that the features are
not the D channels themselves, so that no gate per channel fits; `mixes`, the same of features that are still D in
number; `unit`, that no head's features are longer than 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.registry import feature_maps


@feature_maps.register("identity")
class IdentityMap(nn.Module):
    """The heads as they are."""

    positive = False

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.feature_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        return x


@feature_maps.register("softmax")
class SoftmaxMap(nn.Module):
    """Softmax over the head dimension (Liger, arXiv:2503.01496)."""

    positive = True
    unit = True

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.feature_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        return x.float().softmax(-1).to(x.dtype)


@feature_maps.register("l2norm")
class L2NormMap(nn.Module):
    """Each head divided by its Euclidean norm (DeltaNet, arXiv:2406.06484)."""

    positive = False
    unit = True

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.feature_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1, eps=1e-6).to(x.dtype)


@feature_maps.register("hedgehog")
class HedgehogMap(nn.Module):
    """`[softmax(x W), softmax(-x W)]` with one W per head, started at the identity (Hedgehog, arXiv:2402.04347).

    Args:
        dim: columns of W; F is twice that.
    """

    positive = True
    widens = True

    def __init__(self, heads: int, head_dim: int, *, dim: int = 64) -> None:
        super().__init__()
        self.feature_dim = 2 * _at_least_one(dim)
        self.weight = nn.Parameter(torch.eye(head_dim, dim).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        projected = torch.einsum("...jd,jdf->...jf", x, self.weight.to(x.dtype)).float()
        features = torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)
        return features.clamp(min=1e-12).to(x.dtype)


@feature_maps.register("unit_hedgehog")
class UnitHedgehogMap(HedgehogMap):
    """Hedgehog's features divided by their Euclidean norm, which a memory of the delta rule can take.

    Keys as a teacher leaves them share a few large channels; a memory tells them apart only through a learned map.
    """

    unit = True

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x).float(), dim=-1, eps=1e-6).to(x.dtype)


@feature_maps.register("relu_mlp")
class ReluMlpMap(nn.Module):
    """`relu(W vec(x) + b)` over all heads at once (SUPRA, arXiv:2405.06640, section 3).

    Args:
        identity: start at W = 1 and b = 0, features that are the heads' positive channels. The published start is that
            of a linear layer, uniform in +-1/sqrt(J D).
    """

    positive = True
    mixes = True

    def __init__(self, heads: int, head_dim: int, *, identity: bool = False) -> None:
        super().__init__()
        self.feature_dim = head_dim
        self.linear = nn.Linear(heads * head_dim, heads * head_dim)
        if identity:
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight.to(x.dtype), self.linear.bias.to(x.dtype)
        return F.linear(x.flatten(-2), weight, bias).relu().view_as(x)


@feature_maps.register("t2r")
class T2rMap(nn.Module):
    """`relu(x W + b)` with one W and b per head (T2R, arXiv:2103.13076, eq. 5).

    Args:
        dim: columns of W, which is F.
        identity: start at the identity and b = 0. The published start is that of a linear layer.
    """

    positive = True
    widens = True

    def __init__(self, heads: int, head_dim: int, *, dim: int = 32, identity: bool = False) -> None:
        super().__init__()
        self.feature_dim = _at_least_one(dim)
        if identity:
            weight, bias = torch.eye(head_dim, dim).repeat(heads, 1, 1), torch.zeros(heads, dim)
        else:
            reach = head_dim**-0.5
            weight = torch.empty(heads, head_dim, dim).uniform_(-reach, reach)
            bias = torch.empty(heads, dim).uniform_(-reach, reach)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        projected = torch.einsum("...jd,jdf->...jf", x, self.weight.to(x.dtype))
        return (projected + self.bias.to(x.dtype)).relu()


@feature_maps.register("exp")
class ExpMap(nn.Module):
    """`exp(x)`, divided by its largest feature so that none overflows: features in (0, 1] (LoLCATs' variant)."""

    positive = True

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.feature_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - x.float().amax(-1, keepdim=True)).exp().to(x.dtype)


@feature_maps.register("taylor")
class TaylorMap(nn.Module):
    """Features whose products are `1 + s + s^2 / 2`, the start of exp(s)'s series (Based, arXiv:2402.18668, eq. 3).

    `s = (x W) . (y W') / sqrt(dim)` with one learned W per head, started at the identity.

    Args:
        dim: columns of W; F is `1 + dim + dim (dim + 1) / 2`, since `z_i z_j` and `z_j z_i` share a feature.
    """

    positive = True
    widens = True

    def __init__(self, heads: int, head_dim: int, *, dim: int = 16) -> None:
        super().__init__()
        self.feature_dim = 1 + _at_least_one(dim) + dim * (dim + 1) // 2
        self.weight = nn.Parameter(torch.eye(head_dim, dim).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        dim = self.weight.shape[-1]
        z = torch.einsum("...jd,jdf->...jf", x.float(), self.weight.float()) * dim**-0.25
        first, second = torch.triu_indices(dim, dim, device=x.device)
        pairs = z[..., first] * z[..., second] * torch.where(first == second, 0.5, 1.0).sqrt()
        return torch.cat([torch.ones_like(z[..., :1]), z, pairs], -1).to(x.dtype)


def _at_least_one(dim: int) -> int:
    if dim < 1:
        raise ValueError(f"`dim` must be at least 1, got {dim}.")
    return dim
