"""The corpus of a run: rows to train on, rows to evaluate on, and a fingerprint of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from linearize.data.documents import Document
from linearize.data.formatting import Encoded, encode
from linearize.data.masking import HELD_OUT_SEED, Masking, mask_rows
from linearize.data.packing import PackedRows, cut, pack
from linearize.data.selection import shuffled, take, take_shared
from linearize.data.sources import is_lazy, load_documents
from linearize.errors import LinearizeError
from linearize.processes import ALONE, Processes
from linearize.recipe import Data

ROWS_FILE = "rows.safetensors"
ABOUT_FILE = "corpus.json"
DOCUMENTS = 64  # that a process tokenizes at a time, where several share a stream


@dataclass(frozen=True)
class Corpus:
    """What a run trains and evaluates on.

    Args:
        train: rows [N, T] without those beyond the token budget; fewer where the text is short, and then they repeat.
        held_out: rows [M, T] from documents that are not in `train`.
        fingerprint: sha256 (hex) over the rows and the settings that made them.
        description: one line for people: documents, rows, tokens, epochs.
        settings: what the fingerprint covers besides the rows.
    """

    train: PackedRows
    held_out: PackedRows
    fingerprint: str
    description: str
    settings: dict[str, Any]

    @property
    def masking(self) -> Masking | None:
        """How training rows are masked; None where tokens are predicted from those before them."""
        found = self.settings.get("masking")
        return Masking(**found) if found else None

    def with_length(self, length: int) -> Corpus:
        """Return the corpus with its training rows cut to a length that divides theirs."""
        return dataclasses.replace(self, train=cut(self.train, length))

    def save(self, folder: Path) -> None:
        """Write the corpus into `folder` as safetensors and JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{part}.{name}": tensor for part, name, tensor in named_tensors(self.train, self.held_out)}
        save_file(tensors, folder / ROWS_FILE)
        about = {key: value for key, value in vars(self).items() if key not in ("train", "held_out")}
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Read what `save` wrote.

        Raises:
            LinearizeError: files are missing or damaged (the fingerprint is computed anew and compared).
        """
        try:
            tensors = load_file(folder / ROWS_FILE)
            about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
            train, held_out = (
                PackedRows(*(tensors[f"{part}.{name}"] for name in ("input_ids", "position_ids", "labels")))
                for part in ("train", "held_out")
            )
            held_out = dataclasses.replace(held_out, masked=bool(about["settings"].get("masking")))
            train = dataclasses.replace(train, bos=about["settings"].get("bos"))
            intact = about["fingerprint"] == fingerprint(train, held_out, about["settings"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise damaged(folder, str(error)) from error
        if not intact:
            raise damaged(folder, "its fingerprint does not fit its rows")
        return cls(train, held_out, **about)


def damaged(folder: Path, why: str) -> LinearizeError:
    """Return the error for a saved corpus that cannot be used."""
    return LinearizeError(
        f"The tokenized data in {folder} is incomplete or damaged: {why}. Remove that folder, or start the run again "
        "with --fresh."
    )


def named_tensors(train: PackedRows, held_out: PackedRows) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (part, name, tensor) for the six tensors of a corpus."""
    for part, rows in (("train", train), ("held_out", held_out)):
        for name, tensor in rows.tensors().items():
            yield part, name, tensor


def fingerprint(train: PackedRows, held_out: PackedRows, settings: dict[str, Any]) -> str:
    """Return the sha256 (hex) over all rows and the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part, name, tensor in named_tensors(train, held_out):
        digest.update(f"{part}.{name}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def evaluation_rows(data: Data, tokenizer: PreTrainedTokenizerBase) -> PackedRows:
    """Return rows of text to evaluate on that no run trains on, such as a test file: no document is kept apart.

    Args:
        data: as for `build_corpus`; `held_out` is the number of rows, fewer where the text is short.
        tokenizer: the teacher's.

    Returns:
        Rows [at most data.held_out, data.length].

    Raises:
        LinearizeError: what `load_documents` and `encode` raise, or the text does not fill one row.
    """
    stream, most = load_documents(data), None
    if not is_lazy(data):
        known = list(stream)
        stream, most = shuffled(known, seed=0), len(known)
    rows, _ = take_shared((encode(document, tokenizer, data.loss) for document in stream), data, most)
    if not len(rows):
        raise LinearizeError(
            f"Not enough text to evaluate on: {data.source!r} does not fill one row of {data.length} tokens "
            "(`data.length`). Lower it, or give more text."
        )
    return rows


def describe(
    data: Data, train: PackedRows, documents: int, epochs: float, held_out: PackedRows, held_documents: int
) -> str:
    """Return a corpus in one line."""
    source = data.source if isinstance(data.source, str) else ", ".join(data.source)
    repeats = f", repeated for {epochs:.1f} epochs" if epochs > 1 else ""
    return (
        f"{source}: {len(train)} training rows of {data.length} tokens ({train.tokens:,} from {documents:,} "
        f"documents{repeats}); {len(held_out)} held-out rows ({held_out.tokens:,} from {held_documents:,} other "
        "documents)"
    )


def encoded_ahead(documents: Iterator[Document], encoded: Callable[[Document], Encoded]) -> Iterator[Encoded]:
    """Yield documents as tokens, in order, while threads tokenize those to come: tokenizers run outside of the GIL."""
    threads = os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    try:
        ahead = deque(pool.submit(encoded, document) for document in islice(documents, 2 * threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(encoded, document) for document in islice(documents, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def encoded_together(
    documents: Iterator[Document], encoded: Callable[[Document], Encoded], processes: Processes
) -> Iterator[Encoded]:
    """Yield documents as tokens, in order: process 0 alone reads them, and each process tokenizes its part of a group.

    Args:
        documents: read in process 0 alone.
        encoded: tokenizes one.
        processes: all of which ask for the same number of documents.
    """
    if processes.count == 1:
        yield from encoded_ahead(documents, encoded)
        return
    while group := processes.once(lambda: list(islice(documents, processes.count * DOCUMENTS))):
        yield from processes.shared(group, encoded)


def build_corpus(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_tokens: int,
    seed: int,
    masked: bool = False,
    processes: Processes = ALONE,
) -> Corpus:
    """Read, split, tokenize and pack the data of a run.

    Args:
        data: the recipe's data settings.
        tokenizer: the teacher's.
        train_tokens: the budget of all stages together, in tokens of packed rows.
        seed: order of the training documents; the held-out documents do not depend on it. Data that is read lazily
            keeps its own order.
        masked: the held-out rows get masks, for encoders; training rows get new ones at every step.
        processes: that share the tokenizing of data that is read lazily; then all of them call this.

    Returns:
        The corpus. With less text than `train_tokens`, its rows are to be repeated; `description` says how often.

    Raises:
        LinearizeError: what `load_documents` and `encode` raise, or there is not enough text.
    """
    stream = load_documents(data)
    rows = -(-train_tokens // data.length)

    def tokens(document: Document) -> Encoded:
        return encode(document, tokenizer, data.loss)

    if is_lazy(data):
        encoded = encoded_together(stream, tokens, processes)
        held_out, held_documents = take_shared(encoded, data, most=None)
    else:
        known = list(shuffled(list(stream), seed=0))
        first = encoded_ahead(iter(known), tokens)
        held_out, held_documents = take_shared(first, data, most=len(known) // 2)
        encoded = encoded_ahead(shuffled(known[held_documents:], seed), tokens)
    if len(held_out) < data.held_out:
        raise LinearizeError(
            f"Not enough text for {data.held_out} held-out rows of {data.length} tokens (`data.held_out`, "
            f"`data.length`): the {held_documents} documents that may be held out (half of them) fill "
            f"{len(held_out)}. Lower `data.held_out` or `data.length`, or give more text (a document is never split "
            "between training and evaluation)."
        )
    documents = take(encoded, rows, data.length)
    train = pack(documents, data.length)[:rows]
    if not len(train):
        raise LinearizeError(
            f"Not enough text to train on: the {len(documents)} documents that are not held out do not fill one row of "
            f"{data.length} tokens (`data.length`). Lower `data.length` or `data.held_out`, or give more text."
        )
    settings = {**data.model_dump(include={"format", "loss", "length", "held_out", "split"}), "seed": seed}
    if train.bos is not None:
        settings["bos"] = train.bos
    if masked:
        masking = Masking.of(tokenizer)
        settings["masking"] = dataclasses.asdict(masking)
        held_out = mask_rows(held_out, masking, HELD_OUT_SEED)
    description = describe(data, train, len(documents), train_tokens / train.tokens, held_out, held_documents)
    return Corpus(train, held_out, fingerprint(train, held_out, settings), description, settings)
