"""Window attention: blocked PyTorch and the ring-buffer step against the full fp64 mask."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from linearize.kernels.reference import window_reference
from linearize.kernels.window import window_attention, window_step


def make_inputs(batch, length, heads, groups, key_dim=8, value_dim=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, length, heads, key_dim, generator=gen) * 2,
        torch.randn(batch, length, groups, key_dim, generator=gen),
        torch.randn(batch, length, groups, value_dim, generator=gen),
    )


def random_starts(batch, length, seed):
    gen = torch.Generator().manual_seed(seed)
    new = torch.rand(batch, length, generator=gen) < 0.1
    return torch.where(new, torch.arange(length), 0).cummax(1).values


def decided(q, k, window, sinks, starts, softcap):
    """[B, T, H]: the largest score leads by more than fp32 can lose, so that one key has the maximum's gradient."""
    _, length, heads, key_dim = q.shape
    keys = k.double().repeat_interleave(heads // k.shape[2], 2)
    scores = torch.einsum("bihk,bjhk->bhij", q.double(), keys) / key_dim**0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    i, j = torch.arange(length)[:, None], torch.arange(length)
    first = torch.zeros(1, 1, dtype=torch.long) if starts is None else starts
    behind = j - first[:, :, None]
    visible = (behind >= 0) & (j <= i) & ((i - j < window) | (behind < sinks))
    scores = torch.nn.functional.pad(scores.masked_fill(~visible[:, None], -torch.inf), (0, 1), value=-torch.inf)
    largest, second = scores.topk(2, -1).values.unbind(-1)
    return (largest - second > 1e-5 * largest.abs().clamp(min=1)).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@example(170, 73, 3, 2, False, 2.0, 85)  # two scores that are equal in fp32
@given(
    length=st.integers(1, 200),
    window=st.integers(1, 80),
    sinks=st.integers(0, 5),
    groups=st.integers(1, 2),
    packed=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 5.0]),  # a lower one makes scores equal in fp32
    seed=st.integers(0, 99),
)
def test_forward_and_gradients_match_the_full_mask(length, window, sinks, groups, packed, softcap, seed):
    q, k, v = (x.requires_grad_() for x in make_inputs(2, length, groups * 3, groups, seed=seed))
    starts = random_starts(2, length, seed) if packed else None
    ours = window_attention(q, k, v, window=window, sinks=sinks, starts=starts, softcap=softcap)
    exact = window_reference(q, k, v, window=window, sinks=sinks, starts=starts, softcap=softcap)
    weights = [torch.randn_like(x) for x in ours]
    with torch.no_grad():
        leads = decided(q, k, window, sinks, starts, softcap)
        assert leads.float().mean() > 0.9
        weights[2] *= leads
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(ours, weights, strict=True)), (q, k, v))
    wanted = torch.autograd.grad(sum((x * w).sum() for x, w in zip(exact, weights, strict=True)), (q, k, v))
    for a, e in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


def test_a_token_that_sees_nothing_gets_zero_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in make_inputs(1, 6, 2, 1))
    out = window_attention(q, k, v, window=3, starts=torch.full((1, 6), 4))
    assert torch.equal(out.o[:, :4], torch.zeros_like(out.o[:, :4]))
    assert torch.isneginf(out.lse[:, :4]).all()
    for grad in torch.autograd.grad(out.o.sum() + out.lse[:, 4:].sum(), (q, k, v)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (5, 2), (1, 1), (40, 3)])
def test_steps_over_ring_buffers_match(window, sinks, softcap):
    length = 30
    q, k, v = make_inputs(2, length, 4, 2)
    exact = window_reference(q, k, v, window=window, sinks=sinks, softcap=softcap)
    k_ring, v_ring = torch.zeros(2, window, 2, 8), torch.zeros(2, window, 2, 6)
    for t in range(length):
        k_ring[:, t % window], v_ring[:, t % window] = k[:, t], v[:, t]
        sink_k, sink_v = (k[:, :sinks], v[:, :sinks]) if sinks else (None, None)
        out = window_step(q[:, t], k_ring, v_ring, sink_k, sink_v, torch.tensor([t, t]), softcap=softcap)
        for a, e in zip(out, exact, strict=True):
            torch.testing.assert_close(a.double(), e[:, t], rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named():
    q, k, v = make_inputs(1, 4, 3, 1)
    with pytest.raises(ValueError, match="window must be at least 1"):
        window_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="softcap must lie above 0"):
        window_attention(q, k, v, window=1, softcap=0.0)
    with pytest.raises(ValueError, match="H a multiple of G"):
        window_attention(q, torch.cat([k, k], 2), torch.cat([v, v], 2), window=2)
