"""Attention transfer: every mixer learns its own layer's attention, fed by the teacher (LoLCATs, arXiv:2410.10254).

The teacher's forward pass runs once, without gradients. At each converted layer the mixer gets the teacher's input, its
output is compared with the teacher's, and the backward pass runs right there; the teacher's output goes on. So the
layers are isolated from each other and only one layer's graph exists at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.data import PackedRows
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.context import SequenceContext, sequence_context
from linearize.modeling.classes import family_of, packed_inputs
from linearize.recipe import TRAINED_PROJECTIONS, Transfer
from linearize.stages.adapters import add_lora, attention_targets, lora_parameters, merge_lora
from linearize.stages.base import Run, StageRunner


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
        self.share = 1.0
        self.loss = torch.zeros(())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the teacher's output; the mixer's loss is in `loss`, its gradients in its parameters."""
        self.teacher.eval()  # its dropout would blur the target
        kwargs.pop("sequence_context", None)
        heads: list[Tensor] = []
        family = self.student.family

        def record(module: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
            heads.extend((given[0], made))

        hook = self.teacher.get_submodule(family.projections["o_proj"]).register_forward_hook(record)
        try:
            out = self.teacher(hidden_states, *args, **kwargs)[0]
        finally:
            hook.remove()
        with torch.set_grad_enabled(self.training):
            made = self.student.heads(hidden_states, kwargs.get("position_embeddings"), self.context)
            if self.settings.target == "after_o_proj":
                loss = self._loss(family.output(self.student, made), heads[1])
            else:
                loss = self._loss(made.flatten(-2), heads[0])
            if self.training:
                (loss * self.share).backward()
        self.loss = loss.detach()
        return out, None

    def _loss(self, made: Tensor, wanted: Tensor) -> Tensor:
        made, wanted = made.float(), wanted.float()
        loss = (made - wanted).square().mean()
        if self.settings.loss == "normalized_mse":
            loss = loss / wanted.square().mean().clamp(min=1e-12)
        return loss * self.settings.scale


class TransferRunner(StageRunner):
    """The stage over all converted layers."""

    def __init__(self, settings: Transfer, run: Run) -> None:
        super().__init__(settings, run)
        assert run.surgery is not None
        self.surgery = run.surgery
        self.decoder = run.model.get_decoder()
        self.family = family_of(run.model.config)
        self.targets = attention_targets(self.family, TRAINED_PROJECTIONS[settings.train])
        self.layers: dict[int, TransferLayer] = {}

    def prepare(self) -> dict[str, nn.Parameter]:
        """Freeze the model, put the transfer layers in, and return the mixers' parameters (and adapters) by name."""
        self.run.model.requires_grad_(False)
        trained = {}
        for index, teacher in self.surgery.teachers.items():
            student: Any = self.family.module(self.decoder, index)
            if self.targets:
                add_lora(student, self.settings.lora, self.targets)
            own = {} if student.mixer is None else dict(student.mixer.named_parameters(prefix="mixer"))
            own.update(lora_parameters(student))
            for name, parameter in own.items():
                parameter.requires_grad_(True)
                trained[f"layers.{index}.{name}"] = parameter
            self.layers[index] = TransferLayer(teacher, student, self.settings)
        return trained

    def clip_groups(self, trained: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
        """Clip each layer on its own: their losses have nothing to do with each other."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            groups.setdefault(name.split(".")[1], []).append(parameter)
        return list(groups.values())

    def _pass(self, rows: PackedRows, training: bool, share: float = 1.0) -> list[float]:
        inputs = packed_inputs(self.run.model.config, rows.inputs(self.run.device))
        inputs.pop("labels")
        batch, length = inputs["input_ids"].shape
        context = sequence_context(batch, length, None, inputs["position_ids"], None)
        for layer in self.layers.values():
            layer.share, layer.context = share, context
            layer.train(training)
        with self.surgery.installed(self.layers), torch.no_grad(), self.run.precision():
            self.decoder(**inputs, use_cache=False)
        return torch.stack([layer.loss for layer in self.layers.values()]).tolist()

    def backward(self, rows: PackedRows, share: float) -> dict[str, Any]:
        """Train every layer on a micro-batch; `loss` is the mean over layers, `layers` has each."""
        losses = [loss * share for loss in self._pass(rows, training=True, share=share)]
        return {"loss": sum(losses) / len(losses), "layers": dict(zip(self.layers, losses, strict=True))}

    def held_out_loss(self, rows: PackedRows) -> float:
        """Return the mean over layers and rows."""
        each = [self._pass(rows[i : i + 1], training=False) for i in range(len(rows))]
        return sum(map(sum, each)) / (len(each) * len(each[0]))

    def finish(self) -> None:
        """Merge adapters into projections of the mixers' own and leave the teacher's as they are."""
        for layer in self.layers.values():
            merge_lora(layer.student)
        self.run.model.requires_grad_(False)

    def changes(self, name: str) -> bool:
        """The mixers, and with adapters the projections that they were merged into."""
        place = self.family.attention
        return ".mixer." in name or any(f".{place}.{target}." in name for target in self.targets)
