"""Checks on weight files before anything loads them: whole, unpickled, of a kind that can be linearized."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HASH_LIMIT = 2 * 2**30


def check_folder(folder: Path) -> dict[str, Any]:
    """Return the config of a model folder that is fit to be a teacher.

    Raises:
        LinearizeError: it holds no model, pickled weights only, broken weights, or a linearized model.
    """
    if not (folder / "config.json").is_file():
        raise LinearizeError(f"The folder {folder} holds no model: there is no config.json.{_hint(folder)}")
    config = _json(folder / "config.json")
    if "linearize" in config:
        raise LinearizeError(
            f"{folder} is already linearized (its config.json has a `linearize` key). "
            f"Evaluate it with `linearize eval {folder}`, or start again from its teacher."
        )
    _check_weights(folder)
    return config


def check_safetensors(path: Path) -> None:
    """Raise unless a safetensors file is as long as its header says.

    Raises:
        LinearizeError: the header is no JSON, or the file is shorter or longer than it promises.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header reaches past the end of the file")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise LinearizeError(f"{path} is not a safetensors file or is damaged ({error}). Download it again.") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise LinearizeError(
            f"{path} is damaged: its header promises {expected:,} bytes, the file has {size:,}. Download it again."
        )


def check_gguf(path: Path) -> None:
    """Raise unless a GGUF file can be read to the end of its last tensor.

    Raises:
        LinearizeError: there is no such file, it is no GGUF file, or it is cut short.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise LinearizeError(f"There is no file {path}. Give the path of a .gguf file that exists.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LinearizeError(f"{path} is not a GGUF file: it does not start with the letters GGUF.")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise LinearizeError(f"{path} is damaged or cut short ({error}). Download it again.") from None
    if not reader.tensors:
        raise LinearizeError(f"{path} holds no tensor. Give a GGUF file with a model's weights.")


def sha256(path: Path) -> str:
    """Return a file's sha256; one in the hub's cache carries it as its blob's name."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64 and all(c in "0123456789abcdef" for c in blob):
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprints(folder: Path) -> dict[str, str]:
    """Return the sha256 of each weight file, or nothing where hashing them would read more than 2 GiB."""
    files = sorted(folder.glob("*.safetensors"))
    to_read = sum(file.stat().st_size for file in files if not file.is_symlink())
    return {file.name: sha256(file) for file in files} if to_read <= HASH_LIMIT else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LinearizeError(f"{path} is damaged: it is not JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise LinearizeError(f"{path} is damaged: it holds no JSON object. Download it again.")
    return value


def _check_weights(folder: Path) -> None:
    """Raise unless every weight file of a folder is there, in safetensors, and whole."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent or not names:
            raise LinearizeError(
                f"{folder} is incomplete: {index.name} names {', '.join(absent) or 'no file'}"
                f"{', which is not there' if absent else ''}. Download it again."
            )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LinearizeError(f"The folder {folder} holds no safetensors weights.{_hint(folder)}")
    for file in files:
        check_safetensors(file)


def _hint(folder: Path) -> str:
    """Return what to do with what is there instead."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.endswith(".gguf"):
            return f" To use the GGUF file in it: --model {folder / name}."
        if name == "adapter_config.json":
            return " It is a peft adapter: merge it into its base model (`merge_and_unload`) and save that."
    if any(name.endswith(PICKLED) for name in names):
        return (
            " Its weights are pickled (.bin, .pt), which can run code when loaded and is refused. Load them where you "
            "trust them and write safetensors with `model.save_pretrained(folder)`."
        )
    return " Give a folder with config.json and *.safetensors, a hub id, a .gguf file or an alias (`linearize ls`)."
