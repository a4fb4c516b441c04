"""A pydantic error as one paragraph in the words of a recipe: which key, what was expected, what was got."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

SHOWN = 3


def explain(error: ValidationError, value: Any, model: type[BaseModel], where: str) -> str:
    """Return one paragraph that names the first few mistakes.

    Args:
        error: what pydantic raised.
        value: the parsed YAML that was checked.
        model: the type that it was checked against.
        where: the file or name that held it.
    """
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path = _path(item["loc"], value, item["type"] == "missing")
        found.setdefault(path, []).append(_phrase(dict(item), model))
    outer = {path for path in found if any(other.startswith(path + ".") for other in found)}
    sentences = [_sentence(path, phrases) for path, phrases in found.items() if path not in outer]
    more = f" And {len(sentences) - SHOWN} more." if len(sentences) > SHOWN else ""
    return f"{where} is not a valid recipe. {' '.join(sentences[:SHOWN])}{more}"


def _path(loc: tuple[int | str, ...], value: Any, missing: bool) -> str:
    """Return the location as a dotted path, without the union tags that pydantic puts between."""
    keys: list[str] = []
    node = value
    for position, key in enumerate(loc):
        if isinstance(node, dict) and (key in node or (missing and position == len(loc) - 1)):
            node = node.get(key)
        elif isinstance(node, list | tuple) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            continue
        keys.append(str(key))
    return ".".join(keys)


def _phrase(item: dict[str, Any], model: type[BaseModel]) -> str:
    """Return what is wrong with one value, without its path."""
    kind, message, got = item["type"], str(item["msg"]), _short(item["input"])
    context = item.get("ctx", {})
    if kind == "extra_forbidden":
        key = str(item["loc"][-1])
        known = sorted({name for owner in _owners(item["loc"][:-1], model) for name in owner.model_fields})
        return f"is no key of a recipe here.{_near(key, known)} Known: {', '.join(known)}"
    if kind == "missing":
        return "is required and missing"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        return f"has the unknown stage {context['tag']!r}.{_near(str(context['tag']), tags)} Known: {', '.join(tags)}"
    if kind == "union_tag_not_found":
        return "needs a `stage` key that says which stage it is: transfer, finetune, distill or preference"
    if kind == "value_error":
        return f"cannot be: {message.removeprefix('Value error, ')}"
    if not message.startswith("Input should be "):
        return f"cannot be: {message}, got {got}"
    if kind == "model_type":
        return f"expected a mapping from keys to values, got {got}"
    expected = message.removeprefix("Input should be ")
    for start in ("greater", "less"):
        expected = f"a number {expected}" if expected.startswith(start) else expected
    near = _near(str(item["input"]), _options(expected)) if kind == "literal_error" else ""
    return f"expected {expected}, got {got}{near and '.' + near.rstrip('?') + '?'}"


def _sentence(path: str, phrases: list[str]) -> str:
    """Return one sentence for all that was said about a path; the members of a union are joined by `or`."""
    if len(phrases) > 1 and all(phrase.startswith("expected ") and ", got " in phrase for phrase in phrases):
        expected = " or ".join(phrase.removeprefix("expected ").rpartition(", got ")[0] for phrase in phrases)
        phrases = [f"expected {expected}, got {phrases[0].rpartition(', got ')[2]}"]
    subject = f"`{path}`" if path else "It"
    joint = ": " if phrases[0].startswith("expected ") else " "
    return f"{subject}{joint}{phrases[0].rstrip('.')}{'' if phrases[0].endswith('?') else '.'}"


def _owners(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the recipe types that can sit at a location."""
    owners = [model]
    for key in loc:
        if isinstance(key, int):
            continue
        tagged = [
            owner for owner in owners if "stage" in owner.model_fields and owner.model_fields["stage"].default == key
        ]
        fields = [owner.model_fields[key].annotation for owner in owners if key in owner.model_fields]
        owners = tagged or [found for annotation in fields for found in _models(annotation)] or owners
    return owners


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield every recipe type inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _options(expected: str) -> list[str]:
    """Return the quoted words of a literal's message."""
    return expected.split("'")[1::2]


def _near(name: str, known: list[str]) -> str:
    """Return ` Did you mean ...?` for near matches, else nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(option) for option in near)}?" if near else ""


def _short(value: Any) -> str:
    """Return a value and its type, cut to a readable length."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"
