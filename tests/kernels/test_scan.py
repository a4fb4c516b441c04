"""The selective scan against a loop over tokens, channels and entries in fp64: outputs, states and every gradient."""

import pytest
import torch

from linearize.kernels.scan import selective_scan, selective_scan_step

SIZES = [(1, 2, 2, 12, 4, 12), (64, 3, 1, 12, 4, 6), (63, 4, 2, 8, 8, 5), (131, 6, 2, 8, 2, 8)]


def make(length, heads, groups, key_dim, size, value_dim):
    generator = torch.Generator().manual_seed(length)
    shapes = {"q": (heads, key_dim), "k": (groups, key_dim), "v": (groups, value_dim), "dt": (groups, value_dim)}
    tensors = {name: torch.randn(2, length, *shape, generator=generator) for name, shape in shapes.items()}
    tensors["dt"] = tensors["dt"].exp() / 8
    tensors["rate"] = torch.randn(groups, value_dim, size, generator=generator).exp()
    tensors["initial_state"] = torch.randn(2, groups, value_dim, size, generator=generator)
    return tensors


def by_loop(q, k, v, dt, rate, initial_state, starts=None):
    """`s_vn = exp(-dt_v rate_vn) s_vn + dt_v v_v k_e` and `o_v = sum_n q_e s_vn`, e the n-th entry of v's block."""
    batch, length, heads, key_dim = q.shape
    groups, channels, size = rate.shape
    per_block = channels // (key_dim // size)
    outputs, final = [], []
    for row in range(batch):
        state, rows = initial_state[row], []
        for t in range(length):
            if starts is not None and starts[row, t] == t:
                state = torch.zeros_like(state)
            block = [size * (c // per_block) + n for c in range(channels) for n in range(size)]
            keys = k[row, t][:, block].view(groups, channels, size)
            queries = q[row, t][:, block].view(heads, channels, size)
            step = dt[row, t][..., None]
            state = (-step * rate).exp() * state + step * v[row, t][..., None] * keys
            rows.append((queries * state[[h * groups // heads for h in range(heads)]]).sum(-1))
        outputs.append(torch.stack(rows))
        final.append(state)
    return torch.stack(outputs), torch.stack(final)


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_states_and_gradients_are_those_of_the_loop(sizes):
    tensors = make(*sizes)
    ours = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    theirs = {n: t.double().requires_grad_() for n, t in tensors.items()}
    got, expected = selective_scan(**ours), by_loop(**theirs)
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(9)) for t in expected]
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    sum((a * w).sum() for a, w in zip(got, weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip(expected, weights, strict=True)).backward()
    for name, tensor in ours.items():
        wanted = theirs[name].grad
        torch.testing.assert_close(
            tensor.grad.double(), wanted, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_documents_begin_with_an_empty_state(monkeypatch, backend):
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    tensors = make(140, 4, 2, 8, 4, 8)
    begins = [[0, 3, 64, 77], [70]]
    starts = torch.stack(
        [torch.tensor([max([b for b in row if b <= t], default=-1) for t in range(140)]) for row in begins]
    )
    got = selective_scan(**tensors, starts=starts)
    expected = by_loop(**{n: t.double() for n, t in tensors.items()}, starts=starts)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_a_start_that_lies_ahead_shows_nothing_yet():
    tensors = make(40, 4, 2, 8, 4, 8)
    starts = torch.where(torch.arange(40) < 10, -1, 17).expand(2, -1)
    got = selective_scan(**tensors, starts=starts).o
    alone = selective_scan(**{n: t[:, 17:] if t.dim() == 4 and t.shape[1] == 40 else t for n, t in tensors.items()},
                           starts=torch.zeros(2, 23, dtype=torch.long)).o  # fmt: skip
    assert not got[:, 10:17].any()
    torch.testing.assert_close(got[:, 17:], alone)


def test_fast_decay_neither_overflows_nor_loses_its_gradient():
    tensors = {n: t.requires_grad_() for n, t in make(130, 2, 1, 8, 4, 8).items()}
    out = selective_scan(**{**tensors, "dt": tensors["dt"] * 1e4}).o
    out.sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in tensors.values())
    assert tensors["q"].grad.abs().min() > 0


def test_steps_are_the_full_form():
    tensors = make(20, 4, 2, 8, 4, 8)
    state, rate = tensors.pop("initial_state").clone(), tensors.pop("rate")
    full = selective_scan(**tensors, rate=rate, initial_state=state.clone())
    steps = [selective_scan_step(*(t[:, i] for t in tensors.values()), rate, state) for i in range(20)]
    for a, b in zip((torch.stack(steps, 1), state), full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_keeps_inputs_and_one_state_per_chunk():
    """Saved for the backward pass: the inputs and a state per chunk, not a state per token."""
    tensors = {n: t.requires_grad_() for n, t in make(1024, 2, 1, 16, 16, 64).items()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = selective_scan(**tensors)
    state_of_every_token = 2 * 1024 * 64 * 16 * 4
    assert sum(saved.values()) < state_of_every_token / 4
    out.o.sum().backward()


@pytest.mark.parametrize("wrong", ["k", "v", "dt", "rate"])
def test_shapes_that_do_not_fit_are_named(wrong):
    tensors = make(5, 4, 2, 8, 4, 8)
    tensors[wrong] = tensors[wrong][..., :3]
    with pytest.raises(ValueError, match="do not fit"):
        selective_scan(**tensors)
