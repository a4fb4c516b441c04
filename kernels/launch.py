"""Launch Triton kernels with little host time, and compile those that a call needs at once, in threads.

A launch through Triton binds and specialises its 40 arguments anew every time. Here the compiled kernels of a call are
kept under a key of all that they can be specialised on, and called directly from the second time on.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

THREADS = 8
_plans: dict[Hashable, list[tuple[Any, tuple[Any, ...]]]] = {}


@dataclass(slots=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the `triton.jit` function; its compile-time parameters stand last.
        grid: three sizes.
        args: its run-time arguments in order.
        constants: its compile-time arguments by name; names that it does not have are left out.
        more: further ones.
        warps: warps a program.
        stages: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    more: dict[str, Any]
    warps: int
    stages: int

    def values(self) -> tuple[Any, ...]:
        """Compile-time arguments in order."""
        known = self.constants | self.more
        return tuple(known[name] for name in self.kernel.arg_names[len(self.args) :])

    def options(self) -> dict[str, Any]:
        """Keyword arguments for Triton's own launch."""
        names = self.kernel.arg_names[len(self.args) :]
        return dict(zip(names, self.values(), strict=True)) | {"num_warps": self.warps, "num_stages": self.stages}

    def compile(self) -> None:
        """Compile without launching, the launcher included (C code that Triton would build at the first launch)."""
        with torch.cuda.device(next(x.device for x in self.args if isinstance(x, Tensor))):
            compiled = self.kernel.warmup(*self.args, grid=self.grid, **self.options())
            assert compiled.run is not None


def layout(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """All that kernels can be specialised on in these tensors: device, dtypes, shapes, strides, alignment."""
    return tuple(
        None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0, x.get_device()) for x in tensors
    )


def unit_stride(x: Tensor) -> Tensor:
    """x with unit stride in its last dim; a copy only where that is not so already."""
    return x if x.stride(-1) == 1 else x.contiguous()


def run(launches: Sequence[Launch], key: Hashable) -> None:
    """Launch in order on the current stream; `key` names the call: see `layout`."""
    plan = _plans.get(key)
    if plan is not None:
        device = next(x for x in launches[0].args if isinstance(x, Tensor)).device
        stream = torch.cuda.current_stream(device).cuda_stream
        for launch, (compiled, values) in zip(launches, plan, strict=True):
            compiled[launch.grid](*launch.args, *values, stream=stream)
        return
    built = [launch.kernel[launch.grid](*launch.args, **launch.options()) for launch in launches]
    if all(hasattr(compiled, "packed_metadata") for compiled in built):  # not so in the interpreter
        _plans[key] = [(compiled, launch.values()) for compiled, launch in zip(built, launches, strict=True)]


def forget() -> None:
    """Go through Triton's own launch again."""
    _plans.clear()


def is_new(tensor: Tensor, key: Hashable) -> bool:
    """Whether the call `key` was never launched on the GPU of `tensor`."""
    return tensor.is_cuda and key not in _plans


def compile_all(launches: Sequence[Launch]) -> None:
    """Compile in threads (most of a compilation runs outside Python's lock)."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(Launch.compile, launches))
