"""End-to-end distillation: the student's distribution of the next token is brought to the teacher's.

Logits, the teacher's and the student's, exist only a chunk of tokens at a time.

Legend: B rows, T tokens a row, N labelled tokens, V vocabulary, k the teacher's likeliest tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.data import PackedRows
from linearize.errors import LinearizeError
from linearize.recipe_stages import Distill
from linearize.stages import finetune
from linearize.stages.base import Run
from linearize.stages.finetune import FinetuneRunner, Tensors, predictions
from linearize.stages.speed import FastPass
from linearize.stages.teachers import KeptAnswers, Teacher, layer_outputs


class DistillRunner(FinetuneRunner):
    """The stage on a converted model; its teacher is the model before surgery."""

    def __init__(self, settings: Distill, run: Run) -> None:
        super().__init__(settings, run)
        self.teacher: Teacher | None = None
        self.fast: FastPass | None = None
        self.kept: KeptAnswers | None = None

    def prepare(self) -> dict[str, nn.Parameter]:
        """Choose what trains.

        Raises:
            LinearizeError: `top_k` is more than the vocabulary has.
        """
        vocabulary = self.run.model.config.vocab_size
        if self.settings.top_k is not None and self.settings.top_k > vocabulary:
            raise LinearizeError(f"`top_k` is {self.settings.top_k}; the model's vocabulary has {vocabulary} tokens.")
        return super().prepare()

    def ready(self) -> None:
        """Bring the teacher, or what it said about every row."""
        if self.settings.cache:
            settings = {"top_k": self.settings.top_k, "temperature": self.settings.temperature}
            self.kept = KeptAnswers(self.run.folder / "teacher", self.rows_seen(), settings)
            self.kept.fill(self._answer, self.run.processes)
        else:
            self.teacher = Teacher(self.run, self.settings.teacher_device)
        self._ask_fast()

    def shrink(self) -> None:
        """As for every stage; what was captured of a larger pass goes."""
        super().shrink()
        self._ask_fast()

    def _ask_fast(self) -> None:
        """Have the teacher's passes replayed where the student's are."""
        teacher = self.teacher
        if teacher is None or not self.decoder.captures or teacher.device != self.run.device:
            return

        def states(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return teacher.states({"input_ids": input_ids, "position_ids": position_ids})[0]

        self.fast = FastPass(states, [], self.passes(), self.run.device)

    def passes(self) -> int:
        """As for every stage; layers whose outputs are watched stay as they are."""
        return 0 if self.settings.hidden else super().passes()

    def finish(self) -> None:
        """Let the teacher go, and leave the model ready."""
        self.teacher = self.fast = None
        super().finish()

    def _answer(self) -> Callable[[PackedRows], Tensors]:
        """What answers for a row: the teacher's likeliest tokens `index` [N, k], `made` [N, k + 1] as in `coarse`."""
        teacher = Teacher(self.run, self.settings.teacher_device)

        def answer(row: PackedRows) -> Tensors:
            inputs = row.inputs(self.run.device)
            states = teacher.states(inputs)[0]
            states = states[predictions(row, inputs["labels"])[0].to(states.device)]
            parts = []
            for begin in range(0, len(states), finetune.TOKENS_PER_CHUNK):
                logits = teacher.logits(states[begin : begin + finetune.TOKENS_PER_CHUNK])
                parts.append(self._wanted(logits))
            index, made = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            return {"index": index.int(), "made": made}

        return answer

    def _wanted(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """The teacher's log-probabilities and, where only the likeliest are compared, which tokens they are of."""
        scaled = logits / self.settings.temperature
        if self.settings.top_k is None:
            return None, scaled.log_softmax(-1)
        index = scaled.topk(self.settings.top_k, dim=-1).indices
        return index, coarse(scaled, index)

    def _reference(self, rows: PackedRows, inputs: Tensors, chosen: Tensor) -> Tensors:
        """What was kept about the chosen tokens, or the teacher's final states and its layers' outputs there."""
        if self.kept is not None:
            return {name: tensor.to(self.run.device) for name, tensor in self.kept.read(rows).items()}
        assert self.teacher is not None
        if self.fast is not None:
            return {"states": self.fast(inputs["input_ids"], inputs["position_ids"])[chosen]}
        states, outputs = self.teacher.states(inputs, with_layers=self.settings.hidden > 0)
        chosen = chosen.to(states.device)
        reference = {"states": states[chosen]}
        if outputs:
            reference["layers"] = torch.stack([out[chosen].to(self.run.device) for out in outputs], 1)
        return reference

    def _states(self, inputs: Tensors, chosen: Tensor, reference: Tensors) -> tuple[Tensor, Tensor | None]:
        """The student's final states, and the mean over tokens of its layers' distance from the teacher's."""
        with contextlib.ExitStack() as stack:
            outputs = stack.enter_context(layer_outputs(self.run.model)) if self.settings.hidden else []
            states, _ = super()._states(inputs, chosen, reference)
        if not outputs:
            return states, None
        wanted = reference.pop("layers").float()
        made = torch.stack([out[chosen] for out in outputs], 1).float()
        apart = (made - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
        return states, self.settings.hidden * apart.mean()

    def _loss(self, logits: Tensor, targets: Tensor, reference: Tensors) -> Tensor:
        """Each token's KL and cross-entropy [N], with their factors."""
        settings = self.settings
        if self.kept is not None:
            index, wanted = reference["index"].long(), reference["made"]
        else:
            assert self.teacher is not None
            index, wanted = self._wanted(self.teacher.logits(reference["states"]))  # type: ignore[assignment]
        scaled = logits / settings.temperature
        made = scaled.log_softmax(-1) if index is None else coarse(scaled, index)
        if settings.divergence == "forward":
            divergence = F.kl_div(made, wanted, reduction="none", log_target=True).sum(-1)
        else:
            divergence = F.kl_div(wanted, made, reduction="none", log_target=True).sum(-1)
        loss: Tensor = settings.kl * settings.temperature**2 * divergence
        if settings.cross_entropy:
            loss = loss + settings.cross_entropy * F.cross_entropy(logits, targets, reduction="none")
        return loss


def coarse(logits: Tensor, index: Tensor) -> Tensor:
    """Return log-probabilities of some tokens, and of all others as one.

    Merging outcomes never raises a divergence (the log-sum inequality), so that the divergence of two such
    distributions, forward or reverse, is a lower bound of the whole one.

    Args:
        logits: [N, V].
        index: which tokens, [N, k].

    Returns:
        [N, k + 1], the last for all others; [N, k] where there are none.
    """
    total = logits.logsumexp(-1, keepdim=True)
    named = logits.gather(-1, index)
    if index.shape[-1] == logits.shape[-1]:
        return named - total
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([named, others], -1) - total
