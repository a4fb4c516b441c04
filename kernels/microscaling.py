"""Keys and values in eight bits: MXINT8 of Microscaling Data Formats (arXiv:2310.10537, OCP MX 1.0).

Each block of 32 numbers of a head shares a power of two, below which its largest lies; a number is that times n / 64, n
an int8. Every pass reads rounded keys and values, so that a cache of their bytes loses nothing: rounding twice changes
nothing more, and bf16 and fp16 hold the rounded numbers. So decoding equals prefill, but where the last bit of a
projection, which depends on how many tokens are multiplied at once, decides a rounding.

Legend: D numbers of a head, N = ceil(D / 32) blocks. Stored: D int8, then N exponents (E8M0), as D + N bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MX_BLOCK = 32
MX_LARGEST = 127
MX_STEPS = 64  # of a number below the block's power of two
EXPONENT_BITS = 23  # below the exponent of an fp32 number


def stored_bytes(dim: int) -> int:
    """Return the bytes of a head's key or value of `dim` numbers."""
    return dim - -dim // MX_BLOCK


def stored_numbers(size: int) -> int:
    """Return of how many numbers so many bytes are: the inverse of `stored_bytes`."""
    return size - -(-size // (MX_BLOCK + 1))


class _Rounded(torch.autograd.Function):
    """Round in the forward pass, hand the gradient on as it is."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        step = _steps(_exponents(t), t.shape[-1])
        return (_levels(t, step) * step).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def microscaled(t: Tensor) -> Tensor:
    """Round t [..., D] to numbers of MXINT8, in its own dtype; the gradient goes straight through."""
    rounded: Tensor = _Rounded.apply(t)  # type: ignore[no-untyped-call]
    return rounded


def to_bytes(t: Tensor) -> Tensor:
    """Return rounded numbers [..., D] as they are stored: uint8 [..., D + N]."""
    exponents = _exponents(t)
    levels = _levels(t, _steps(exponents, t.shape[-1]))
    return torch.cat([levels.to(torch.int8).view(torch.uint8), exponents.to(torch.uint8)], -1)


def from_bytes(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers [..., D] of stored bytes [..., D + N]."""
    dim = stored_numbers(stored.shape[-1])
    levels = stored[..., :dim].contiguous().view(torch.int8).to(torch.float32)
    return (levels * _steps(stored[..., dim:].to(torch.int32), dim)).to(dtype)


def as_stored(t: Tensor, rounded: bool) -> Tensor:
    """Return what a cache holds of keys or values: the bytes of `rounded` ones, or themselves."""
    return to_bytes(t) if rounded else t


def numbers(held: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys or values that a cache holds: in `dtype` where they are bytes, else as they are."""
    return from_bytes(held, dtype) if held.dtype == torch.uint8 else held


def _exponents(t: Tensor) -> Tensor:
    """The biased exponent of each block's largest number, int32 [..., N]; 7 at least, whose step is a normal number."""
    largest = F.pad(t.float().abs(), (0, -t.shape[-1] % MX_BLOCK)).unflatten(-1, (-1, MX_BLOCK)).amax(-1)
    exponents: Tensor = largest.view(torch.int32) >> EXPONENT_BITS
    return exponents.clamp(7, 254)


def _steps(exponents: Tensor, dim: int) -> Tensor:
    """The distance of two neighbours for each number, fp32 [..., dim]."""
    powers = (exponents << EXPONENT_BITS).view(torch.float32) / MX_STEPS
    return powers.repeat_interleave(MX_BLOCK, -1)[..., :dim]


def _levels(t: Tensor, step: Tensor) -> Tensor:
    """Numbers in steps, whole, in fp32 or t's fp64."""
    return (t / step).round().clamp(-MX_LARGEST, MX_LARGEST)
