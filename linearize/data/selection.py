"""Which documents are held out and which are trained on: taken from a stream until their rows are full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from linearize.data.documents import Document
from linearize.data.formatting import Encoded
from linearize.data.packing import PackedRows, pack
from linearize.recipe import Data


def shuffled(documents: list[Document], seed: int) -> Iterator[Document]:
    """Yield the documents in an order that depends on `seed` and their number alone."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return (documents[index] for index in order.tolist())


def take(documents: Iterator[Encoded], rows: int, length: int, share: int | None = None) -> list[Encoded]:
    """Take documents until they fill `rows` rows of `length` tokens, each counting for `share` tokens at most."""
    taken: list[Encoded] = []
    size = 0
    for document in documents:
        taken.append(document)
        size += len(document.ids[:share])
        if size >= rows * length and len(pack([cut(part, share) for part in taken], length)) >= rows:
            break
    return taken


def cut(document: Encoded, size: int | None) -> Encoded:
    """Return the first `size` tokens of a document."""
    return replace(document, ids=document.ids[:size], labels=document.labels[:size])


def take_shared(documents: Iterator[Encoded], data: Data, most: int | None) -> tuple[PackedRows, int]:
    """Take documents from the front of the stream until the held-out rows are full, or none is left.

    Up to eight documents share the rows where there are as many, so that one long book does not stand for a library.

    Args:
        documents: the stream; what is taken here is not there any more for training.
        data: uses `length` and `held_out`.
        most: how many documents may be taken, where their number is known.

    Returns:
        At most data.held_out rows of data.length tokens, and the number of documents that were taken.
    """
    rows, length = data.held_out, data.length
    sharing = 8 if most is None else max(1, min(8, most))
    share = max(length, -(-rows * length // sharing))
    taken = take(islice(documents, most), rows, length, share)
    packed = pack([cut(document, share) for document in taken], length)
    if len(packed) < rows:
        packed = pack(taken, length)
    return packed[:rows], len(taken)
