"""The part of a checkpoint that its teacher does not have: mixers and changed projections, to be joined with it again.

LoRA is merged at the end of a stage, so what is left of it is the projections that it changed, whole. An adapter's
folder is a finished folder with `adapter.safetensors` in the place of the weights, and `adapter.json`, which says what
is taken from the teacher and what that must be.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize import yaml_io
from linearize.errors import LinearizeError
from linearize.hub import ADAPTER, ADAPTER_NOTE, CARD, LOCK, choose_files
from linearize.modeling.export import FILE_NAME
from linearize.teacher import fetch, resolve

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", FILE_NAME)


class Tensors:
    """The tensors of a folder's safetensors files, read one at a time.

    Args:
        folder: where the files lie.
        pattern: of their names.
    """

    def __init__(self, folder: Path, pattern: str = "*.safetensors") -> None:
        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob(pattern))]
        self._file = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (it is no mapping)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file[name].get_tensor(name)
        return tensor

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._file)


def write_adapter(folder: Path, out: Path) -> None:
    """Write what a finished folder has beyond its teacher as a folder of its own.

    Args:
        folder: the output folder of a finished run that converted its model.
        out: a new folder.

    Raises:
        LinearizeError: the teacher cannot be had, or shares no tensor with the model.
    """
    upload = choose_files(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not config.get("linearize"):
        raise LinearizeError(f"{folder} was not converted, so that there is nothing for --adapter-only; leave it out.")
    lock = yaml_io.read(folder / LOCK)
    teacher = str(lock["settings"]["model"])
    if lock["settings"].get("revision") is not None:  # of the Hub: pinned to the commit
        teacher = f"{teacher}@{lock['provenance']['teacher']['revision']}"
    own, theirs = Tensors(folder), Tensors(fetch(resolve(teacher)).folder)
    names = {dtype: name for name, dtype in DTYPES.items()}
    borrowed = {name: names[own[name].dtype] for name in own.names() if _same(name, own, theirs)}
    if not borrowed:
        raise LinearizeError(
            f"{folder} shares no tensor with its teacher, since all were trained: an adapter would be the whole model. "
            "Leave out --adapter-only."
        )
    out.mkdir(parents=True)
    changed = {name: own[name] for name in own.names() if name not in borrowed}
    save_file(changed, out / ADAPTER, metadata={"format": "pt"})
    note = {"teacher": teacher, "sha256": _digest(theirs, borrowed), "borrowed": borrowed}
    (out / ADAPTER_NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
    kept = [name for name in upload.files if not any(Path(name).match(pattern) for pattern in WEIGHTS)]
    for name in kept:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    del config["auto_map"]  # transformers alone cannot load it
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    lock["files"] = sorted({ADAPTER, ADAPTER_NOTE, *(name for name in kept if not name.startswith("eval/"))})
    (out / LOCK).write_text(yaml_io.dump(lock), encoding="utf-8")
    card = out / CARD
    if card.is_file():
        card.write_text(adapter_card(card.read_text(encoding="utf-8"), teacher), encoding="utf-8")


def adapter_card(card: str, teacher: str) -> str:
    """Return a model card whose section on loading is that of an adapter."""
    head, found, rest = card.partition("## How to load it\n")
    _, after, tail = rest.partition("\n## ")
    if not found:
        return card
    words = (
        "This repository holds the mixers and the projections that training changed; all else is the teacher's, "
        f"`{teacher}`, which is fetched and checked. It loads with `linearize` alone:\n\n"
        '```python\nimport linearize\n\nmodel = linearize.load("adapter")  # teacher=... where it lies elsewhere\n```\n'
    )
    relation = "base_model_relation: "
    return head.replace(f"{relation}finetune", f"{relation}adapter") + found + "\n" + words + after + tail


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter in the place of weights."""
    return (folder / ADAPTER_NOTE).is_file()


def joined(folder: Path, teacher: str | None = None) -> dict[str, Tensor]:
    """Return all tensors of a model: the adapter's and the teacher's.

    Args:
        folder: an adapter's.
        teacher: as for `--model`; the one that it was made from by default.

    Raises:
        LinearizeError: the teacher cannot be had, or is another one.
    """
    note = _note(folder)
    name = teacher or note["teacher"]
    try:
        theirs = Tensors(fetch(resolve(name)).folder)
    except LinearizeError as error:
        raise LinearizeError(
            f"{folder} is an adapter, and its teacher cannot be had: {error} Say where it lies: "
            'linearize.load(..., teacher="FOLDER or owner/name").'
        ) from error
    borrowed: dict[str, str] = note["borrowed"]
    own = Tensors(folder, ADAPTER)
    absent = sorted(entry for entry in borrowed if entry not in theirs)
    if absent or _digest(theirs, borrowed) != note["sha256"]:
        what = f"it has no {absent[0]}" if absent else "its weights are others"
        raise LinearizeError(
            f"{name} is not the teacher that {folder} was made from: {what}. Expected {note['teacher']}; give that as "
            "teacher=..."
        )
    taken = {entry: theirs[entry].to(DTYPES[dtype]) for entry, dtype in borrowed.items()}
    return {**taken, **{entry: own[entry] for entry in own.names()}}


def _note(folder: Path) -> dict[str, Any]:
    """What an adapter says of its teacher, checked."""
    try:
        note: Any = json.loads((folder / ADAPTER_NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        note = None
    borrowed = note.get("borrowed") if isinstance(note, dict) else None
    if (
        not isinstance(borrowed, dict)
        or not all(isinstance(dtype, str) and dtype in DTYPES for dtype in borrowed.values())
        or not all(isinstance(note.get(key), str) for key in ("teacher", "sha256"))
        or not (folder / ADAPTER).is_file()
    ):
        raise LinearizeError(
            f"{folder} is a damaged adapter: {ADAPTER_NOTE} must be JSON with `teacher`, `sha256`, `borrowed` "
            f"(dtypes by name), and {ADAPTER} lie beside it. Take the whole folder again."
        )
    found: dict[str, Any] = note
    return found


def _same(name: str, own: Tensors, theirs: Tensors) -> bool:
    if name not in theirs:
        return False
    mine, other = own[name], theirs[name]
    return mine.shape == other.shape and torch.equal(mine, other.to(mine.dtype))


def _digest(tensors: Tensors, dtypes: dict[str, str]) -> str:
    """The sha256 (hex) of tensors by name, as the model has them."""
    digest = hashlib.sha256()
    for name in sorted(dtypes):
        digest.update(name.encode())
        flat = tensors[name].to(DTYPES[dtypes[name]]).contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
