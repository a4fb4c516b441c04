"""Masks over tokens, for encoders: BERT's masked language modeling (arXiv:1810.04805, section 3.1).

Shapes: N rows, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from linearize.data.formatting import IGNORE
from linearize.data.packing import PackedRows
from linearize.errors import LinearizeError

RATE = 0.15
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Masking:
    """What masking needs to know of a tokenizer.

    Attributes:
        token: id of the mask token.
        vocabulary: ids that random replacements are drawn from.
    """

    token: int
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Masking:
        """Read a tokenizer.

        Raises:
            LinearizeError: it has no mask token.
        """
        token: Any = tokenizer.mask_token_id
        if token is None:
            raise LinearizeError(
                "The teacher's tokenizer has no mask token, which masked language modeling needs; set its "
                "`mask_token`, or use the tokenizer that the encoder was trained with."
            )
        return cls(int(token), len(tokenizer))


def mask_rows(rows: PackedRows, masking: Masking, seed: int) -> PackedRows:
    """Choose 15 % of the labelled tokens: of these 80 % become the mask, 10 % another token, and 10 % stay.

    Args:
        rows: plain rows [N, T].
        masking: of the tokenizer.
        seed: the same rows and seed give the same masks.

    Returns:
        Rows whose labels are the chosen tokens; where a row would have none, its last labelled token is chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = rows.input_ids.shape
    labelled = rows.labels != IGNORE
    chosen = labelled & (torch.rand(shape, generator=generator) < RATE)
    place = torch.arange(shape[1])
    last = torch.where(labelled, place, -1).amax(1, keepdim=True)
    chosen |= ~chosen.any(1, keepdim=True) & labelled & (place == last)
    fate = torch.rand(shape, generator=generator)
    others = torch.randint(masking.vocabulary, shape, generator=generator, dtype=rows.input_ids.dtype)
    ids = torch.where(chosen & (fate < 0.8), torch.full_like(rows.input_ids, masking.token), rows.input_ids)
    ids = torch.where(chosen & (fate >= 0.9), others, ids)
    return PackedRows(ids, rows.position_ids, rows.labels.masked_fill(~chosen, IGNORE), masked=True)
