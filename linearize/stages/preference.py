"""Direct preference optimization (Rafailov et al., arXiv:2305.18290): the teacher is the reference.

Legend: B pairs, T tokens a row, N labelled tokens. A row holds the chosen answer in its first half and the rejected one
in its second, as two documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.data import PackedRows
from linearize.modeling.heads import logits_of
from linearize.recipe_stages import Preference
from linearize.stages import finetune
from linearize.stages.base import Run
from linearize.stages.finetune import FinetuneRunner, Tensors
from linearize.stages.teachers import KeptAnswers, Teacher


class PreferenceRunner(FinetuneRunner):
    """The stage on a converted model; the reference's log-probabilities are computed once, before the first step."""

    def __init__(self, settings: Preference, run: Run) -> None:
        super().__init__(settings, run)
        self.kept: KeptAnswers | None = None

    def ready(self) -> None:
        """Let the teacher judge every pair."""
        self.kept = KeptAnswers(self.run.folder / "reference", self.rows_seen(), {})
        self.kept.fill(self._answer, self.run.processes)

    def weights(self, rows: PackedRows) -> Tensor:
        """Every pair counts the same."""
        return torch.ones(len(rows), dtype=torch.float64)

    def _answer(self) -> Callable[[PackedRows], Tensors]:
        """What answers for a pair: the teacher's log-probabilities of both answers [1, 2]."""
        teacher = Teacher(self.run)

        def answer(row: PackedRows) -> Tensors:
            inputs = row.inputs(self.run.device)
            states = teacher.states(inputs)[0][:, :-1]
            chosen = inputs["labels"][:, 1:] != -100
            targets = inputs["labels"][:, 1:][chosen]
            tokens = [
                -F.cross_entropy(teacher.logits(states[chosen][part]), targets[part], reduction="none")
                for part in chunks(len(targets))
            ]
            return {"reference": sums(torch.cat(tokens), chosen)}

        return answer

    def _pairs(self, rows: PackedRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's states and the targets of the N answer tokens, where these stand, and the reference."""
        assert self.kept is not None
        inputs = rows.inputs(self.run.device)
        labels = inputs["labels"][:, 1:]
        chosen = labels != -100
        with self.run.precision():
            states = self.decoder(inputs["input_ids"], inputs["position_ids"])[:, :-1][chosen]
        return states, labels[chosen], chosen, self.kept.read(rows)["reference"].to(self.run.device)

    def _token_losses(self, states: Tensor, targets: Tensor, part: slice) -> Tensor:
        with self.run.precision():
            logits = logits_of(self.run.model, states[part])
        return F.cross_entropy(logits.float(), targets[part], reduction="none")

    @torch.no_grad()
    def _margins(self, states: Tensor, targets: Tensor, chosen: Tensor, reference: Tensor) -> Tensor:
        """How much more than the teacher the student prefers the chosen answers, times beta, [B]."""
        tokens = [-self._token_losses(states, targets, part) for part in chunks(len(targets))]
        gain = sums(torch.cat(tokens), chosen) - reference
        margins: Tensor = self.settings.beta * (gain[:, 0] - gain[:, 1])
        return margins

    def backward(self, rows: PackedRows, share: float) -> dict[str, Any]:
        """Add gradients of the mean loss over pairs.

        A pair's loss is a function of two sums over tokens. Its derivatives by them are worked out first, so that
        logits exist only a chunk of tokens at a time.
        """
        states, targets, chosen, reference = self._pairs(rows)
        margins = self._margins(states, targets, chosen, reference)
        slope = self.settings.beta * (-margins).sigmoid() * (share / len(margins))
        # A token of a chosen answer lowers the loss as its log-probability grows, one of a rejected answer raises it.
        factors = torch.where(first_half(chosen), slope[:, None], -slope[:, None])[chosen]
        leaf = states.detach().requires_grad_()
        for part in chunks(len(targets)):
            (self._token_losses(leaf, targets, part) * factors[part]).sum().backward()
        states.backward(leaf.grad)
        return {
            "loss": float(-F.logsigmoid(margins).mean()) * share,
            "margin": float(margins.mean()) * share,
            "accuracy": float((margins > 0).double().mean()) * share,
        }

    @torch.no_grad()
    def held_out_loss(self, rows: PackedRows) -> float:
        """Return the mean loss of the pairs."""
        margins = torch.cat([self._margins(*self._pairs(rows[index : index + 1])) for index in range(len(rows))])
        return float(-F.logsigmoid(margins).mean())


def chunks(count: int) -> list[slice]:
    """Return slices of `count` tokens whose logits may exist together."""
    size = finetune.TOKENS_PER_CHUNK
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def first_half(chosen: Tensor) -> Tensor:
    """Return which predicted tokens [B, T - 1] lie in the first half of their rows; bool."""
    places = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
    return (places < (chosen.shape[1] + 1) // 2).expand_as(chosen)


def sums(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Return what tokens [N] sum to in each half of their rows, [B, 2]; `chosen` [B, T - 1] says where they stand."""
    spread = torch.zeros_like(chosen, dtype=tokens.dtype).masked_scatter(chosen, tokens)
    half = first_half(chosen)
    return torch.stack([(spread * half).sum(1), (spread * ~half).sum(1)], 1)
