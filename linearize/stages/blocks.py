"""A decoder that runs some of its layers, from hidden states that are at hand.

Legend: B rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from linearize.data import PackedRows
from linearize.modeling.classes import family_of, layers_of
from linearize.stages.teachers import hidden_output, row_key


@contextlib.contextmanager
def only(model: Any, block: range, hidden: Tensor | None) -> Iterator[list[Tensor]]:
    """Let a decoder's forward pass run the layers of a block alone; masks and positions are its own, as always.

    Args:
        model: of a known family.
        block: which layers.
        hidden: the input of the first of them [B, T, hidden]; None is what the embedding gives.

    Yields:
        A list that receives the output of the last [B, T, hidden].
    """
    outputs: list[Tensor] = []
    family, layers = family_of(model.config), layers_of(model)
    others = [layer for index, layer in enumerate(layers) if index not in block]
    for layer in others:
        layer.forward = lambda hidden_states, *args, **kwargs: family.layer_output(hidden_states)

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args, kwargs) if hidden is None else ((hidden, *args[1:]), kwargs)

    hooks = [
        layers[block[0]].register_forward_pre_hook(enter, with_kwargs=True),
        layers[block[-1]].register_forward_hook(lambda module, args, output: outputs.append(hidden_output(output))),
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
        for layer in others:
            del layer.forward


class BlockInputs:
    """The teacher's hidden states of all rows at the entry of one block, on the CPU; moved on block by block.

    Args:
        rows: [N, T], all that will be asked for.
        blocks: the decoder's layers, in blocks.
        advance: runs the teacher through a block: (rows, block, its input or None) -> its output [B, T, hidden].
        batch: rows that run together.
    """

    def __init__(
        self,
        rows: PackedRows,
        blocks: list[range],
        advance: Callable[[PackedRows, range, Tensor | None], Tensor],
        batch: int,
    ) -> None:
        self.rows = rows
        self.blocks = blocks
        self.advance = advance
        self.batch = batch
        self.place = 0
        self.states: dict[bytes, Tensor] = {}

    def move_to(self, place: int) -> None:
        """Bring the states to the entry of block number `place`, which is never before the present one."""
        for number in range(self.place, place):
            for start in range(0, len(self.rows), self.batch):
                part = self.rows[start : start + self.batch]
                output = self.advance(part, self.blocks[number], self.read(part)).cpu()
                for index in range(len(part)):
                    self.states[row_key(part[index : index + 1])] = output[index]
            self.place = number + 1

    def read(self, rows: PackedRows) -> Tensor | None:
        """Return the states of rows [B, T, hidden] on the CPU, or None at the first block, whose input is embedded."""
        if self.place == 0:
            return None
        return torch.stack([self.states[row_key(rows[index : index + 1])] for index in range(len(rows))])
