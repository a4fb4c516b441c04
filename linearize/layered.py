"""A teacher of which one part at a time has its weights: read from safetensors when it is needed, dropped behind it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.modeling import auto_class
from linearize.modeling.classes import layers_of
from linearize.teacher import attention_kind
from linearize.weights import tensor_files

CHUNK_BYTES = 2**24


class LayeredTeacher:
    """A model on the meta device whose layers, embedding and head get their weights for a while.

    What the decoder has besides (norms, learned positions) is small and stays.

    Args:
        folder: the teacher's, with safetensors under the model's own names.
        config: the teacher's.
        dtype: of the weights.
        device: where they go.

    Attributes:
        model: the model.
        live: bytes of the teacher's tensors that have their weights now.
        peak: the most that there were.

    Raises:
        LinearizeError: the files lack a tensor under the model's name for it.
    """

    def __init__(self, folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self.files = tensor_files(folder)
        with init_empty_weights(include_buffers=False):
            self.model: Any = auto_class(config.model_type).from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention_kind(config)
            )
        self.model.tie_weights()  # anew: on its way to the meta device a parameter becomes another
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        owners = dict(self.model.named_modules())
        self.places: dict[str, tuple[nn.Module, str]] = {}  # by the teacher's modules: surgery replaces attention
        shared: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owner, _, last = name.rpartition(".")
            self.places[name] = owners[owner], last
            shared.setdefault(id(parameter), []).append(name)
        self.keys = {name: self._key(names) for names in shared.values() for name in names}
        self.live = self.peak = 0
        decoder = self.model.get_decoder()
        self.layers = [self._under(layer) for layer in layers_of(self.model)]
        self.embedding = self._under(self.model.get_input_embeddings())
        inside = {*self.embedding, *(name for names in self.layers for name in names)}
        self.rest = [name for name in self._under(decoder) if name not in inside]
        self.head = [name for name in self.places if name not in {*inside, *self.rest}]
        self.load(self.rest)

    def _under(self, module: nn.Module) -> list[str]:
        """The names of a module's parameters in the model."""
        own = {id(child) for child in module.modules()}
        return [name for name, (owner, _) in self.places.items() if id(owner) in own]

    def _key(self, names: list[str]) -> str:
        """The name in the files of a parameter that has these names in the model."""
        prefix = f"{self.model.base_model_prefix}."
        for name in names:
            for key in (name, name.removeprefix(prefix), prefix + name):
                if key in self.files:
                    return key
        raise LinearizeError(
            f"The weights in {self.folder} have no tensor {names[0]!r}: layer by layer, tensors are read by the "
            "model's own names, and this checkpoint names or packs them otherwise. Run it without --stream-layers."
        )

    def load(self, names: Iterable[str]) -> None:
        """Read parameters from the files."""
        for name in names:
            owner, last = self.places[name]
            like: Any = owner._parameters[last]
            if like.device.type == "meta":
                read = self._read(self.keys[name], like.shape, like.dtype)
                owner._parameters[last] = nn.Parameter(read, requires_grad=False)
                self.live += read.nbytes
        self.peak = max(self.peak, self.live)

    def drop(self, names: Iterable[str]) -> None:
        """Put parameters back onto the meta device."""
        for name in names:
            owner, last = self.places[name]
            held: Any = owner._parameters[last]
            if held.device.type != "meta":
                owner._parameters[last] = nn.Parameter(held.to("meta"), requires_grad=False)
                self.live -= held.nbytes

    @contextlib.contextmanager
    def at_hand(self, names: Iterable[str]) -> Iterator[None]:
        """Have some parameters while inside."""
        wanted = list(names)
        self.load(wanted)
        try:
            yield
        finally:
            self.drop(wanted)

    def of(self, block: range) -> list[str]:
        """Return the names of the parameters of a block of layers."""
        return [name for index in block for name in self.layers[index]]

    def _read(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One tensor in the model's dtype, a few rows at a time: no second copy in the files' dtype."""
        with safe_open(self.folder / self.files[key], "pt") as file:
            found = file.get_slice(key)
            if list(shape) != found.get_shape():
                raise LinearizeError(
                    f"The tensor {key!r} in {self.folder / self.files[key]} has the shape {found.get_shape()}, and its "
                    f"config.json makes it {list(shape)}. Download the model again."
                )
            made = torch.empty(shape, dtype=dtype, device=self.device)
            if not shape:
                return made.copy_(file.get_tensor(key))
            rows = max(1, CHUNK_BYTES * shape[0] // max(1, made.nbytes))
            for start in range(0, shape[0], rows):
                made[start : start + rows] = found[start : start + rows].to(self.device)
        return made
