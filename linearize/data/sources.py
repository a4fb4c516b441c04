"""`data.source` -> documents: what ships with Python, local files and folders, datasets of the Hugging Face Hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from linearize.data.documents import Document, choose_format, to_document
from linearize.data.readers import READERS, Row, file_type, read_file
from linearize.errors import LinearizeError
from linearize.recipe import Data

URL = re.compile(r"[a-z][a-z0-9]*://")
REMOTE = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def builtin_rows() -> Iterator[Row]:
    """Yield the language-reference topics that ship in every CPython, one row each, sorted by name.

    Some topics repeat others: `compound` holds the whole of `if`, `for`, `try` and more. A topic whose paragraphs stand
    for the larger part in a longer topic is left out; otherwise text that was trained on would be evaluated on.
    """
    from pydoc_data.topics import topics

    def paragraphs(text: str) -> set[str]:
        pieces = (" ".join(piece.split()) for piece in re.split(r"\n\s*\n", text))
        return {piece for piece in pieces if len(piece) >= 60}

    parts = {name: paragraphs(text) for name, text in topics.items()}
    by_length = sorted(topics, key=lambda name: (-len(topics[name]), name))
    kept: list[str] = []
    for name in by_length:
        size = sum(map(len, parts[name]))
        repeated = max((sum(map(len, parts[name] & parts[longer])) for longer in kept), default=0)
        if repeated * 2 <= size:
            kept.append(name)
    yield from ({"text": topics[name].strip()} for name in sorted(kept))


def folder_files(folder: Path, split: str) -> list[Path]:
    """Return the readable files under `folder` that belong to `split`, sorted.

    Files with the split in their name (`train-00001.parquet`) are taken; where no name has it, `train` takes all but
    those that only describe the folder (README, LICENSE).
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and file_type(path))
    files = [path for path in found if not path.name.lower().startswith((".", "readme", "license"))]
    named = [path for path in files if split in re.split(r"[-_.]", path.name.lower())]
    chosen = named or (files if split == "train" else [])
    if not chosen:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise LinearizeError(
            f"No file for the split {split!r} in the folder {folder} (`data.source`): it holds {held}. Expected files "
            f"that end in {', '.join(READERS)} (also as .xz or .gz); give such a folder, or another `data.split`."
        )
    return chosen


def missing_file(source: str, setting: str) -> LinearizeError:
    """Return the error for a setting's source that names no file, with near matches from its folder."""
    path = Path(source).expanduser()
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""
    return LinearizeError(
        f"{setting} names {source!r}, and there is no such file or folder (looked in {folder.absolute()}).{hint} "
        f"Give `builtin`, a file, a folder, or a hub id such as `owner/name`."
    )


def hub_rows(source: str, split: str, streaming: bool) -> Iterable[Row]:
    """Return the rows of a dataset of the Hugging Face Hub; `owner/name:config` picks one of its configurations.

    A downloaded dataset comes in a fixed random order, a streamed one in its own.
    """
    import datasets

    name, _, config = source.partition(":")
    try:
        dataset: Any = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError) as error:
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise LinearizeError(
            f"Cannot load the dataset {source!r} (`data.source`, split {split!r}): it is no local file, and the hub "
            f"says: {detail[0].rstrip('.')}. Check the id, `data.split` and the connection, or give a local file."
        ) from error
    rows: Iterable[Row] = dataset if streaming else dataset.shuffle(seed=0, keep_in_memory=True)
    return rows


def url_rows(source: str, split: str) -> Iterable[Row]:
    """Return the rows of files at a URL, such as `s3://bucket/part-*.parquet`, streamed through `datasets`.

    Raises:
        LinearizeError: their type is not served there, they cannot be opened, or a split is asked for.
    """
    import datasets

    kind = REMOTE.get(file_type(Path(source)) or "")
    if kind is None or split != "train":
        what = f"`data.split` is {split!r}, and a URL has no splits" if kind else "their type is not read from a URL"
        raise LinearizeError(
            f"Cannot read {source!r} (`data.source`): {what}. Give files that end in {', '.join(REMOTE)} (also as "
            ".gz or .xz), without `data.split`."
        )
    try:
        dataset: Any = datasets.load_dataset(kind, data_files={"train": source}, split="train", streaming=True)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, ImportError) as error:
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise LinearizeError(
            f"Cannot open {source!r} (`data.source`): {detail[0].rstrip('.')}. Check the address; fsspec opens it, "
            "which needs s3fs for s3:// and gcsfs for gs://, and their credentials."
        ) from error
    rows: Iterable[Row] = dataset
    return rows


def is_local(source: str) -> bool:
    """Tell whether a source is on this machine: `builtin`, or a file or folder that exists."""
    return source == "builtin" or os.path.exists(Path(source).expanduser())  # False for a name that is too long


def check_source(source: str, setting: str = "`data.source`") -> None:
    """Raise where a source cannot be: nothing at all, a file or folder that is missing, or no hub id.

    Args:
        source: as in `data.source`.
        setting: that has it, named in the error.

    Raises:
        LinearizeError: with near matches.
    """
    if source and (is_local(source) or URL.match(source)):
        return
    looks_local = file_type(Path(source)) is not None or source.startswith((".", "/", "~"))
    if looks_local or not HUB_ID.fullmatch(source):
        raise missing_file(source, setting)


def source_names(data: Data) -> list[str]:
    """Return the sources as a list.

    Raises:
        LinearizeError: the list is empty.
    """
    names = [data.source] if isinstance(data.source, str) else data.source
    if not names:
        raise LinearizeError("`data.source` is an empty list. Give at least one source, such as `builtin`.")
    return names


def is_lazy(data: Data) -> bool:
    """Tell whether rows are read only as far as the token budget needs: streams, and everything from the hub."""
    return data.streaming or not all(is_local(name) for name in source_names(data))


def source_rows(source: str, split: str, streaming: bool) -> Iterable[Row]:
    """Return the rows of one source, read as they are asked for.

    Raises:
        LinearizeError: there is no such source, it has no such split, or no reader takes it.
    """
    path = Path(source).expanduser()
    if path.is_dir() and source != "builtin":
        return (row for file in folder_files(path, split) for row in read_file(file))
    if source == "builtin" or path.is_file():
        if split != "train":
            raise LinearizeError(
                f"`data.split` is {split!r}, and {source!r} has no splits. Leave `data.split` out, or give the file "
                "that holds that split."
            )
        return builtin_rows() if source == "builtin" else read_file(path)
    if URL.match(source):
        return url_rows(source, split)
    check_source(source)
    return hub_rows(source, split, streaming)


def source_documents(source: str, data: Data) -> Iterator[Document]:
    """Yield the documents of one source; its first row decides what `format: auto` means."""
    form, found = None, False
    for row in source_rows(source, data.split, data.streaming):
        form = form or choose_format(row, data.format, source)
        document = to_document(row, form, source)
        if document is not None:
            found = True
            yield document
    if not found:
        raise LinearizeError(f"`data.source` {source!r} is empty: no row has text. Give one that has, or `builtin`.")


def round_robin(sources: list[Iterator[Document]]) -> Iterator[Document]:
    """Yield one document of each source in turn until all are used up."""
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def load_documents(data: Data) -> Iterator[Document]:
    """Yield the documents of all sources, in turn; text that was seen before is left out.

    Args:
        data: the recipe's data settings; uses `source`, `split`, `format` and `streaming`.

    Raises:
        LinearizeError: a source is missing, empty, damaged, or has no usable column.
    """
    seen: set[int] = set()
    for document in round_robin([source_documents(name, data) for name in source_names(data)]):
        identity = hash(document)
        if identity not in seen:
            seen.add(identity)
            yield document
