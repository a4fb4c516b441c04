"""Files -> rows: JSON, JSON lines, CSV, Parquet and plain text, as they are or packed with xz or gzip.

Every reader is a generator, so a large file is read only as far as it is needed.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from linearize.errors import LinearizeError, UnknownNameError

Row = dict[str, Any]

COMPRESSIONS: dict[str, Callable[..., IO[Any]]] = {".xz": lzma.open, ".gz": gzip.open}
SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 8192


def read_lines(file: Iterable[bytes]) -> Iterator[Row]:
    """Yield one row per non-empty line of JSON lines; a bare string is a row with only `text`."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise ValueError(f"line {number}: expected a JSON object, got {type(value).__name__}")
        yield value


def read_json(file: IO[bytes]) -> Iterator[Row]:
    """Yield the objects of a JSON list, of an object's only list, or of JSON lines that are named `.json`."""
    content = file.read()
    if not content.strip():
        return
    try:
        value = json.loads(content)
    except ValueError:
        yield from read_lines(content.splitlines())
        return
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("expected a list of JSON objects")
    yield from value


def read_csv(file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    yield from csv.DictReader(lines)


def read_parquet(file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def read_text(file: IO[bytes]) -> Iterator[Row]:
    """Yield plain text as documents.

    A line `<|endoftext|>` ends a document. So does a blank line once the document has 8,192 characters, or any line
    once it has twice as many: a book in one file then still has parts to hold out.
    """
    lines: list[str] = []
    size = 0
    for raw in file:
        line = raw.decode("utf-8")
        separator, blank = line.strip() == SEPARATOR, not line.strip()
        if not separator:
            lines.append(line)
            size += len(line)
        if separator or (blank and size >= PIECE_CHARS) or size >= 2 * PIECE_CHARS:
            yield {"text": "".join(lines).strip()}
            lines, size = [], 0
    yield {"text": "".join(lines).strip()}


READERS: dict[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
}


def file_type(path: Path) -> str | None:
    """Return the suffix that names the reader ("books.jsonl.xz" -> ".jsonl"), or None where there is no reader."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        UnknownNameError: no reader takes files of this type.
        LinearizeError: the file is damaged or is not what its name says.
    """
    suffix = file_type(path)
    if suffix is None:
        packed = f" (each also packed: {', '.join(COMPRESSIONS)})"
        raise UnknownNameError("file type", path.suffix or path.name, READERS, where=f"{path}{packed}")
    opener = COMPRESSIONS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield from READERS[suffix](file)
    except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error) as error:
        if isinstance(error, LinearizeError):
            raise
        raise LinearizeError(
            f"Cannot read {path} as {suffix[1:]}: {error}. Repair or replace the file, or rename it after its content."
        ) from error
