"""Bytes of caches, and bytes as people read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


def format_bytes(count: float) -> str:
    """Return a byte count in binary units with three digits ("1.50 MiB")."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    unit = 0
    while abs(count) >= 1000 and unit < len(units) - 1:
        count /= 1024
        unit += 1
    if unit == 0:
        return f"{count:.0f} B"
    return f"{count:.{0 if abs(count) >= 100 else 1 if abs(count) >= 10 else 2}f} {units[unit]}"


def kv_cache_bytes(config: PretrainedConfig, context: int, dtype: torch.dtype, batch: int = 1) -> int:
    """Return the bytes of a softmax Transformer's KV cache.

    Args:
        config: the Transformer's config; layers of type `sliding_attention` keep their window alone.
        context: tokens in the cache, of each row.
        dtype: of keys and values.
        batch: rows.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or context
    tokens = sum(min(context, window) if kind == "sliding_attention" else context for kind in layers)
    return int(2 * heads * head_dim * tokens * dtype.itemsize * batch)


def tensor_bytes(holder: Any) -> int:
    """Return the bytes of all tensors that an object (a cache, a list, a state) holds, each storage counted once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                held: Any = value.values()
            elif isinstance(value, list | tuple):
                held = value
            else:
                held = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
            for entry in held:
                visit(entry)

    visit(holder)
    return sum(storages.values())
