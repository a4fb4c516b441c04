"""Fine-tuning: LoRA adapters, merged at the end, or all parameters.

The loss is the cross-entropy of the next token, or in an encoder that of masked tokens.

Legend: B rows, T tokens a row, N labelled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.data import PackedRows
from linearize.data.masking import mask_rows
from linearize.errors import LinearizeError
from linearize.mixers.retain import RetainMemory
from linearize.modeling.classes import family_of
from linearize.modeling.heads import logits_of
from linearize.stages.adapters import add_lora, lora_parameters, lora_targets, merge_lora
from linearize.stages.base import Run, StageRunner
from linearize.stages.meanwhile import unrounded
from linearize.stages.speed import FastDecoder, decoder_states

TOKENS_PER_CHUNK = 1024
MERGE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
Tensors = dict[str, Tensor]


def final_states(model: Any, inputs: Tensors) -> Tensor:
    """Return the states [B, T, hidden] that a model's output embedding reads."""
    return decoder_states(model.get_decoder(), inputs["input_ids"], inputs["position_ids"])


def predictions(rows: PackedRows, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which final states predict a label, [B, T] bool, and those labels, [N].

    Args:
        rows: B rows.
        labels: theirs [B, T], on the device.
    """
    asked = rows.predicted().to(labels.device)
    return asked if rows.masked else asked.roll(-1, 1), labels[asked]


class FinetuneRunner(StageRunner):
    """The stage on a whole model."""

    def __init__(self, settings: Any, run: Run) -> None:
        super().__init__(settings, run)
        self.decoder = FastDecoder(run.model, passes=0)

    def prepare(self) -> dict[str, nn.Parameter]:
        """Choose what trains and return it by name.

        Raises:
            LinearizeError: nothing that trains has a gradient.
        """
        model = self.run.model
        model.requires_grad_(False)
        model.train()
        if self.settings.train == "full":
            model.requires_grad_(True)
            trained = dict(model.named_parameters())
        elif self.settings.train == "attention":
            trained = {name: p for name, p in model.named_parameters() if self._in_attention(name)}
        elif self.settings.train == "lora":
            add_lora(model, self.settings.lora, self._targets())
            model.requires_grad_(False)
            trained = lora_parameters(model)
        else:
            trained = {}
        if self.settings.train_mixer:
            trained.update({n: p for n, p in model.named_parameters() if ".mixer." in n})
        if trained and trained.keys() <= _scores(model):
            raise LinearizeError(
                f"A stage with `train: {self.settings.train}` has only the scores of `memory: retain` to train, which "
                "learn in a transfer stage alone. Use `train: lora`, or drop the stage."
            )
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        passes = 0 if self.run.processes.sharded else self.passes()  # layers that gather their weights stay as they are
        tokens = self.settings.tokens // self.run.processes.count
        self.decoder = FastDecoder(model, passes, tokens, graph=not self.settings.gradient_checkpointing)
        return trained

    def shrink(self) -> None:
        """As for every stage; what was captured of a larger pass goes."""
        super().shrink()
        self.decoder.forget()

    def _targets(self) -> list[str]:
        return lora_targets(self.run.model, self.settings.lora.targets)

    def _in_attention(self, name: str) -> bool:
        """Whether an entry of the model's state dict is in attention that is converted by now, and not all exact."""
        family = family_of(self.run.model.config)
        decoder = self.run.model.get_decoder()
        converted = [
            i for i in self.run.model.config.linearize["layers"] if family.module(decoder, i).mixer is not None
        ]
        return any(f".{family.layers}.{index}.{family.attention}." in f".{name}" for index in converted)

    def batch(self, rows: PackedRows) -> PackedRows:
        """Mask an encoder's rows, anew at every step."""
        masking = self.run.corpus.masking
        return rows if masking is None else mask_rows(rows, masking, int(torch.randint(2**31, ())))

    def _reference(self, rows: PackedRows, inputs: Tensors, chosen: Tensor) -> Tensors:
        """What `_loss` compares with besides the labels: tensors [N, ...], one entry for each chosen token."""
        return {}

    def _states(self, inputs: Tensors, chosen: Tensor, reference: Tensors) -> tuple[Tensor, Tensor | None]:
        """The final states of the chosen tokens [N, hidden], and a loss per token beside that of the logits."""
        return self.decoder(inputs["input_ids"], inputs["position_ids"])[chosen], None

    def _loss(self, logits: Tensor, targets: Tensor, reference: Tensors) -> Tensor:
        """The losses [N] of logits [N, vocabulary] in fp32 with targets [N]."""
        loss = F.cross_entropy(logits, targets, reduction="none")
        if self.settings.z_loss:
            loss = loss + self.settings.z_loss * logits.logsumexp(-1).square()
        return loss

    def _forward(self, rows: PackedRows) -> tuple[Tensor, Tensor, Tensor | None, Tensors]:
        """The final states and the targets of the N labelled tokens, the loss beside, and the reference."""
        inputs = rows.inputs(self.run.device)
        chosen, targets = predictions(rows, inputs["labels"])
        reference = self._reference(rows, inputs, chosen)
        with self.run.precision():
            states, beside = self._states(inputs, chosen, reference)
        return states, targets, beside, reference

    def _chunk_losses(self, states: Tensor, targets: Tensor, reference: Tensors) -> Iterator[Tensor]:
        """The losses of the tokens, a chunk of them at a time."""
        for begin in range(0, len(targets), TOKENS_PER_CHUNK):
            part = slice(begin, begin + TOKENS_PER_CHUNK)
            with self.run.precision():
                logits = logits_of(self.run.model, states[part])
            beside = {name: tensor[part] for name, tensor in reference.items()}
            yield self._loss(logits.float(), targets[part], beside)

    def backward(self, rows: PackedRows, share: float) -> dict[str, Any]:
        """Add gradients of the mean loss over the labels; logits exist only a chunk of tokens at a time."""
        states, targets, beside, reference = self._forward(rows)
        leaf = states.detach().requires_grad_()
        total = torch.zeros((), device=leaf.device)
        for losses in self._chunk_losses(leaf, targets, reference):
            loss = losses.sum() * (share / len(targets))
            loss.backward()
            total += loss.detach()
        if beside is None:
            states.backward(leaf.grad)
        else:
            torch.autograd.backward([states, beside * share], [leaf.grad, None])
            total += beside.detach() * share
        return {"loss": float(total)}

    @torch.no_grad()
    def held_out_loss(self, rows: PackedRows) -> float:
        """Return the mean loss of the rows, each row with the same weight."""
        total = 0.0
        for begin in range(0, len(rows), self.micro):
            part = rows[begin : begin + self.micro]
            with self.decoder.evaluated():
                states, targets, beside, reference = self._forward(part)
            losses = torch.cat(list(self._chunk_losses(states.detach(), targets, reference)))
            counts = part.predicted().sum(1).to(losses.device)
            total += float((losses / counts.repeat_interleave(counts)).sum())
            total += 0.0 if beside is None else float(beside) * len(part)
        return total / len(rows)

    @torch.no_grad()
    def finish(self) -> None:
        """Merge the adapters and make sure that the merged model says what the adapted one said.

        Raises:
            LinearizeError: the logits differ.
        """
        model = self.run.model
        self.decoder.close()
        model.eval()
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        if self.settings.train == "lora":
            ids = self.run.corpus.held_out.input_ids[:1, :64].to(self.run.device, torch.long)
            with unrounded(model):
                before = model(input_ids=ids, use_cache=False).logits.float()
                merge_lora(model)
                after = model(input_ids=ids, use_cache=False).logits.float()
            worst, limit = float((after - before).abs().max()), MERGE_TOLERANCE[model.dtype]
            if not worst <= limit * float(before.abs().max().clamp(min=1.0)):
                raise LinearizeError(
                    f"Merging the LoRA adapters changed logits by {worst:.3g}, of at most {before.abs().max():.3g}."
                )
        model.requires_grad_(False)

    def changes(self, name: str) -> bool:
        """Everything, converted attention, or the adapted projections and, if they train, the mixers."""
        if self.settings.train == "full":
            return True
        if self.settings.train == "attention":
            return self._in_attention(name)
        targets = self._targets() if self.settings.train == "lora" else []
        adapted = any(f".{target}." in name for target in targets)
        return adapted or (self.settings.train_mixer and ".mixer." in name)


def _scores(model: nn.Module) -> set[str]:
    """The names of parameters that choose what a memory keeps, which no output has a gradient for."""
    memories = {name: part for name, part in model.named_modules() if isinstance(part, RetainMemory)}
    return {f"{name}.{own}" for name, part in memories.items() for own, _ in part.named_parameters()}
