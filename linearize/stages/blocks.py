"""A decoder that runs some of its layers, from hidden states that are at hand.

Legend: B rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize.data import PackedRows
from linearize.errors import LinearizeError
from linearize.modeling.classes import family_of, layers_of, packed_inputs
from linearize.stages.teachers import hidden_output
from linearize.weights import check_safetensors

STATES, PLACE = "states", "place"


def decoder_arguments(model: Any, rows: PackedRows, device: torch.device, hidden: Tensor | None = None) -> Any:
    """Return what a decoder is called with to run rows [B, T]: their tokens, or hidden states in their place.

    Args:
        model: a teacher or a converted model.
        rows: to run.
        device: of the decoder.
        hidden: what `only` lets the first layer of a block read [B, T, hidden]; nothing is embedded then.
    """
    inputs = rows.inputs(device)
    inputs.pop("labels")
    arguments = {**packed_inputs(model.config, inputs), "use_cache": False}
    return arguments if hidden is None else with_hidden(arguments, hidden)


def with_hidden(arguments: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
    """Return a decoder's arguments with hidden states in the place of tokens."""
    return {**{name: value for name, value in arguments.items() if name != "input_ids"}, "inputs_embeds": hidden}


@contextlib.contextmanager
def only(model: Any, block: range, hidden: Tensor | None) -> Iterator[list[Tensor]]:
    """Let a decoder's forward pass run the layers of a block alone; masks and positions are its own, as always.

    Args:
        model: of a known family.
        block: which layers; without any, nothing but the embedding runs.
        hidden: the input of the first of them [B, T, hidden]; None is what the embedding gives.

    Yields:
        A list that receives the output of the last [B, T, hidden].
    """
    outputs: list[Tensor] = []
    layers = layers_of(model)
    first, last = (block[0], block[-1]) if block else (0, 0)

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args, kwargs) if hidden is None else ((hidden, *args[1:]), kwargs)

    with passed_by(model, block):
        hooks = [
            layers[first].register_forward_pre_hook(enter, with_kwargs=True),
            layers[last].register_forward_hook(lambda module, args, output: outputs.append(hidden_output(output))),
        ]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def passed_by(model: Any, block: range = range(0)) -> Iterator[None]:
    """Let every layer of a decoder but those of a block hand on its input as it is."""
    family = family_of(model.config)
    others = [layer for index, layer in enumerate(layers_of(model)) if index not in block]
    for layer in others:
        layer.forward = lambda hidden_states, *args, **kwargs: family.layer_output(hidden_states)
    try:
        yield
    finally:
        for layer in others:
            del layer.forward


class BlockInputs:
    """Hidden states of all rows at the entry of one block, moved on block by block: on the CPU, or in files.

    Rows that run together are moved on, and written, together; a file appears whole or not at all. So a run that was
    killed goes on from its files, some of which may be a block ahead.

    Args:
        rows: [N, T], all that will be asked for.
        blocks: the decoder's layers, in blocks.
        advance: runs rows through a block: (rows, block, its input) -> its output [B, T, hidden]; an empty block and
            None ask for what is embedded.
        batch: rows that run together.
        folder: of the files; None keeps the states in memory.
    """

    def __init__(
        self,
        rows: PackedRows,
        blocks: list[range],
        advance: Callable[[PackedRows, range, Tensor | None], Tensor],
        batch: int,
        folder: Path | None = None,
    ) -> None:
        self.blocks = blocks
        self.advance = advance
        self.folder = folder
        self.parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        self.where = {
            states_key(part[index : index + 1]): (number, index)
            for number, part in enumerate(self.parts)
            for index in range(len(part))
        }
        self.states: dict[int, Tensor] = {}
        self.places = [self._place(number) for number in range(len(self.parts))]

    @property
    def place(self) -> int:
        """The block at whose entry the hindmost rows are; -1 before they are embedded."""
        return min(self.places)

    def move_to(self, place: int) -> None:
        """Bring the states to the entry of block number `place`; rows that are there or beyond stay."""
        for number in range(self.place, place):
            block = range(0) if number < 0 else self.blocks[number]
            for part, rows in enumerate(self.parts):
                if self.places[part] == number:
                    self._write(part, self.advance(rows, block, self._read(part)).cpu(), number + 1)

    def restart(self) -> None:
        """Forget the states: the rows are to be embedded anew."""
        self.places = [-1] * len(self.parts)

    def read(self, rows: PackedRows) -> Tensor:
        """Return the states of rows [B, T, hidden] on the CPU."""
        found = [self.where[states_key(rows[index : index + 1])] for index in range(len(rows))]
        if self.folder is None:
            return torch.stack([self.states[part][index] for part, index in found])
        states = []
        for part, index in found:
            with safe_open(self._file(part), "pt") as file:
                states.append(file.get_slice(STATES)[index])
        return torch.stack(states)

    def _read(self, part: int) -> Tensor | None:
        if self.places[part] < 0:
            return None
        if self.folder is None:
            return self.states[part]
        with safe_open(self._file(part), "pt") as file:
            found: Tensor = file.get_tensor(STATES)
        return found

    def _write(self, part: int, states: Tensor, place: int) -> None:
        if self.folder is None:
            self.states[part] = states
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = self._file(part).with_suffix(".new")
            save_file({STATES: states.contiguous()}, beside, {PLACE: str(place)})
            beside.replace(self._file(part))
        self.places[part] = place

    def _place(self, part: int) -> int:
        """Where a file's rows are; what is missing or damaged is embedded anew."""
        if self.folder is None or not self._file(part).is_file():
            return -1
        try:
            check_safetensors(self._file(part))
        except LinearizeError:
            return -1
        with safe_open(self._file(part), "pt") as file:
            return int(file.metadata()[PLACE])

    def _file(self, part: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{part:05d}.safetensors"


def states_key(row: PackedRows) -> bytes:
    """Return what tells a row [1, T] from others that a decoder would run differently."""
    digest = hashlib.sha256()
    for tensor in (row.input_ids, row.position_ids):
        digest.update(tensor.int().cpu().contiguous().numpy().tobytes())
    return digest.digest()
