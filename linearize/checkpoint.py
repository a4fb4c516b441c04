"""Checkpoints of a run: safetensors and JSON in a folder that appears whole or not at all.

The checkpoint before the newest stays beside it until the next one is written, for the day when the newest is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

FILE_BYTES = 2 * 2**30
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class Checkpoint(NamedTuple):
    """What was read.

    Attributes:
        tensors: on the CPU.
        state: JSON values.
        damaged: names of newer folders that were not whole and were left out.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a file that appears, or takes an older one's place, whole or not at all."""
    beside = path.with_name(path.name + ".new")
    write_text(beside, text)
    beside.replace(path)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Flush a folder with everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name; of names that share a tensor, as tied weights do, the first alone."""
    once = {(t.data_ptr(), t.shape, t.stride()): name for name, t in reversed(list(tensors.items()))}
    return {name: t for name, t in tensors.items() if once[t.data_ptr(), t.shape, t.stride()] == name}


def save(folder: Path, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> None:
    """Write a checkpoint; the one of the same name becomes the one before it when the new one is whole.

    Args:
        folder: the checkpoint's own folder. What lies there was written or read by this process, so that it is whole.
        tensors: names and tensors that share no memory, taken one after the other; no more of them are copied to the
            CPU at once than fill a file (`FILE_BYTES`).
        state: JSON values.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    shutil.rmtree(new, ignore_errors=True)
    if folder.exists():  # never three at once on the disk
        shutil.rmtree(old, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _write(new, tensors, state)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _promote(folder)


def load(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole.

    One that was still being written is removed; one that was whole once and is not any more is kept as `.damaged`.

    Returns:
        Tensors on the CPU and the state, or None where there is no whole checkpoint.
    """
    damaged: list[str] = []
    for candidate in (_beside(folder, "new"), folder, _beside(folder, "old")):
        if not candidate.is_dir():
            continue
        if not _is_whole(candidate):
            damaged.append(candidate.name)
            _put_away(candidate, folder)
            continue
        state: dict[str, Any] = json.loads((candidate / STATE).read_text(encoding="utf-8"))
        tensors = {name: tensor for file in tensor_files(candidate) for name, tensor in load_file(file).items()}
        if candidate.name.endswith(".new"):
            _promote(folder)
        elif candidate != folder:
            candidate.rename(folder)
        return Checkpoint(tensors, state, tuple(damaged))
    return None


def state_of(folder: Path) -> dict[str, Any] | None:
    """Return the state of a checkpoint without its tensors, or None where there is no whole one."""
    if not _is_whole(folder):
        return None
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def remove(folder: Path) -> None:
    """Delete a checkpoint, the one before it and its leftovers."""
    for path in (*(_beside(folder, suffix) for suffix in ("new", "old", "damaged")), folder):
        shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _write(new: Path, tensors: Iterable[tuple[str, Tensor]], state: dict[str, Any]) -> None:
    for number, part in enumerate(_parts(tensors)):
        path = new / (f"tensors-{number}.safetensors" if number else TENSORS)
        save_file(part, path)
        sync(path)
    write_text(new / STATE, json.dumps(state))
    write_text(new / MANIFEST, json.dumps(_digests(new)))
    sync(new)


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file, on the CPU; one file at least."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield part


def tensor_files(folder: Path) -> list[Path]:
    """Return the files that hold a checkpoint's tensors."""
    return sorted(folder.glob("*.safetensors"))


def _put_away(broken: Path, folder: Path) -> None:
    damaged = _beside(folder, "damaged")
    if broken != _beside(folder, "new"):
        shutil.rmtree(damaged, ignore_errors=True)
        broken.rename(damaged)
    else:
        shutil.rmtree(broken)


def _promote(folder: Path) -> None:
    """Let the whole `.new` take its place; a kill between the two renames leaves `.new` and `.old`, both whole."""
    new, old = _beside(folder, "new"), _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digests(folder: Path) -> dict[str, Any]:
    return {path.name: _digest(path) for path in (*tensor_files(folder), folder / STATE)}


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(files == _digests(folder) and TENSORS in files)
    except (OSError, ValueError):
        return False
