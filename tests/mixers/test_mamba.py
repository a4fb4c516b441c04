"""The Mamba in the Llama: which teacher head each row of a student reads, and the layers' formulas in fp64 loops.

Legend: T tokens, H query heads, G KV heads, D head dim, M memory heads.
"""

import pytest
import torch
from torch.nn import functional as F

from linearize.recipe import Recipe
from linearize.surgery import convert

HEADS = [(32, 8), (9, 3), (14, 2), (12, 2), (8, 8)]
# Biases on q, k and v; norms on q and k; biases on all four; one fused matrix.
TEACHERS = {"qwen2": {}, "qwen3": {}, "llama": {"attention_bias": True}, "phi3": {}}
EXPANDING = ["paper/mamba1-llama", "paper/mamba2-llama", "paper/lolcats"]
GROUPED = ["mamba", "gdn"]
DIM = 32


def student(random_teacher, recipe, family, heads):
    """One converted layer, and a batch of one row in which token t is basis vector t."""
    model = random_teacher(family, heads, DIM, num_hidden_layers=1, **TEACHERS[family])
    hidden = model.config.hidden_size
    convert(model, {**Recipe.from_yaml(recipe).mixer.model_dump(), "overlap": True})  # no token enters late
    return model.model.layers[0].self_attn, torch.eye(hidden)[None]


def no_rotation(tokens):
    return torch.ones(1, tokens, DIM), torch.zeros(1, tokens, DIM)


def head_rows(attention, kind, head, heads, x):
    """What teacher head `head` of q, k or v makes of x [T, hidden], from its own rows of the weights: [T, D]."""
    first = head * DIM
    if hasattr(attention, "qkv_proj"):
        projection = attention.qkv_proj
        first += {"q": 0, "k": heads[0], "v": sum(heads)}[kind] * DIM
    else:
        projection = getattr(attention, f"{kind}_proj")
    rows = x @ projection.weight[first : first + DIM].T
    if projection.bias is not None:
        rows = rows + projection.bias[first : first + DIM]
    norm = getattr(attention, f"{kind}_norm", None)
    if norm is not None:
        rows = rows / (rows.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
    return rows


@torch.no_grad()
def what_the_parts_see(attention, x):
    """Inputs of the feature maps, of the memory and of the convolution, and the convolution's outputs."""
    seen, mixer = {}, attention.mixer
    mixer.q_map.register_forward_pre_hook(lambda _, args: seen.update(q=args[0][0]))
    mixer.k_map.register_forward_pre_hook(lambda _, args: seen.update(k=args[0][0]))
    inputs = mixer._memory_inputs

    def watched(*given):
        q, stream = inputs(*given)
        seen.update(v=stream["v"][0])
        return q, stream

    mixer._memory_inputs = watched  # not the memory's own call: beside a window both run as one op
    if mixer.conv is not None:
        mixer.conv.register_forward_hook(lambda _, args, out: seen.update(convolved=(args[0], out)))
    attention(x, position_embeddings=no_rotation(x.shape[1]))
    return seen


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", TEACHERS)
@pytest.mark.parametrize("recipe", EXPANDING + GROUPED)
def test_each_row_reads_the_right_teacher_head(random_teacher, recipe, family, heads):
    attention, x = student(random_teacher, recipe, family, heads)
    seen = what_the_parts_see(attention, x)
    names = ("q", "k", "v")
    sources = {name: seen[name] for name in names}
    if "convolved" in seen:  # what was convolved must be the teacher's, and what is read its convolution
        given, made = seen["convolved"]
        for name, before, after in zip(names if len(given) == 3 else ("v",), given, made, strict=False):
            repeat = seen[name].shape[1] // after.shape[2]
            for row in range(seen[name].shape[1]):
                torch.testing.assert_close(seen[name][:, row], after[0, :, row // repeat], rtol=0, atol=0)
            sources[name] = before[0]
    counts = {"q": heads[0], "k": heads[1], "v": heads[1]}
    if recipe in EXPANDING:
        assert seen["k"].shape[1] == seen["v"].shape[1] == heads[0]
    else:
        assert seen["k"].shape[1] == seen["v"].shape[1] == heads[1]
    for name in names:
        rows = sources[name].shape[1]
        assert rows in (counts[name], heads[0])
        for row in range(rows):
            head = row // (rows // counts[name])
            expected = head_rows(attention, name, head, heads, x[0])
            torch.testing.assert_close(
                sources[name][:, row], expected, rtol=1e-5, atol=1e-5, msg=lambda t, n=name, r=row: f"{n} {r}: {t}"
            )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", TEACHERS)
@pytest.mark.parametrize("recipe", ["paper/mamba1-llama", "paper/mamba2-llama"])
def test_each_channel_goes_out_through_its_own_column(random_teacher, monkeypatch, recipe, family, heads):
    attention, x = student(random_teacher, recipe, family, heads)
    channels = heads[0] * DIM
    one_by_one = torch.eye(channels).view(1, channels, heads[0], DIM)
    monkeypatch.setattr(attention.mixer, "forward", lambda *args: one_by_one)
    with torch.no_grad():
        out = attention(x, position_embeddings=no_rotation(x.shape[1]))[0][0]
    for head in range(heads[0]):
        for channel in range(DIM):
            column = attention.o_proj.weight[:, head * DIM + channel]
            bias = 0 if attention.o_proj.bias is None else attention.o_proj.bias
            torch.testing.assert_close(out[head * DIM + channel], column + bias, rtol=1e-6, atol=1e-6)


def silu(x):
    return x / (1 + (-x).exp())


def softplus(x):
    return (1 + x.exp()).log()


def doubles(module):
    return {name: p.detach().double() for name, p in module.named_parameters()}


def causal_conv(x, weight, bias):
    """Mamba's convolution of x [T, C] with SiLU behind it; weight[:, i] is the tap of the token i steps back."""
    out = torch.zeros_like(x) + bias
    for t in range(len(x)):
        for back in range(min(t + 1, weight.shape[1])):
            out[t] += weight[:, back] * x[t - back]
    return silu(out)


def mamba2_layer(p, u, heads):
    """The published layer on u [T, hidden], in the order [x, B, C] of its own convolution where that matters not."""
    (H, G), T, R = heads, len(u), heads[0] // heads[1]
    x, B, C = (u @ p[f"{n}_proj.weight"].T + p[f"{n}_proj.bias"] for n in "vkq")
    weight, bias = p["mixer.conv.weight"], p["mixer.conv.bias"]
    C, B, x = causal_conv(torch.cat([C, B, x], 1), weight, bias).split([H * DIM, G * DIM, G * DIM], 1)
    dt = softplus(u @ p["mixer.gate.weight"].T + p["mixer.gate.bias"])
    A = -p["mixer.gate.log_rate"].exp()
    z = u @ p["mixer.output_gate.weight"].T
    y = torch.zeros(T, H * DIM).double()
    for h in range(H):
        one, kv = slice(h * DIM, (h + 1) * DIM), slice(h // R * DIM, (h // R + 1) * DIM)
        state = torch.zeros(DIM, DIM).double()
        for t in range(T):
            state = (dt[t, h] * A[h]).exp() * state + dt[t, h] * torch.outer(B[t, kv], x[t, kv])
            out = (C[t, one] @ state + p["mixer.memory.skip.weight"][h] * x[t, kv]) * silu(z[t, one])
            y[t, one] = out / (out.square().mean() + 1e-5).sqrt() * p["mixer.norm.weight"][h]
    return y @ p["o_proj.weight"].T


def mamba1_layer(p, u, heads):
    """The published layer on u [T, hidden], with KV heads repeated as heads and not as blocks of 16 channels."""
    H, T, R, N = heads[0], len(u), heads[0] // heads[1], 16
    x, B, C = (u @ p[f"{n}_proj.weight"].T + p[f"{n}_proj.bias"] for n in "vkq")
    x = torch.cat([x[:, h // R * DIM : (h // R + 1) * DIM] for h in range(H)], 1)
    B = torch.cat([B[:, h // R * DIM : (h // R + 1) * DIM] for h in range(H)], 1)
    x = causal_conv(x, p["mixer.conv.weight"], p["mixer.conv.bias"])
    dt = softplus(u @ p["mixer.memory.down"].T @ p["mixer.memory.up"].T + p["mixer.memory.bias"])
    A = -p["mixer.memory.log_rate"].exp().view(H * DIM, N)
    D, z = p["mixer.memory.skip.weight"].flatten(), u @ p["mixer.output_gate.weight"].T
    y = torch.zeros(T, H * DIM).double()
    for c in range(H * DIM):
        block = slice(c // N * N, c // N * N + N)
        state = torch.zeros(N).double()
        for t in range(T):
            state = (dt[t, c] * A[c]).exp() * state + dt[t, c] * x[t, c] * B[t, block]
            y[t, c] = C[t, block] @ state + D[c] * x[t, c]
    return y * silu(z) @ p["o_proj.weight"].T


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
@pytest.mark.parametrize(("recipe", "layer"), [("mamba1", mamba1_layer), ("mamba2", mamba2_layer)])
def test_the_published_layers(random_teacher, recipe, layer, heads):
    attention, _ = student(random_teacher, f"paper/{recipe}-llama", "qwen2", heads)
    u = torch.randn(1, 17, attention.q_proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = attention(u, position_embeddings=no_rotation(17))[0][0]
    torch.testing.assert_close(out.double(), layer(doubles(attention), u[0].double(), heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["paper/mamba1-llama", "paper/mamba2-llama"])
def test_the_published_start(random_teacher, recipe):
    """dt between 0.001 and 0.1 where its projection is 0, A = 1..16 or between 1 and 16, D = 1, all in fp32."""
    attention, _ = student(random_teacher, recipe, "llama", (32, 8))
    mixer = attention.to(torch.bfloat16).mixer
    gate = mixer.memory if recipe.startswith("paper/mamba1") else mixer.gate
    steps, rates = F.softplus(gate.bias.double()), gate.log_rate.double().exp()
    assert 1e-3 * 0.999 <= steps.min() < 3e-3
    assert 3e-2 < steps.max() <= 0.1 * 1.001
    if gate is mixer.memory:
        torch.testing.assert_close(rates, torch.arange(1, 17).double().expand_as(rates), rtol=1e-5, atol=0)
    else:
        assert 1 <= rates.min() < 4
        assert 13 < rates.max() <= 16
    assert (mixer.memory.skip.weight == 1).all()
    for part in (mixer.gate, mixer.memory, mixer.conv):
        assert {p.dtype for p in part.parameters()} <= {torch.float32}
    assert mixer.output_gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", ["mamba", "gdn", "supra"])
def test_our_recipe_starts_near_the_window(random_teacher, make_mixer, recipe):
    """Right after surgery the logits are much closer to those of the window alone than a published layer's are."""
    ids = torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(1))

    def logits(mixer):
        model = random_teacher("llama", (4, 2), DIM)
        convert(model, mixer)
        with torch.no_grad():
            return model(ids).logits

    ours = Recipe.from_yaml(recipe).mixer.model_dump()
    window = logits(make_mixer(combine="window_only", window=ours["window"]))
    published = Recipe.from_yaml("paper/mamba2-llama").mixer.model_dump()
    near, far = ((logits(mixer) - window).square().mean() for mixer in (ours, published))
    assert near < 0.01 * far
