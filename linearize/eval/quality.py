"""Held-out quality: perplexity, divergence from the teacher, and both by position in the document.

Shapes: B rows, T tokens a row, L tokens that have a label in a batch, V vocabulary.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linearize.data import PackedRows
from linearize.errors import LinearizeError
from linearize.eval.logits import (
    ReadLogits,
    chunks,
    copy_head,
    device_of,
    evaluation_mode,
    final_states,
    language_model,
    logits_reader,
    output_embedding,
)
from linearize.eval.tally import PositionBucket, Quality, Tally
from linearize.modeling.classes import packed_inputs
from linearize.modeling.heads import finish_logits

__all__ = ["PositionBucket", "Quality", "TeacherReference", "evaluate"]

TOKENS_PER_BATCH = 4096


class Labelled(NamedTuple):
    """The labelled tokens of a batch.

    Attributes:
        inputs: of the model.
        mask: which tokens predict a label, [B, T].
        targets: these labels, [L].
        positions: their places in their documents, [L].
        rows: the rows of the batch that they are in, [L].
    """

    inputs: dict[str, Tensor]
    mask: Tensor
    targets: Tensor
    positions: Tensor
    rows: Tensor


def labelled(model: nn.Module, rows: PackedRows) -> Labelled:
    """Return a batch's inputs and its labelled tokens."""
    inputs = rows.inputs(device_of(model))
    labels = inputs.pop("labels")
    after = rows.predicted().to(labels.device)
    mask = after if rows.masked else after.roll(-1, dims=1)
    positions, given = inputs["position_ids"][after], packed_inputs(language_model(model).config, inputs)
    return Labelled(given, mask, labels[after], positions, mask.nonzero()[:, 0])


def batch_size(rows: PackedRows, batch: int | None) -> int:
    """Return how many rows run at once: `batch`, or as many as fill 4,096 tokens."""
    return batch or max(1, TOKENS_PER_BATCH // rows.length)


def context_note(model: nn.Module, rows: PackedRows) -> str:
    """Return a note, with a warning, where a document in `rows` is longer than the model's context; else nothing."""
    context = getattr(language_model(model).config, "max_position_embeddings", None)
    longest = int(rows.position_ids.max()) + 1
    if context is None or longest <= context:
        return ""
    note = f"evaluated up to {longest} tokens, beyond the context of {context}"
    warnings.warn(f"Held-out rows are longer than the model's context: {note}. Rows are marked.", stacklevel=3)
    return note


class TeacherReference:
    """The teacher's predictions on the held-out rows, made once and kept small.

    Kept are the final hidden states of the tokens that predict a label and a copy of the output embedding, so the
    logits are made anew in chunks. A teacher whose logits are more than that product has its logits kept instead.

    Args:
        model: the teacher, before surgery.
        rows: the held-out rows.
        batch: rows at once; as many as fill 4,096 tokens by default.
        own_head: copy the output embedding, which may train later.
    """

    def __init__(self, model: nn.Module, rows: PackedRows, batch: int | None = None, *, own_head: bool = True) -> None:
        self.rows = rows
        self.states: list[Tensor] = []
        head = output_embedding(model)
        self.head: nn.Module | None = None
        self.config = copy.copy(language_model(model).config)
        note = context_note(model, rows)
        start = time.perf_counter()
        tally = Tally(rows.length, with_teacher=True, rows=len(rows))
        size = batch_size(rows, batch)
        with evaluation_mode(model):
            device = device_of(model)
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                inputs, mask, targets, positions, places = labelled(model, part)
                states, plain = final_states(model, inputs)
                if first == 0 and plain:
                    self.head = copy_head(head) if own_head else head
                if self.head is None:
                    states = model(**inputs, use_cache=False).logits
                self.states += states[mask].cpu().split(mask.sum(1).tolist())
                read = self.reader(list(range(first, first + len(part))), device)
                for at in chunks(len(targets), language_model(model).config.vocab_size):
                    logits = read(at)
                    tally.add(logits, logits, targets[at], positions[at], first + places[at])
        self.quality = tally.quality(time.perf_counter() - start, note)

    def reader(self, indices: list[int], device: torch.device) -> ReadLogits:
        """Return the reader of the teacher's logits for these rows, one after the other."""
        kept = torch.cat([self.states[index] for index in indices]).to(device)
        if self.head is None:
            return lambda at: kept[at].float()
        head = self.head.to(device)
        return lambda at: finish_logits(self.config, head(kept[at])).float()


def evaluate(
    model: nn.Module, rows: PackedRows, reference: TeacherReference | None = None, batch: int | None = None
) -> Quality:
    """Measure a model on held-out rows in one pass.

    Every token counts the same, whichever row or batch it is in. Logits exist only a chunk of tokens at a time.

    Args:
        model: a causal language model of transformers, also inside a peft wrapper.
        rows: held-out rows, [N, T].
        reference: the teacher on the same rows; None leaves out `kl` and `top1_agreement`.
        batch: rows at once; as many as fill 4,096 tokens by default.

    Returns:
        The means over all tokens that have a label.

    Raises:
        LinearizeError: `reference` was made from other rows.
    """
    if reference is not None and not torch.equal(reference.rows.input_ids, rows.input_ids):
        raise LinearizeError("The teacher's reference was made from other rows. Make it from the rows to be evaluated.")
    note = context_note(model, rows)
    start = time.perf_counter()
    tally = Tally(rows.length, with_teacher=reference is not None, rows=len(rows))
    size = batch_size(rows, batch)
    with evaluation_mode(model):
        device = device_of(model)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            inputs, mask, targets, positions, places = labelled(model, part)
            student = logits_reader(model, inputs, mask)
            teacher = reference.reader(list(range(first, first + len(part))), device) if reference else None
            for at in chunks(len(targets), language_model(model).config.vocab_size):
                logits = student(at)
                tally.add(logits, teacher(at) if teacher else None, targets[at], positions[at], first + places[at])
    return tally.quality(time.perf_counter() - start, note)
