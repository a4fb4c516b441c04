"""Text to measure perplexity on: a run's own held-out rows, WikiText-2 raw, or any file, in rows of any length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.data import PackedRows, build_corpus, evaluation_rows, pack
from linearize.data.documents import Document
from linearize.data.formatting import encode
from linearize.data.readers import COMPRESSIONS, SEPARATOR, file_type
from linearize.data.sources import check_source, hub_rows
from linearize.errors import LinearizeError
from linearize.recipe import Data

HELD_OUT = "held-out"
WIKITEXT = "wikitext2"
WIKITEXT_HUB = "Salesforce/wikitext:wikitext-2-raw-v1"


@dataclass(frozen=True)
class EvaluationText:
    """Rows to measure on.

    Attributes:
        name: as tables show it.
        source: where the text is from.
        rows: [N, T].
    """

    name: str
    source: str
    rows: PackedRows

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of the rows."""
        digest = hashlib.sha256()
        for name, tensor in self.rows.tensors().items():
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def row(self) -> dict[str, Any]:
        """Return what a report says of the text."""
        sizes = {"rows": len(self.rows), "length": self.rows.length}
        return {"name": self.name, "source": self.source, **sizes, "sha256": self.fingerprint}


def held_out_text(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, masked: bool = False) -> EvaluationText:
    """Return the documents that a run with these data settings holds out; `masked` as in `build_corpus`.

    Raises:
        LinearizeError: what `build_corpus` raises.
    """
    rows = build_corpus(data, tokenizer, train_tokens=data.length, seed=seed, masked=masked).held_out
    source = data.source if isinstance(data.source, str) else ", ".join(data.source)
    return EvaluationText(HELD_OUT, source, rows)


def evaluation_text(source: str, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> EvaluationText:
    """Return the first rows of a text that no run trains on.

    A plain-text file is one document, or those between lines `<|endoftext|>`, so that its rows are as long as asked
    for; rows of other files and of hub data sets are documents of their own.

    Args:
        source: `wikitext2` (the raw test set, from the Hub), a file, a folder or a hub id.
        tokenizer: the model's.
        rows: at most so many.
        length: tokens a row.

    Raises:
        LinearizeError: there is no such text, or it does not fill one row.
    """
    path = Path(source).expanduser()
    name = WIKITEXT if source == WIKITEXT else path.name.partition(".")[0] if path.exists() else source
    if source == WIKITEXT or (path.is_file() and file_type(path) == ".txt"):
        texts = _wikitext() if source == WIKITEXT else _documents(path)
        packed = pack([encode(Document("text", (("text", text),)), tokenizer, "all") for text in texts], length)
        if not len(packed):
            raise LinearizeError(f"{source!r} does not fill one row of {length} tokens; give a lower --length.")
        return EvaluationText(name, source, packed[:rows])
    check_source(source, "--data")
    data = Data(source=source, format="auto", held_out=rows, length=length)
    return EvaluationText(name, source, evaluation_rows(data, tokenizer))


def _wikitext() -> Iterator[str]:
    yield "\n\n".join(row["text"] for row in hub_rows(WIKITEXT_HUB, "test", streaming=True))


def _documents(path: Path) -> Iterator[str]:
    opener = COMPRESSIONS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            content = file.read()
    except (OSError, ValueError, EOFError) as error:
        raise LinearizeError(f"Cannot read {path} as text: {error}. Repair or replace the file.") from error
    yield from filter(None, (part.strip() for part in content.split(SEPARATOR)))
