"""Keys and values in eight bits: E4M3 of FP8 Formats for Deep Learning (arXiv:2209.05433).

Every pass reads rounded keys and values, so that a cache of one byte each loses nothing, and decoding equals prefill
(but where the last bit of a projection, which depends on how many tokens are multiplied at once, decides a rounding).
Cached tensors are bytes, which every device can index, pad and select, and float8 only where their numbers are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # in E4M3, which has no infinity


class _StraightThrough(torch.autograd.Function):
    """Round in the forward pass, hand the gradient on as it is."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clamp(-LARGEST, LARGEST).to(FP8).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def round_to_fp8(t: Tensor) -> Tensor:
    """Return the nearest numbers of E4M3 in t's dtype, the gradient straight through; +-448 is the largest."""
    rounded: Tensor = _StraightThrough.apply(t)  # type: ignore[no-untyped-call]
    return rounded


def to_cache(t: Tensor, fp8: bool) -> Tensor:
    """Return what a cache holds of rounded keys or values: the bytes of their float8, or without `fp8` themselves."""
    return t.to(FP8).view(torch.uint8) if fp8 else t


def from_cache(t: Tensor) -> Tensor:
    """Return the numbers that a cached tensor holds: a float8 view of its bytes, or the tensor."""
    return t.view(FP8) if t.dtype == torch.uint8 else t
