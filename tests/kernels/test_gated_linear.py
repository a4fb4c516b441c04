"""Gated linear attention: chunked PyTorch and the step against the fp64 recurrence, forward and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.kernels.gated_linear import gated_linear_attention, gated_linear_step, starts_from_cu_seqlens
from linearize.kernels.reference import gated_linear_reference

DECAYS = ["none", "fixed", "scalar", "vector"]


def relative_rms(actual, expected):
    error = (actual.double() - expected.double()).pow(2).mean().sqrt()
    return (error / expected.double().pow(2).mean().sqrt().clamp(min=1e-12)).item()


def make_inputs(batch, length, heads, groups, key_dim, value_dim, decay, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    shapes = {"fixed": (groups,), "scalar": (batch, length, groups), "vector": (batch, length, groups, key_dim)}
    g = None if decay == "none" else torch.nn.functional.logsigmoid(normal(*shapes[decay]) * 3)
    q, k = normal(batch, length, heads, key_dim), normal(batch, length, groups, key_dim)
    return q, k, normal(batch, length, groups, value_dim), g


def document_starts(length, lengths, continued):
    starts, at = [], 0
    for n in lengths:
        starts += [at] * n
        at += n
    starts = torch.tensor((starts + [at] * length)[:length])
    return torch.where(starts == 0, -1, starts) if continued else starts


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", [(2, 67, 6, 2, 16, 24), (1, 130, 4, 4, 8, 8), (1, 16, 3, 1, 20, 12)])
def test_forward_and_gradients_match_the_recurrence(decay, shape):
    q, k, v, g = make_inputs(*shape, decay)
    batch, length, heads, groups, key_dim, value_dim = shape
    state, norm = torch.randn(batch, groups, key_dim, value_dim), torch.randn(batch, groups, key_dim)
    starts = torch.stack([document_starts(length, [5, 30, 9], b == 0) for b in range(batch)])
    inputs = [x.requires_grad_() for x in (q, k, v, state, norm)] + ([] if g is None else [g.requires_grad_()])
    exact = gated_linear_reference(q, k, v, g, scale=0.3, starts=starts, initial_state=state, initial_norm=norm)
    ours = gated_linear_attention(
        q, k, v, g, scale=0.3, with_normalizer=True, starts=starts, initial_state=state, initial_norm=norm
    )
    weights = [torch.randn_like(x) for x in ours]
    for name, a, e in zip(("o", "normalizer", "state", "norm"), ours, exact, strict=True):
        assert relative_rms(a, e) < 2e-5, name
    grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(ours, weights, strict=True)), inputs)
    wanted = torch.autograd.grad(sum((x * w).sum() for x, w in zip(exact, weights, strict=True)), inputs)
    for name, a, e in zip("q k v state norm g".split(), grads, wanted, strict=False):
        assert relative_rms(a, e) < 2e-5, name


@pytest.mark.parametrize("value", [0.0, -1e-6, -1.0, -20.0, -1e4, -torch.inf])
@pytest.mark.parametrize("decay", ["fixed", "scalar", "vector"])
def test_any_gate_is_exact(decay, value):
    """One gate value in half of the places, mild gates in the others: no overflow, no NaN, no cancellation."""
    q, k, v, g = make_inputs(1, 100, 2, 1, 8, 8, decay)
    g = torch.where(torch.rand_like(g) < 0.5, torch.tensor(value), g) if decay != "fixed" else torch.full_like(g, value)
    g.requires_grad_()
    ours = gated_linear_attention(q, k, v, g)
    exact, _, state, _ = gated_linear_reference(q, k, v, g)
    assert relative_rms(ours.o, exact) < 2e-5
    assert relative_rms(ours.state, state) < 2e-5
    (grad,) = torch.autograd.grad(ours.o.sum(), g)
    assert torch.isfinite(grad).all()


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 140),
    groups=st.integers(1, 3),
    repeat=st.integers(1, 3),
    key_dim=st.integers(1, 20),
    decay=st.sampled_from(DECAYS),
    seed=st.integers(0, 1000),
)
def test_random_shapes(length, groups, repeat, key_dim, decay, seed):
    q, k, v, g = make_inputs(1, length, groups * repeat, groups, key_dim, 5, decay, seed)
    ours = gated_linear_attention(q, k, v, g, with_normalizer=True)
    exact = gated_linear_reference(q, k, v, g)
    for a, e in zip(ours, exact, strict=True):
        assert relative_rms(a, e) < 2e-5


@pytest.mark.parametrize("decay", DECAYS)
def test_steps_in_place_match_the_recurrence(decay):
    q, k, v, g = make_inputs(2, 20, 4, 2, 8, 6, decay)
    state, norm = torch.zeros(2, 2, 8, 6), torch.zeros(2, 2, 8)
    addresses = state.data_ptr(), norm.data_ptr()
    exact = gated_linear_reference(q, k, v, g, scale=0.5)
    for t in range(20):
        gate = g if g is None or g.dim() == 1 else g[:, t]
        o, z = gated_linear_step(q[:, t], k[:, t], v[:, t], gate, state, norm, scale=0.5)
        torch.testing.assert_close(o.double(), exact[0][:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(z.double(), exact[1][:, t], rtol=1e-4, atol=1e-5)
    assert addresses == (state.data_ptr(), norm.data_ptr())
    torch.testing.assert_close(state.double(), exact[2], rtol=1e-4, atol=1e-5)


def test_delayed_starts_see_nothing_until_reached():
    """A start past the token is an empty view: the output is exactly zero there."""
    q, k, v, g = make_inputs(1, 80, 2, 1, 8, 8, "scalar")
    starts = torch.full((1, 80), 70)
    ours = gated_linear_attention(q, k, v, g, starts=starts, with_normalizer=True)
    exact = gated_linear_reference(q, k, v, g, starts=starts)
    assert torch.equal(ours.o[:, :70], torch.zeros_like(ours.o[:, :70]))
    assert relative_rms(ours.o, exact[0]) < 2e-5
    assert relative_rms(ours.state, exact[2]) < 2e-5


def test_cu_seqlens_are_documents():
    q, k, v, g = make_inputs(1, 90, 2, 2, 8, 8, "vector")
    packed = gated_linear_attention(q, k, v, g, cu_seqlens=torch.tensor([0, 13, 64, 90]))
    for a, b in ((0, 13), (13, 64), (64, 90)):
        alone = gated_linear_attention(q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b])
        torch.testing.assert_close(packed.o[:, a:b], alone.o, rtol=1e-4, atol=1e-5)
    assert starts_from_cu_seqlens(torch.tensor([0, 2, 5]), 5).tolist() == [[0, 0, 2, 2, 2]]


def test_split_in_two_calls_is_one_call():
    q, k, v, g = make_inputs(2, 150, 4, 2, 8, 8, "vector")
    whole = gated_linear_attention(q, k, v, g)
    first = gated_linear_attention(q[:, :71], k[:, :71], v[:, :71], g[:, :71])
    rest = gated_linear_attention(q[:, 71:], k[:, 71:], v[:, 71:], g[:, 71:], initial_state=first.state)
    torch.testing.assert_close(torch.cat([first.o, rest.o], 1), whole.o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rest.state, whole.state, rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    q, k, v, _ = make_inputs(1, 4, 3, 1, 8, 8, "none")
    with pytest.raises(ValueError, match="H a multiple of G"):
        gated_linear_attention(q, torch.cat([k, k], 2), torch.cat([v, v], 2))
    with pytest.raises(ValueError, match="log_decay has shape"):
        gated_linear_attention(q, k, v, torch.zeros(7))
