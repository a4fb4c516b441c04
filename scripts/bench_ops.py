"""Chunked PyTorch against the naive fp64 recurrence on the CPU: gated linear attention, forward and backward.

    python scripts/bench_ops.py

Medians of process time over five runs (one for the naive form), one thread, T = 1,024. Prints a table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from linearize.kernels.gated_linear import gated_linear_attention
from linearize.kernels.reference import gated_linear_reference

LENGTH = 1024
SHAPES = ((1, 9, 3, 64), (4, 9, 3, 64), (1, 32, 8, 128))  # B, H, G, D


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median process time of `run`, after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


def main() -> None:
    """Measure every gate and shape."""
    torch.set_num_threads(1)
    table = Table(
        "B, H, G, D", "gate", "naive ms", "chunked ms", "times faster", title=f"T = {LENGTH}, forward + backward"
    )
    for batch, heads, groups, dim in SHAPES:
        for gate, shape in (("none", None), ("scalar", (groups,)), ("vector", (groups, dim))):
            inputs = [torch.randn(batch, LENGTH, n, dim) for n in (heads, groups, groups)]
            if shape is not None:
                inputs.append(-torch.rand(batch, LENGTH, *shape))
            for tensor in inputs:
                tensor.requires_grad_()

            def chunked(inputs: list[torch.Tensor] = inputs) -> object:
                return torch.autograd.grad(gated_linear_attention(*inputs).o.sum(), inputs)

            def naive(inputs: list[torch.Tensor] = inputs) -> object:
                return torch.autograd.grad(gated_linear_reference(*inputs)[0].sum(), inputs)

            slow, fast = seconds(naive, 1), seconds(chunked, 5)
            name = f"{batch}, {heads}, {groups}, {dim}"
            table.add_row(name, gate, f"{1e3 * slow:.0f}", f"{1e3 * fast:.1f}", f"{slow / fast:.0f} x")
    Console().print(table)


if __name__ == "__main__":
    main()
