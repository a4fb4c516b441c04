"""Launch Triton kernels with little host time, and compile those that a call needs at once, in threads.

A launch through Triton binds and specialises its 40 arguments anew every time. Here the compiled kernel is kept under a
key of all that it can be specialised on, and called directly from the second time on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

THREADS = 8
_compiled: dict[tuple[Any, ...], Any] = {}


@dataclass
class Launch:
    """One launch.

    Attributes:
        kernel: the `triton.jit` function; its compile-time parameters stand last.
        grid: three sizes.
        args: its run-time arguments in order.
        constants: its compile-time arguments by name; names that it does not have are left out.
        warps: warps a program.
        stages: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int

    def __post_init__(self) -> None:
        names = self.kernel.arg_names[len(self.args) :]
        self.values = tuple(self.constants[name] for name in names)
        bound = tuple((x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in self.args)
        self.key = (id(self.kernel), self.device(), bound, self.values, self.warps, self.stages)

    def device(self) -> torch.device:
        """Where its first tensor is."""
        return next(x.device for x in self.args if isinstance(x, Tensor))

    def options(self) -> dict[str, Any]:
        """Keyword arguments for Triton's own launch."""
        names = self.kernel.arg_names[len(self.args) :]
        return dict(zip(names, self.values, strict=True)) | {"num_warps": self.warps, "num_stages": self.stages}

    def compile(self) -> None:
        """Compile without launching."""
        with torch.cuda.device(self.device()):
            self.kernel.warmup(*self.args, grid=self.grid, **self.options())


def run(launches: Sequence[Launch]) -> None:
    """Launch in order, on the current stream."""
    for launch in launches:
        compiled = _compiled.get(launch.key)
        if compiled is None:
            compiled = launch.kernel[launch.grid](*launch.args, **launch.options())
            if hasattr(compiled, "packed_metadata"):  # not so in the interpreter
                _compiled[launch.key] = compiled
        else:
            compiled[launch.grid](*launch.args, *launch.values)


def is_new(launches: Sequence[Launch]) -> bool:
    """Whether the first of these was never launched on a GPU."""
    return launches[0].key not in _compiled and launches[0].device().type == "cuda"


def compile_all(launches: Sequence[Launch]) -> None:
    """Compile in threads (most of a compilation runs outside Python's lock)."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(Launch.compile, launches))
