"""Checkpoints of a run: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint, replacing an older one of the same name only when the new one is whole.

    Args:
        folder: the checkpoint's own folder.
        tensors: by name; copied to the CPU one at a time. Of names that share a tensor the first alone is written.
        state: JSON values.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    once = {(t.data_ptr(), t.shape, t.stride()): name for name, t in reversed(tensors.items())}  # tied weights
    kept = {name: t for name, t in tensors.items() if once[t.data_ptr(), t.shape, t.stride()] == name}
    save_file({name: t.detach().cpu().contiguous() for name, t in kept.items()}, new / TENSORS)
    sync(new / TENSORS)
    write_text(new / STATE, json.dumps(state))
    files = {name: _digest(new / name) for name in (TENSORS, STATE)}
    write_text(new / MANIFEST, json.dumps(files))
    sync(new)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the checkpoint, or the one before it if the newest is not whole.

    Returns:
        Tensors on the CPU and the state, or None where there is no whole checkpoint.
    """
    for candidate in (folder, folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")):
        if _is_whole(candidate):
            state: dict[str, Any] = json.loads((candidate / STATE).read_text(encoding="utf-8"))
            return load_file(candidate / TENSORS), state
    return None


def state_of(folder: Path) -> dict[str, Any] | None:
    """Return the state of a checkpoint without its tensors, or None where there is no whole one."""
    if not _is_whole(folder):
        return None
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def remove(folder: Path) -> None:
    """Delete a checkpoint and its leftovers."""
    for suffix in ("", ".new", ".old"):
        shutil.rmtree(folder.with_name(folder.name + suffix), ignore_errors=True)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(files) and all(_digest(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError):
        return False
