"""Safe YAML for recipes: `1e-3` is a number, a repeated key is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from linearize.errors import LinearizeError

MAX_BYTES = 2**20  # of a file
MAX_VALUES = 100_000  # with every alias written out


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's floats and without silent overwriting of keys."""

    def get_single_node(self) -> yaml.Node | None:
        """Return the document, unless its aliases make it endless or of a size that its text does not show."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node holds; 0 stands in `known` for one that is still being counted."""
    if known.get(id(node)) == 0:
        raise yaml.composer.ComposerError(None, None, "an alias refers to what it stands in", node.start_mark)
    if id(node) not in known:
        known[id(node)] = 0
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    if known[id(node)] > MAX_VALUES:
        raise yaml.composer.ComposerError(None, None, f"it holds more than {MAX_VALUES:,} values", node.start_mark)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """The safe dumper, writing short lists of scalars on one line."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice", key_node.start_mark)
        seen.add(key)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


def _list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.SequenceNode:
    flat = not any(isinstance(item, dict) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Dumper.add_representer(list, _list)
_Dumper.add_multi_representer(dict, yaml.SafeDumper.represent_dict)


def parse(text: str, where: str) -> Any:
    """Return the value that `text` holds.

    Args:
        text: one YAML document.
        where: the file or option that held it; used in errors.

    Raises:
        LinearizeError: the text is not YAML, or a mapping repeats a key.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise LinearizeError(f"{where}{line}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise LinearizeError(f"{where} is not YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise LinearizeError(f"{where} is nested too deeply.") from None


def read(path: Path) -> Any:
    """Return the value in a YAML file.

    Raises:
        LinearizeError: the file cannot be read as UTF-8 text or is not YAML.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LinearizeError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LinearizeError(f"Cannot read {path} as a UTF-8 text file: {error}.") from None
    return parse(text, str(path))


def dump(value: Any) -> str:
    """Return `value` as YAML text, keys in their given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
