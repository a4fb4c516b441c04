"""Less time for long stages on a GPU: compiled decoder layers, and a small model's passes as CUDA graphs.

A pass of a small model is thousands of launches, which take the host longer than the GPU. Compiling makes them fewer,
and spares the GPU of a larger model memory traffic; a graph replays them all at once. Neither pays for a short stage,
since both take half a minute to make.

Legend: B rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linearize.modeling.classes import layers_of, packed_inputs

PASSES = 300  # of a stage, from which on making them pays
WORK = 3e15  # or its tokens times the model's parameters: about as long on an H100 as making them takes
VARIANTS = 8  # of a compiled layer: each stage's rows, with and without gradients, of one document and of several
GRAPHED = 2_000_000_000  # parameters up to which the host is the slower side


def decoder_states(decoder: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the states [B, T, hidden] that the output embedding of a decoder's model reads.

    Args:
        decoder: of a teacher or a student.
        input_ids: [B, T].
        position_ids: [B, T], which count from 0 in each document.
    """
    given = packed_inputs(decoder.config, {"input_ids": input_ids, "position_ids": position_ids})
    states: Tensor = decoder(**given, use_cache=False).last_hidden_state
    return states


def two_documents(position_ids: Tensor) -> Tensor:
    """Return the positions [B, T] of rows of two documents each.

    What is captured serves rows of several documents, as no value can be read then. So must what warms it up: rows of
    one document take another way, and what is new would be compiled within the capture, which spoils it.
    """
    places = torch.arange(position_ids.shape[1], device=position_ids.device, dtype=position_ids.dtype)
    return (places % -(-len(places) // 2)).expand(position_ids.shape).contiguous()


def _on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


def pays(decoder: nn.Module, passes: int, tokens: int) -> bool:
    """Return whether a stage is worth what compiling its layers takes on a GPU.

    Args:
        decoder: that trains, its weights anywhere.
        passes: forward and backward passes of the stage; 0 where layers cannot be compiled.
        tokens: of all passes.
    """
    return passes >= PASSES or (passes > 0 and tokens * sum(p.numel() for p in decoder.parameters()) >= WORK)


class _Decoder(nn.Module):
    """A decoder as a function of two tensors, as capture wants it."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return decoder_states(self.decoder, input_ids, position_ids)


class FastDecoder:
    """A decoder that trains: `decoder_states` of it, compiled and captured where that pays.

    Args:
        model: the student, with adapters in and parameters marked as trained or not.
        passes: forward and backward passes that the stage will make; with 0, the decoder stays as it is.
        tokens: of all passes.
        graph: capture the pass, where the model is small.
    """

    def __init__(self, model: Any, passes: int, tokens: int = 0, graph: bool = True) -> None:
        self.decoder = model.get_decoder()
        self.layers: list[nn.Module] = []
        self.trained: list[nn.Parameter] = []
        self.lent: list[nn.Parameter] = []  # whose gradients are the graph's own buffers, which a pass overwrites
        self.graphed: Any = None
        self.shape: torch.Size | None = None
        self.limits = contextlib.ExitStack()
        if not _on_gpu(model) or not pays(self.decoder, passes, tokens):
            self.captures = False
            return
        self.layers = list(layers_of(model))
        self.captures = graph and sum(p.numel() for p in self.decoder.parameters()) <= GRAPHED
        # Layers share one `forward`, whose graphs are counted together: windows, exact heads and rows differ.
        self.limits.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS * len(self.layers)))
        for layer in self.layers:
            layer.compile(dynamic=False)

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the final states [B, T, hidden]; with gradients, they are valid until the next call."""
        if self.captures and torch.is_grad_enabled() and self.shape is None:
            self._capture(input_ids, position_ids)
        if self.graphed is None or input_ids.shape != self.shape or not torch.is_grad_enabled():
            return decoder_states(self.decoder, input_ids, position_ids)
        for parameter in self.lent:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        self.lent = [parameter for parameter in self.trained if parameter.grad is None]
        states: Tensor = self.graphed(input_ids, position_ids)
        return states

    def _capture(self, input_ids: Tensor, position_ids: Tensor) -> None:
        self.shape = input_ids.shape
        self.trained = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        # The capture has a stream of its own; a wait between streams is all that comes of it.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
        try:
            self.graphed = torch.cuda.make_graphed_callables(
                _Decoder(self.decoder).train(), (input_ids, two_documents(position_ids)), allow_unused_input=True
            )
        except RuntimeError as error:
            _warn(error)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Run a forward pass as training does, so that nothing is compiled anew, and without a backward pass."""
        with torch.set_grad_enabled(bool(self.layers)):
            yield

    def forget(self) -> None:
        """Let the graph go; the next pass is captured anew."""
        self.graphed = self.shape = None

    def close(self) -> None:
        """Leave the layers as they were, and let the graph's memory go."""
        self.graphed = None
        self.limits.close()
        while self.layers:
            self.layers.pop()._compiled_call_impl = None


class FastPass:
    """A function that may leave gradients in parameters, replayed as a CUDA graph from its third call on.

    Args:
        function: of `input_ids` and `position_ids` [B, T] and further tensors; returns one. All that it does besides
            must be the same at every call.
        parameters: whose gradients it adds to; none where it makes no backward pass.
        passes: calls that the stage will make.
        device: of the tensors; only a GPU replays.
    """

    def __init__(
        self, function: Callable[..., Tensor], parameters: list[nn.Parameter], passes: int, device: torch.device
    ) -> None:
        self.function = function
        self.parameters = parameters
        self.eager_calls = 2 if passes >= PASSES and device.type == "cuda" else -1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: tuple[Tensor, ...] = ()
        self.gradients: list[Tensor] = []
        self.result = torch.zeros(())

    def __call__(self, *given: Tensor) -> Tensor:
        """Return what the function returns; valid until the next call."""
        if self.eager_calls == 0:
            self.eager_calls = -1
            self._capture(given)
        if self.graph is None or any(a.shape != b.shape for a, b in zip(given, self.given, strict=True)):
            self.eager_calls -= self.eager_calls > 0
            return self.function(*given)
        for mine, tensor in zip(self.given, given, strict=True):
            mine.copy_(tensor)
        fresh = [g for p, g in zip(self.parameters, self.gradients, strict=True) if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
        self.graph.replay()
        return self.result

    def _capture(self, given: tuple[Tensor, ...]) -> None:
        self.given = tuple(tensor.clone() for tensor in given)
        before = [parameter.grad for parameter in self.parameters]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        input_ids, position_ids, *more = self.given
        self.function(input_ids, two_documents(position_ids), *more)
        for gradient in self.gradients:
            gradient.zero_()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.result = self.function(*self.given)
            self.graph = graph
        except RuntimeError as error:
            _warn(error)
        for parameter, earlier, kept in zip(self.parameters, before, self.gradients, strict=True):
            parameter.grad = None if earlier is None else kept.copy_(earlier)


def _warn(error: BaseException) -> None:
    while error.__context__ is not None:  # how a capture ends says only that it went wrong before
        error = error.__context__
    detail = str(error).splitlines()[0]
    warnings.warn(f"No CUDA graph of a training pass, which is slower without: {detail}", stacklevel=3)
