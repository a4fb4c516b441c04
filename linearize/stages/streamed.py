"""Attention transfer of a teacher that is never in memory as a whole: layer after layer from its files.

A block of layers is read, its mixers train on the hidden states at its entry, its results are written, all rows
are moved on through it, and it is dropped. What is kept of a model that is deep is what is kept of one that is not.

Legend: B rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linearize import checkpoint
from linearize.data import PackedRows, rows_seen
from linearize.eval import Quality, TeacherReference, evaluate
from linearize.eval.quality import batch_size
from linearize.layered import LayeredTeacher
from linearize.mixers.attention import LinearizedAttention, sharing
from linearize.modeling.classes import family_of, layers_of
from linearize.recipe_stages import Transfer
from linearize.report.metrics import Record, read_metrics
from linearize.stages import Run, run_stage
from linearize.stages.adapters import add_lora
from linearize.stages.base import stage_seed
from linearize.stages.blocks import BlockInputs, decoder_arguments, only, passed_by, with_hidden
from linearize.stages.transfer import TransferRunner
from linearize.surgery import Surgery, convert

NAME = "transfer"
STUDENTS = ("after surgery", "after transfer")


class StreamedRunner(TransferRunner):
    """The stage on one block, fed by hidden states that are at hand.

    Args:
        settings: the stage's, one block after the other.
        run: its surgery has the block's layers alone.
        stream: the whole.
        block: its layers.
    """

    def __init__(self, settings: Transfer, run: Run, stream: Stream, block: range) -> None:
        super().__init__(settings, run)
        self.stream = stream
        self.block = block

    def prepare(self) -> dict[str, nn.Parameter]:
        """As for all layers at once; the adapters of those before draw the random numbers that they draw there."""
        if self.targets:
            for index in self.stream.surgery.teachers:
                if index < self.block.start:
                    add_lora(sharing(self.family.module(self.decoder, index)), self.settings.lora, self.targets)
        return super().prepare()

    def block_inputs(self) -> BlockInputs:
        """The states of all rows, which are at the block's entry."""
        return self.stream.training_states

    def changes(self, name: str) -> bool:
        """What the block's layers do not share with the teacher."""
        return any(self.stream.owns(index, name) for index in self.block) or (
            super().changes(name) and any(name.startswith(self.stream.prefix(index)) for index in self.block)
        )


@dataclass
class Stream:
    """A streamed transfer.

    Args:
        teacher: layer by layer.
        surgery: of its model; from `convert_layers`.
        settings: of the stage.
        run: as for the whole model; `folder` gets a folder for each block.
        start: where `convert_layers` put the mixers.
        chosen: the layers that train: all, or a range that begins and ends with blocks.
        states: folder for the hidden states; None keeps them in memory.
        measure: take the held-out rows along, and measure at the end; for all layers only.
    """

    teacher: LayeredTeacher
    surgery: Surgery
    settings: Transfer
    run: Run
    start: Path
    chosen: range
    states: Path | None = None
    measure: bool = False
    training_states: BlockInputs = field(init=False)
    done: set[range] = field(init=False, default_factory=set)
    held: dict[str, BlockInputs] = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.teacher.model
        self.decoder = self.model.get_decoder()
        self.family = family_of(self.model.config)
        count, size = self.model.config.num_hidden_layers, self.settings.block
        self.blocks = [range(i, min(i + size, count)) for i in range(0, count, size)]
        self.settings = self.settings.model_copy(update={"order": "layerwise"})
        self.training_states = self._inputs("training", self._rows(), self._trained_on(), self._batch())
        rows, held_out = self.run.corpus.held_out, self.measure
        named = {"teacher": self._teacher_forward, **dict.fromkeys(STUDENTS, self._student_forward)}
        self.held = {
            name: self._inputs(name, rows, forward, batch_size(rows, None))
            for name, forward in named.items()
            if held_out
        }
        place = next(name for name, module in self.model.named_modules() if module is self.decoder)
        self.stem = f"{place}.{self.family.layers}"

    def _inputs(self, name: str, rows: PackedRows, forward: Any, batch: int) -> BlockInputs:
        folder = None if self.states is None else self.states / name.replace(" ", "-")
        return BlockInputs(rows, self.blocks, forward, batch, folder)

    def _rows(self) -> PackedRows:
        rows, settings = self.run.corpus.train, self.settings
        return rows_seen(rows, settings.batch, stage_seed(self.run.seed, NAME), settings.steps(rows.length))

    def _batch(self) -> int:
        return self.settings.micro_batch or self.settings.batch

    def _forward(self, rows: PackedRows, block: range, hidden: Tensor | None) -> Tensor:
        """Run rows through a block as the model is now."""
        hidden = None if hidden is None else hidden.to(self.run.device)
        with torch.no_grad(), only(self.model, block, hidden) as outputs:
            self.decoder(**decoder_arguments(self.model, rows, self.run.device, hidden))
        return outputs[0]

    def _teacher_forward(self, rows: PackedRows, block: range, hidden: Tensor | None) -> Tensor:
        with self.surgery.installed(self.surgery.teachers):
            return self._forward(rows, block, hidden)

    def _student_forward(self, rows: PackedRows, block: range, hidden: Tensor | None) -> Tensor:
        return self._forward(rows, block, hidden)

    def _trained_on(self) -> Callable[[PackedRows, range, Tensor | None], Tensor]:
        def forward(rows: PackedRows, block: range, hidden: Tensor | None) -> Tensor:
            with self.run.precision():
                return self._teacher_forward(rows, block, hidden)

        return forward

    def prefix(self, layer: int) -> str:
        """Return how the entries of a layer's attention begin in the model's state dict."""
        return f"{self.stem}.{layer}.{self.family.attention}."

    def owns(self, layer: int, name: str) -> bool:
        """Return whether an entry of the state dict is a mixer's of this layer, or reordered in it."""
        inside = name.startswith(self.prefix(layer))
        return inside and (".mixer." in name or layer in self.surgery.arranged)

    def folder(self, block: range) -> Path:
        """Return where a block's checkpoints, metrics and results lie."""
        return self.run.folder / "layers" / f"{block.start:04d}"

    def ended(self, block: range) -> Path:
        """Return where what a block ended with lies."""
        return self.folder(block) / f"{NAME}-ended"

    def turns(self) -> list[range]:
        """Return the blocks that have layers to convert, in order."""
        return [b for b in self.blocks if set(b) <= set(self.chosen) and any(i in self.surgery.teachers for i in b)]

    def rounds(self) -> list[range]:
        """Return the blocks that train, in order: not those whose converted layers have nothing to."""
        return [block for block in self.turns() if self._trains(block)]

    def train(self) -> dict[str, float]:
        """Transfer all chosen layers, and return tokens and seconds of training.

        A run that was killed goes on at the block, and at the step, that it was in.
        """
        turns = self.turns()
        behind = [number for number, block in enumerate(self.blocks) if block in turns and not self._ended(block)]
        if behind and max(self.training_states.places) > behind[0]:  # what a block ended with is damaged
            self.training_states.restart()
        if moving := self._moving(-1, turns):
            with self.teacher.at_hand(self.teacher.embedding):
                for states in moving:
                    states.move_to(0)
        for number, block in enumerate(self.blocks):
            mine, moving = block in turns, self._moving(number, turns)
            if not moving and (not mine or self._ended(block)):
                continue
            with self._at_hand(block):
                untrained = self.held.get("after surgery")
                if untrained is not None:
                    untrained.move_to(number + 1)
                if mine:
                    self._block(block)
                for states in moving:
                    states.move_to(number + 1)
        found = [checkpoint.state_of(self.ended(block)) for block in turns]
        spent = [state for state in found if state is not None]
        return {
            "tokens": max((state["tokens"] for state in spent), default=0.0),
            "seconds": sum(state["seconds"] for state in spent),
        }

    def _moving(self, number: int, turns: list[range]) -> list[BlockInputs]:
        """The states that have to pass block `number`, or the embedding at -1."""
        behind = self.blocks[number].start if number >= 0 else -1
        ahead = any(block.start > behind and not self._ended(block) for block in turns)
        wanted = [*self.held.values(), *([self.training_states] if ahead else [])]
        return [states for states in wanted if states.place <= number]

    def _ended(self, block: range) -> bool:
        if block not in self.done and checkpoint.state_of(self.ended(block)) is not None:  # which reads all of it
            self.done.add(block)
        return block in self.done

    def _block(self, block: range) -> None:
        """Train the block that is at hand, or load what it ended with."""
        steps, rounds = self.settings.steps(self.run.corpus.train.length), self.rounds()
        before = sum(steps for earlier in rounds if earlier.start < block.start)

        def progress(record: dict[str, Any]) -> None:
            self.run.progress({**record, "step": record["step"] + before, "steps": steps * len(rounds)})

        folder = self.folder(block)
        run = replace(
            self.run,
            model=self.model,
            surgery=self.surgery.only(block),
            folder=folder,
            metrics=folder / "metrics.jsonl",
            progress=progress,
            tell=lambda event: None if event["event"] == "stage" else self.run.tell(event),
        )
        runner = StreamedRunner(self.settings, run, self, block)
        if block in rounds:
            run_stage(self.settings, run, NAME, runner)
            self.done.add(block)
        elif not self._ended(block):  # what does not train is still another than the teacher's
            kept = {name: tensor for name, tensor in self.model.state_dict().items() if runner.changes(name)}
            checkpoint.save(self.ended(block), kept.items(), {"tokens": 0.0, "seconds": 0.0})

    def _trains(self, block: range) -> bool:
        """Whether a layer of the block has a mixer with parameters, or gets adapters."""
        students = [self.family.module(self.decoder, index) for index in block if index in self.surgery.teachers]
        adapted = bool(self.settings.train != "mixer" and students)
        return adapted or any(s.mixer is not None and any(True for _ in s.mixer.parameters()) for s in students)

    @contextlib.contextmanager
    def _at_hand(self, block: range) -> Iterator[None]:
        """Have a block's weights, the teacher's and those that its mixers start from."""
        converted = [index for index in block if index in self.surgery.teachers and index in self.chosen]
        with self.teacher.at_hand(self.teacher.of(block)):
            for index in converted:
                self.surgery.arrange(index)
                mixer = self.family.module(self.decoder, index).mixer
                if mixer is not None:
                    mixer.to_empty(device=self.run.device)
                    mixer.load_state_dict(load_file(start_file(self.start, index)))
            try:
                yield
            finally:
                for index in converted:
                    student = self.family.module(self.decoder, index)
                    if student.mixer is not None:
                        student.mixer.to("meta")
                    for name, child in self.surgery.teachers[index].named_children():
                        setattr(student, name, sharing(child))  # its own projections are written; they go

    def qualities(self) -> Iterator[tuple[str, Quality]]:
        """Measure teacher and student on the held-out rows, which have been through all layers."""
        held_out = self.run.corpus.held_out
        with self.teacher.at_hand(self.teacher.head):
            with self.surgery.installed(self.surgery.teachers), self._behind_all_layers("teacher"):
                reference = TeacherReference(self.model, held_out, own_head=False)
            yield "teacher", reference.quality
            for name in STUDENTS:
                with self._behind_all_layers(name):
                    yield name, evaluate(self.model, held_out, reference)

    @contextlib.contextmanager
    def _behind_all_layers(self, name: str) -> Iterator[None]:
        """Let the model take the last layer's output from what is kept of the rows that it is given."""
        states, first, kept = self.held[name], layers_of(self.model)[0], list[Tensor]()
        offset = self.family.first_position(self.model.config)

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            ids = args[0] if args else kwargs["input_ids"]
            places = kwargs["position_ids"] - (0 if self.family.isolates_documents else offset)
            kept[:] = [states.read(PackedRows(ids, places, ids)).to(self.run.device)]
            return (), with_hidden(kwargs, kept[0])

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return (kept[0], *args[1:]), kwargs

        with passed_by(self.model):
            hooks = [
                self.decoder.register_forward_pre_hook(read, with_kwargs=True),
                first.register_forward_pre_hook(enter, with_kwargs=True),
            ]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def metrics(self) -> list[Record]:
        """Return the records of all blocks as the stage's own: its steps run once for each block."""
        rounds = self.rounds()
        steps = self.settings.steps(self.run.corpus.train.length)
        tokens = self.settings.batch * self.run.corpus.train.length
        joined = []
        for turn, block in enumerate(rounds):
            for record in read_metrics(self.folder(block) / "metrics.jsonl"):
                step = turn * steps + record["step"]
                joined.append({**record, "step": step, "tokens": step * tokens // len(rounds)})
        return joined


def convert_layers(
    teacher: LayeredTeacher,
    mixer: dict[str, Any],
    layers: list[int],
    exact_heads: list[tuple[int, int]],
    start: Path,
    chosen: range,
) -> Surgery:
    """Convert a teacher without its weights; every mixer is drawn as for the whole model and put on the disk.

    Args:
        teacher: layer by layer.
        mixer: the recipe's, as plain data.
        layers: to convert.
        exact_heads: (layer, KV head) pairs.
        start: folder that gets a file for each chosen layer.
        chosen: layers.
    """
    start.mkdir(parents=True, exist_ok=True)

    def put_away(index: int, new: LinearizedAttention) -> None:
        if new.mixer is None:
            return
        new.mixer.to(teacher.dtype)
        path = start_file(start, index)
        if index in chosen and not path.exists():
            save_file({name: tensor.contiguous() for name, tensor in new.mixer.state_dict().items()}, f"{path}.new")
            Path(f"{path}.new").replace(path)
        new.mixer.to("meta")

    return convert(teacher.model, mixer, layers, exact_heads, put_away)


def start_file(folder: Path, layer: int) -> Path:
    """Return the file of what a layer's mixer starts from."""
    return folder / f"{layer:04d}.safetensors"
