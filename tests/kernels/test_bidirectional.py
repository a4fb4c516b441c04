"""Linear attention in both directions: outputs and gradients against the fp64 sum over pairs."""

import pytest
import torch

from linearize.kernels.bidirectional import bidirectional_linear_attention
from linearize.kernels.reference import bidirectional_reference

STARTS = torch.tensor([[0] * 5 + [5] * 9 + [14] * 7, [-1] * 20 + [20]])


def make_inputs(decay, heads=4, groups=2, length=21):
    gen = torch.Generator().manual_seed(3)
    q = torch.randn(2, length, heads, 6, generator=gen).softmax(-1)
    k = torch.randn(2, length, groups, 6, generator=gen).softmax(-1)
    v = torch.randn(2, length, groups, 5, generator=gen)
    shapes = {"none": None, "head": (groups,), "token": (2, length, groups), "channel": (2, length, groups, 6)}
    shape = shapes[decay]
    g = None if shape is None else torch.nn.functional.logsigmoid(torch.randn(shape, generator=gen) + 1)
    return [None if t is None else t.requires_grad_() for t in (q, k, v, g)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_outputs_and_gradients_match_the_sum_over_pairs(decay, heads, packed):
    inputs = make_inputs(decay, *heads)
    given = [t for t in inputs if t is not None]
    starts = STARTS if packed else None
    ours = bidirectional_linear_attention(*inputs, scale=0.7, with_normalizer=True, starts=starts)
    exact = bidirectional_reference(*inputs, scale=0.7, starts=starts)
    weights = [torch.randn_like(t) for t in ours]
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(sum((t * w).sum() for t, w in zip(ours, weights, strict=True)), given)
    wanted = torch.autograd.grad(sum((t * w).sum() for t, w in zip(exact, weights, strict=True)), given)
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("decay", ["none", "head"])
def test_a_constant_decay_weighs_by_the_distance(decay):
    """LION: o_i = sum_j a^|i - j| (q_i . k_j) v_j / sum_j a^|i - j| (q_i . k_j)."""
    q, k, v, g = (None if t is None else t.detach() for t in make_inputs(decay, 2, 2))
    o, normalizer = bidirectional_linear_attention(q, k, v, g, with_normalizer=True)
    place = torch.arange(21)
    distance = (place[:, None] - place).abs()
    rate = torch.ones(2) if g is None else g.exp()
    weights = rate[:, None, None] ** distance * torch.einsum("bihk,bjhk->bhij", q, k)
    wanted = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(o / normalizer[..., None], wanted, rtol=1e-4, atol=1e-5)


def test_zeros_behind_a_row_change_nothing():
    q, k, v, g = (t.detach() for t in make_inputs("token"))
    padded = [torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, 6)) for t in (q, k, v, g)]
    for starts in (None, STARTS):
        more = None if starts is None else torch.cat([starts, starts[:, -1:].expand(-1, 6)], 1)
        alone, _ = bidirectional_linear_attention(q, k, v, g, starts=starts)
        got, _ = bidirectional_linear_attention(*padded, starts=more)
        torch.testing.assert_close(got[:, :21], alone, rtol=1e-5, atol=1e-6)
