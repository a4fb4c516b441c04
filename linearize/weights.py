"""Checks on weight files before anything loads them: whole, unpickled, of a kind that can be linearized."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError
from linearize.headers import GgufHeader, gguf_header, safetensors_elements

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GGUF_VERSIONS = (2, 3)
HASH_LIMIT = 2 * 2**30
SIZES = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**10,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**31,
}
METADATA = "__metadata__"


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
        LinearizeError: the header is none, or the file is shorter or longer than it promises.
    """
    try:
        safetensors_elements(path)
    except ValueError as error:
        raise LinearizeError(f"{path} is not a safetensors file or is damaged ({error}). Download it again.") from None


def tensor_files(folder: Path) -> dict[str, str]:
    """Return which file of a model folder, which was checked, holds each tensor.

    Raises:
        LinearizeError: the index leads out of the folder.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_json(index).get("weight_map", {}).values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if Path(name).name != name:
            raise LinearizeError(f"{index} names {name!r}, which is not a file of its folder. Download it again.")
    return {tensor: name for name in names for tensor in header(folder / name) if tensor != METADATA}


def header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file that was checked: dtype, shape and place of each tensor by its name."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(length))
    return found


def check_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file that holds all of its tensors.

    Raises:
        LinearizeError: there is no such file, it is no GGUF file or one of another kind, or it is cut short.
    """
    if not path.is_file():
        raise LinearizeError(f"There is no file {path}. Give the path of a .gguf file that exists.")
    with path.open("rb") as file:
        letters, version = file.read(4), file.read(4)
    if letters != b"GGUF":
        raise LinearizeError(f"{path} is not a GGUF file: it does not start with the letters GGUF.")
    if len(version) == 4 and int.from_bytes(version, "little") not in GGUF_VERSIONS:
        kind = "in big-endian byte order" if version[0] == 0 else f"of version {int.from_bytes(version, 'little')}"
        raise LinearizeError(
            f"{path} is a GGUF file {kind}; versions 2 and 3 in little-endian order are read. Convert it anew, or give "
            "the model's safetensors folder or hub id."
        )
    try:
        header = gguf_header(path)
    except ValueError as error:
        raise LinearizeError(f"{path} is damaged or cut short ({error}). Download it again.") from None
    if not header.tensors:
        raise LinearizeError(f"{path} holds no tensor. Give a GGUF file with a model's weights.")
    return header


def check_sizes(config: Any, where: str) -> None:
    """Raise where a config has a size that no model has: building such a one would not end.

    Raises:
        LinearizeError: it has.
    """
    for name, most in SIZES.items():
        size = getattr(config, name, None)
        if isinstance(size, int) and not 0 < size <= most:
            raise LinearizeError(
                f"{where} is damaged: its config says `{name}: {size}`; expected 1 to {most}. Download it again."
            )
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    hidden = getattr(config, "hidden_size", None)
    if isinstance(heads, int) and isinstance(hidden, int) and hidden // heads > SIZES["head_dim"]:
        raise LinearizeError(f"{where} is damaged: its config gives each of {heads} heads {hidden // heads} channels.")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise LinearizeError(
            f"{where} is damaged: its config says `num_attention_heads: {heads}` and `num_key_value_heads: {groups}`; "
            "expected a multiple. Download it again."
        )


def empty_model(config: Any, dtype: Any = None) -> Any:
    """Return the model of a config on the meta device, where its weights take no memory.

    Raises:
        LinearizeError: no model can be made of it.
    """
    import torch

    from linearize.modeling import auto_class

    try:
        with torch.device("meta"):
            return auto_class(config.model_type).from_config(type(config).from_dict(config.to_dict()), dtype=dtype)
    except Exception as error:  # whatever a damaged config does to a model's constructor
        words = " ".join(str(error).split())[:300]
        raise LinearizeError(
            f"The teacher's config is damaged: transformers makes no model of it ({type(error).__name__}: {words}). "
            "Download the model again."
        ) from error


def check_promise(config: Any, held: int, where: str) -> None:
    """Raise where a config describes far more parameters than the weights hold, before they are allocated.

    Args:
        config: of a family that can be linearized; others are not checked.
        held: elements of all tensors in the weight files.
        where: those files, for the error.

    Raises:
        LinearizeError: it does, or no model can be made of it.
    """
    import linearize.families  # noqa: F401  (fills the registry)
    from linearize.registry import families

    if config.model_type not in families:
        return
    promised = sum(parameter.numel() for parameter in empty_model(config).parameters())
    if promised > 2 * held:  # of fewer, the first that is missing is named once the rest is loaded
        raise LinearizeError(
            f"The weights in {where} lack some of the model's tensors: its config describes {promised:,} parameters, "
            f"and the files hold {held:,}. Download the model again."
        )


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
    except (OSError, ValueError, RecursionError) as error:
        raise LinearizeError(f"{path} is damaged: it is not JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise LinearizeError(f"{path} is damaged: it holds no JSON object. Download it again.")
    return value


def _check_weights(folder: Path) -> None:
    """Raise unless every weight file of a folder is there, in safetensors, and whole."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shards(index)
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


def _shards(index: Path) -> list[str]:
    """Return the files that an index names, all of them beside it."""
    places = _json(index).get("weight_map", {})
    names: set[str] = set()
    for name in places.values() if isinstance(places, dict) else [None]:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise LinearizeError(
                f"{index} is damaged: its `weight_map` names {name!r} where a .safetensors file beside it is expected. "
                "Download it again."
            )
        names.add(name)
    return sorted(names)


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
