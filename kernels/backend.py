"""Which implementation of an op runs, and why.

`LINEARIZE_BACKEND=reference|torch|triton` overrides the choice; without it Triton serves CUDA tensors where the op has
a Triton kernel, and PyTorch everything else.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

BACKENDS = ("reference", "torch", "triton")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_module(op: str) -> bool:
    """Whether this op's Triton file and Triton itself can be imported (neither is at hand in a checkpoint's file)."""
    return _importable(op)


@cache
def _importable(op: str) -> bool:
    try:
        return importlib.util.find_spec(f"linearize.kernels.{op}_triton") is not None and (
            importlib.util.find_spec("triton") is not None
        )
    except ModuleNotFoundError:
        return False


def explain(op: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend that `op` would use on `device` for inputs of `dtype`, and the reason in words.

    Args:
        op: file name of the op in `kernels/`, for example "gated_linear".
        device: where the inputs are.
        dtype: of q, k and v.

    Raises:
        ValueError: `LINEARIZE_BACKEND` names no backend, or one that does not run on the device.
    """
    forced = os.environ.get("LINEARIZE_BACKEND", "")
    kind = torch.device(device).type
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"LINEARIZE_BACKEND={forced!r} is unknown; expected one of {', '.join(BACKENDS)}.")
        if forced == "triton" and kind == "cpu" and not os.environ.get("TRITON_INTERPRET"):
            raise ValueError("LINEARIZE_BACKEND='triton' needs a GPU, and the tensors are on the CPU; unset it.")
        return forced, "LINEARIZE_BACKEND says so"
    if kind != "cuda":
        return "torch", f"Triton kernels need a CUDA device, the tensors are on {kind}"
    if not _triton_module(op):
        return "torch", f"no Triton kernel of {op} can be imported here"
    if dtype not in TRITON_DTYPES:
        return "torch", f"the Triton kernel takes bf16, fp16 and fp32, not {dtype}"
    return "triton", "CUDA tensors of a supported dtype"


def select(op: str, tensor: torch.Tensor) -> str:
    """Return the backend for `op` on tensors like `tensor`: "reference", "torch" or "triton"."""
    return explain(op, tensor.device, tensor.dtype)[0]
