"""Sums over tokens, and the means that they become.

Shapes: V vocabulary, l tokens in a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

FIRST_BUCKET = 64
KEPT = 128  # chunks whose values stay on their device, which so waits once for all of them


@dataclass(frozen=True)
class PositionBucket:
    """Quality of the tokens that have at least `start` and fewer than `stop` tokens of their document before them."""

    start: int
    stop: int
    tokens: int
    loss: float
    kl: float | None


@dataclass(frozen=True)
class Quality:
    """What one evaluation pass found.

    Args:
        perplexity: exp(loss).
        loss: mean cross-entropy over all tokens with a label, in nats.
        kl: mean KL(teacher || student) over the same tokens, in nats; None without a teacher.
        top1_agreement: share of these tokens at which both put the same token first; None without a teacher.
        tokens: how many tokens that is.
        seconds: wall time of the pass.
        by_position: the same by position in the document, in buckets that double.
        row_losses: of each row, its number of tokens and its mean loss: what a paired comparison needs.
        note: what a reader must know of these numbers; empty if nothing.
    """

    perplexity: float
    loss: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    seconds: float
    by_position: tuple[PositionBucket, ...]
    note: str = ""
    row_losses: tuple[tuple[int, float], ...] = ()

    def row(self, name: str) -> dict[str, Any]:
        """Return the evaluation as a row of `results.json` (keys without a value are left out)."""
        values = {"perplexity": self.perplexity, "kl": self.kl, "top1": self.top1_agreement}
        measured = {key: value for key, value in values.items() if value is not None}
        note = {"note": self.note} if self.note else {}
        positions = [asdict(part) for part in self.by_position]
        counts = {"eval_tokens": self.tokens, "eval_seconds": self.seconds, "by_position": positions}
        return {"name": name, **measured, **counts, **note}


class Tally:
    """Sums over tokens, by position bucket and by row, in float64.

    Args:
        longest: tokens a row.
        with_teacher: whether there is a teacher to compare with.
        rows: how many rows will be seen.
    """

    def __init__(self, longest: int, with_teacher: bool, rows: int) -> None:
        self.with_teacher = with_teacher
        self.rows = torch.zeros(2, rows, dtype=torch.float64)
        buckets = int(bucket(torch.tensor(longest))) + 1
        self.sums = torch.zeros(4, buckets, dtype=torch.float64)
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, student: Tensor, teacher: Tensor | None, targets: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Add a chunk of tokens.

        Args:
            student: logits [l, V], float32.
            teacher: logits [l, V], float32, if there is a teacher.
            targets: the tokens that came, [l].
            positions: their places in their documents, [l].
            rows: the rows that they are in, [l].
        """
        log_q = student.log_softmax(-1)
        loss = -log_q.gather(-1, targets[:, None])[:, 0]
        kl = agree = torch.zeros_like(loss)
        if teacher is not None:
            log_p = teacher.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            agree = (log_p.argmax(-1) == log_q.argmax(-1)).to(loss.dtype)
        values = torch.stack([torch.ones_like(loss), loss, kl, agree])
        self.kept.append((values, positions, rows))
        if len(self.kept) == KEPT:
            self._sum()

    def _sum(self) -> None:
        """Add up what is kept."""
        if self.kept:
            values, positions, rows = (torch.cat(parts, -1).cpu() for parts in zip(*self.kept, strict=True))
            self.sums.index_add_(1, bucket(positions), values.double())
            self.rows.index_add_(1, rows, values[:2].double())
            self.kept.clear()

    def quality(self, seconds: float, note: str) -> Quality:
        """Return the means of all that was added."""
        self._sum()
        tokens, loss, kl, agree = self.sums.sum(1).tolist()
        spans = []
        for index, (count, own_loss, own_kl, _) in enumerate(self.sums.T.tolist()):
            if count:
                start = FIRST_BUCKET << (index - 1) if index else 1
                own = own_kl / count if self.with_teacher else None
                spans.append(PositionBucket(start, FIRST_BUCKET << index, int(count), own_loss / count, own))
        mean = loss / tokens
        return Quality(
            perplexity=math.exp(mean) if mean < 700 else math.inf,
            loss=mean,
            kl=kl / tokens if self.with_teacher else None,
            top1_agreement=agree / tokens if self.with_teacher else None,
            tokens=int(tokens),
            seconds=seconds,
            by_position=tuple(spans),
            note=note,
            row_losses=tuple((int(count), own / count) for count, own in self.rows.T.tolist() if count),
        )


def paired_difference(first: Quality, second: Quality) -> tuple[float, float]:
    """Return the mean loss of `first` less that of `second` on the same rows, and its standard error over rows."""
    return weighted_difference(first.row_losses, second.row_losses)


def weighted_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the mean difference of two lists of (tokens, mean loss) by row, and its standard error.

    Rows are the sample, and each weighs as many tokens as it has; with one row the standard error is nan.

    Raises:
        ValueError: they are of other rows.
    """
    if [count for count, _ in first] != [count for count, _ in second]:
        raise ValueError("The two were measured on other rows.")
    weights = torch.tensor([count for count, _ in first], dtype=torch.float64)
    gaps = torch.tensor([a - b for (_, a), (_, b) in zip(first, second, strict=True)], dtype=torch.float64)
    mean = (weights * gaps).sum() / weights.sum()
    if len(gaps) < 2:
        return float(mean), math.nan
    scatter = (weights**2 * (gaps - mean) ** 2).sum() * len(gaps) / (len(gaps) - 1)
    return float(mean), float(scatter.sqrt() / weights.sum())


def bucket(positions: Tensor) -> Tensor:
    """Return the bucket of each position: 0 below 64, 1 below 128, 2 below 256, and so on."""
    return (positions.clamp(min=FIRST_BUCKET // 2).double().log2().floor().long() - 5).clamp(min=0)
