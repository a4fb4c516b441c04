"""Tokenized documents -> rows of equal length, and rows -> batches.

Shapes: N rows, T tokens a row, B rows a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linearize.data.formatting import IGNORE, Encoded


@dataclass(frozen=True)
class PackedRows:
    """Rows of documents, one after the other.

    Args:
        input_ids: token ids, [N, T], int32.
        position_ids: the token's place in its document, [N, T], int32. A zero starts a document; a document that goes
            on in the next row starts anew there.
        labels: `input_ids` or -100, [N, T], int32. The loss shifts: `labels[:, t]` is predicted from the tokens before
            t. It is -100 at the first token of each document, so that nothing is predicted across documents.
        masked: `input_ids` have masks, and `labels` are what stands behind them, at the same place and nowhere else.
        bos: the token that stands in place of the first of a row where a document goes on; None where that one stays.
            Some models are lost without it, such as Gemma. Rows with masks leave the token to its label.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    masked: bool = False
    bos: int | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return self.input_ids.numel()

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> PackedRows:
        """Return these rows as new `PackedRows`."""
        at = index if isinstance(index, slice) else torch.as_tensor(index, dtype=torch.long)
        return PackedRows(self.input_ids[at], self.position_ids[at], self.labels[at], self.masked, self.bos)

    def predicted(self) -> Tensor:
        """Return which labels a model is asked for, [N, T] bool: all that there are, but a causal row's first."""
        asked = self.labels != IGNORE
        if not self.masked:
            asked[:, 0] = False
        return asked

    def joined(self, other: PackedRows) -> PackedRows:
        """Return these rows and those of `other` behind them."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        ids, positions, labels = (torch.cat(pair) for pair in pairs)
        return PackedRows(ids, positions, labels, self.masked, self.bos)

    def tensors(self) -> dict[str, Tensor]:
        """Return the three tensors by name."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "labels": self.labels}

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the three tensors as int64 on `device`, ready for `model(**inputs)`."""
        return {name: tensor.to(device, torch.long) for name, tensor in self.tensors().items()}


def pack(documents: Sequence[Encoded], length: int) -> PackedRows:
    """Concatenate documents and cut them into rows.

    Tokens that do not fill the last row are left out, and so are rows without any label. A row in which a document goes
    on begins with its `bos`, in place of a token that is not predicted anyway.

    Args:
        documents: tokenized documents, in order.
        length: tokens a row, T.

    Returns:
        As many full rows as the documents give; none where they are too short.
    """
    count = sum(len(document.ids) for document in documents) // length * length
    ids, labels, positions = (np.empty(count, dtype=np.int32) for _ in range(3))
    start = 0
    for document in documents:
        size = min(len(document.ids), count - start)
        ids[start : start + size] = document.ids[:size]
        labels[start : start + size] = document.labels[:size]
        positions[start : start + size] = np.arange(size)
        start += size
    bos = next((document.bos for document in documents if document.bos is not None), None)
    one, places, labelled = (torch.from_numpy(array[None]) for array in (ids, positions, labels))
    return _cut(PackedRows(one, places, labelled, bos=bos), length)


def cut(rows: PackedRows, length: int) -> PackedRows:
    """Cut rows into shorter ones: those that `pack` gives for this length from the same documents.

    Args:
        rows: [N, T]; where `masked`, labels stand at their own place and stay.
        length: divides T.

    Returns:
        Rows [N * T / length, length] without those that have no label; the same object where nothing is to be cut.
    """
    return rows if length == rows.length else _cut(rows, length)


def _cut(rows: PackedRows, length: int) -> PackedRows:
    ids, positions, labels = (tensor.reshape(rows.tokens // length, length) for tensor in rows.tensors().values())
    if rows.bos is not None:
        ids = ids.clone()
        ids[positions[:, 0] > 0, 0] = rows.bos
    positions = torch.minimum(positions, torch.arange(length, dtype=positions.dtype))
    if not rows.masked:
        labels = labels.masked_fill(positions == 0, IGNORE)
    useful = (labels != IGNORE).any(1)
    return PackedRows(ids[useful], positions[useful], labels[useful], rows.masked, rows.bos)


def batches(rows: PackedRows, batch: int, seed: int, start_step: int = 0) -> Iterator[PackedRows]:
    """Yield batches without end, from `start_step` on.

    Every epoch has its own order. Which rows step s gets depends on `seed` and s alone, so a run that continues at a
    step sees what it would have seen.

    Args:
        rows: what to draw from, [N, T].
        batch: rows a step, B; a batch may hold the end of one epoch and the start of the next.
        seed: of the order.
        start_step: the first step to yield.

    Yields:
        Rows [B, T].
    """
    count = len(rows)
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    step = start_step
    while True:
        chosen = []
        for place in range(step * batch, (step + 1) * batch):
            if place // count != epoch:
                epoch = place // count
                order = epoch_order(count, seed, epoch)
            chosen.append(order[place % count])
        yield rows[torch.stack(chosen)]
        step += 1


def rows_seen(rows: PackedRows, batch: int, seed: int, steps: int) -> PackedRows:
    """Return the rows that the first `steps` batches of `batches` hold, each once."""
    count = len(rows)
    if steps * batch >= count:
        return rows
    return rows[epoch_order(count, seed, 0)[: steps * batch]]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `count` rows in this epoch, [count], int64."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))
