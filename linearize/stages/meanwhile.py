"""What mixers do otherwise for a while: other windows as a stage trains, no rounding as adapters merge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.mixer import TokenMixer


def windows_of(model: nn.Module, size: int | None) -> contextlib.AbstractContextManager[None]:
    """Let every sliding window of a model be so many tokens long, or as long as the teacher's own where that is less.

    Where window and memory are disjoint, tokens then enter the memory as soon as they leave that window. Compiled
    layers notice; a CUDA graph that was captured meanwhile has these windows for good.

    Args:
        model: the student.
        size: tokens; None leaves the windows as they are.
    """
    if size is None:
        return contextlib.nullcontext()
    mixers = [part for part in model.modules() if isinstance(part, TokenMixer) and part.window]
    return _having(mixers, "window", [mixer.bounded(size) for mixer in mixers])


def unrounded(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Read keys and values as they are where the mixer rounds them, since a last bit can move a rounding by a level.

    Args:
        model: the student.
    """
    parts = [part for part in model.modules() if isinstance(part, LinearizedAttention)]
    return _having(parts, "microscaled", [False] * len(parts))


@contextlib.contextmanager
def _having(parts: Sequence[nn.Module], name: str, values: Sequence[Any]) -> Iterator[None]:
    """Give an attribute of modules other values for a while."""
    before = [getattr(part, name) for part in parts]
    try:
        for part, value in zip(parts, values, strict=True):
            setattr(part, name, value)
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            setattr(part, name, value)
