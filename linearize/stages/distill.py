"""End-to-end distillation: the student's distribution of the next token is brought to the teacher's.

The teacher costs no second copy of the weights: it is the same decoder with the attention that surgery replaced and
without adapters. Logits, the teacher's and the student's, exist only a chunk of tokens at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor

from linearize.data import PackedRows
from linearize.modeling.heads import logits_of
from linearize.recipe import Distill
from linearize.stages import finetune
from linearize.stages.base import Run
from linearize.stages.finetune import FinetuneRunner


class DistillRunner(FinetuneRunner):
    """The stage on a converted model whose backbone is frozen or has adapters."""

    def __init__(self, settings: Distill, run: Run) -> None:
        super().__init__(settings, run)
        assert run.surgery is not None
        self.surgery = run.surgery

    @contextlib.contextmanager
    def _teacher(self) -> Iterator[None]:
        """Turn the model into the teacher: its own attention, no adapters, no dropout, no gradients."""
        decoder = self.run.model.get_decoder()
        training = decoder.training
        try:
            with self.surgery.installed(self.surgery.teachers), without_adapters(self.run.model), torch.no_grad():
                decoder.eval()
                yield
        finally:
            decoder.train(training)

    def _reference(self, inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
        """The teacher's last hidden states of the chosen tokens [N, hidden]."""
        with self._teacher(), self.run.precision():
            states: Tensor = self._states(inputs)[chosen]
        return states

    def _loss(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """The sum over tokens of KL and cross-entropy, each with its factor."""
        settings = self.settings
        assert reference is not None
        with torch.no_grad(), without_adapters(self.run.model), self.run.precision():
            teacher = logits_of(self.run.model, reference)
        wanted = F.log_softmax(teacher.float() / settings.temperature, -1)
        made = F.log_softmax(logits / settings.temperature, -1)
        if settings.divergence == "forward":
            divergence = F.kl_div(made, wanted, reduction="sum", log_target=True)
        else:
            divergence = F.kl_div(wanted, made, reduction="sum", log_target=True)
        loss: Tensor = settings.kl * settings.temperature**2 * divergence
        if settings.cross_entropy:
            loss = loss + settings.cross_entropy * F.cross_entropy(logits, targets, reduction="sum")
        return loss

    @torch.no_grad()
    def held_out_loss(self, rows: PackedRows) -> float:
        """Return the mean loss of the rows, each row with the same weight."""
        total = 0.0
        for index in range(len(rows)):
            row = rows[index : index + 1]
            inputs = row.inputs(self.run.device)
            chosen, targets = self._predictions(row, inputs)
            reference = self._reference(inputs, chosen)
            with self.run.precision():
                states = self._states(inputs)[chosen]
            for begin in range(0, len(targets), finetune.TOKENS_PER_CHUNK):
                part = slice(begin, begin + finetune.TOKENS_PER_CHUNK)
                with self.run.precision():
                    logits = logits_of(self.run.model, states[part])
                total += float(self._loss(logits.float(), targets[part], reference[part])) / len(targets)
        return total / len(rows)


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
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
