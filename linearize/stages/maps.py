"""Attention maps of teacher and mixer, and the cross-entropy between them (Hedgehog, arXiv:2402.04347, eq. 7; LoLCATs,
arXiv:2410.10254, table 10).

A mixer whose output is linear in the values has its map read off values that are one at one token and zero at all
others, D tokens at a time, so that no op needs a form that returns its weights.

Legend: B batch, T tokens, H query heads, G KV heads, D head dim, E exact KV heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.kernels.microscaling import microscaled
from linearize.kernels.window import window_attention
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.combine import Average, MemoryOnly, SharedSoftmax
from linearize.mixers.context import SequenceContext
from linearize.mixers.exact import ExactAttention
from linearize.mixers.memories import AdditiveMemory

LEAST_WEIGHT = 1e-12


def why_no_map(mixer: Any) -> str | None:
    """Return why a mixer's weights over tokens are no distribution, or None where they are one.

    A mixer that divides by the sum of its weights has none below 0: `check_mixer` sees to that.

    Args:
        mixer: a `TokenMixer`.
    """
    if not isinstance(mixer.combine, SharedSoftmax | Average | MemoryOnly):
        return "its `combine` is not `shared_softmax`, `average` or `memory_only`"
    if not isinstance(mixer.memory, AdditiveMemory) or not mixer.memory.normalize:
        return "its memory is not `additive` with `normalize: true`"
    if mixer.group_norm or mixer.norm is not None or mixer.conv is not None or mixer.output_gate is not None:
        return "it has an `output_norm`, an `output_gate` or a `conv`"
    return None


def check_map(mixer: Any) -> None:
    """Raise where a mixer has no attention map.

    Raises:
        LinearizeError: it has none.
    """
    problem = why_no_map(mixer)
    if problem is not None:
        raise LinearizeError(
            f"A transfer stage has `maps`, and this mixer's weights over tokens are no attention map: {problem}. Drop "
            "`maps`, or take a mixer such as that of the recipe lolcats."
        )


def map_cross_entropy(
    teacher: nn.Module,
    student: LinearizedAttention,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    context: SequenceContext,
) -> Tensor:
    """Return the cross-entropy of the mixer's map relative to the teacher's, mean over rows, heads and queries.

    Args:
        teacher: the attention that was replaced.
        student: the module that replaced it.
        x: the layer's input [B, T, hidden].
        position_embeddings: cos and sin from the teacher's rotary module, if it has one.
        context: documents of this call; no padding.
    """
    assert student.mixer is not None
    family, exact = student.family, student.exact_groups
    sides: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for module, learns in ((teacher, False), (student, torch.is_grad_enabled())):
        with torch.set_grad_enabled(learns):
            q, k, q_rotated, k_rotated, _ = student.projected(module, x, position_embeddings)
            if module is student and student.microscaled:
                k_rotated = microscaled(k_rotated)
            queries = slice(exact * student.repeat, None)
            sides.append((q[:, :, queries], k[:, :, exact:], q_rotated[:, :, queries], k_rotated[:, :, exact:]))
    (_, _, q_teacher, k_teacher), (q, k, q_rotated, k_rotated) = sides
    batch, length, groups, dim = k.shape
    total = x.new_zeros((), dtype=torch.float32)
    for begin in range(0, length, dim):
        values = torch.zeros(batch, length, groups, dim, dtype=q.dtype, device=x.device)
        for place in range(begin, min(begin + dim, length)):
            values[:, place, :, place - begin] = 1
        with torch.no_grad():
            if student.mixer.causal:
                window = family.max_window(teacher, teacher.config) or length
                wanted = window_attention(
                    q_teacher, k_teacher, values, window=window, scale=student.mixer.scaling, starts=context.starts,
                    softcap=student.mixer.softcap,
                ).o  # fmt: skip
            else:
                wanted = ExactAttention(student.mixer.scaling, causal=False)(q_teacher, k_teacher, values, context)
        made = student.mixer(
            x,
            (q, k),
            (q_rotated, k_rotated),
            values,
            context,
            None,
            lambda queries, keys: student._rotate(queries, keys, position_embeddings, context),
        )
        total = total - (wanted.float() * made.float().clamp(min=LEAST_WEIGHT).log()).sum()
    return total / (batch * length * q.shape[2])
