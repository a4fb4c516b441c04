"""Check a recipe's mixer against the registered parts before anything is built."""

from __future__ import annotations

import difflib
import inspect
import typing
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from linearize.errors import LinearizeError, UnknownNameError
from linearize.mixers.mixer import TokenMixer
from linearize.mixers.parts import HeadShape
from linearize.registry import Registry, combines, feature_maps, gates, memories

PARTS: dict[str, Registry[type]] = {
    "feature_map": feature_maps,
    "gate": gates,
    "memory": memories,
    "combine": combines,
}
FINITE = ConfigDict(allow_inf_nan=False)


def check_mixer(mixer: dict[str, Any], where: str = "mixer", causal: bool = True) -> None:
    """Check names, options, their types and values, and that the parts fit together.

    Args:
        mixer: the recipe's `mixer` as plain data.
        where: key to name in errors.
        causal: the recipe's `causal`; without it the mixer must serve encoders.

    Raises:
        LinearizeError: a part does not exist, an option is unknown or of a wrong type or value, or parts do not fit.
    """
    found = {kind: _check_part(registry, mixer[kind], f"{where}.{kind}") for kind, registry in PARTS.items()}
    combine, window = found["combine"], mixer["window"]
    if not causal:
        _check_bidirectional(mixer, found, where)
    if combine.uses_window and window is None:
        raise LinearizeError(
            f"`{where}.combine: {mixer['combine']['name']}` needs a window, but `{where}.window` is null."
        )
    if not combine.uses_window and window is not None:
        raise LinearizeError(
            f"`{where}.combine: {mixer['combine']['name']}` does not use a window; set `{where}.window: null`."
        )
    if mixer.get("memory_layers", "all") != "all" and not (combine.uses_window and combine.uses_memory):
        raise LinearizeError(
            f"`{where}.memory_layers` leaves layers with the window alone, and `{where}.combine: "
            f"{mixer['combine']['name']}` does not use both a window and a memory; drop it, or use another combine."
        )
    _check_log_weights(mixer, found, where)
    normalizes = mixer["normalize"] or (combine.shares_denominator and not getattr(combine, "log_weights", False))
    if normalizes and combine.uses_memory and not found["feature_map"].positive:
        raise LinearizeError(
            f"`{where}.normalize` (or a shared denominator) needs features of at least 0, which "
            f"`{where}.feature_map: {mixer['feature_map']['name']}` does not give; use softmax or hedgehog."
        )
    if combine.uses_memory:
        _check_memory(mixer, found, normalizes, where)
    if (
        combine.uses_memory
        and getattr(found["gate"], "per_channel", False)
        and (getattr(found["feature_map"], "widens", False) or getattr(found["feature_map"], "mixes", False))
    ):
        raise LinearizeError(
            f"`{where}.gate: {mixer['gate']['name']}` decays each channel of the keys, and `{where}.feature_map: "
            f"{mixer['feature_map']['name']}` has features that are no such channels; use another gate or map."
        )
    if combine.uses_memory and mixer["rotary"] == "features":
        _check_rotated_features(mixer, found, normalizes, where)
    if mixer.get("conv") is not None and not combine.uses_memory:
        raise LinearizeError(f"`{where}.conv` is on what the memory reads, and this mixer has no memory; drop it.")
    if mixer["output_gate"] == "silu" and not combine.uses_memory:
        raise LinearizeError(f"`{where}.output_gate: silu` gates the memory's output, and this mixer has no memory.")
    if not mixer["overlap"] and (not combine.uses_window or not combine.uses_memory):
        raise LinearizeError(f"`{where}.overlap: false` needs both a window and a memory.")
    if mixer["output_norm"] and not combine.uses_memory:
        raise LinearizeError(f"`{where}.output_norm` normalizes the memory's output, and this mixer has no memory.")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:  # parts check the values of their options as they are built
            TokenMixer(HeadShape(2, 1, 64, 64), mixer, 1.0)
        except (RuntimeError, OverflowError, TypeError) as error:  # of sizes that no tensor has
            words = " ".join(str(error).split())[:200]
            raise LinearizeError(f"`{where}` cannot be built: {words}. Check the sizes among its options.") from error


def _check_bidirectional(mixer: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Check that a mixer has nothing that knows earlier tokens alone."""
    if found["combine"].uses_window:
        raise LinearizeError(
            f"`causal: false` has no window, which looks back alone, but `{where}.combine: {mixer['combine']['name']}` "
            f"uses one; set `{where}.combine: memory_only` and `{where}.window: null`."
        )
    if not getattr(found["memory"], "bidirectional", False):
        raise LinearizeError(
            f"`{where}.memory: {mixer['memory']['name']}` runs forward alone, and the recipe has `causal: false`; use "
            "additive."
        )
    if mixer.get("conv") is not None:
        raise LinearizeError(f"`{where}.conv` looks back alone, and the recipe has `causal: false`; drop it.")
    if mixer.get("cache_dtype", "model") != "model":
        raise LinearizeError(
            f"`{where}.cache_dtype` has no effect with `causal: false`: encoders have no cache; drop it."
        )


def _check_log_weights(mixer: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Check that a softmax over window and memory has both, and that nothing else changes what it weighs."""
    name, combine = mixer["memory"]["name"], mixer["combine"]["name"]
    joins, memory = getattr(found["combine"], "log_weights", False), getattr(found["memory"], "log_weights", False)
    if not found["combine"].uses_memory:
        return
    if joins and not memory:
        raise LinearizeError(
            f"`{where}.combine: {combine}` needs a memory that is a softmax over tokens, which `{where}.memory: "
            f"{name}` is not; use retain."
        )
    if memory and not joins:
        raise LinearizeError(
            f"`{where}.memory: {name}` shares one softmax with the window, which `{where}.combine: {combine}` does not "
            "make; use joint."
        )
    if not memory:
        return
    window = mixer["window"] or {}
    needs: dict[str, tuple[Any, Any]] = {
        "rotary": (mixer["rotary"], True),
        "overlap": (mixer["overlap"], False),
        "feature_map": (mixer["feature_map"]["name"], "identity"),
        "gate": (mixer["gate"]["name"], "none"),
        "normalize": (mixer["normalize"], False),
        "output_norm": (mixer["output_norm"], False),
        "conv": (mixer.get("conv"), None),
        "window.kind": (window.get("kind", "sliding"), "sliding"),
        "k_map_heads": (mixer.get("k_map_heads", "kv"), "kv"),
    }
    for key, (given, needed) in needs.items():
        if given != needed:
            raise LinearizeError(
                f"`{where}.memory: {name}` reads whole tokens as the teacher's softmax does, each once, and needs "
                f"`{where}.{key}: {_yaml(needed)}`, got {_yaml(given)}."
            )


def _yaml(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if not isinstance(value, dict) else "one"


def _check_memory(mixer: dict[str, Any], found: dict[str, Any], normalizes: bool, where: str) -> None:
    """Check that a memory gets the keys that it is stable for, and is not asked for weights that it does not have."""
    name = mixer["memory"]["name"]
    if normalizes and not getattr(found["memory"], "normalizes", True):
        raise LinearizeError(
            f"`{where}.memory: {name}` has no sum of weights, which `{where}.normalize` or `{where}.combine: "
            f"{mixer['combine']['name']}` divides by; set `{where}.output_norm: true` and another combine."
        )
    if getattr(found["memory"], "own_decay", False) and mixer["gate"]["name"] != "none":
        raise LinearizeError(
            f"`{where}.memory: {name}` has a decay of its own, which `{where}.gate: {mixer['gate']['name']}` would not "
            f"reach; set `{where}.gate: none`."
        )
    if getattr(found["memory"], "needs_channels", False) and not getattr(found["gate"], "per_channel", False):
        raise LinearizeError(
            f"`{where}.memory: {name}` needs a gate with a decay per channel, which `{where}.gate: "
            f"{mixer['gate']['name']}` is not; use key."
        )
    if not getattr(found["memory"], "needs_unit", False):
        return
    if getattr(found["gate"], "writes_keys", False) or getattr(found["gate"], "scales_writes", False):
        raise LinearizeError(
            f"`{where}.memory: {name}` grows without bound on keys longer than 1, which `{where}.gate: "
            f"{mixer['gate']['name']}` writes; use another gate."
        )
    if not getattr(found["feature_map"], "unit", False):
        raise LinearizeError(
            f"`{where}.memory: {name}` grows without bound on keys longer than 1, which `{where}.feature_map: "
            f"{mixer['feature_map']['name']}` may give; use l2norm or softmax."
        )


def _check_rotated_features(mixer: dict[str, Any], found: dict[str, Any], normalizes: bool, where: str) -> None:
    """Check that the rotary embedding fits the features, and that nobody divides by what may then be 0."""
    if normalizes:
        raise LinearizeError(
            f"`{where}.rotary: features` makes products of features that may be below 0, and `{where}.normalize` "
            f"or `{where}.combine: {mixer['combine']['name']}` divides by them; set `{where}.output_norm: group`."
        )
    if getattr(found["feature_map"], "widens", False):
        raise LinearizeError(
            f"`{where}.rotary: features` needs as many features as channels, which `{where}.feature_map: "
            f"{mixer['feature_map']['name']}` does not give; use `{where}.rotary: true` or another map."
        )


def _check_part(registry: Registry[type], part: dict[str, Any], where: str) -> Any:
    name = part["name"]
    if name not in registry:
        raise UnknownNameError(registry.kind, name, registry.names(), where)
    found = registry.get(name)
    known = {p.name: p for p in inspect.signature(found).parameters.values() if p.kind is p.KEYWORD_ONLY}
    hints = typing.get_type_hints(found.__init__)  # type: ignore[misc]
    for key, value in part.items():
        if key == "name":
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise LinearizeError(
                f"Unknown option `{key}` of the {registry.kind} {name!r} at `{where}`.{hint} "
                f"Options: {', '.join(known) or 'none'}."
            )
        try:
            TypeAdapter(hints[key], config=FINITE).validate_python(value, strict=True)
        except ValidationError as error:
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise LinearizeError(f"`{where}.{key}` must be {expected}, got {value!r}.") from error
    return found
