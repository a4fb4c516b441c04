"""Fine-tuning: LoRA adapters, merged at the end, or all parameters.

The loss is the cross-entropy of the next token, or in an encoder that of masked tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.data import PackedRows
from linearize.data.masking import mask_rows
from linearize.errors import LinearizeError
from linearize.modeling.classes import packed_inputs
from linearize.modeling.heads import logits_of
from linearize.stages.adapters import add_lora, lora_parameters, lora_targets, merge_lora
from linearize.stages.base import StageRunner

TOKENS_PER_CHUNK = 1024
MERGE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


class FinetuneRunner(StageRunner):
    """The stage on a whole model."""

    def prepare(self) -> dict[str, nn.Parameter]:
        """Choose what trains and return it by name."""
        model = self.run.model
        model.requires_grad_(False)
        model.train()
        if self.settings.train == "full":
            model.float().requires_grad_(True)
            trained = dict(model.named_parameters())
        elif self.settings.train == "lora":
            add_lora(model, self.settings.lora, self._targets())
            model.requires_grad_(False)
            trained = lora_parameters(model)
        else:
            trained = {}
        if self.settings.train_mixer:
            trained.update({n: p for n, p in model.named_parameters() if ".mixer." in n})
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return trained

    def _targets(self) -> list[str]:
        return lora_targets(self.run.model, self.settings.lora.targets)

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        model = self.run.model
        given = packed_inputs(model.config, {name: inputs[name] for name in ("input_ids", "position_ids")})
        states: Tensor = model.get_decoder()(**given, use_cache=False).last_hidden_state
        return states

    def _reference(self, inputs: dict[str, Tensor], chosen: Tensor) -> Tensor | None:
        """What `_loss` compares with besides the labels, for each of the chosen tokens; nothing here."""
        return None

    def _loss(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """The sum of the losses of logits [N, vocabulary] in fp32 with targets [N]."""
        loss = F.cross_entropy(logits, targets, reduction="sum")
        if self.settings.z_loss:
            loss = loss + self.settings.z_loss * logits.logsumexp(-1).square().sum()
        return loss

    def batch(self, rows: PackedRows) -> PackedRows:
        """Mask an encoder's rows, anew at every step."""
        masking = self.run.corpus.masking
        return rows if masking is None else mask_rows(rows, masking, int(torch.randint(2**31, ())))

    def _predictions(self, rows: PackedRows, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Which final states predict a label, [B, T] bool, and those labels, [N]."""
        asked = rows.predicted().to(self.run.device)
        return asked if rows.masked else asked.roll(-1, 1), inputs["labels"][asked]

    def backward(self, rows: PackedRows, share: float) -> dict[str, Any]:
        """Add gradients of the mean loss over the labels; logits exist only a chunk of tokens at a time."""
        inputs = rows.inputs(self.run.device)
        chosen, targets = self._predictions(rows, inputs)
        reference = self._reference(inputs, chosen)
        with self.run.precision():
            states = self._states(inputs)
        wanted = states[chosen]
        leaf = wanted.detach().requires_grad_()
        total = 0.0
        for begin in range(0, len(targets), TOKENS_PER_CHUNK):
            part = slice(begin, begin + TOKENS_PER_CHUNK)
            with self.run.precision():
                logits = logits_of(self.run.model, leaf[part])
            beside = None if reference is None else reference[part]
            loss = self._loss(logits.float(), targets[part], beside) * (share / len(targets))
            loss.backward()
            total += float(loss.detach())
        wanted.backward(leaf.grad)
        return {"loss": total}

    @torch.no_grad()
    def held_out_loss(self, rows: PackedRows) -> float:
        """Return the mean cross-entropy of the rows, each row with the same weight."""
        losses = []
        for index in range(len(rows)):
            row = rows[index : index + 1]
            inputs = row.inputs(self.run.device)
            chosen, targets = self._predictions(row, inputs)
            with self.run.precision():
                logits = logits_of(self.run.model, self._states(inputs)[chosen])
            losses.append(F.cross_entropy(logits.float(), targets))
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def finish(self) -> None:
        """Merge the adapters and make sure that the merged model says what the adapted one said.

        Raises:
            LinearizeError: the logits differ.
        """
        model = self.run.model
        model.eval()
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        if self.settings.train == "lora":
            ids = self.run.corpus.held_out.input_ids[:1, :64].to(self.run.device, torch.long)
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
        """Everything, or the adapted projections and, if they train, the mixers."""
        if self.settings.train == "full":
            return True
        targets = self._targets() if self.settings.train == "lora" else []
        adapted = any(f".{target}." in name for target in targets)
        return adapted or (self.settings.train_mixer and ".mixer." in name)
