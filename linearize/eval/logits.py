"""Logits a chunk at a time: one forward pass for the final hidden states, the output embedding only where it is needed.

Shapes: B rows, T tokens a row, D hidden size, V vocabulary, L tokens with a label in a batch, l tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy as copy_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.modeling.heads import logits_head, logits_of

CHUNK_ELEMENTS = 2**23

ReadLogits = Callable[[slice], Tensor]
"""Takes a slice of the L labelled tokens, returns the logits that predict them, [l, V] float32."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without gradients; its mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is; one of which a part at a time has its weights is where they are."""
    return next(p.device for p in model.parameters() if p.device.type != "meta")


def language_model(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a peft wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def final_states(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Run the model without its logits.

    Returns:
        The states that the output embedding reads, [B, T, D], and whether `logits_of` turns them into the model's
        logits.
    """
    inner = language_model(model)
    decoder: Any = inner.get_decoder()
    if decoder is None or decoder is inner:
        decoder = inner.base_model
    captured: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    try:
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    finally:
        hook.remove()
    states = captured[0]
    again = logits_of(inner, states[:, -1]).float()
    tolerance = 1e-4 if states.dtype == torch.float32 else 2e-2
    return states, bool((again - logits).abs().max() <= tolerance * logits.abs().max())


def output_embedding(model: nn.Module) -> nn.Module:
    """Return the module that turns final hidden states into logits."""
    return logits_head(language_model(model))


def logits_reader(model: nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> ReadLogits:
    """Run the model on a batch; the reader makes logits a chunk at a time where the model allows that."""
    states, plain = final_states(model, inputs)
    if plain:
        inner, kept = language_model(model), states[mask]
        return lambda at: logits_of(inner, kept[at]).float()
    logits: Tensor = model(**inputs, use_cache=False).logits[mask]
    return lambda at: logits[at].float()


def chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of `count` tokens that keep [l, V] float32 under 32 MiB."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def copy_head(layer: nn.Module) -> nn.Module:
    """Return a frozen copy of a module that shares nothing with it."""
    if not isinstance(layer, nn.Linear):
        return copy_module(layer).requires_grad_(False)
    copy = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    copy.load_state_dict({name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}, assign=True)
    return copy.requires_grad_(False)
