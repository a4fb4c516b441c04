"""Masks over tokens: how many, where, and the same for the same seed."""

import pytest
import torch

from linearize.data import PackedRows
from linearize.data.masking import Masking, mask_rows
from linearize.errors import LinearizeError

MASKING = Masking(token=7, vocabulary=50)


def rows(count=64, length=100):
    ids = torch.randint(10, 50, (count, length), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    positions = torch.arange(length, dtype=torch.int32).expand(count, -1)
    return PackedRows(ids, positions, ids.masked_fill(positions % 10 == 0, -100))


def test_fifteen_percent_are_chosen_and_of_these_eight_tenths_are_masked():
    plain = rows()
    masked = mask_rows(plain, MASKING, 3)
    chosen = masked.labels != -100
    assert masked.masked
    assert torch.equal(masked.labels[chosen], plain.input_ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], plain.input_ids[~chosen])
    assert not chosen[plain.labels == -100].any()
    assert float(chosen.sum() / (plain.labels != -100).sum()) == pytest.approx(0.15, abs=0.01)
    hidden, kept = masked.input_ids[chosen] == 7, masked.input_ids[chosen] == plain.input_ids[chosen]
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.04)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(masked.predicted(), chosen)


def test_the_seed_decides_and_no_row_is_left_without_a_label():
    plain = rows(200, 3)
    first, again, other = (mask_rows(plain, MASKING, seed) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.labels, other.labels)
    assert bool(first.predicted().any(1).all())


def test_a_tokenizer_without_a_mask_is_named(make_teacher):
    from transformers import AutoTokenizer

    with pytest.raises(LinearizeError, match="mask token"):
        Masking.of(AutoTokenizer.from_pretrained(make_teacher()))
