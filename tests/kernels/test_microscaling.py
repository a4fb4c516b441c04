import pytest
import torch

from linearize.kernels.microscaling import from_bytes, microscaled, stored_bytes, stored_numbers, to_bytes
from linearize.kernels.reference import mxint8_reference


def uneven(dim, dtype):
    """Rows [R, dim] of numbers as unlike as a dtype's keys can be: each block has a power of two of its own."""
    generator = torch.Generator().manual_seed(dim)
    plain = torch.randn(64, dim, generator=generator, dtype=torch.float64)
    place, sign = torch.arange(dim), 1 - 2 * (torch.arange(dim) % 2)
    largest, least = (4, -4) if dtype == torch.float16 else (36, -30)
    halves = (torch.arange(64 * dim).view(64, dim) % 127 + 0.5) * sign  # of a step, where 127.5 steps are the largest
    halves[:, ::32] = 127.5
    rows = [
        plain,
        plain * 10.0 ** torch.randint(least, largest, (64, dim), generator=generator),  # huge and tiny neighbours
        plain * torch.where(place // 32 % 2 == 0, 10.0**largest, 10.0**least),  # huge and tiny neighbouring blocks
        plain * (place // 32 % 2),  # blocks of zeros
        plain[:4] * 1e-40,
        2.0 ** torch.randint(-14, 15, (64, dim), generator=generator).double() * sign,
        torch.where(place % 32 == 0, 1.0, 1 - 2.0**-9) * 2 * sign[None],  # just below a power, beside it
        (2 - 2.0**-7) * sign[None].double(),  # 127 steps
        (2 - 2.0**-9) * sign[None].double(),  # nearer to 128 steps, which there are not
        halves / 64,
        halves / 4096,
        torch.zeros(1, dim, dtype=torch.float64),
    ]
    return torch.cat(rows).to(dtype)


@pytest.mark.parametrize("dim", [1, 8, 32, 33, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mxint8_is_the_nearest_number_of_a_block_and_its_bytes_lose_nothing(dtype, dim):
    x = uneven(dim, dtype)
    assert x.isfinite().all()
    rounded = microscaled(x)
    assert rounded.dtype == dtype and torch.equal(rounded.double(), mxint8_reference(x))
    assert torch.equal(microscaled(rounded), rounded)
    for t in (x, rounded):
        stored = to_bytes(t)
        assert stored.dtype == torch.uint8 and stored.shape == (len(x), dim + -(-dim // 32))
        assert torch.equal(from_bytes(stored, dtype), rounded)
    assert torch.equal(microscaled(x.view(-1, 1, dim).transpose(0, 1)), rounded[None])


def test_mxint8_of_known_numbers():
    head = [1.0, 0.3, -1.999, 1 / 128, 3 / 128] + 27 * [0.0] + [-0.75, 0.001]
    x = torch.tensor(head, requires_grad=True)
    gradient = torch.arange(34.0)
    microscaled(x).backward(gradient)
    assert torch.equal(x.grad, gradient)
    assert microscaled(x).tolist() == [1.0, 19 / 64, -127 / 64, 0.0, 2 / 64] + 27 * [0.0] + [-0.75, 0.0]
    assert to_bytes(x.detach()).tolist() == [64, 19, 256 - 127, 0, 2] + 27 * [0] + [256 - 96, 0] + [127, 126]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mxint8_compiles_into_one_graph(dtype):
    x = uneven(80, dtype).requires_grad_()
    compiled = torch.compile(microscaled, backend="aot_eager", fullgraph=True)
    rounded, gradient = compiled(x), torch.randn_like(x)
    rounded.backward(gradient)
    assert torch.equal(rounded, microscaled(x)) and torch.equal(x.grad, gradient)
    cached = torch.compile(lambda t: from_bytes(to_bytes(t), dtype), backend="aot_eager", fullgraph=True)
    assert torch.equal(cached(x.detach()), rounded)


def test_the_bytes_of_mxint8_tell_how_many_numbers_they_are():
    assert [stored_bytes(dim) for dim in (1, 8, 32, 33, 64, 80)] == [2, 9, 33, 35, 66, 83]
    assert [stored_numbers(stored_bytes(dim)) for dim in range(1, 301)] == list(range(1, 301))
