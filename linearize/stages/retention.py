"""What a memory of whole tokens learns to keep: those that the teacher attends to from farther back than the window.

As Locret (arXiv:2410.01805) trains its scores on the teacher's attention.

Legend: B batch, T tokens, H query heads, G KV heads (H = G * R), D head dim, C block of queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.kernels.window import cap_scores
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.context import SequenceContext
from linearize.mixers.retain import RetainMemory

ATTENDED = 0.1  # share of a query's attention from which a token is worth a slot
QUERIES = 64  # which must stand behind the window for a token to have a label
BLOCK = 128


def labelled_rows(mixer: Any, window: int) -> int:
    """Return from how many tokens on a document has one with a label: its sinks, a window and the queries behind it.

    Args:
        mixer: of a converted layer.
        window: its length as the stage trains.

    Returns:
        0 where the mixer has no scores to learn.
    """
    return mixer.sinks + window + QUERIES if isinstance(mixer.memory, RetainMemory) else 0


def retains(student: LinearizedAttention) -> bool:
    """Whether a layer's mixer has scores to learn."""
    return student.mixer is not None and isinstance(student.mixer.memory, RetainMemory)


def retention_loss(
    teacher: nn.Module,
    student: LinearizedAttention,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    context: SequenceContext,
) -> Tensor:
    """Return the binary cross-entropy of the scores with whether the teacher comes back to a token, mean over rows.

    It does if some query at least a window later, of any query head of the KV head, gives the token more than a tenth
    of its attention. Sinks, which never enter the memory, and tokens with fewer than 64 such queries in their document
    have no label. A row's loss is the mean over its labels, 0 without any.

    Args:
        teacher: the attention that was replaced.
        student: the module that replaced it, with a `RetainMemory`.
        x: the layer's input [B, T, hidden].
        position_embeddings: cos and sin from the teacher's rotary module, if it has one.
        context: documents of this call; no padding.
    """
    mixer: Any = student.mixer
    with torch.no_grad():
        largest = late_attention(teacher, student, x, position_embeddings, context)
        place = torch.arange(x.shape[1], device=x.device)
        starts, ends = torch.zeros_like(place)[None], torch.full_like(place, x.shape[1])[None]
        if context.starts is not None:
            starts = context.starts.clamp(min=0).contiguous()
            ends = torch.searchsorted(starts, starts, right=True)
        known = (ends - place >= mixer.window + QUERIES) & (place - starts >= mixer.sinks)
        known = known.expand(x.shape[:2])[..., None].expand_as(largest).float()
    with torch.autocast(x.device.type, enabled=False):
        logits = mixer.memory.logits(x).float()
        loss = F.binary_cross_entropy_with_logits(logits, (largest > ATTENDED).float(), reduction="none")
        means: Tensor = (loss * known).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    return means.mean()


@torch.no_grad()
def late_attention(
    teacher: nn.Module,
    student: LinearizedAttention,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    context: SequenceContext,
) -> Tensor:
    """Return the largest share of attention that a token gets in the teacher from at least a window later, [B, T, G].

    Arguments are those of `retention_loss`.
    """
    mixer: Any = student.mixer
    exact, length = student.exact_groups, x.shape[1]
    _, _, q, k, _ = student.projected(teacher, x, position_embeddings)
    reach = student.family.max_window(teacher, teacher.config) or length
    place = torch.arange(length, device=x.device)
    starts = torch.zeros_like(place)[None] if context.starts is None else context.starts.clamp(min=0)
    keys = k[:, :, exact:].float().permute(0, 2, 3, 1)[:, :, None]  # [B, G, 1, D, T]
    queries = (q[:, :, exact * student.repeat :].float() * mixer.scaling).unflatten(2, (-1, student.repeat))
    queries = queries.permute(0, 2, 3, 1, 4)  # [B, G, R, T, D]
    largest = torch.zeros(x.shape[0], keys.shape[1], length, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for rows in place.split(BLOCK):
            back = rows[:, None] - place
            visible = (back >= 0) & (back < reach) & (place >= starts[:, rows, None])  # [B, C, T]
            scores = cap_scores(queries[:, :, :, rows] @ keys, mixer.softcap)
            weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
            late = weights.masked_fill(back < mixer.window, 0.0)
            largest = torch.maximum(largest, late.amax((2, 3)))
    return largest.transpose(1, 2)
