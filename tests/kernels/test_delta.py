"""The chunked gated delta rule and its step against the naive fp64 recurrence.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearize.kernels.delta import gated_delta_rule, gated_delta_step
from linearize.kernels.reference import gated_delta_reference

GATES = {
    "none": None,
    "fixed": lambda b, t, g, k: (g,),
    "scalar": lambda b, t, g, k: (b, t, g),
    "vector": lambda b, t, g, k: (b, t, g, k),
}


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item()


def inputs(gate: str, B: int, T: int, H: int, G: int, K: int, V: int, top: float = 1.0) -> dict[str, Tensor | None]:
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, G, K), torch.randn(B, T, G, V)
    k = torch.nn.functional.normalize(k, dim=-1)
    shape = GATES[gate]
    g = None if shape is None else -torch.rand(shape(B, T, G, K)) * 2
    return {
        "q": q,
        "k": k,
        "v": v,
        "beta": torch.rand(B, T, G) * top,
        "log_decay": g,
        "initial_state": torch.randn(B, G, K, V),
    }


def documents(B: int, T: int) -> Tensor:
    starts = torch.full((B, T), -1)
    starts[:, T // 3 :] = T // 3
    starts[1:, T // 2 :] = T // 2 + 2
    return starts


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_every_gradient_equal_the_recurrence(gate: str, packed: bool) -> None:
    torch.manual_seed(0)
    given = inputs(gate, 2, 150, 6, 2, 20, 12, top=2.0)
    starts = documents(2, 150) if packed else None
    low = {n: None if x is None else x.clone().requires_grad_() for n, x in given.items()}
    high = {n: None if x is None else x.double().requires_grad_() for n, x in given.items()}
    out = gated_delta_rule(**low, scale=0.5, starts=starts)
    o, state = gated_delta_reference(**high, scale=0.5, starts=starts)
    assert relative(out.o, o) < 2e-5
    assert relative(out.state, state) < 2e-5
    assert out.normalizer is None
    weights = torch.randn_like(o), torch.randn_like(state)
    ((out.o * weights[0]).sum() + (out.state * weights[1]).sum()).backward()
    ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
    for name, x in low.items():
        if x is not None:
            assert relative(x.grad, high[name].grad) < 2e-5, name


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_prefill_and_steps_equal_one_call(gate: str) -> None:
    torch.manual_seed(1)
    given = inputs(gate, 2, 70, 4, 2, 16, 8)
    whole = gated_delta_rule(**given)
    cut = {n: x if x is None or n == "initial_state" else x[:, :65] for n, x in given.items()}
    state = gated_delta_rule(**cut).state
    for t in range(65, 70):
        step = {n: None if given[n] is None else given[n][:, t] for n in ("q", "k", "v", "beta", "log_decay")}
        o = gated_delta_step(**step, state=state)
        torch.testing.assert_close(o, whole.o[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole.state, rtol=1e-4, atol=1e-5)


def test_l2norm_equals_normalised_inputs() -> None:
    torch.manual_seed(2)
    given = inputs("scalar", 1, 40, 2, 1, 16, 8)
    given["k"] = given["k"] * 3
    unit = {
        **given,
        "q": torch.nn.functional.normalize(given["q"], dim=-1),
        "k": torch.nn.functional.normalize(given["k"], dim=-1),
    }
    torch.testing.assert_close(
        gated_delta_rule(**given, l2norm=True).o, gated_delta_rule(**unit).o, rtol=1e-4, atol=1e-5
    )


def test_cu_seqlens_equal_separate_documents() -> None:
    torch.manual_seed(3)
    given = {n: x for n, x in inputs("vector", 1, 100, 4, 2, 16, 8).items() if n != "initial_state"}
    packed = gated_delta_rule(**given, cu_seqlens=torch.tensor([0, 30, 37, 100])).o
    for begin, end in ((0, 30), (30, 37), (37, 100)):
        alone = gated_delta_rule(**{n: x[:, begin:end] for n, x in given.items()}).o
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    gate=st.sampled_from(sorted(GATES)), T=st.integers(1, 140), G=st.integers(1, 3), repeat=st.integers(1, 4),
    K=st.integers(1, 40), V=st.integers(1, 40), top=st.sampled_from([1.0, 2.0]),
)  # fmt: skip
def test_any_shape(gate: str, T: int, G: int, repeat: int, K: int, V: int, top: float) -> None:
    given = inputs(gate, 2, T, G * repeat, G, K, V, top)
    o, state = gated_delta_reference(**given)
    out = gated_delta_rule(**given)
    assert relative(out.o, o) < 2e-5
    assert relative(out.state, state) < 2e-5


def test_beta_of_the_wrong_shape_is_refused() -> None:
    given = inputs("none", 1, 8, 2, 1, 4, 4)
    with pytest.raises(ValueError, match="beta"):
        gated_delta_rule(**{**given, "beta": given["beta"][..., 0]})
