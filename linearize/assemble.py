"""Write a finished checkpoint from a teacher's files and the tensors that a conversion changed, one shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearize.layered import LayeredTeacher
from linearize.modeling.export import save_around
from linearize.weights import METADATA, header

SHARD_BYTES = 4 * 2**30
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
INDEX = "model.safetensors.index.json"


def assemble(teacher: LayeredTeacher, changed: Iterable[Path], folder: Path, tokenizer: Any) -> None:
    """Write a converted model's folder without ever having the model.

    A file of the teacher's is copied as it is, unless a tensor in it changed, has another name in the model, or is in
    another dtype than the run's: then it is written anew, and is in memory meanwhile.

    Args:
        teacher: converted; tells names, dtype and configuration.
        changed: safetensors files with the tensors of the student that are not the teacher's, by the model's names.
        folder: of the checkpoint; made here.
        tokenizer: saved beside it.
    """
    folder.mkdir(parents=True)
    files = list(changed)
    new = {name for file in files for name in header(file) if name != METADATA}
    shards = Shards(folder)
    names = {key: name for name, key in reversed(teacher.keys.items())}
    names |= {key: key for name, key in teacher.keys.items() if name == key}
    for source in sorted(set(teacher.files.values())):
        _take(teacher, source, names, new, shards)
    waiting: dict[str, Tensor] = {}
    for file in files:
        waiting |= load_file(file)
        if sum(tensor.nbytes for tensor in waiting.values()) > SHARD_BYTES:
            shards.write(waiting)
            waiting = {}
    shards.write(waiting)
    shards.finish()
    model = teacher.model
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(teacher.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        if (teacher.folder / "generation_config.json").is_file():
            model.generation_config = type(model.generation_config).from_pretrained(teacher.folder)
        model.generation_config.save_pretrained(folder)
    save_around(model.config, folder, tokenizer)


def _take(teacher: LayeredTeacher, file: str, names: dict[str, str], new: set[str], shards: Shards) -> None:
    """Copy a file of the teacher's, or write what is left of it."""
    path = teacher.folder / file
    entries = {key: entry for key, entry in header(path).items() if key != METADATA}
    dtype = DTYPES[teacher.dtype]
    if all(names.get(key) == key and key not in new and entry["dtype"] == dtype for key, entry in entries.items()):
        shards.copy(path, entries)
        return
    kept = [key for key in entries if key in names and names[key] not in new]
    with safe_open(path, "pt") as opened:
        shards.write({names[key]: opened.get_tensor(key).to(teacher.dtype) for key in kept})


class Shards:
    """The weight files of a checkpoint while they are written; they are numbered at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[tuple[Path, list[str], int]] = []

    def _next(self) -> Path:
        return self.folder / f"shard-{len(self.written)}.safetensors"

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write a shard, unless it would be empty."""
        if tensors:
            path, size = self._next(), sum(tensor.nbytes for tensor in tensors.values())
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
            self.written.append((path, list(tensors), size))

    def copy(self, source: Path, entries: dict[str, Any]) -> None:
        """Copy a shard."""
        path = self._next()
        shutil.copyfile(source, path)
        size = sum(end - begin for begin, end in (entry["data_offsets"] for entry in entries.values()))
        self.written.append((path, list(entries), size))

    def finish(self) -> None:
        """Give the files their names and write the index."""
        places = {}
        for number, (path, names, _) in enumerate(self.written, start=1):
            name = f"model-{number:05d}-of-{len(self.written):05d}.safetensors"
            path.rename(self.folder / name)
            places.update(dict.fromkeys(names, name))
        index = {
            "metadata": {"total_size": sum(size for _, _, size in self.written)},
            "weight_map": dict(sorted(places.items())),
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
