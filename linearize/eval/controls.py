"""Controls that are made from a finished student: what it is worth without its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from linearize.mixers.mixer import TokenMixer


@contextlib.contextmanager
def memory_silenced(model: nn.Module) -> Iterator[None]:
    """Make every memory of a linearized model return zeros, with a zero normalizer, while the context lasts.

    Only full forward passes are served, not decoding.
    """

    def silence(module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor | None, Any]) -> Any:
        out, normalizer, state = output
        return out * 0, None if normalizer is None else normalizer * 0, state

    hooks = [
        module.memory.register_forward_hook(silence)
        for module in model.modules()
        if isinstance(module, TokenMixer) and module.memory is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
