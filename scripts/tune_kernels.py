"""Time candidate tiles of each Triton launch on the GPU at hand; `kernels/configs.py` keeps the choice.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim.
    python scripts/tune_kernels.py --op linear --gate vector
    python scripts/tune_kernels.py --op delta --gate scalar --launch states state_grads --shape 1 8192 32 8 128 128
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

from linearize.kernels import configs, delta_triton, gated_linear_triton, launch
from linearize.kernels.configs import Tile

SHAPE = (4, 2048, 32, 8, 128, 128)
KERNELS = {
    "linear": {
        "states": "_states",
        "outputs": "_outputs",
        "state_grads": "_state_grads",
        "value_grads": "_value_grads",
        "key_grads": "_key_grads",
    },
    "delta": {
        "solve": "_solve",
        "states": "_delta_states",
        "outputs": "_outputs",
        "value_grads": "_value_grads",
        "state_grads": "_delta_state_grads",
        "key_grads": "_key_grads",
    },
}
WHOLE = -1  # the block is the whole key dim
BLOCKS = {
    "linear": {
        "states": [(64, 64), (32, 64), (32, 32), (64, 32)],
        "outputs": [(WHOLE, 64), (WHOLE, 128)],
        "state_grads": [(64, 64), (32, 64), (32, 32), (64, 32)],
        "value_grads": [(WHOLE, 64), (WHOLE, 128)],
        "key_grads": [(64, 128), (32, 128)],
    },
    "delta": {
        "solve": [(WHOLE, 64), (WHOLE, 128)],
        "states": [(WHOLE, 16), (WHOLE, 32), (WHOLE, 64)],
        "outputs": [(WHOLE, 64), (WHOLE, 128)],
        "value_grads": [(WHOLE, 32), (WHOLE, 64)],
        "state_grads": [(WHOLE, 16), (WHOLE, 32), (WHOLE, 64)],
        "key_grads": [(64, 128), (32, 128)],
    },
}


def candidates(op: str, name: str, shape: tuple[int, ...]) -> Iterator[Tile]:
    """Tiles to try for one launch; a block is never wider than the head."""
    wide, high = (max(16, triton.next_power_of_2(x)) for x in shape[4:])
    stages = (1, 2, 3, 4) if name == "states" else (1, 2, 3) if name == "state_grads" else (1, 2)
    blocks = dict.fromkeys(
        (wide if key == WHOLE else min(key, wide), min(value, high)) for key, value in BLOCKS[op][name]
    )
    for (key, value), warps, depth in itertools.product(blocks, (4, 8), stages):
        if warps == 8 and key * value < 4096:
            continue
        if name == "key_grads" and (key, warps, depth) == (32, 4, 1):  # an illegal access, see docs/kernels.md
            continue
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


def op_call(op: str, gate: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A forward and backward call at `shape` with usual gates."""
    B, T, H, G, K, V = shape
    q, k, v, do = (torch.randn(B, T, h, d, device="cuda", dtype=dtype) for h, d in ((H, K), (G, K), (G, V), (H, V)))
    shapes = {"none": None, "scalar": (B, T, G), "vector": (B, T, G, K)}
    g = None
    if shapes[gate] is not None:
        g = (torch.nn.functional.logsigmoid(torch.randn(shapes[gate], device="cuda")) / 16).to(dtype).requires_grad_()
    for x in (q, k, v):
        x.requires_grad_()

    beta = torch.rand(B, T, G, device="cuda").requires_grad_()

    def call() -> None:
        if op == "delta":
            unit = torch.nn.functional.normalize(k, dim=-1)
            o = delta_triton.gated_delta_triton(q, unit, v, beta, g, 1.0, None, None)[0]
        else:
            o = gated_linear_triton.gated_linear_triton(q, k, v, g, 1.0, False, None, None, None)[0]
        o.backward(do)

    return call


def timed(op: str, gate: str, shape: tuple[int, ...], name: str, tile: Tile, measure: bool = True) -> float:
    """Milliseconds of one launch with `tile`."""
    call, original = {
        "linear": (gated_linear_triton.Call, configs.gated_linear_tiles),
        "delta": (delta_triton.DeltaCall, configs.delta_tiles),
    }[op]
    table = call.table

    def tiles(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(original(*args, **kwargs), **{name: tile})

    call.table = staticmethod(tiles)
    try:
        with captured() as launches:
            op_call(op, gate, shape, torch.bfloat16)()
        again = next(run for kernel, run in launches if kernel == KERNELS[op][name])
        return triton.testing.do_bench(again, warmup=5, rep=30, return_mode="median") if measure else 0.0
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
        print(name, tile, type(error).__name__)
        return float("inf")
    finally:
        call.table = staticmethod(table)


def _warm(job: tuple[str, str, tuple[int, ...], str, Tile]) -> None:
    timed(*job, measure=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", default="linear", choices=KERNELS)
    parser.add_argument("--gate", nargs="+", default=["vector", "scalar"])
    parser.add_argument("--shape", nargs=6, type=int, default=SHAPE, metavar=("B", "T", "H", "G", "K", "V"))
    parser.add_argument("--launch", nargs="+", help="all by default")
    parser.add_argument("--jobs", type=int, default=14)
    options = parser.parse_args()
    op, shape = options.op, tuple(options.shape)
    names = options.launch or list(KERNELS[op])
    small = (1, 256, *shape[2:])
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        jobs = [
            (op, g, small, name, tile) for g in options.gate for name in names for tile in candidates(op, name, shape)
        ]  # fmt: skip
        pool.map(_warm, jobs, chunksize=1)
    for gate in options.gate:
        for name in names:
            rows = [(timed(op, gate, shape, name, tile), tile) for tile in candidates(op, name, shape)]
            rows.sort(key=lambda row: row[0])
            for ms, tile in rows:
                print(f"{gate:7} {name:12} {ms:8.4f} ms  {tile}", flush=True)


if __name__ == "__main__":
    main()
