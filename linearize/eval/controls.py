"""Controls that are made from a finished student: what it is worth without its memory, its window, its mixer.

Each one changes what goes into, or comes out of, every mixer's `combine`, so that full passes and decoding are served
alike. Exact heads and softmax layers stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.kernels.window import WindowOutput
from linearize.mixers.mixer import TokenMixer

Sides = tuple[WindowOutput | None, Tensor | None, Tensor | None]
"""What `combine` gets: the window's output, the memory's, and the normalizer of the memory."""


def _silence_memory(
    combine: Any, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None
) -> Sides:
    nothing = None if memory is None else torch.zeros_like(memory)
    no_weight = -torch.inf if getattr(combine, "log_weights", False) else 0.0
    return window, nothing, None if normalizer is None else torch.full_like(normalizer, no_weight)


def _silence_window(
    combine: Any, window: WindowOutput | None, memory: Tensor | None, normalizer: Tensor | None
) -> Sides:
    if window is not None:
        nowhere = torch.full_like(window.lse, -torch.inf)
        window = WindowOutput(torch.zeros_like(window.o), nowhere, nowhere)
    return window, memory, normalizer


@contextlib.contextmanager
def memory_silenced(model: nn.Module) -> Iterator[None]:
    """Make every memory return zeros, of no weight: the mix of window and memory stays as it was trained."""
    with _changed(model, before=_silence_memory, needs="memory"):
        yield


@contextlib.contextmanager
def window_alone(model: nn.Module) -> Iterator[None]:
    """Make every mixer return its window's output as it is, as the teacher's own attention over the window would."""
    with _changed(model, after=lambda sides, out: sides[0].o, needs="both"):
        yield


@contextlib.contextmanager
def memory_alone(model: nn.Module) -> Iterator[None]:
    """Make every window return zeros and see nothing: the mix of window and memory stays as it was trained."""
    with _changed(model, before=_silence_window, needs="any"):
        yield


@contextlib.contextmanager
def mixer_silenced(model: nn.Module) -> Iterator[None]:
    """Make every mixer return zeros: what is left are exact heads, softmax layers and the rest of the network."""
    with _changed(model, after=lambda sides, out: torch.zeros_like(out), needs="any"):
        yield


CONTROLS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[None]]] = {
    "memory zeroed": memory_silenced,
    "window only": window_alone,
    "memory only": memory_alone,
    "no mixer": mixer_silenced,
}


def applicable(model: nn.Module) -> list[str]:
    """Return the names of the controls that differ from the model and from one another.

    A mixer without a memory has none to silence; where none has a window, no mixer is what a zeroed memory leaves.
    """
    mixers = _mixers(model)
    if not mixers:
        return []
    memory = any(mixer.memory is not None for mixer in mixers)
    both = any(mixer.memory is not None and mixer.window for mixer in mixers)
    window = any(mixer.window for mixer in mixers)
    chosen = {"memory zeroed": memory, "window only": both, "memory only": both, "no mixer": window}
    return [name for name, applies in chosen.items() if applies]


def _mixers(model: nn.Module) -> list[TokenMixer]:
    return [module for module in model.modules() if isinstance(module, TokenMixer)]


@contextlib.contextmanager
def _changed(
    model: nn.Module,
    needs: str,
    before: Callable[..., Sides] | None = None,
    after: Callable[[Any, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Hook the combine of the mixers that have what the control `needs`: a memory, a window and a memory, or neither.

    Raises:
        LinearizeError: the model ran and none of the combines did, so that the control changed nothing.
    """
    chosen = [
        mixer
        for mixer in _mixers(model)
        if needs == "any" or (mixer.memory is not None and (needs == "memory" or mixer.window))
    ]
    calls = {"model": 0, "combine": 0}

    def enter(module: nn.Module, arguments: Any) -> Any:
        calls["combine"] += 1
        return None if before is None else before(module, *arguments)

    def leave(module: nn.Module, arguments: Any, output: Tensor) -> Any:
        return None if after is None else after(arguments, output)

    def count(module: nn.Module, arguments: Any) -> None:
        calls["model"] += 1

    hooks: list[Any] = [model.register_forward_pre_hook(count)]
    for mixer in chosen:
        hooks += [mixer.combine.register_forward_pre_hook(enter), mixer.combine.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if chosen and calls["model"] and not calls["combine"]:
        raise LinearizeError(
            "A control changed nothing: the model ran without calling the combine of its mixers (a fused kernel?). "
            "Run it with LINEARIZE_BACKEND=torch."
        )
