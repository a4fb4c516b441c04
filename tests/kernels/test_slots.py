"""Gated slot attention against a loop over tokens in fp64: outputs, states and every gradient."""

import pytest
import torch

from linearize.kernels.slots import gated_slot_attention, gated_slot_step


def make(length: int, heads: int, groups: int, slots: int = 6):
    generator = torch.Generator().manual_seed(length)
    sizes = {"q": (heads, 5), "k": (groups, 5), "v": (groups, 7), "log_decay": (groups, slots)}
    tensors = {n: torch.randn(2, length, *size, generator=generator) for n, size in sizes.items()}
    tensors["log_decay"] = -tensors["log_decay"].exp() / 4
    tensors["initial_keys"] = torch.randn(2, groups, 5, slots, generator=generator)
    tensors["initial_values"] = torch.randn(2, groups, slots, 7, generator=generator)
    return tensors


def by_loop(q, k, v, log_decay, initial_keys, initial_values, scale, starts=None):
    """`K = a K + k (1 - a)^T`, `V = a V + (1 - a) v^T`, `o = softmax(scale q K) V`, empty where a document begins."""
    outputs = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    final = []
    for row in range(q.shape[0]):
        keys, values = initial_keys[row], initial_values[row]
        for t in range(q.shape[1]):
            if starts is not None and starts[row, t] == t:
                keys, values = torch.zeros_like(keys), torch.zeros_like(values)
            keep = log_decay[row, t].exp()
            keys = keep[:, None] * keys + k[row, t][..., None] * (1 - keep)[:, None]
            values = keep[..., None] * values + (1 - keep)[..., None] * v[row, t][:, None]
            for head in range(q.shape[2]):
                group = head * k.shape[2] // q.shape[2]
                outputs[row, t, head] = (scale * q[row, t, head] @ keys[group]).softmax(-1) @ values[group]
        final.append((keys, values))
    return outputs, torch.stack([keys for keys, _ in final]), torch.stack([values for _, values in final])


@pytest.mark.parametrize(("length", "heads", "groups"), [(1, 2, 2), (16, 3, 1), (37, 4, 2)])
def test_outputs_states_and_gradients_are_those_of_the_loop(length: int, heads: int, groups: int) -> None:
    tensors = make(length, heads, groups)
    ours = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    theirs = {n: t.double().requires_grad_() for n, t in tensors.items()}
    got = gated_slot_attention(**ours, scale=0.7)
    expected = by_loop(**theirs, scale=0.7)
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(9)) for t in expected]
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    sum((a * w).sum() for a, w in zip(got, weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip(expected, weights, strict=True)).backward()
    for name, tensor in ours.items():
        wanted = theirs[name].grad
        torch.testing.assert_close(
            tensor.grad.double(), wanted, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_documents_begin_with_empty_slots() -> None:
    tensors = make(40, 4, 2)
    begins = [[0, 3, 16, 33], [20]]
    starts = torch.stack(
        [torch.tensor([max([b for b in row if b <= t], default=-1) for t in range(40)]) for row in begins]
    )
    got = gated_slot_attention(**tensors, starts=starts)
    expected = by_loop(**{n: t.double() for n, t in tensors.items()}, scale=1.0, starts=starts)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_steps_are_the_full_form() -> None:
    tensors = make(20, 4, 2)
    keys, values = tensors.pop("initial_keys").clone(), tensors.pop("initial_values").clone()
    full = gated_slot_attention(**tensors, scale=0.5, initial_keys=keys.clone(), initial_values=values.clone())
    steps = [gated_slot_step(*(t[:, i] for t in tensors.values()), keys, values, scale=0.5) for i in range(20)]
    for a, b in zip((torch.stack(steps, 1), keys, values), full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
