"""Time candidate tiles of each Triton launch on the GPU at hand; `kernels/configs.py` keeps the choice.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim.
    python scripts/tune_kernels.py --op gated_linear --gate vector
Each candidate replaces one launch's tile; the call's launches are captured and the one in question is timed alone.
Candidates are compiled first, in parallel processes, into Triton's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from linearize.kernels import configs, gated_linear_triton, launch
from linearize.kernels.configs import Tile

SHAPE = (4, 2048, 32, 8, 128, 128)
KERNELS = {
    "states": "_states",
    "outputs": "_outputs",
    "state_grads": "_state_grads",
    "value_grads": "_value_grads",
    "key_grads": "_key_grads",
}
BLOCKS = {
    "states": [(64, 64), (32, 64), (32, 32), (64, 32)],
    "outputs": [(128, 64), (128, 128)],
    "state_grads": [(64, 64), (32, 64), (32, 32), (64, 32)],
    "value_grads": [(128, 64), (128, 128)],
    "key_grads": [(64, 128), (32, 128)],
}


def candidates(name: str) -> Iterator[Tile]:
    """Tiles to try for one launch."""
    stages = (2, 3, 4) if name == "states" else (1, 2)
    for (key, value), warps, depth in itertools.product(BLOCKS[name], (4, 8), stages):
        if not (warps == 8 and key * value < 4096):
            yield Tile(key, value, warps, depth)


@contextmanager
def captured() -> Iterator[list[Any]]:
    """Run launches as usual and note them, so that one can be repeated."""
    launches: list[Any] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if not kwargs["warmup"]:
            launches.append((self.__name__, lambda: original(self, *args, **kwargs)))
        return original(self, *args, **kwargs)

    JITFunction.run = run
    launch.forget()
    try:
        yield launches
    finally:
        JITFunction.run = original


def gated_linear_call(gate: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A forward and backward call at `shape` with usual gates."""
    B, T, H, G, K, V = shape
    q, k, v, do = (torch.randn(B, T, h, d, device="cuda", dtype=dtype) for h, d in ((H, K), (G, K), (G, V), (H, V)))
    shapes = {"none": None, "scalar": (B, T, G), "vector": (B, T, G, K)}
    g = None
    if shapes[gate] is not None:
        g = (torch.nn.functional.logsigmoid(torch.randn(shapes[gate], device="cuda")) / 16).to(dtype).requires_grad_()
    for x in (q, k, v):
        x.requires_grad_()

    def call() -> None:
        o = gated_linear_triton.gated_linear_triton(q, k, v, g, 1.0, False, None, None, None)[0]
        o.backward(do)

    return call


def timed(gate: str, shape: tuple[int, ...], name: str, tile: Tile, measure: bool = True) -> float:
    """Milliseconds of one launch with `tile`."""
    original = configs.gated_linear_tiles

    def tiles(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(original(*args, **kwargs), **{name: tile})

    gated_linear_triton.gated_linear_tiles = tiles
    try:
        with captured() as launches:
            gated_linear_call(gate, shape, torch.bfloat16)()
        again = next(run for kernel, run in launches if kernel == KERNELS[name])
        return triton.testing.do_bench(again, warmup=5, rep=30, return_mode="median") if measure else 0.0
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
        print(name, tile, type(error).__name__)
        return float("inf")
    finally:
        gated_linear_triton.gated_linear_tiles = original


def _warm(job: tuple[str, tuple[int, ...], str, Tile]) -> None:
    timed(*job, measure=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gate", nargs="+", default=["vector", "scalar"])
    parser.add_argument("--shape", nargs=6, type=int, default=SHAPE, metavar=("B", "T", "H", "G", "K", "V"))
    parser.add_argument("--launch", nargs="+", default=list(KERNELS))
    parser.add_argument("--jobs", type=int, default=14)
    options = parser.parse_args()
    shape = tuple(options.shape)
    small = (1, 256, *shape[2:])
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        jobs = [(g, small, name, tile) for g in options.gate for name in options.launch for tile in candidates(name)]
        pool.map(_warm, jobs, chunksize=1)
    for gate in options.gate:
        for name in options.launch:
            rows = [(timed(gate, shape, name, tile), tile) for tile in candidates(name)]
            rows.sort(key=lambda row: row[0])
            for ms, tile in rows:
                print(f"{gate:7} {name:12} {ms:8.4f} ms  {tile}", flush=True)


if __name__ == "__main__":
    main()
