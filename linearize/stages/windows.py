"""Shorter windows while a stage trains, so that exact heads and memories learn to carry what lies farther back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from linearize.mixers.mixer import TokenMixer


@contextlib.contextmanager
def shortened(model: nn.Module, limit: int | None) -> Iterator[None]:
    """Let no sliding window of a model be longer than so many tokens for a while.

    Where window and memory are disjoint, tokens then enter the memory as soon as they leave the shorter window.
    Compiled layers notice; a CUDA graph that was captured meanwhile has the shorter windows for good.

    Args:
        model: the student.
        limit: tokens; None leaves the windows as they are.
    """
    mixers = [part for part in model.modules() if isinstance(part, TokenMixer) and limit is not None]
    sizes = [mixer.window for mixer in mixers]
    try:
        for mixer, size in zip(mixers, sizes, strict=True):
            mixer.window = size if limit is None else min(size, limit)
        yield
    finally:
        for mixer, size in zip(mixers, sizes, strict=True):
            mixer.window = size
