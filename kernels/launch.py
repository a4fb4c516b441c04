"""Register ops, launch their Triton kernels with little host time, and compile what a call needs at once, in threads.

A launch through Triton binds and specialises its 40 arguments anew every time, and an op's launches and buffers follow
from the layout of its inputs alone. So the first call of a layout is recorded, and the later ones are replayed: the
outputs and one block of memory for all buffers between launches are allocated, and the kernels get addresses in them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

THREADS = 16
PLANS = 4096  # kept at most
ALIGNMENT = 256  # bytes, of buffers in the block
_plans: dict[Hashable, _Plan] = {}

Output = Tensor | Sequence[Tensor]


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

    def variant(self) -> Hashable:
        """What the compiled kernel depends on: launches with equal variants share one."""
        kinds: list[Hashable] = []
        for x, parameter in zip(self.args, self.kernel.params, strict=False):
            if isinstance(x, Tensor):
                kinds.append((x.dtype, x.data_ptr() % 16 == 0))
            elif isinstance(x, int) and not parameter.do_not_specialize:
                kinds.append((x == 1, x % 16 == 0))
            else:
                kinds.append(type(x).__name__)
        return self.kernel, self.values(), self.warps, self.stages, tuple(kinds)

    def compile(self) -> None:
        """Compile without launching, the launcher included (C code that Triton would build at the first launch)."""
        with torch.cuda.device(next(x.device for x in self.args if isinstance(x, Tensor))):
            compiled = self.kernel.warmup(*self.args, grid=self.grid, **self.options())
            assert compiled.run is not None


def layout(tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """All that a plan depends on in these tensors: device, dtypes, shapes, strides, alignment, which are the same."""
    first: dict[int, int] = {}
    kinds: list[Hashable] = []
    for index, x in enumerate(tensors):
        if x is None:
            kinds.append(None)
            continue
        address = x.data_ptr()
        same = first.setdefault(address, index)
        kinds.append((x.dtype, x.shape, x.stride(), address % 16, x.get_device(), same))
    return tuple(kinds)


def unit_stride(x: Tensor) -> Tensor:
    """x with unit stride in its last dim; a copy only where that is not so already."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied where they are not contiguous."""
    return [None if x is None else x.contiguous() for x in tensors]


@dataclass(slots=True)
class _Plan:
    """A recorded call.

    Attributes:
        device: of all tensors.
        outputs: size, strides and dtype of each.
        block: bytes of all buffers between launches.
        steps: per launch what starts it, its arguments, and which of them are addresses: position, index among inputs,
            outputs and the block, bytes from there.
    """

    device: torch.device
    outputs: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    block: int = 0
    steps: list[tuple[Callable[..., object], list[Any], list[tuple[int, int, int]]]] = field(default_factory=list)

    def replay(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """Launch on the current stream and return fresh outputs."""
        device = self.device
        outputs = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.outputs
        ]
        bases = [0 if x is None else x.data_ptr() for x in given]
        bases += [x.data_ptr() for x in outputs]
        block = torch.empty(self.block, dtype=torch.uint8, device=device)
        bases.append(block.data_ptr())
        stream = _stream(device)
        for start, values, places in self.steps:
            args = values.copy()
            for position, base, offset in places:
                args[position] = bases[base] + offset
            start(*args, stream=stream)
        return outputs


def _stream(device: torch.device) -> int:
    """The current stream: its address, without an object around it."""
    stream: int = driver.active.get_current_stream(device.index)
    return stream


def _record(
    launches: Sequence[Launch], built: Sequence[Any], given: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> _Plan:
    """The plan of a call.

    A tensor of a launch that is neither given (or a view from its start) nor an output is a buffer, which some launch
    fills before any reads it.
    """
    device = next(x.device for x in given if x is not None)
    plan = _Plan(device, [(x.shape, x.stride(), x.dtype) for x in outputs])
    assert len({id(x) for x in outputs}) == len(outputs)
    known = {id(x): index for index, x in enumerate([*given, *outputs])}
    addresses = {x.data_ptr(): index for index, x in enumerate(given) if x is not None}
    buffers: dict[int, int] = {}
    for launch, compiled in zip(launches, built, strict=True):
        places = []
        for position, x in enumerate(launch.args):
            if not isinstance(x, Tensor):
                continue
            index = known.get(id(x), addresses.get(x.data_ptr()))
            if index is not None:
                places.append((position, index, 0))
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() not in buffers:
                buffers[storage.data_ptr()] = plan.block
                plan.block += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
            offset = buffers[storage.data_ptr()] + x.data_ptr() - storage.data_ptr()
            places.append((position, len(given) + len(outputs), offset))
        values = [None if isinstance(x, Tensor) else x for x in launch.args]
        plan.steps.append((compiled[launch.grid], [*values, *launch.values()], places))
    return plan


def play(
    name: Hashable,
    given: Sequence[Tensor | None],
    build: Callable[[], tuple[Sequence[Launch], Sequence[Tensor]]],
    later: Callable[[Sequence[Tensor]], Sequence[Launch]] | None = None,
) -> Sequence[Tensor]:
    """Run one call of an op on the current stream.

    Args:
        name: of the call, with every number that its launches depend on beside the layout of `given`.
        given: all tensors that its launches read or update, as they take them.
        build: its launches in order, and its outputs.
        later: the launches of a call that is to follow, from the outputs; compiled beside these.

    Returns:
        The outputs.
    """
    key = (name, layout(given))
    plan = _plans.get(key)
    if plan is not None:
        return plan.replay(given)
    launches, outputs = build()
    if any(x.is_cuda for x in given if x is not None):
        compile_all([*launches, *([] if later is None else later(outputs))])
    built = [_start(launch) for launch in launches]
    if all(hasattr(compiled, "packed_metadata") for compiled in built):  # not so in the interpreter
        if len(_plans) >= PLANS:
            _plans.clear()
        _plans[key] = _record(launches, built, given, outputs)
    return outputs


def _start(launch: Launch) -> Any:
    """Launch through Triton, and return the compiled kernel."""
    return launch.kernel[launch.grid](*launch.args, **launch.options())


def forget() -> None:
    """Go through Triton's own launch again."""
    _plans.clear()


def compile_all(launches: Sequence[Launch]) -> None:
    """Compile in threads (most of a compilation runs outside Python's lock), the last launch, the longest, first."""
    variants = {launch.variant(): launch for launch in launches}
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(Launch.compile, reversed(variants.values())))


def differentiable(
    name: str,
    forward: Callable[..., Output],
    backward: Callable[..., Output],
    fakes: tuple[Callable[..., Output], Callable[..., Output]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Register `forward` and `backward` as the ops `linearize::<name>` and `linearize::<name>_grad`.

    Args:
        name: of the op.
        forward: its annotations are the op's schema.
        backward: gradients from those of the outputs (None where there is none) and what was saved.
        fakes: what both return, without data.
        save: takes `ctx`, the inputs and the outputs, and saves what the backward needs.
        gradients: takes `ctx`, `backward` or its op, and the gradients of the outputs; returns one gradient an input.

    Returns:
        The op to call: through the dispatcher where `torch.compile` traces; else without it, whose cost would show.
    """
    ops = [
        torch.library.custom_op(f"linearize::{name}{end}", run, mutates_args=())
        for end, run in (("", forward), ("_grad", backward))
    ]
    for op, fake in zip(ops, fakes, strict=True):
        op.register_fake(fake)
    traced, traced_grad = (getattr(torch.ops.linearize, f"{name}{end}") for end in ("", "_grad"))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    ops[0].register_autograd(lambda ctx, *grads: gradients(ctx, traced_grad, *grads), setup_context=setup)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return gradients(ctx, backward, *grads)

    def call(*inputs: Any) -> Any:
        return (traced if torch.compiler.is_compiling() else Eager.apply)(*inputs)

    return call
