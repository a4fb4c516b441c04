"""`linearize doctor`: versions, devices, which backend each op would use and why, and one parity check per op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.kernels.backend import explain

PACKAGES = ("linearize", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "triton", "gguf")
SHAPE = {"batch": 2, "tokens": 67, "heads": 4, "groups": 2, "dim": 32}


@dataclass(frozen=True)
class OpReport:
    """What an op would run, and how far it is from the fp64 reference.

    Attributes:
        op: its name.
        backend: that runs.
        why: in words.
        error: largest difference from the reference, relative to its largest value.
        tolerance: what is allowed.
    """

    op: str
    backend: str
    why: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def _gated_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linearize.kernels.gated_linear import gated_linear_attention

    return gated_linear_attention(q.softmax(-1), k.softmax(-1), v, _decay(k)).o


def _bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linearize.kernels.bidirectional import bidirectional_linear_attention

    return bidirectional_linear_attention(q.softmax(-1), k.softmax(-1), v, _decay(k))[0]


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linearize.kernels.window import window_attention

    return window_attention(q, k, v, window=16, sinks=2).o


def _delta(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linearize.kernels.delta import gated_delta_rule

    return gated_delta_rule(q, k, v, k[..., 0].sigmoid(), _decay(k), l2norm=True).o


def _hybrid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linearize.kernels.hybrid import hybrid_attention

    out = hybrid_attention(q, k, v, _decay(k), window=16, memory_q=q.softmax(-1), memory_k=k.softmax(-1))
    return out.window + out.memory


def _scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linearize.kernels.scan import selective_scan

    rate = torch.arange(1, 9, device=v.device, dtype=v.dtype).expand(v.shape[2], v.shape[3], 8)
    return selective_scan(q, k, v, torch.nn.functional.softplus(v) / 4, rate).o


def _step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from linearize.kernels.gated_linear import gated_linear_step

    state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    q, k, decay = q.softmax(-1), k.softmax(-1), _decay(k)
    steps = [gated_linear_step(q[:, t], k[:, t], v[:, t], decay[:, t], state)[0] for t in range(q.shape[1])]
    return torch.stack(steps, 1)


def _decay(k: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(k if k.dtype == torch.float64 else k.float()) / 16


Run = Callable[[Tensor, Tensor, Tensor], Tensor]
# Each op as a model calls it, and the op whose reference it must agree with.
OPS: dict[str, tuple[Run, Run]] = {
    "gated_linear": (_gated_linear, _gated_linear),
    "bidirectional": (_bidirectional, _bidirectional),
    "window": (_window, _window),
    "hybrid": (_hybrid, _hybrid),
    "delta": (_delta, _delta),
    "scan": (_scan, _scan),
    "step": (_step, _gated_linear),
}


def versions() -> dict[str, str]:
    """Return the versions of Python and of what the package is built on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> list[str]:
    """Return every device that torch sees, in words."""
    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = [f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for i, gpu in enumerate(cuda)]
    return [*gpus, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]


def check_op(op: str, device: torch.device | str, dtype: torch.dtype) -> OpReport:
    """Run an op as a model would and compare it with the naive fp64 reference.

    Args:
        op: a name in `OPS`.
        device: where the inputs are.
        dtype: of the inputs.

    Raises:
        LinearizeError: `LINEARIZE_BACKEND` names no backend.
    """
    try:
        backend, why = explain(op, device, dtype)
    except ValueError as unknown:
        raise LinearizeError(str(unknown)) from None
    generator = torch.Generator().manual_seed(0)
    size = (SHAPE["batch"], SHAPE["tokens"])
    q = torch.randn(*size, SHAPE["heads"], SHAPE["dim"], generator=generator).to(device, dtype)
    k, v = (torch.randn(*size, SHAPE["groups"], SHAPE["dim"], generator=generator).to(device, dtype) for _ in "kv")
    run, reference = OPS[op]
    got = run(q, k, v).double().cpu()
    expected = _by_reference(reference, q, k, v)
    error = float((got - expected).abs().max() / expected.abs().max())
    return OpReport(op, backend, why, error, 1e-5 if dtype == torch.float32 and backend != "triton" else 2e-2)


def _by_reference(run: Run, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return an op's output by the reference implementation, on fp64 copies of its inputs."""
    before = os.environ.get("LINEARIZE_BACKEND")
    os.environ["LINEARIZE_BACKEND"] = "reference"
    try:
        return run(q.double().cpu(), k.double().cpu(), v.double().cpu())
    finally:
        if before is None:
            del os.environ["LINEARIZE_BACKEND"]
        else:
            os.environ["LINEARIZE_BACKEND"] = before
