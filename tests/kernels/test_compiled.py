"""The Triton kernels compile for sm_90 and sm_80 without a GPU, fit, and hold no form that Triton miscompiles.

The limits are what the kernels take today; raise one only with a measurement that shows the gain. The rest of the table
of `kernels/configs.py` is compiled by `make soak`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from dry_compile import Needs, compile_calls, transposed_accumulators

from linearize.kernels import delta_triton, gated_linear_triton, launch, scan_triton, step_triton, window_triton
from linearize.kernels.microscaling import stored_bytes

SHARED = {80: 163 * 1024, 90: 227 * 1024}
SPILL = {"vector": 2600, "scalar": 900, "none": 900, "window": 500}  # bytes a thread


def linear(gate: str, dim: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
    B, T, H, G = 4, 128, 16, 8
    q, k, v, do = (torch.empty(B, T, heads, dim, dtype=dtype) for heads in (H, G, G, H))
    shape = {"none": None, "scalar": (B, T, G), "vector": (B, T, G, dim)}[gate]
    g = None if shape is None else torch.empty(shape, dtype=dtype)

    def calls() -> None:
        given = (q, k, v, g, None, None, None, 1.0, False)
        gated_linear_triton._run_forward(*given)
        gated_linear_triton._run_backward(do, None, None, None, *given)

    return calls


def delta(gate: str, dim: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
    B, T, H, G = 4, 128, 16, 8
    q, k, v, do = (torch.empty(B, T, heads, dim, dtype=dtype) for heads in (H, G, G, H))
    shape = {"none": None, "scalar": (B, T, G), "vector": (B, T, G, dim)}[gate]
    g = None if shape is None else torch.empty(shape, dtype=dtype)

    def calls() -> None:
        given = (q, k, v, torch.empty(B, T, G, dtype=dtype), g, None, None, 1.0, 1e-6)
        delta_triton._run_forward(*given)
        delta_triton._run_backward(do, None, *given)

    return calls


def window(dim: int, sinks: int = 0, dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
    q, k, v = (torch.empty(2, 600, heads, dim, dtype=dtype) for heads in (8, 2, 2))
    starts = torch.empty(2, 600, dtype=torch.int64) if sinks else None

    def calls() -> None:
        o, lse, row_max, row_arg = window_triton._run_forward(q, k, v, starts, 64, sinks, 1.0)
        window_triton._run_backward(o, lse, row_max, q, k, v, starts, o, lse, row_arg, 64, sinks, 1.0)

    return calls


def step(dim: int, features: int, delta: bool = False, stored: bool = False) -> Callable[[], None]:
    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(2, *shape, dtype=dtype)

    def calls() -> None:
        row, dtype = (stored_bytes(dim), torch.uint8) if stored else (dim, torch.bfloat16)
        rings = (new(size, 2, row, dtype=dtype) for size in (64, 64, 4, 4))
        step_triton.hybrid_step_triton(
            new(8, dim), new(2, dim), new(2, dim), *rings,
            torch.zeros(2, dtype=torch.int64), new(8, features), new(2, features), new(2, dim),
            new(2) if delta else new(2, features), new(2) if delta else None,
            new(2, features, dim, dtype=torch.float32), None if delta else new(2, features, dtype=torch.float32),
            1.0, 1.0, write=not stored,
        )  # fmt: skip

    return calls


def delta_step(dim: int) -> Callable[[], None]:
    q, k, v, g = (torch.empty(2, heads, dim, dtype=torch.bfloat16) for heads in (8, 2, 2, 2))
    return lambda: step_triton.gated_delta_step_triton(
        q, k, v, torch.empty(2, 2), g, torch.empty(2, 2, dim, dim), 1.0, 1e-6
    )


def scan(repeat: int) -> Callable[[], None]:
    q, k, v = (torch.empty(2, 128, heads, 128, dtype=torch.bfloat16) for heads in (8 * repeat, 8, 8))
    dt, goes_on = torch.empty(2, 128, 8, 128), torch.empty(2, 128)
    rate, state = torch.empty(8, 128, 16), torch.empty(2, 8, 128, 16)

    def calls() -> None:
        o, final, kept = scan_triton._run_forward(q, k, v, dt, rate, goes_on, state)
        scan_triton._run_backward(o, final, q, k, v, dt, rate, goes_on, kept)

    return calls


def check(needs: list[Needs], capability: int, spill: int) -> None:
    for need in needs:
        assert need.shared <= SHARED[capability], need
        assert need.spill <= spill, need
        assert not need.transposed, f"{need.name}: the transpose of an accumulator feeds a dot: {need.transposed}"


UNTUNED = {linear: {80: 2, 90: 1}, delta: {80: 3, 90: 1}}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The tiles of the GPU that is compiled for."""
    capability = getattr(request.node, "callspec", None) and request.node.callspec.params.get("capability")
    monkeypatch.setattr(gated_linear_triton, "is_hopper", lambda device: capability != 80)


@pytest.mark.parametrize("capability", [90, 80])
def test_scalar_gates(capability: int) -> None:
    check(compile_calls(linear("scalar", 64), capability), capability, SPILL["scalar"])


@pytest.mark.parametrize("capability", [90, 80])
def test_delta_rule(capability: int) -> None:
    check(compile_calls(delta("scalar", 64), capability), capability, SPILL["scalar"])


def test_a_call_compiles_each_of_its_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[launch.Launch] = []
    monkeypatch.setattr(launch.Launch, "compile", compiled.append)
    q, k, v = (torch.empty(2, 128, heads, 64, dtype=torch.bfloat16) for heads in (8, 4, 4))
    given = (q, k, v, torch.empty(2, 128, 4), torch.empty_like(k), None, None, 1.0, 1e-6)
    forward = delta_triton.DeltaCall(*given).forward()[0]
    backward = delta_triton.DeltaCall(*given).backward(q, None)[0]
    launch.compile_all([*forward, *backward])
    names = [x.kernel.__name__ for x in compiled]
    assert names.count("_solve") == 2  # usual and steep chunks, forward and backward alike
    assert "_key_grads" in names[:4] and names.count("_key_grads") == 2
    assert {x.variant() for x in compiled} == {x.variant() for x in (*forward, *backward)}


def test_vector_gates() -> None:
    check(compile_calls(linear("vector", 64), 90), 90, SPILL["vector"])


@pytest.mark.parametrize("capability", [90, 80])
def test_window(capability: int) -> None:
    check(compile_calls(window(128, sinks=4), capability), capability, SPILL["window"])


def test_step() -> None:
    check(compile_calls(step(128, 128), 90), 90, 0)
    check(compile_calls(delta_step(128), 90), 90, 0)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_step_whose_rings_are_mxint8(dim: int) -> None:
    check(compile_calls(step(dim, 128, stored=True), 90), 90, 0)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("features", [64, 128, 256])
def test_a_step_whose_memory_has_more_features_than_the_window_has_channels(features: int, delta: bool) -> None:
    check(compile_calls(step(64, features, delta), 90), 90, 0)


@pytest.mark.parametrize("repeat", [1, 4])
@pytest.mark.parametrize("capability", [90, 80])
def test_scan(capability: int, repeat: int) -> None:
    check(compile_calls(scan(repeat), capability), capability, 0)


@pytest.mark.parametrize("last", ["#shared3, #smem>", "#shared, #smem>\n %t = ttg.memdesc_trans %b {order"])
def test_the_scan_finds_both_forms_of_a_transposed_accumulator(last: str) -> None:
    layouts = "#shared3 = #ttg.nvmma_shared<{swizzlingByteWidth = 128, transposed = true, elementBitWidth = 16}>\n"
    store = f" %b = ttg.local_alloc %a : (tensor<128x64xbf16, #mma>) -> !ttg.memdesc<128x64xbf16, {last}"
    assert len(transposed_accumulators(layouts + store)) == 1
    assert not transposed_accumulators(layouts + store.replace("#mma", "#blocked"))


@pytest.mark.soak
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
@pytest.mark.parametrize("capability", [90, 80])
def test_every_row_of_the_table(gate: str, dim: int, capability: int) -> None:
    slack = 2 if dim == 256 else 1
    for op in (linear, delta):
        check(compile_calls(op(gate, dim), capability), capability, slack * UNTUNED[op][capability] * SPILL[gate])
    check(compile_calls(window(dim, sinks=4), capability), capability, slack * SPILL["window"])


@pytest.mark.soak
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_delta_rule_of_other_dtypes(gate: str, dim: int, dtype: torch.dtype) -> None:
    check(compile_calls(delta(gate, dim, dtype), 90), 90, 2**15)  # right, not fast
