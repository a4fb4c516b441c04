"""The chunked gated delta rule and its step against the naive fp64 recurrence.

Legend: B batch, T tokens, H query heads, G KV heads, K key dim, V value dim.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearize.kernels.delta import delta_product, delta_product_step, gated_delta_rule, gated_delta_step
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


@settings(max_examples=20, deadline=None)
@given(
    gate=st.sampled_from(list(GATES)), T=st.integers(1, 80), G=st.integers(1, 3), share=st.integers(2, 4),
    K=st.integers(2, 20), V=st.integers(1, 20), l2norm=st.booleans(),
)  # fmt: skip
def test_grouped_values_equal_repeated_queries_and_keys(gate, T, G, share, K, V, l2norm) -> None:
    torch.manual_seed(T)
    given = inputs(gate, 2, T, G * share, G * share, K, V)
    few = {n: torch.randn(2, T, G, K).double().requires_grad_() for n in ("q", "k")}
    if not l2norm:
        few["k"] = torch.nn.functional.normalize(few["k"].detach(), dim=-1).requires_grad_()
    unit = {n: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() if l2norm else x for n, x in few.items()}
    high = {n: None if x is None else x.double().requires_grad_() for n, x in given.items()}
    many = {n: x.repeat_interleave(share, 2) for n, x in unit.items()}
    wanted, last = gated_delta_reference(**{**high, **many}, scale=0.5)
    grouped, also = gated_delta_reference(**{**high, **unit}, scale=0.5)
    assert torch.equal(wanted, grouped) and torch.equal(last, also)
    low = {n: None if x is None else x.detach().float().requires_grad_() for n, x in {**high, **few}.items()}
    out = gated_delta_rule(**low, scale=0.5, l2norm=l2norm)
    assert relative(out.o, wanted) < 2e-5 and relative(out.state, last) < 2e-5
    names = [n for n, x in low.items() if x is not None and not (n == "log_decay" and gate == "fixed")]
    ours = torch.autograd.grad(out.o.sum() + out.state.sum(), [low[n] for n in names])
    theirs = torch.autograd.grad(wanted.sum() + last.sum(), [{**high, **few}[n] for n in names])
    scale = max(y.norm() for y in theirs)  # a sum of gradients may come out near 0
    for name, x, y in zip(names, ours, theirs, strict=True):
        assert (x.double() - y).norm() < 2e-5 * scale, name
    state = given["initial_state"].clone()
    for t in range(T):
        decay = low["log_decay"] if gate in ("none", "fixed") else low["log_decay"][:, t]
        token = [low[n].detach()[:, t] for n in ("q", "k", "v", "beta")]
        o = gated_delta_step(*token, None if decay is None else decay.detach(), state, scale=0.5, l2norm=l2norm)
        assert o.shape == (2, G * share, V)
    assert relative(o, wanted[:, -1]) < 1e-4 and relative(state, last) < 1e-4


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


def products(gate: str, B: int, T: int, n: int, H: int, G: int, K: int, V: int) -> dict[str, Tensor | None]:
    given = inputs(gate, B, T * n, H, G, K, V, top=2.0)
    given |= {name: given[name].unflatten(1, (T, n)) for name in ("k", "v", "beta")}
    gated = gate in ("scalar", "vector")
    return given | {"q": given["q"][:, :T], "log_decay": given["log_decay"][:, :T] if gated else given["log_decay"]}


def product_by_loop(q, k, v, beta, log_decay, initial_state, starts=None):
    """`S <- exp(g) S`, then n times `S <- S + b k (v - k^T S)^T`, then `o = q^T S`; a new document empties S."""
    state, outputs, repeat = initial_state, [], q.shape[2] // k.shape[3]
    g = torch.zeros(k.shape[3]) if log_decay is None else log_decay
    for t in range(q.shape[1]):
        if starts is not None:
            before = starts[:, t - 1] if t else torch.full_like(starts[:, 0], -1)
            state = torch.where((starts[:, t] != before)[:, None, None, None], 0.0, state)
        decay = (g if g.dim() == 1 else g[:, t]).double().exp()
        state = state * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        for i in range(k.shape[2]):
            key, strength = k[:, t, i, :, :, None], beta[:, t, i, :, None, None]
            visible = 1.0 if starts is None else (starts[:, t] <= t).double()[:, None, None, None]
            state = state + visible * strength * key * (v[:, t, i, :, None] - key.transpose(-1, -2) @ state)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state.repeat_interleave(repeat, 1)))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("n", "packed"), [(1, False), (3, False), (2, True)])
def test_products_and_their_gradients_equal_the_loop(gate: str, n: int, packed: bool) -> None:
    torch.manual_seed(4)
    given = products(gate, 2, 50, n, 4, 2, 10, 6)
    starts = documents(2, 50) if packed else None
    low = {name: None if x is None else x.clone().requires_grad_() for name, x in given.items()}
    high = {name: None if x is None else x.double().requires_grad_() for name, x in given.items()}
    out = delta_product(**low, starts=starts)
    o, state = product_by_loop(**high, starts=starts)
    assert relative(out.o, o) < 2e-5
    assert relative(out.state, state) < 2e-5
    weights = torch.randn_like(o), torch.randn_like(state)
    ((out.o * weights[0]).sum() + (out.state * weights[1]).sum()).backward()
    ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
    for name, x in low.items():
        if x is not None:
            assert relative(x.grad, high[name].grad) < 2e-5, name


@pytest.mark.parametrize("gate", ["none", "fixed", "vector"])
def test_product_steps_equal_one_call(gate: str) -> None:
    torch.manual_seed(5)
    given = products(gate, 2, 9, 2, 4, 2, 10, 6)
    whole = delta_product(**given, l2norm=True, scale=0.5)
    state = given["initial_state"].clone()
    for t in range(9):
        names = ("q", "k", "v", "beta") if gate == "fixed" else ("q", "k", "v", "beta", "log_decay")
        step = {n: None if given[n] is None else given[n][:, t] for n in names}
        o = delta_product_step(**{"log_decay": given["log_decay"], **step}, state=state, l2norm=True, scale=0.5)
        torch.testing.assert_close(o, whole.o[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole.state, rtol=1e-4, atol=1e-5)


def test_products_of_documents_equal_separate_documents() -> None:
    torch.manual_seed(6)
    given = {n: x for n, x in products("scalar", 1, 40, 2, 4, 2, 8, 6).items() if n != "initial_state"}
    packed = delta_product(**given, cu_seqlens=torch.tensor([0, 13, 40])).o
    for begin, end in ((0, 13), (13, 40)):
        alone = delta_product(**{n: x[:, begin:end] for n, x in given.items()}).o
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-4, atol=1e-5)


def test_products_of_the_wrong_shape_are_refused() -> None:
    given = products("none", 1, 8, 2, 2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"expected k \[B, T, n, G, K\]"):
        delta_product(**{**given, "beta": given["beta"][:, :, 0]})
    with pytest.raises(ValueError, match="q has shape"):
        delta_product(**{**given, "q": given["q"][:, :5]})


def test_beta_of_the_wrong_shape_is_refused() -> None:
    given = inputs("none", 1, 8, 2, 1, 4, 4)
    with pytest.raises(ValueError, match="beta"):
        gated_delta_rule(**{**given, "beta": given["beta"][..., 0]})
