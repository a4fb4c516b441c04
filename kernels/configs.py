"""The static table of tile sizes, warps and pipeline stages of the Triton kernels; nothing is tuned at run time.

Legend: C chunk, K key dim, V value dim, R query heads of a KV head. Chosen by `scripts/tune_kernels.py` on an H100.
GPUs other than Hopper and Blackwell of the data center get tiles that were chosen by what they spill when compiled for
sm_80: untuned, and never run. Entries are compiled in `tests/kernels` for sm_80 and sm_90, and gradient-checked on the
GPU by `scripts/bench_kernels.py --check`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Tile:
    """One launch: block of key dims, block of value dims, warps, pipeline stages."""

    key: int
    value: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """The launches of `gated_linear_attention`, forward and backward; the walks over chunks are cut into `segments`."""

    chunk: int
    segments: int
    states: Tile
    outputs: Tile
    state_grads: Tile
    value_grads: Tile
    key_grads: Tile


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device gets the tiles tuned on an H100: compute capability 9 or 10, and what is no GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


AnyTiles = TypeVar("AnyTiles", "Tiles", "DeltaTiles")


def _before_hopper(tiles: AnyTiles) -> AnyTiles:
    """Smaller shares of a chunk a thread: products take their operands from registers there, not from shared memory."""
    names = [name for name in ("solve", "outputs", "value_grads") if hasattr(tiles, name)]
    changed = {name: replace(getattr(tiles, name), warps=8) for name in names}
    changed["key_grads"] = replace(tiles.key_grads, key=min(tiles.key_grads.key, 32), warps=4)
    if tiles.value_grads.key > 128:
        changed["value_grads"] = replace(changed["value_grads"], value=min(tiles.value_grads.value, 32))
    return replace(tiles, **changed)


def _power(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())


FULL = 256  # programs that fill a GPU while they walk over chunks
SHORTEST = 8  # chunks of a segment of such a walk


@cache
def gated_linear_tiles(
    dtype: torch.dtype, key_dim: int, value_dim: int, pairs: int, repeat: int, tokens: int, hopper: bool = True
) -> Tiles | None:
    """Return the tiles for one shape, or None where no kernel serves it.

    Args:
        dtype: of q, k, v.
        key_dim: K.
        value_dim: V.
        pairs: B * G, the number of states.
        repeat: R.
        tokens: T.
        hopper: as `is_hopper` says.
    """
    key, value = _power(key_dim), _power(value_dim)
    wide = max(key, value)
    if wide > 256 or (wide > 128 and dtype != torch.bfloat16):
        return None
    half = dtype == torch.bfloat16
    chunk = 64 if half else 32
    programs, segments = pairs * (key // min(key, 32)) * (value // min(value, 64)), 1
    while programs * segments < FULL and tokens >= 2 * segments * SHORTEST * chunk:
        segments *= 2
    wide_enough = programs * segments >= 100
    state = (min(32, key), min(64 if wide_enough else 32, value))
    grad = state
    if not half:
        return Tiles(
            chunk=chunk,
            segments=segments,
            states=Tile(*state, stages=2),
            outputs=Tile(key, min(value, 64), stages=1),
            state_grads=Tile(*grad, stages=1),
            value_grads=Tile(key, min(value, 64), stages=1),
            key_grads=Tile(min(key, 32), value, stages=1),
        )
    columns = min(value, 128 if wide <= 128 else 64)
    tiles = Tiles(
        chunk=chunk,
        segments=segments,
        states=Tile(*state, stages=3),
        outputs=Tile(key, columns, warps=4 if wide <= 128 else 8, stages=1),
        state_grads=Tile(*grad, stages=2 if repeat * sum(grad) <= 512 else 1),
        value_grads=Tile(key, columns, warps=4 if wide <= 128 else 8, stages=1),
        key_grads=Tile(min(key, 64), value, stages=1),
    )
    return tiles if hopper else _before_hopper(tiles)


@dataclass(frozen=True)
class DeltaTiles:
    """The launches of `gated_delta_rule`, forward and backward; in the first, the block of value dims is a loop's."""

    chunk: int
    solve: Tile
    states: Tile
    outputs: Tile
    value_grads: Tile
    state_grads: Tile
    key_grads: Tile
    segments: int = 1  # its walk cannot be cut: what a chunk does to the state is a full matrix


@cache
def delta_tiles(
    dtype: torch.dtype, key_dim: int, value_dim: int, pairs: int, repeat: int, tokens: int, hopper: bool = True
) -> DeltaTiles | None:
    """Return the tiles for one shape, or None where no kernel serves it.

    Args:
        dtype: of q, k, v.
        key_dim: K.
        value_dim: V.
        pairs: B * G, the number of states.
        repeat: R.
        tokens: T.
        hopper: as `is_hopper` says.
    """
    shared = gated_linear_tiles(dtype, key_dim, value_dim, pairs, repeat, tokens)
    if shared is None:
        return None
    key, value = _power(key_dim), _power(value_dim)
    columns = min(value, 32 if key <= 128 and pairs * (value // 32) >= 100 else 16)
    if dtype != torch.bfloat16:
        # wgmma, which needs 4 warps, would take accumulators transposed in tf32
        walk = Tile(key, 16, warps=2, stages=1)
        return DeltaTiles(
            chunk=shared.chunk,
            solve=Tile(key, min(value, 64), stages=1),
            states=walk,
            outputs=shared.outputs,
            value_grads=Tile(key, min(value, 32), stages=1),
            state_grads=walk,
            key_grads=shared.key_grads,
        )
    tiles = DeltaTiles(
        chunk=shared.chunk,
        # At least 64 wide: with 32 columns of values Triton 3.6 gave wrong u on Hopper.
        solve=Tile(max(key, 64), 64, warps=4 if key <= 128 else 8, stages=1),
        states=Tile(key, columns, stages=2),
        outputs=shared.outputs,
        value_grads=Tile(key, min(value, 64), warps=4 if key <= 128 else 8, stages=1),
        state_grads=Tile(key, columns, stages=2),
        key_grads=shared.key_grads,
    )
    return tiles if hopper else _before_hopper(tiles)


@dataclass(frozen=True)
class Blocks:
    """One launch over blocks of queries and keys."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class WindowTiles:
    """The launches of `window_attention`, forward and backward."""

    forward: Blocks
    query_grads: Blocks
    key_grads: Blocks


@cache
def window_tiles(dtype: torch.dtype, key_dim: int, value_dim: int) -> WindowTiles:
    """Return the tiles for one shape.

    Args:
        dtype: of q, k, v.
        key_dim: K.
        value_dim: V.
    """
    wide = max(_power(key_dim), _power(value_dim))
    if dtype == torch.float32:
        small = Blocks(32, 32, stages=1)
        return WindowTiles(forward=small, query_grads=small, key_grads=small)
    if wide > 128:
        return WindowTiles(Blocks(64, 32), Blocks(64, 32, stages=1), Blocks(32, 64, warps=8, stages=1))
    return WindowTiles(forward=Blocks(64, 32), query_grads=Blocks(64, 64), key_grads=Blocks(64, 64))
