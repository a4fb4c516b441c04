"""Attention transfer: every mixer learns its own layer's attention, fed by the teacher (LoLCATs, arXiv:2410.10254).

The teacher's forward pass runs once, without gradients. At each converted layer the mixer gets the teacher's input, its
output is compared with the teacher's, and the backward pass runs right there; the teacher's output goes on. So the
layers are isolated from each other and only one layer's graph exists at a time.

In blocks of several layers the student's hidden states pass from layer to layer inside a block, and so do gradients;
each block begins with the teacher's. One block after the other (`order: layerwise`), the teacher's hidden states of all
rows are kept at the entry of the block that trains.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from linearize.data import PackedRows
from linearize.errors import LinearizeError
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.context import SequenceContext, sequence_context
from linearize.modeling.classes import family_of
from linearize.recipe_stages import TRAINED_PROJECTIONS, Transfer
from linearize.stages import base
from linearize.stages.adapters import add_lora, attention_targets, lora_parameters, merge_lora
from linearize.stages.base import Run, StageRunner
from linearize.stages.blocks import BlockInputs, decoder_arguments, only
from linearize.stages.maps import check_map, map_cross_entropy
from linearize.stages.retention import retains, retention_loss
from linearize.stages.speed import FastPass, decoder_states


class TransferLayer(nn.Module):
    """Stands in a layer during the stage: runs the teacher's attention and trains the mixer on it.

    Args:
        teacher: the attention that was replaced.
        student: the module that replaced it.
        settings: the stage's.
    """

    def __init__(self, teacher: nn.Module, student: LinearizedAttention, settings: Transfer) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = student
        self.settings = settings
        self.context = SequenceContext()
        self.share: float | Tensor = 1.0
        self.stopped = False
        self.loss = torch.zeros(())

    def train(self, mode: bool = True) -> TransferLayer:
        """Set the student's mode; the teacher stays in evaluation, for its dropout would blur the target."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the teacher's output; the mixer's loss is in `loss`, its gradients in its parameters."""
        kwargs.pop("sequence_context", None)
        seen = Seen(self.teacher, self.student.family, self.settings)
        with seen:
            out = self.teacher(hidden_states, *args, **kwargs)[0]
        if self.stopped:
            return out, None
        positions = kwargs.get("position_embeddings")
        with torch.set_grad_enabled(self.training):
            made = self.student.heads(hidden_states, positions, self.context)
            if self.settings.target == "after_o_proj":
                loss = transfer_loss(self.student.family.output(self.student, made), seen.output, self.settings)
            else:
                loss = transfer_loss(made.flatten(-2), seen.output, self.settings)
            if self.settings.maps and self.student.mixer is not None:
                loss = loss + self.settings.maps * map_cross_entropy(
                    self.teacher, self.student, hidden_states, positions, self.context
                )
            if retains(self.student):
                loss = loss + retention_loss(self.teacher, self.student, hidden_states, positions, self.context)
            if self.training:
                (loss * self.share).backward()
        self.loss = loss.detach()
        return out, None


class Seen:
    """What the output projection of an attention module reads or, for `target: after_o_proj`, gives, while inside."""

    def __init__(self, attention: nn.Module, family: Any, settings: Transfer) -> None:
        self.projection = attention.get_submodule(family.projections["o_proj"])
        self.after = settings.target == "after_o_proj"
        self.outputs: list[Tensor] = []

    @property
    def output(self) -> Tensor:
        """What was seen last."""
        return self.outputs[-1]

    def __enter__(self) -> Seen:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.outputs.append(output if self.after else args[0])

        self.hook = self.projection.register_forward_hook(keep)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def transfer_loss(made: Tensor, wanted: Tensor, settings: Transfer) -> Tensor:
    """Return the squared error of a layer's output [B, T, ...], as the recipe scales it: the mean over rows."""
    made, wanted = made.float().flatten(1), wanted.float().flatten(1)
    loss = (made - wanted).square().mean(1)
    if settings.loss == "normalized_mse":
        loss = loss / wanted.square().mean(1).clamp(min=1e-12)
    return loss.mean() * settings.scale


class TransferRunner(StageRunner):
    """The stage over all converted layers."""

    trains_inside_forward = True

    def __init__(self, settings: Transfer, run: Run) -> None:
        super().__init__(settings, run)
        assert run.surgery is not None
        self.surgery = run.surgery
        self.decoder = run.model.get_decoder()
        self.family = family_of(run.model.config)
        self.targets = attention_targets(self.family, TRAINED_PROJECTIONS[settings.train])
        self.layers: dict[int, TransferLayer] = {}
        self.trained: dict[int, list[nn.Parameter]] = {}
        count = run.model.config.num_hidden_layers
        self.blocks = [range(i, min(i + settings.block, count)) for i in range(0, count, settings.block)]
        self.patience: dict[int, tuple[float, int]] = {}
        self.inputs: BlockInputs | None = None
        self.fast: FastPass | None = None

    def prepare(self) -> dict[str, nn.Parameter]:
        """Freeze the model, put the transfer layers in, and return the mixers' parameters (and adapters) by name.

        Raises:
            LinearizeError: `maps` is set and a mixer has no attention map, or blocks meet FSDP2 or `memory: retain`.
        """
        if self.run.processes.sharded and self.settings.block > 1:
            raise LinearizeError(
                f"A transfer stage with `block: {self.settings.block}` does not run under FSDP2. Use `block: 1`, or "
                "launch with configs/launch/ddp.yaml."
            )
        self.run.model.requires_grad_(False)
        trained = {}
        for index, teacher in self.surgery.teachers.items():
            student: Any = self.family.module(self.decoder, index)
            if self.settings.maps and student.mixer is not None:
                check_map(student.mixer)
            if self.settings.block > 1 and retains(student):
                raise LinearizeError(
                    f"`memory: retain` learns its scores from the teacher's attention on the teacher's own input; a "
                    f"transfer stage with `block: {self.settings.block}` gives layers the student's. Use `block: 1`."
                )
            if self.targets:
                add_lora(student, self.settings.lora, self.targets)
            own = {} if student.mixer is None else dict(student.mixer.named_parameters(prefix="mixer"))
            own.update(lora_parameters(student))
            if not own:  # all heads are exact
                continue
            for name, parameter in own.items():
                parameter.requires_grad_(True)
                trained[f"layers.{index}.{name}"] = parameter
            self.layers[index] = TransferLayer(teacher, student, self.settings)
            self.trained[index] = list(own.values())
        self.inputs = self.block_inputs()
        whole = not self.run.processes.sharded  # what gathers weights meanwhile is not captured
        if whole and self.inputs is None and self.settings.block == 1 and self.settings.patience is None:
            self.fast = FastPass(self._whole, list(trained.values()), self.passes(), self.run.device)
        return trained

    def weights(self, rows: PackedRows) -> Tensor:
        """Every row counts the same, whatever its labels."""
        return torch.ones(len(rows), dtype=torch.float64)

    def block_inputs(self) -> BlockInputs | None:
        """Return the teacher's hidden states, block by block, where blocks train one after the other."""
        if self.settings.order != "layerwise":
            return None
        return BlockInputs(self.rows_seen(), self.blocks, self._advance, self.micro)

    @property
    def rounds(self) -> int:
        """How often the stage's steps run: once, or layerwise once for each block that has something to train."""
        return len(self._turns()) if self.inputs is not None else 1

    def shrink(self) -> None:
        """As for every stage; a captured pass is made anew."""
        super().shrink()
        if self.fast is not None:
            self.fast = FastPass(self._whole, self.fast.parameters, self.passes(), self.run.device)

    def _turns(self) -> list[int]:
        """The blocks that have something to train."""
        return [place for place, block in enumerate(self.blocks) if any(index in self.layers for index in block)]

    def begin(self, turn: int) -> None:
        """Bring the teacher's hidden states to the block that trains now."""
        if self.inputs is not None:
            self.inputs.move_to(self._turns()[turn])

    def clip_groups(self, trained: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
        """Clip each block on its own: their losses have nothing to do with each other."""
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            groups.setdefault(int(name.split(".")[1]) // self.settings.block, []).append(parameter)
        return list(groups.values())

    def _set(self, positions: Tensor, training: bool, share: float | Tensor) -> None:
        """Tell the layers about a pass over rows with these position ids."""
        batch, length = positions.shape
        context = sequence_context(batch, length, None, positions, None)
        for layer in self.layers.values():
            layer.share, layer.context = share, context
            layer.train(training)

    def _whole(self, input_ids: Tensor, position_ids: Tensor, share: Tensor, training: bool = True) -> Tensor:
        """Run, or train, every layer on rows [B, T] that have `share` [] of a batch; return the losses [layers]."""
        self._set(position_ids, training, share)
        with self.surgery.installed({**self.surgery.teachers, **self.layers}), torch.no_grad(), self.run.precision():
            decoder_states(self.decoder, input_ids, position_ids)
        return torch.stack([layer.loss for layer in self.layers.values()])

    def _pass(self, rows: PackedRows, training: bool, share: float = 1.0) -> dict[int, float]:
        """Run rows, or the block whose turn it is, and return the loss of each layer that was run."""
        inputs = rows.inputs(self.run.device)
        place = None if self.inputs is None or not training else self.inputs.place
        if place is None and self.settings.block == 1:
            given = inputs["input_ids"], inputs["position_ids"], torch.tensor(share, device=self.run.device)
            every = self.fast(*given) if training and self.fast is not None else self._whole(*given, training)
            return dict(zip(self.layers, every.tolist(), strict=True))
        self._set(inputs["position_ids"], training, share)
        hidden = None if place is None else self._input(rows)
        blocks = self.blocks if place is None else [self.blocks[place]]
        ran = [index for block in blocks for index in block if index in self.layers]
        if self.settings.block == 1:
            with self.surgery.installed({**self.surgery.teachers, **self.layers}), torch.no_grad():
                self._run(rows, blocks[0], hidden)
        else:
            for block in blocks:
                hidden = self._block(rows, block, hidden, training)
        losses = torch.stack([self.layers[index].loss for index in ran]).tolist()
        return dict(zip(ran, losses, strict=True))

    def _input(self, rows: PackedRows) -> Tensor | None:
        """What is kept of the rows at the entry of the block whose turn it is."""
        return None if self.inputs is None else self.inputs.read(rows).to(self.run.device)

    def _run(self, rows: PackedRows, block: range, hidden: Tensor | None) -> Tensor:
        """Run a block of the decoder from its input (None: what is embedded), and return the block's output."""
        with self.run.precision(), only(self.run.model, block, hidden) as outputs:
            self.decoder(**decoder_arguments(self.run.model, rows, self.run.device, hidden))
        return outputs[0]

    def _advance(self, rows: PackedRows, block: range, hidden: Tensor | None) -> Tensor:
        """The teacher's output of a block, from its input."""
        with self.surgery.installed(self.surgery.teachers), torch.no_grad():
            return self._run(rows, block, None if hidden is None else hidden.to(self.run.device))

    def _block(self, rows: PackedRows, block: range, hidden: Tensor | None, training: bool) -> Tensor:
        """Run teacher and student through a block, train the student on the teacher, return the teacher's output."""
        layers = {index: self.layers[index] for index in block if index in self.layers}
        teachers = {index: Seen(layer.teacher, self.family, self.settings) for index, layer in layers.items()}
        with contextlib.ExitStack() as stack:
            for seen in teachers.values():
                stack.enter_context(seen)
            output = self._advance(rows, block, hidden)
        if not layers:
            return output
        for layer in layers.values():
            layer.student.context = layer.context
        students = {index: Seen(layer.student, self.family, self.settings) for index, layer in layers.items()}
        attention = {**self.surgery.teachers, **{index: layer.student for index, layer in layers.items()}}
        with contextlib.ExitStack() as stack:
            for seen in students.values():
                stack.enter_context(seen)
            stack.enter_context(self.surgery.installed(attention))
            stack.enter_context(torch.set_grad_enabled(training))
            self._run(rows, block, hidden)
            losses = {
                index: transfer_loss(seen.output, teachers[index].output, self.settings)
                for index, seen in students.items()
            }
            if training:
                (torch.stack(list(losses.values())).sum() * next(iter(layers.values())).share).backward()
        for index, layer in layers.items():
            layer.loss = layer.loss if layer.stopped else losses[index].detach()
        return output

    def backward(self, rows: PackedRows, share: float) -> dict[str, Any]:
        """Train every layer on a micro-batch; `loss` is the mean over layers, `layers` has each."""
        losses = {index: loss * share for index, loss in self._pass(rows, training=True, share=share).items()}
        for index, parameters in self.trained.items():
            if self.layers[index].stopped:
                for parameter in parameters:
                    parameter.grad = None
        return {"loss": sum(losses.values()) / len(losses), "layers": losses}

    def _held_out(self, rows: PackedRows) -> dict[int, float]:
        """The mean over rows of each layer's loss."""
        each = [self._pass(rows[i : i + 1], training=False) for i in range(len(rows))]
        return {index: sum(losses[index] for losses in each) / len(each) for index in each[0]}

    def held_out_loss(self, rows: PackedRows) -> float:
        """Return the mean over layers and rows."""
        losses = self._held_out(rows)
        return sum(losses.values()) / len(losses)

    def after_step(self, step: int) -> bool:
        """Stop the layers whose held-out loss has not fallen for too long; return whether any still trains."""
        if self.settings.patience is None or step % base.PLATEAU_STEPS:
            return True
        losses = self.run.processes.agreed(self._held_out(self.held_out()))
        for index, loss in losses.items():
            layer, (best, waited) = self.layers[index], self.patience.get(index, (float("inf"), 0))
            if layer.stopped:
                continue
            self.patience[index] = (loss, 0) if loss < best else (best, waited + 1)
            layer.stopped = self.patience[index][1] >= self.settings.patience
            layer.loss = torch.tensor(loss, device=self.run.device)
        return not all(layer.stopped for layer in self.layers.values())

    def state(self) -> dict[str, Any]:
        """Return which layers have stopped, their losses, and how long the others have waited."""
        return {
            str(index): [*self.patience[index], layer.stopped, float(layer.loss)]
            for index, layer in self.layers.items()
            if index in self.patience
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        for key, (best, waited, stopped, loss) in state.items():
            layer = self.layers[int(key)]
            self.patience[int(key)] = (best, waited)
            layer.stopped, layer.loss = stopped, torch.tensor(loss, device=self.run.device)

    def finish(self) -> None:
        """Merge adapters into projections of the mixers' own and leave the teacher's as they are."""
        self.inputs = self.fast = None
        for layer in self.layers.values():
            layer.student.context = None
            merge_lora(layer.student)
        self.run.model.requires_grad_(False)

    def changes(self, name: str) -> bool:
        """The mixers, and with adapters the projections that they were merged into."""
        place = self.family.attention
        return ".mixer." in name or any(f".{place}.{target}." in name for target in self.targets)
