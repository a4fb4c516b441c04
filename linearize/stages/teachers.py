"""The teacher of an end-to-end stage: the student's own model as it was, or a copy, and what it said, kept on the disk.

Legend: B rows, T tokens a row, N labelled tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn

from linearize import checkpoint
from linearize.data import PackedRows
from linearize.modeling.classes import layers_of
from linearize.modeling.heads import logits_of
from linearize.processes import Processes
from linearize.stages.base import Run
from linearize.stages.finetune import Tensors, final_states

ROWS_PER_SHARD = 64


@contextlib.contextmanager
def layer_outputs(model: Any) -> Iterator[list[Tensor]]:
    """Collect the outputs [B, T, hidden] of a decoder's layers, in order, while it runs."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(hidden_output(output))

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def hidden_output(output: Any) -> Tensor:
    """Return the hidden states in what a decoder's layer returns: them, or a tuple that begins with them."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


class Teacher:
    """The model before surgery.

    It costs no second copy of the weights where the student's are still the teacher's: it is the same decoder with the
    attention that surgery replaced and without adapters. Where the run says `teacher_copy`, it is loaded anew.

    Args:
        run: of the stage.
        device: where a copy goes; the run's own by default.
    """

    def __init__(self, run: Run, device: str | None = None) -> None:
        self.run = run
        self.surgery = run.surgery
        self.device = run.device if device is None else torch.device(device)
        self.copy: Any = None
        if run.teacher_copy:
            assert run.load_teacher is not None
            self.copy = run.load_teacher(self.device).eval().requires_grad_(False)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Any]:
        """Give the model that is the teacher: its own attention, no adapters, no dropout, no gradients."""
        if self.copy is not None:
            with torch.no_grad(), self.run.precision():
                yield self.copy
            return
        decoder = self.run.model.get_decoder()
        training = decoder.training
        own = contextlib.nullcontext() if self.surgery is None else self.surgery.installed(self.surgery.teachers)
        with own, without_adapters(self.run.model), torch.no_grad():
            decoder.eval()
            try:
                with self.run.precision():
                    yield self.run.model
            finally:
                decoder.train(training)

    def states(self, inputs: Tensors, with_layers: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return the final states [B, T, hidden], on the teacher's device, and on demand each layer's output.

        Args:
            inputs: from `PackedRows.inputs`.
            with_layers: also return the outputs of all layers [B, T, hidden].
        """
        with self.at_work() as model, contextlib.ExitStack() as stack:
            outputs = stack.enter_context(layer_outputs(model)) if with_layers else []
            states = final_states(model, {name: tensor.to(self.device) for name, tensor in inputs.items()})
        return states, outputs

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of final states in fp32, on the run's device."""
        model = self.run.model if self.copy is None else self.copy
        with torch.no_grad(), without_adapters(self.run.model), self.run.precision():
            return logits_of(model, states).to(self.run.device).float()


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch every LoRA adapter of a model off, and on again; which parameters train stays as it is."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [module._disable_adapters for module in adapted]
    for module in adapted:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, disabled in zip(adapted, before, strict=True):
            module._disable_adapters = disabled


class KeptAnswers:
    """What a teacher said about rows, computed once and read back row by row, from shards on the disk.

    An interrupted writer goes on behind its last whole shard. Rows are found by their content.

    Args:
        folder: of the shards.
        rows: [R, T], all that will be asked for.
        settings: what the answers depend on besides the rows.
    """

    def __init__(self, folder: Path, rows: PackedRows, settings: dict[str, Any]) -> None:
        self.rows = rows
        self.keys = [row_key(rows[index : index + 1]) for index in range(len(rows))]
        digest = hashlib.sha256(repr(sorted(settings.items())).encode() + b"".join(self.keys)).hexdigest()[:16]
        self.folder = folder.with_name(f"{folder.name}-{digest}")
        self.places: dict[bytes, tuple[int, int, int]] = {}

    def fill(self, answer: Callable[[], Callable[[PackedRows], Tensors]], processes: Processes) -> None:
        """Write the shards that are missing, and learn where each row's part lies.

        Args:
            answer: makes what answers one row, called only where a shard is missing: tensors whose first axes agree.
            processes: that share the shards.
        """
        shards = range(-(-len(self.rows) // ROWS_PER_SHARD))
        missing = processes.once(lambda: [n for n in shards if checkpoint.state_of(self._shard(n)) is None])
        ask = answer() if missing else None
        for shard in processes.mine(missing):
            assert ask is not None
            answers = [ask(self.rows[index : index + 1]) for index in self._rows_of(shard)]
            joined = {name: torch.cat([a[name] for a in answers]) for name in answers[0]}
            if processes.main or not processes.sharded:
                sizes = [len(next(iter(a.values()))) for a in answers]
                checkpoint.save(self._shard(shard), joined.items(), {"sizes": sizes})
        processes.wait()
        for shard in shards:
            found, begin = checkpoint.state_of(self._shard(shard)), 0
            assert found is not None
            for index, size in zip(self._rows_of(shard), found["sizes"], strict=True):
                self.places[self.keys[index]] = (shard, begin, begin + size)
                begin += size

    def _rows_of(self, shard: int) -> range:
        return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(self.rows)))

    def read(self, rows: PackedRows) -> Tensors:
        """Return the answers about rows, one after the other, on the CPU."""
        parts: list[Tensors] = []
        for index in range(len(rows)):
            shard, begin, end = self.places[row_key(rows[index : index + 1])]
            with safe_open(self._shard(shard) / checkpoint.TENSORS, "pt") as file:
                parts.append({name: file.get_slice(name)[begin:end] for name in file.keys()})  # noqa: SIM118
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:05d}"


def row_key(row: PackedRows) -> bytes:
    """Return what tells a row [1, T] from others."""
    digest = hashlib.sha256()
    for tensor in row.tensors().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()
