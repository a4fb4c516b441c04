"""Compile Triton launches for a GPU that is not there, from calls on CPU tensors, and read what they need of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass
class Needs:
    """What one compiled kernel takes.

    Attributes:
        name: of the kernel.
        shared: bytes of shared memory a block.
        registers: a thread.
        spill: bytes of stack a thread.
        transposed: places where an accumulator reaches a dot transposed.
    """

    name: str
    shared: int
    registers: int
    spill: int
    transposed: list[str]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of running them."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    original, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_launch(launch: Launch, capability: int) -> Needs:
    """Compile for `capability` (80 or 90) and return what the kernel needs."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[(index,)] = "constexpr", 1
                continue
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    used = _resources(built.asm["cubin"])
    return Needs(launch.kernel.__name__, built.metadata.shared, *used, transposed_accumulators(built.asm["ttgir"]))


def transposed_accumulators(ir: str) -> list[str]:
    """Accumulators stored to shared memory in a transposed layout, or stored plainly and read transposed."""
    ir = re.sub(r" loc\(.*?\)$", "", ir, flags=re.M)
    layouts = set(re.findall(r"^(#\w+) = #ttg.nvmma_shared<\{[^}]*transposed = true", ir, re.M))
    stores = re.finditer(
        r"(%\w+) = ttg.local_alloc %\w+ : \(tensor<[^,>]*, #mma\w*>\) -> !ttg.memdesc<[^,]*, (#\w+)", ir
    )
    found = []
    for store in stores:
        if store[2] in layouts or f"ttg.memdesc_trans {store[1]} " in ir:
            found.append(store[0])
    return found


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (where spilled registers go) a thread, read from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", log)[1]), int(re.search(r"STACK:(\d+)", log)[1])


def compile_calls(calls: Callable[[], None], capability: int) -> list[Needs]:
    """Compile everything that `calls` launches."""
    with recorded() as launches:
        calls()
    return [compile_launch(launch, capability) for launch in launches]
