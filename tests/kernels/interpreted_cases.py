"""The Triton kernels in Triton's interpreter, on the CPU; `test_interpreted.py` runs this file in a process of its own.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim, W window, S sinks.
bf16 is left to the GPU check of `scripts/bench_kernels.py`: the interpreter's bf16 dot is wrong (Triton 3.6 and 3.9).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_kernels import BOUNDS, GATES, delta_errors, hybrid_errors, linear_errors, relative, window_errors

from linearize.kernels import configs, launch, window_triton
from linearize.kernels.delta import delta_product, delta_product_step, gated_delta_rule, gated_delta_step
from linearize.kernels.gated_linear import gated_linear_attention, gated_linear_step
from linearize.kernels.hybrid import hybrid_attention, hybrid_step
from linearize.kernels.microscaling import from_bytes, microscaled, stored_bytes
from linearize.kernels.reference import gated_delta_reference, window_reference
from linearize.kernels.scan import selective_scan
from linearize.kernels.window import window_attention, window_step


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Fresh tensors hold NaN until they are written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def check(errors: dict[str, float], dtype: torch.dtype = torch.float32) -> None:
    assert not {name: error for name, error in errors.items() if error > BOUNDS[dtype]}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_gated_linear_and_every_gradient(gate: str, packed: bool) -> None:
    check(linear_errors(gate, torch.float32, 2, 70, 6, 2, 24, 40, packed=packed, normalizer=packed, device="cpu"))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_walk_cut_into_segments(gate: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SHORTEST", 1)
    configs.gated_linear_tiles.cache_clear()
    try:
        assert configs.gated_linear_tiles(torch.float32, 16, 24, 1, 2, 150).segments == 4
        shape = (1, 150, 2, 1, 16, 24)
        errors = linear_errors(gate, torch.float32, *shape, packed=packed, normalizer=packed, device="cpu")
    finally:
        configs.gated_linear_tiles.cache_clear()
    # A fixed gate's gradient is a sum over all tokens that can come out near 0.
    check({n: e for n, e in errors.items() if not (n == "dg" and gate == "fixed")})


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_gates_from_zero_to_minus_infinity(gate: str) -> None:
    check(linear_errors(gate, torch.float32, 1, 70, 2, 1, 16, 16, harsh=True, device="cpu"))


@pytest.mark.parametrize("slope", [0.0, -1e-6, -1.0, -20.0, -torch.inf])
def test_one_gate_for_all(slope: float) -> None:
    q, k, v = torch.randn(1, 40, 2, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    g = torch.full((1, 40, 1, 16), slope)
    o = gated_linear_attention(q, k, v, g).o
    weights = torch.einsum("bihk,bjhk->bhij", q, k.expand_as(q))
    steps = torch.arange(40)[:, None] - torch.arange(40)
    decay = torch.where(steps > 0, (slope * steps.clamp(min=1)).exp(), (steps == 0).float())
    assert relative(o, torch.einsum("bhij,bjhv->bihv", weights * decay, v.expand_as(q)).double()) < 2e-5


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_delta_rule_and_every_gradient(gate: str, packed: bool) -> None:
    shape = (2, 70, 6, 2, 24, 40)
    check(delta_errors(gate, torch.float32, *shape, packed=packed, top=2.0, unit=packed, device="cpu"))


@pytest.mark.parametrize(
    ("gate", "unit"), [("none", False), ("fixed", True), ("scalar", True), ("vector", False), ("vector", True)]
)
def test_delta_rule_with_more_value_heads_than_keys(gate: str, unit: bool) -> None:
    check(delta_errors(gate, torch.float32, 2, 40, 2, 2, 16, 24, packed=unit, unit=unit, share=3 - unit, device="cpu"))


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_delta_rule_with_gates_from_zero_to_minus_infinity(gate: str) -> None:
    check(delta_errors(gate, torch.float32, 1, 70, 2, 1, 16, 16, harsh=True, device="cpu"))


@pytest.mark.parametrize(
    ("gate", "H", "J"), [("none", 4, 2), ("fixed", 4, 2), ("scalar", 4, 2), ("vector", 4, 2), ("scalar", 2, 4)]
)
def test_delta_steps_follow_the_parallel_form(gate: str, H: int, J: int) -> None:
    B, T, n, G, K, V = 2, 6, 2, 2, 16, 24
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, n, G, K), torch.randn(B, T, n, J, V)
    beta, state = 2 * torch.rand(B, T, n, J), torch.randn(B, J, K, V)
    shape = {"none": None, "fixed": (J,), "scalar": (B, T, J), "vector": (B, T, J, K)}[gate]
    g = None if shape is None else -torch.rand(shape)
    one = gated_delta_rule(q, k[:, :, 0], v[:, :, 0], beta[:, :, 0], g, scale=0.5, initial_state=state, l2norm=True)
    whole = delta_product(q, k, v, beta, g, scale=0.5, initial_state=state, l2norm=True)
    states = state.clone(), state.clone()
    for t in range(T):
        g_t = g if g is None or gate == "fixed" else g[:, t]
        given = k[:, t, 0], v[:, t, 0], beta[:, t, 0], g_t, states[0]
        torch.testing.assert_close(
            gated_delta_step(q[:, t], *given, scale=0.5, l2norm=True), one.o[:, t], rtol=1e-4, atol=1e-4
        )
        given = k[:, t], v[:, t], beta[:, t], g_t, states[1]
        o = delta_product_step(q[:, t], *given, scale=0.5, l2norm=True)
        torch.testing.assert_close(o, whole.o[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, (one.state, whole.state), rtol=1e-4, atol=1e-4)


class Started:
    """Stands for a compiled kernel: takes addresses where the kernel takes tensors."""

    packed_metadata = ()

    def __init__(self, first: launch.Launch) -> None:
        self.first = first

    def __getitem__(self, grid: tuple[int, int, int]):
        def start(*values, stream: int) -> None:
            args = values[: len(self.first.args)]
            assert values[len(args) :] == self.first.values()
            args = [
                self.tensor(x, y) if isinstance(x, Tensor) else y for x, y in zip(self.first.args, args, strict=True)
            ]
            self.first.kernel[grid](*args, **self.first.options())

        return start

    @staticmethod
    def tensor(like: Tensor, address: int) -> Tensor:
        if like.numel() == 0:
            return like
        memory = (ctypes.c_uint8 * like.element_size()).from_address(address)
        return torch.frombuffer(memory, dtype=like.dtype)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record and replay calls in the interpreter too."""

    def started(first: launch.Launch) -> Started:
        original(first)
        return Started(first)

    original = launch._start
    monkeypatch.setattr(launch, "_start", started)
    monkeypatch.setattr(launch, "_stream", lambda device: 0)
    launch.forget()
    yield
    launch.forget()


def test_tensors_that_were_the_same_in_an_earlier_call_may_differ_in_the_next(replaying: None) -> None:
    q, k, v, other = (torch.randn(1, 20, 1, 16) for _ in range(4))
    hybrid_attention(q, k, v, window=8, memory_q=q)
    apart = hybrid_attention(q, k, v, window=8, memory_q=other).memory
    torch.testing.assert_close(apart, gated_linear_attention(other, k, v).o, rtol=1e-5, atol=1e-5)


def test_a_replayed_call_equals_a_first_one(replaying: None) -> None:
    B, T, H, G, D = 1, 33, 2, 1, 16

    def new() -> dict[str, Tensor]:
        q, k, v, g = (torch.randn(B, T, h, D) for h in (H, G, G, G))
        one = {"q": q, "k": k, "v": v, "g": -g.abs(), "scalar": -g[..., 0].abs(), "beta": g[..., 1].sigmoid()}
        state, norm = torch.randn(B, G, D, D), torch.randn(B, G, D)
        return {n: x.requires_grad_() for n, x in (one | {"state": state, "norm": norm}).items()}

    def linear(x: dict[str, Tensor], gate: str, more: dict) -> list[Tensor | None]:
        return list(gated_linear_attention(x["q"], x["k"], x["v"], x.get(gate), **more))

    def hybrid(x: dict[str, Tensor], more: dict) -> list[Tensor | None]:
        return list(hybrid_attention(x["q"], x["k"], x["v"], x["g"], window=8, sinks=2, **more)[:5])

    def delta(x: dict[str, Tensor], gate: str, unit: bool) -> list[Tensor | None]:
        out = gated_delta_rule(x["q"], x["k"], x["v"], x["beta"], x.get(gate), initial_state=x["state"], l2norm=unit)
        return [out.o, out.state]

    def steps(x: dict[str, Tensor]) -> list[Tensor | None]:
        state = x["state"].detach().clone()
        rings = [torch.zeros(B, 4, G, D) for _ in range(2)]
        q, k, v, g = (x[name].detach()[:, 0] for name in ("q", "k", "v", "g"))
        out = hybrid_step(q, k, v, g, state, *rings, torch.zeros(B, dtype=torch.long))
        return [out.window, out.memory, state, *rings]

    calls = {
        "linear": lambda x: linear(x, "g", {}),
        "linear, scalar, normalizer": lambda x: linear(
            x, "scalar", {"with_normalizer": True, "initial_state": x["state"], "initial_norm": x["norm"]}
        ),
        "linear, norm alone": lambda x: linear(x, "", {"with_normalizer": True, "initial_norm": x["norm"]}),
        "delta": lambda x: delta(x, "scalar", False),
        "delta, vector": lambda x: delta(x, "g", True),
        "hybrid": lambda x: hybrid(x, {}),
        "hybrid, apart": lambda x: hybrid(x, {"memory_q": x["q"] * 2, "memory_v": x["v"] * 2}),
        "window": lambda x: list(window_attention(x["q"], x["k"], x["v"], window=16)),
        "scan": lambda x: list(selective_scan(x["q"], x["k"], x["v"], x["v"].abs(), x["state"][0, :, :, :4].abs())),
        "steps": steps,
    }

    def results(call, x: dict[str, Tensor]) -> list[Tensor]:
        out = [y for y in call(x) if y is not None]
        loss = sum((y * (1 + torch.arange(y.numel()).view(y.shape) % 7)).sum() for y in out)
        grads = torch.autograd.grad(loss, list(x.values()), allow_unused=True) if loss.requires_grad else ()
        return [y.detach() for y in out] + [y for y in grads if y is not None]

    for name, call in calls.items():
        launch.forget()
        results(call, new())
        count = len(launch._plans)
        x = new()
        replayed = results(call, x)
        assert len(launch._plans) == count > 0, name
        launch.forget()
        for ours, wanted in zip(replayed, results(call, x), strict=True):
            assert torch.equal(ours, wanted), name


def test_half_precision() -> None:
    check(delta_errors("scalar", torch.float16, 1, 70, 4, 2, 16, 16, top=2.0, device="cpu"), torch.float16)
    check(delta_errors("vector", torch.float16, 1, 40, 4, 2, 16, 16, unit=True, device="cpu"), torch.float16)
    check(linear_errors("vector", torch.float16, 1, 40, 4, 2, 16, 16, device="cpu"), torch.float16)
    check(window_errors(torch.float16, 1, 40, 4, 2, 16, 16, 16, 2, device="cpu"), torch.float16)


@pytest.mark.parametrize(("window", "sinks", "packed"), [(16, 0, False), (16, 3, True), (33, 5, True), (1, 40, False)])
def test_window_and_every_gradient(window: int, sinks: int, packed: bool) -> None:
    check(window_errors(torch.float32, 2, 90, 6, 2, 24, 40, window, sinks, packed=packed, device="cpu"))


@pytest.mark.parametrize("chunk", [16, 40])
@pytest.mark.parametrize(("window", "sinks", "packed"), [(1, 3, False), (16, 3, True), (16, 40, True), (16, 70, False)])
def test_gradients_of_sinks_by_chunks(
    chunk: int, window: int, sinks: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_triton, "CHUNK", chunk)
    check(window_errors(torch.float32, 2, 190, 6, 2, 24, 40, window, sinks, packed=packed, device="cpu"))


@pytest.mark.parametrize(
    ("gate", "apart", "packed"), [("vector", False, True), ("scalar", True, True), ("none", True, False)]
)
def test_both_branches_in_one_op_and_every_gradient(gate: str, apart: bool, packed: bool) -> None:
    check(hybrid_errors(gate, torch.float32, 2, 50, 4, 2, 16, 24, apart=apart, packed=packed, device="cpu"))


def test_nothing_but_inputs_and_rows_is_kept_for_the_backward() -> None:
    B, T, H, G, D = 1, 200, 4, 2, 16
    q, k, v, g = (torch.randn(B, T, h, D) for h in (H, G, G, G))
    shapes = []

    def pack(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hybrid_attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), -g.abs(), window=16)
    inputs = [(B, T, H, D), (B, T, G, D), (B, T, G, D), (B, T, G, D)]
    rows = [(B, T, H, D), (B, T, H), (B, T, H)]  # the window's output, its log-sum-exp, where its largest score was
    assert sorted(shapes) == sorted(inputs + rows)


def test_views_of_a_packed_qkv_are_not_copied() -> None:
    packed = torch.randn(2, 40, 8, 16)
    q, k, v = packed.split([4, 2, 2], 2)
    assert (
        relative(
            gated_linear_attention(q, k, v).o, gated_linear_attention(*(x.contiguous() for x in (q, k, v))).o.double()
        )
        == 0
    )
    some = gated_linear_attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:]).o
    assert torch.equal(some, gated_linear_attention(q, k, v).o[:, :, 2:])
    assert torch.equal(
        window_attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], window=8).o,
        window_attention(q, k, v, window=8).o[:, :, 2:],
    )


@pytest.mark.parametrize(("gate", "sinks"), [("none", 0), ("fixed", 3), ("scalar", 0), ("vector", 3)])
def test_steps_follow_the_parallel_form(gate: str, sinks: int) -> None:
    B, T, H, G, K, V, W = 1, 12, 4, 2, 16, 24, 5
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    shape = {"none": None, "fixed": (G,), "scalar": (B, T, G), "vector": (B, T, G, K)}[gate]
    g = None if shape is None else -torch.rand(shape)
    whole = hybrid_attention(q, k, v, g, window=W, sinks=sinks, with_normalizer=True)
    state, norm, length = torch.zeros(B, G, K, V), torch.zeros(B, G, K), torch.zeros(B, dtype=torch.long)
    rings = torch.zeros(B, W, G, K), torch.zeros(B, W, G, V)
    first = (torch.zeros(B, sinks, G, K), torch.zeros(B, sinks, G, V)) if sinks else (None, None)
    apart = state.clone(), norm.clone()
    for t in range(T):
        g_t = g if g is None or gate == "fixed" else g[:, t]
        step = hybrid_step(
            q[:, t], k[:, t], v[:, t], g_t, state, *rings, length, state_norm=norm, sink_k=first[0], sink_v=first[1]
        )
        near = window_step(q[:, t], *rings, *first, length)
        o, sums = gated_linear_step(q[:, t], k[:, t], v[:, t], g_t, *apart)
        length += 1
        for got, wanted in (
            (step.window, whole.window), (near.o, whole.window), (step.lse, whole.lse), (near.lse, whole.lse),
            (step.row_max, whole.row_max), (step.memory, whole.memory), (o, whole.memory),
            (step.normalizer, whole.normalizer), (sums, whole.normalizer),
        ):  # fmt: skip
            torch.testing.assert_close(got, wanted[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, whole.state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sinks", [0, 3])
def test_steps_read_and_write_mxint8(sinks: int) -> None:
    """Of keys and values that were rounded, rings and sinks of bytes lose nothing."""
    B, T, H, G, K, V, W = 2, 9, 4, 2, 16, 40, 5
    q = torch.randn(B, T, H, K)
    k, v = (microscaled(torch.randn(B, T, G, size) * torch.logspace(-2, 2, size)) for size in (K, V))
    whole = hybrid_attention(q, k, v, window=W, sinks=sinks, memory_k=k / 100)
    state, length = torch.zeros(B, G, K, V), torch.zeros(B, dtype=torch.long)
    sizes = [(W, K), (W, V), *([(sinks, K), (sinks, V)] if sinks else [])]
    k_ring, v_ring, *first = (torch.zeros(B, size, G, stored_bytes(dim), dtype=torch.uint8) for size, dim in sizes)
    sink_k, sink_v = first or (None, None)
    for t in range(T):
        more = {"sink_k": sink_k, "sink_v": sink_v, "memory_k": k[:, t] / 100}
        step = hybrid_step(q[:, t], k[:, t], v[:, t], None, state, k_ring, v_ring, length, **more)
        near = window_step(q[:, t], k_ring, v_ring, sink_k, sink_v, length)
        length += 1
        assert step.memory.dtype == step.window.dtype == torch.float32
        for got, wanted in ((step.window, whole.window), (near.o, whole.window), (step.memory, whole.memory)):
            torch.testing.assert_close(got, wanted[:, t], rtol=1e-4, atol=1e-4)
    assert torch.equal(from_bytes(k_ring[:, (T - 1) % W], k.dtype), k[:, -1])


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_a_step_of_the_delta_rule_beside_a_window_of_another_width(gate: str) -> None:
    B, T, H, G, K, M, V, W = 2, 7, 4, 2, 16, 40, 24, 3
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    mq, mk = (torch.nn.functional.normalize(torch.randn(B, T, h, M), dim=-1) for h in (H, G))
    beta = torch.rand(B, T, G) * 2
    g = {"none": None, "scalar": -torch.rand(B, T, G), "vector": -torch.rand(B, T, G, M)}[gate]
    start = torch.randn(B, G, M, V)
    near = window_reference(q, k, v, window=W)[0]
    far, last = gated_delta_reference(mq, mk, v, beta, g, scale=0.5, initial_state=start)
    state, alone, length = start.clone(), start.clone(), torch.zeros(B, dtype=torch.long)
    rings = torch.zeros(B, W, G, K), torch.zeros(B, W, G, V)
    for t in range(T):
        g_t = None if g is None else g[:, t]
        both = hybrid_step(
            q[:, t], k[:, t], v[:, t], g_t, state, *rings, length, beta=beta[:, t], memory_q=mq[:, t],
            memory_k=mk[:, t], memory_scale=0.5,
        )  # fmt: skip
        o = gated_delta_step(mq[:, t], mk[:, t], v[:, t], beta[:, t], g_t, alone, scale=0.5)
        length += 1
        for got, wanted in ((both.window, near), (both.memory, far), (o, far)):
            assert relative(got, wanted[:, t]) < 2e-5
    assert relative(state, last) < 2e-5 and relative(alone, last) < 2e-5


def test_compiles_without_a_graph_break() -> None:
    q, k, v = (torch.randn(1, 40, h, 16).requires_grad_() for h in (4, 2, 2))
    g = (-torch.rand(1, 40, 2, 16)).requires_grad_()

    def run() -> Tensor:
        out = hybrid_attention(q, k, v, g, window=8, sinks=2, with_normalizer=True)
        assert out.normalizer is not None
        return out.window + out.memory / (1 + out.normalizer[..., None].abs())

    def delta() -> Tensor:
        return gated_delta_rule(q, k, v, k.mean(-1).sigmoid(), g, l2norm=True).o

    def grouped_values() -> Tensor:
        beta = v[..., :2].sigmoid().flatten(2)
        return gated_delta_rule(q[:, :, :2], k, v.repeat(1, 1, 2, 1), beta, beta.log()).o + 0 * g.sum()

    for op in (run, delta, grouped_values):
        results = []
        for call in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
            out = call()
            results.append((out, *torch.autograd.grad(out.sum(), (q, k, v, g))))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@settings(max_examples=8, deadline=None)
@given(
    gate=st.sampled_from(GATES), T=st.integers(1, 80), G=st.integers(1, 2), repeat=st.integers(1, 3),
    K=st.integers(2, 40), V=st.integers(2, 40), window=st.integers(1, 64), sinks=st.integers(0, 5),
)  # fmt: skip
def test_any_shape(gate: str, T: int, G: int, repeat: int, K: int, V: int, window: int, sinks: int) -> None:
    # A fixed gate's gradient is a sum over all tokens that can come out near 0.
    cases = (
        linear_errors(gate, torch.float32, 1, T, G * repeat, G, K, V, device="cpu"),
        delta_errors(gate, torch.float32, 1, T, G * repeat, G, K, V, device="cpu"),
        delta_errors(gate, torch.float32, 1, T, G, G, K, V, share=repeat, device="cpu"),
    )
    for errors in cases:
        check({n: e for n, e in errors.items() if not (n == "dg" and gate == "fixed")})
    check(window_errors(torch.float32, 1, T, G * repeat, G, K, V, window, sinks, device="cpu"))


@pytest.mark.parametrize(
    ("length", "heads", "groups", "key_dim", "size", "value_dim"),
    [(1, 2, 2, 8, 8, 8), (70, 6, 2, 12, 4, 9), (64, 3, 1, 10, 5, 6), (129, 2, 2, 8, 4, 8)],
)
def test_scan_and_every_gradient(length, heads, groups, key_dim, size, value_dim):
    shapes = {"q": (heads, key_dim), "k": (groups, key_dim), "v": (groups, value_dim), "dt": (groups, value_dim)}
    tensors = {name: torch.randn(2, length, *shape) for name, shape in shapes.items()}
    tensors["dt"] = tensors["dt"].exp() / 8
    tensors["rate"] = torch.randn(groups, value_dim, size).exp()
    tensors["initial_state"] = torch.randn(2, groups, value_dim, size)
    begins = [[], [0, length // 3]]
    starts = [[max([b for b in row if b <= t], default=-1) for t in range(length)] for row in begins]
    results = {}
    for backend in ("triton", "reference"):
        os.environ["LINEARIZE_BACKEND"] = backend
        given = {name: t.double() if backend == "reference" else t.clone() for name, t in tensors.items()}
        given = {name: t.requires_grad_() for name, t in given.items()}
        out = selective_scan(**given, starts=torch.tensor(starts))
        torch.manual_seed(7)
        sum((t * torch.randn(t.shape)).sum() for t in out).backward()
        results[backend] = {**out._asdict(), **{f"d{name}": t.grad for name, t in given.items()}}
    for name, ours in results["triton"].items():
        assert relative(ours, results["reference"][name].double()) < 2e-5, name
