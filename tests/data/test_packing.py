import itertools
from dataclasses import replace

import pytest
import torch

from linearize.data import batches, pack
from linearize.data.formatting import IGNORE, Encoded
from linearize.data.packing import cut


def documents(*sizes):
    start = 0
    made = []
    for size in sizes:
        ids = list(range(start, start + size))
        made.append(Encoded(ids, ids))
        start += size
    return made


def test_positions_restart_and_nothing_is_predicted_across_documents():
    rows = pack(documents(3, 7, 4), length=6)
    assert rows.input_ids.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert rows.labels.tolist() == [[-100, 1, 2, -100, 4, 5], [-100, 7, 8, 9, -100, 11]]
    assert {tensor.dtype for tensor in rows.tensors().values()} == {torch.int32}


def test_labels_of_prompts_stay_masked():
    rows = pack([Encoded([1, 2, 3, 4], [-100, -100, 3, 4])], length=4)
    assert rows.labels.tolist() == [[-100, -100, 3, 4]]


def test_rows_without_labels_are_left_out():
    rows = pack([Encoded([1, 2, 3, 4], [-100] * 4), Encoded([5, 6, 7, 8], [5, 6, 7, 8])], length=4)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize("sizes", [[], [5], [2, 2]])
def test_text_shorter_than_a_row_gives_none(sizes):
    assert len(pack(documents(*sizes), length=6)) == 0


def test_inputs_are_int64_copies_for_a_model():
    inputs = pack(documents(4), length=4).inputs()
    assert set(inputs) == {"input_ids", "position_ids", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in inputs.values())


@pytest.mark.parametrize("bos", [None, 99])
@pytest.mark.parametrize("length", [4, 8, 16])
def test_rows_that_are_cut_are_those_of_the_shorter_length(length, bos):
    prompt = Encoded(list(range(60)), [IGNORE] * 40 + list(range(40, 60)))
    known = [replace(document, bos=bos) for document in (*documents(7, 30, 1, 2, 45), prompt, *documents(15))]
    rows = pack(known, length=16)
    short = pack(known, length=length)
    whole = cut(rows, length)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, short.tensors()[name]), name
    assert whole.tensors()["labels"].dtype == torch.int32
    assert cut(rows, 16) is rows


def test_a_document_that_goes_on_in_a_row_begins_there_with_its_first_special_token():
    rows = pack([replace(document, bos=99) for document in documents(3, 7, 4)], length=5)
    assert rows.input_ids.tolist() == [[0, 1, 2, 3, 4], [99, 6, 7, 8, 9]]  # the next document begins in the third row
    rows = pack([replace(document, bos=99) for document in documents(3, 7, 6)], length=4)
    assert rows.input_ids.tolist() == [[0, 1, 2, 3], [99, 5, 6, 7], [99, 9, 10, 11], [99, 13, 14, 15]]
    assert rows.labels.tolist()[1] == [IGNORE, 5, 6, 7]
    assert rows[[1]].bos == rows.joined(rows).bos == 99


def test_rows_with_masks_keep_their_labels_where_they_are_cut():
    rows = replace(pack(documents(32), length=32), masked=True)
    assert cut(rows, 8).labels.flatten().tolist() == [IGNORE, *range(1, 32)]


def first_steps(rows, batch, seed, start, steps):
    return [part.input_ids.tolist() for part in itertools.islice(batches(rows, batch, seed, start), steps)]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_a_resumed_order_is_the_uninterrupted_one(batch):
    rows = pack(documents(*[4] * 5), length=4)
    whole = first_steps(rows, batch, seed=3, start=0, steps=12)
    for start in (1, 4, 11):
        assert first_steps(rows, batch, 3, start, 12 - start) == whole[start:]


def test_every_epoch_has_every_row_once_in_its_own_order():
    rows = pack(documents(*[4] * 6), length=4)
    seen = [row[0] for step in first_steps(rows, 2, 0, 0, 9) for row in step]
    epochs = [seen[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(epoch) == [0, 4, 8, 12, 16, 20] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert first_steps(rows, 2, 1, 0, 9) != first_steps(rows, 2, 0, 0, 9)
