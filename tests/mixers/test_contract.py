"""The contract of every mixer (the eight rules of CONTRIBUTING.md), for each recipe's and for random combinations.

Legend: T tokens, H query heads, G KV heads, D head dim, M memory heads, W window, S sinks.
"""

import inspect
import itertools
import os
import random
import subprocess
import sys
import typing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from linearize.errors import LinearizeError
from linearize.kernels.microscaling import microscaled
from linearize.kernels.reference import mxint8_reference
from linearize.mixers import check_mixer
from linearize.mixers.check import PARTS
from linearize.mixers.context import SequenceContext, sequence_context
from linearize.mixers.mixer import TokenMixer
from linearize.mixers.parts import Fp32Part, HeadShape
from linearize.modeling.export import save_checkpoint
from linearize.recipe import Recipe, recipe_names
from linearize.recipe_mixer import Mixer
from linearize.surgery import convert

HEADS = [(9, 3), (8, 8), (14, 2), (12, 1)]
SHAPES = [(heads, dim) for dim in (64, 80) for heads in HEADS]
ATOL = 5e-4  # a norm over a memory that is still near 0 magnifies rounding
MXINT8_ATOL = 1e-5  # of a window alone; one number in the place of its neighbour moves outputs a thousand times more
VOCABULARY = 61


def recipe_mixers():
    """Every mixer that a packaged recipe uses, as written and with a short window that inputs leave behind."""
    found = {}
    for name in recipe_names():
        mixer = Recipe.from_yaml(name).mixer
        if mixer is None:
            continue
        found[name] = mixer.model_dump()
        if mixer.window is not None:
            found[f"{name}, short window"] = {**found[name], "window": {**found[name]["window"], "size": 7}}
    return found


RECIPES = recipe_mixers()
_RANDOM = random.Random(0)
RECIPE_CASES = [
    pytest.param(mixer, heads, _RANDOM.choice((64, 80)), id=f"{name}-{heads[0]}q{heads[1]}kv")
    for (name, mixer), count in zip(RECIPES.items(), itertools.count())
    for heads in (HEADS if "short" not in name else [HEADS[count % 4]])
]


@st.composite
def parts(draw, kind):
    """A registered part; each of its options at its default, at half of it, or on where it is off by default."""
    name = draw(st.sampled_from(PARTS[kind].names()))
    found = PARTS[kind].get(name)
    hints = typing.get_type_hints(found.__init__)
    part = {"name": name}
    for option in inspect.signature(found).parameters.values():
        if option.kind is not option.KEYWORD_ONLY or not draw(st.booleans()):
            continue
        if option.default is None:
            part[option.name] = 0.5
        elif hints[option.name] is bool:
            part[option.name] = not option.default
        else:
            part[option.name] = type(option.default)(
                option.default / 2 if hints[option.name] is float else option.default // 2
            )
    return part


@st.composite
def mixers(draw):
    fields = {kind: draw(parts(kind)) for kind in PARTS}
    sliding = st.fixed_dictionaries({"size": st.integers(1, 12), "sinks": st.integers(0, 5)})
    sizes = sliding | st.fixed_dictionaries({"size": st.integers(1, 12), "kind": st.just("terrace")})
    fields["window"] = draw(sizes) if PARTS["combine"].get(fields["combine"]["name"]).uses_window else None
    for switch in ("normalize", "overlap"):
        fields[switch] = draw(st.booleans())
    fields["rotary"] = draw(st.sampled_from((False, True, "features")))
    fields["output_norm"] = draw(st.sampled_from((False, True, "group", "per_head")))
    fields["output_gate"] = draw(st.sampled_from((False, True, "silu")))
    fields["conv"] = draw(st.sampled_from((None, 2, {"inputs": "v", "activation": "silu", "identity": False})))
    fields["k_map_heads"] = draw(st.sampled_from(("kv", "query")))
    return Mixer.model_validate(fields).model_dump()


def is_valid(mixer):
    try:
        check_mixer(mixer)
    except LinearizeError:
        return False
    return True


def random_mixers(examples):
    """Run a test on `examples` valid combinations and shapes; the same ones every time."""

    def decorate(test):
        limits = settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return limits(given(mixer=mixers().filter(is_valid), shape=st.sampled_from(SHAPES))(test))

    return decorate


def perturb(module, seed=1):
    """Move a mixer's parameters away from their starts, so that a part that is still neutral cannot hide an error."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def converted(random_teacher):
    """Teachers of two layers; with mxint8 of one in fp64, where a last bit, of a projection or of the layer before,
    which depends on how many tokens are computed at once, moves no rounding.
    """

    def make(mixer, heads, head_dim, exact_heads=None):
        rounds = mixer["cache_dtype"] == "mxint8"
        model = random_teacher("llama", heads, head_dim, num_hidden_layers=1 if rounds else 2)
        exact_heads = exact_heads and [pair for pair in exact_heads if pair[0] < len(model.model.layers)]
        convert(model, mixer, exact_heads=exact_heads)
        if rounds:
            model.double()
        for layer in model.model.layers:
            if layer.self_attn.mixer is not None:
                perturb(layer.self_attn.mixer)
        return model

    return make


def tokens(rows, length, seed=3):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def chunked(model, ids, sizes, **streams):
    """Logits of a prefill in chunks of `sizes` and one-token steps for the rest.

    `streams` are cut like the ids, but an attention mask always covers everything before too.
    """
    cache, outputs, begin = None, [], 0
    for size in itertools.chain(sizes, itertools.repeat(1)):
        end = begin + size
        if begin == ids.shape[1]:
            break
        cut = {name: t[:, :end] if name == "attention_mask" else t[:, begin:end] for name, t in streams.items()}
        out = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **cut)
        cache = out.past_key_values
        outputs.append(out.logits)
        begin = end
    return torch.cat(outputs, 1)


def assert_close(actual, expected, what, atol=ATOL):
    error = (actual - expected).abs().max().item()
    assert error < atol, f"{what}: off by {error:.2e}"


def tolerance(mixer):
    """Tight with mxint8 where nothing magnifies rounding, so that no number may be rounded to another one."""
    tight = mixer["cache_dtype"] == "mxint8" and mixer["combine"]["name"] == "window_only"
    return MXINT8_ATOL if tight else ATOL


def check_padding_and_decode(model, length, atol=ATOL):
    """Rules 2 and 3: a batch of plain, left-, right- and inner-padded rows equals its rows alone, in every form."""
    prompt = length - 12  # the last 12 tokens are decoded
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, :9] = 0
    mask[2, prompt - 5 : prompt] = 0
    mask[3, 13:19] = 0
    ids = tokens(4, length)
    with torch.no_grad():
        alone = [model(ids[row][mask[row] == 1][None], use_cache=False).logits[0] for row in range(4)]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    forms = {
        "full forward": lambda: model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits,
        "full forward without position_ids": lambda: model(ids, attention_mask=mask, use_cache=False).logits,
        "prefill at once, then decode": lambda: chunked(
            model, ids, [prompt], attention_mask=mask, position_ids=positions
        ),
        "prefill in chunks, then decode": lambda: chunked(
            model, ids, [3, 14, prompt - 17], attention_mask=mask.bool(), position_ids=positions
        ),
        "the same without position_ids": lambda: chunked(model, ids, [3, prompt - 3], attention_mask=mask),
    }
    if length < 60:  # the long rows of the recipes would take minutes
        forms["steps of one token, padding too"] = lambda: chunked(
            model, ids, [1], attention_mask=mask, position_ids=positions
        )
    for name, run in forms.items():
        with torch.no_grad():
            got = run()
        for row, kind in enumerate(("plain", "left-padded", "right-padded", "inner-padded")):
            assert_close(got[row][mask[row] == 1], alone[row], f"{name}, {kind} row", atol)


def check_packing(model, length, atol=ATOL):
    """Rule 4: documents that share a row give the logits that each gives alone, in every form."""
    ids = tokens(2, length, seed=4)
    documents = [(length // 3, length - length // 3), (1, 10, length - 11)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    with torch.no_grad():
        alone = torch.stack(
            [
                torch.cat([model(part[None], use_cache=False).logits[0] for part in ids[row].split(documents[row])])
                for row in range(2)
            ]
        )
        packed = model(ids, position_ids=positions, use_cache=False).logits
        assert_close(packed, alone, "position_ids that restart", atol)
        ends = torch.tensor([0, *itertools.accumulate(documents[0] + documents[1])], dtype=torch.int32)
        flat = model(ids.view(1, -1), cu_seq_lens_q=ends, use_cache=False).logits.view_as(alone)
        assert_close(flat, alone, "cu_seq_lens_q", atol)
    prompt = length - 9
    got = chunked(model, ids, [5, length // 3 - 5, prompt - length // 3], position_ids=positions)
    assert_close(got, alone, "packed prefill in chunks, one beginning with a document, then decode", atol)
    if length < 60:
        steps = chunked(model, ids, [1], position_ids=positions)
        assert_close(steps, alone, "documents that begin in decode steps", atol)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    padded = (F.pad(ids, (4, 0)), F.pad(positions, (4, 0)))
    with torch.no_grad():
        got = model(padded[0], attention_mask=mask, position_ids=padded[1], use_cache=False).logits[:, 4:]
    assert_close(got, alone, "packed and left-padded", atol)


def check_causal(model, length):
    """Rule 5: changing a token changes no logits before it."""
    ids = tokens(1, length, seed=5)
    for place in (1, length // 2, length - 1):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % VOCABULARY
        with torch.no_grad():
            before, after = (model(i, use_cache=False).logits[0] for i in (ids, other))
        torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=1e-5)
        assert not torch.allclose(after[place], before[place], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mixer", "heads", "head_dim"), RECIPE_CASES)
def test_recipe_mixer_keeps_padding_packing_decode_and_causality(converted, mixer, heads, head_dim):
    model = converted(mixer, heads, head_dim)
    check_padding_and_decode(model, 80, tolerance(mixer))
    check_packing(model, 80, tolerance(mixer))
    check_causal(model, 80)


@random_mixers(20)
def test_random_mixer_keeps_padding_packing_decode_and_causality(converted, mixer, shape):
    model = converted(mixer, *shape)
    check_padding_and_decode(model, 45)
    check_packing(model, 36)
    check_causal(model, 30)


@pytest.mark.parametrize("exact", ["some", "all"])
@pytest.mark.parametrize("name", RECIPES)
def test_exact_heads_share_a_layer_with_the_recipe_mixer(converted, name, exact):
    heads, head_dim = HEADS[list(RECIPES).index(name) % 3], 16
    groups = heads[1]
    chosen = (
        [(0, groups - 1), *((1, g) for g in range(groups))]
        if exact == "some"
        else list(itertools.product(range(2), range(groups)))
    )
    model = converted(RECIPES[name], heads, head_dim, chosen)
    check_padding_and_decode(model, 40, tolerance(RECIPES[name]))
    check_packing(model, 30, tolerance(RECIPES[name]))
    check_causal(model, 20)


def test_a_model_of_exact_heads_alone_is_the_teacher(random_teacher, converted):
    ids = tokens(2, 30)
    exact = list(itertools.product(range(2), range(3)))
    with torch.no_grad():
        teacher = random_teacher("llama", (9, 3), 16)(ids).logits
        student = converted(RECIPES["liger"], (9, 3), 16, exact)(ids).logits
    torch.testing.assert_close(student, teacher, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
def test_exact_start_of_a_window_as_long_as_the_input(random_teacher, make_mixer, heads, head_dim):
    """Rule 1."""
    teacher, ids = random_teacher("llama", heads, head_dim), tokens(2, 40)
    with torch.no_grad():
        expected = teacher(ids).logits
        convert(teacher, make_mixer(combine="window_only", window={"size": 40}))
        torch.testing.assert_close(teacher(ids).logits, expected, rtol=0, atol=1e-5)


# The naive recurrence: formulas from the parts' papers and docstrings, in fp64, one token at a time.
FEATURES = {
    "identity": lambda x, p: x,
    "softmax": lambda x, p: x.softmax(-1),
    "exp": lambda x, p: x.exp() / x.exp().amax(-1, keepdim=True),
    "l2norm": lambda x, p: x / (x * x).sum(-1, keepdim=True).sqrt(),
    "hedgehog": lambda x, p, dim=64: torch.cat(
        [(s * torch.stack([x[:, j] @ p["weight"][j] for j in range(x.shape[1])], 1)).softmax(-1) for s in (1, -1)], -1
    ),
    "relu_mlp": lambda x, p, identity=False: torch.stack(
        [(p["linear.weight"] @ token.flatten() + p["linear.bias"]).clamp(min=0).view_as(token) for token in x]
    ),
}


def _taylor(x, p, dim=16):
    """Every product of two entries as a feature of its own, as published: F = 1 + dim + dim^2."""
    z = torch.stack([x[:, j] @ p["weight"][j] for j in range(x.shape[1])], 1) / dim**0.25
    return torch.cat([torch.ones_like(z[..., :1]), z, (z[..., None] * z[..., None, :]).flatten(-2) / 2**0.5], -1)


def _t2r(x, p, dim=32, identity=False):
    return torch.stack([(x[:, j] @ p["weight"][j] + p["bias"][j]).clamp(min=0) for j in range(x.shape[1])], 1)


def _unit_hedgehog(x, p, dim=64):
    both = FEATURES["hedgehog"](x, p)
    return both / (both * both).sum(-1, keepdim=True).sqrt()


FEATURES.update(taylor=_taylor, t2r=_t2r, unit_hedgehog=_unit_hedgehog)


def _fixed(x, k, p, first=5.0, last=None, slopes=False):
    count = k.shape[1]
    if slopes:
        decays = torch.tensor([-((2 ** (-8 / count)) ** (j + 1)) for j in range(count)])
        return decays.double()[None, :, None].expand(*k.shape[:2], 1)
    last = first + count - 1 if last is None else last
    exponents = [first + (last - first) * j / max(count - 1, 1) for j in range(count)]
    return torch.tensor([1 - 2**-e for e in exponents]).double().log()[None, :, None].expand(*k.shape[:2], 1)


def _step_size(x, p):
    return (1 + (x @ p["weight"].T + p["bias"]).exp()).log()


GATES = {
    "none": lambda x, k, p: torch.zeros_like(k[..., :1]),
    "fixed": _fixed,
    "key": lambda x, k, p, normalizer=16.0, bias=None: F.logsigmoid(k + p.get("bias", 0.0)) / normalizer,
    "lower_bounded": lambda x, k, p, highest=1.0: (1 / (1 + (-k).exp())).log(),  # the bound of the first layer is 0
    "hgrn2": lambda x, k, p: (1 / (1 + (-k).exp())).log(),
    "key_softplus": lambda x, k, p: -(1 + k.exp()).log(),
    "dt": lambda x, k, p, **drawn: (-p["log_rate"].exp() * (1 + (x @ p["weight"].T + p["bias"]).exp()).log())[
        ..., None
    ],
    "scalar": lambda x, k, p, normalizer=1.0, bias=6.0: (F.logsigmoid(x @ p["weight"].T + p["bias"]) / normalizer)[
        ..., None
    ],
}


def _shared(scores, values, memory, weight, p, shift=True):
    mass = p["factor"].sigmoid()[:, None] * (scores - scores.amax(-1, keepdim=True) * shift).exp()
    scale = p["log_memory"].exp() if "log_memory" in p else torch.ones(len(memory)).double()
    above = (mass[..., None] * values).sum(1) + scale[:, None] * memory
    return above / (mass.sum(-1) + scale * weight)[:, None]


def _gated(near, far, p):
    gates = 2 / (1 + (-p["weight"] @ p["x"]).exp())
    heads = len(near)
    return (gates[:heads] * p["window"])[:, None] * near + (gates[heads:] * p["memory"])[:, None] * far


def _joint(scores, values, memory, log_weight):
    near, far = scores.exp().sum(-1, keepdim=True), log_weight.exp()[:, None]
    return (near * _softmax(scores, values) + far * memory) / (near + far)


def _softmax(scores, values):
    return (scores.softmax(-1)[..., None] * values).sum(1)


COMBINES = {
    "window_only": lambda scores, values, memory, weight, p: _softmax(scores, values),
    "memory_only": lambda scores, values, memory, weight, p: memory,
    "average": lambda scores, values, m, weight, p, memory=0.5: (1 - memory) * _softmax(scores, values) + memory * m,
    "learned": lambda scores, values, m, weight, p, window=1.0, memory=0.1: (
        p["window"][:, None] * _softmax(scores, values) + p["memory"][:, None] * m
    ),
    "gated": lambda scores, values, m, weight, p, window=1.0, memory=0.1: _gated(_softmax(scores, values), m, p),
    "joint": lambda scores, values, m, weight, p: _joint(scores, values, m, weight),
    "shared_softmax": lambda scores, values, m, weight, p, factor=0.1, memory=None, shift=True: _shared(
        scores, values, m, weight, p, shift
    ),
}


def _beta(x, p, scale=1.0, bias=0.0, negative=False):
    return (x @ p["weight"].T + p["bias"]).sigmoid() * (2 if negative else 1)


def retained(tokens, slots):
    """Of (score, place) in order of place, those of highest score, the earlier of equal ones first."""
    return sorted(tokens, key=lambda token: (-token[0], token[1]))[:slots]


def read_retained(kept, q, k, v, scaling):
    """A token's queries [H, D] on what each KV head kept: outputs [H, D] and log-sum-exps [H]."""
    outputs, sums = torch.zeros_like(q), torch.full((len(q),), -torch.inf).double()
    for head, query in enumerate(q):
        group = head * len(kept) // len(q)
        places = [place for _, place in kept[group]]
        if places:
            scores = scaling * k[places, group] @ query
            outputs[head], sums[head] = scores.softmax(0) @ v[places, group], scores.exp().sum().log()
    return outputs, sums


def scan_inputs(x, p, channels):
    """Mamba-1's step sizes [T, heads, V] and its rates [heads, V, N]."""
    dt = (1 + (x @ p["down"].T @ p["up"].T + p["bias"]).exp()).log()
    return dt.view(len(x), -1, channels), p["log_rate"].exp()


def scan_token(scan, t, state, key, value):
    """A token of Mamba-1, as a state [heads, K, V] that is 0 wherever channel v does not work with key entry k."""
    (dt, rate), size, channels = scan, scan[1].shape[-1], torch.arange(value.shape[-1])
    new = torch.zeros_like(state)
    for n in range(size):
        entries = channels // size * size + n  # as many key entries as channels
        decay = (-dt[t] * rate[:, :, n]).exp()
        new[:, entries, channels] = decay * state[:, entries, channels] + dt[t] * value * key[:, entries]
    return new


def options(part):
    return {key: value for key, value in part.items() if key != "name"}


def rope(x, positions=None):
    """Rotate the channel pairs (i, i + D / 2) of x [T, heads, D] by the angle position / 100^(2 i / D)."""
    positions = torch.arange(len(x)) if positions is None else positions
    half = x.shape[-1] // 2
    angles = positions[:, None].to(x.dtype) / 100 ** (torch.arange(half).to(x.dtype) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def convolve(weight, bias, activation, *tensors):
    """Each channel of the tensors [T, heads, D] mixed with its past; channels lie in this order in the weight."""
    x = torch.cat([t.flatten(1) for t in tensors], 1)
    out = torch.stack([sum(weight[:, i] * x[t - i] for i in range(min(t + 1, weight.shape[1]))) for t in range(len(x))])
    out = out + bias
    out = out / (1 + (-out).exp()) if activation == "silu" else out
    parts = out.split([t[0].numel() for t in tensors], 1)
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def naive(mixer, spec, scaling, x, plain, rotated, v):
    """One document: x [T, hidden], plain and rotated (q [T, H, D], k [T, G, D]), v [T, G, D], all fp64."""
    named = {name: p.detach().double() for name, p in mixer.named_parameters()}

    def of(part):
        return {name.removeprefix(f"{part}."): p for name, p in named.items() if name.startswith(f"{part}.")}

    if spec["cache_dtype"] == "mxint8":
        rotated, v = (rotated[0], mxint8_reference(rotated[1])), mxint8_reference(v)
    (length, heads), groups = plain[0].shape[:2], v.shape[1]
    size, sinks = (spec["window"]["size"], spec["window"]["sinks"]) if spec["window"] else (0, 0)
    size = size["among"][0] if isinstance(size, dict) else size  # what a probe has not chosen yet begins there
    terrace = bool(spec["window"]) and spec["window"]["kind"] == "terrace"
    delay = 0 if spec["overlap"] else size
    has_memory = spec["combine"]["name"] != "window_only"
    repeat = heads // groups if spec["k_map_heads"] == "query" else 1
    window_q, window_keys, window_values = rotated[0], rotated[1], v
    convolved = spec["conv"]["inputs"] if spec["conv"] else None
    conv = (named["conv.weight"], named["conv.bias"], spec["conv"]["activation"]) if convolved else ()
    if convolved == "qkv":
        q, k, v = convolve(*conv, *plain, v)
        plain, rotated = (q, k), (rope(q), rope(k))
    k_gate, k, values = (
        t.repeat_interleave(repeat, 1) for t in (plain[1], (rotated if spec["rotary"] is True else plain)[1], v)
    )
    if convolved == "v":
        (values,) = convolve(*conv, values)
    owners = [h * groups * repeat // heads for h in range(heads)]  # the memory head that each query head reads
    if has_memory:
        phi = FEATURES[spec["feature_map"]["name"]]
        how = options(spec["feature_map"])
        phi_q = phi((rotated if spec["rotary"] is True else plain)[0], of("q_map"), **how)
        phi_k = phi(k, of("k_map"), **how)
        keep = GATES[spec["gate"]["name"]](x, k_gate, of("gate"), **options(spec["gate"])).exp()
        if spec["gate"]["name"] in ("hgrn2", "lower_bounded"):
            phi_k = 1 - keep
        if spec["rotary"] == "features":
            phi_q, phi_k = rope(phi_q), rope(phi_k)
        if spec["gate"]["name"] == "dt":
            phi_k = phi_k * _step_size(x, of("gate"))[..., None]
        state = torch.zeros(groups * repeat, phi_k.shape[-1], v.shape[-1]).double()
        norm = torch.zeros(groups * repeat, phi_k.shape[-1]).double()
        scale = spec["memory"].get("scale", 1.0)
        slots = torch.zeros(groups * repeat, phi_k.shape[-1], v.shape[-1]).double()
        scan = scan_inputs(x, of("memory"), v.shape[-1]) if spec["memory"]["name"] == "scan" else None
        kept = [[] for _ in range(groups)]
        beta = _beta(x, of("memory"), **options(spec["memory"])) if spec["memory"]["name"] == "delta" else None
    outputs = []
    for t in range(length):
        memory = weight = scores = seen = None
        if has_memory:
            # Of a terrace, a block enters as a whole when the second block behind it begins.
            arriving = [t - delay]
            if terrace and delay:
                arriving = range(t - 2 * size, t - size) if t % size == 0 else []
            for s in arriving:
                if s < 0 or (delay and s < sinks):
                    continue
                if spec["memory"]["name"] == "retain":
                    scores = (x[s] @ named["memory.weight"].T + named["memory.bias"]).sigmoid().tolist()
                    kept = [
                        retained([*tokens, (score, s)], spec["memory"].get("slots", 128))
                        for tokens, score in zip(kept, scores, strict=True)
                    ]
                old = state
                state = keep[s][..., None] * state
                new = values[s]
                if spec["memory"]["name"] == "slots":
                    taken = 1 - keep[s]
                    slots = keep[s][:, None] * slots + phi_k[s][..., None] * taken[:, None]
                    state, new = state + taken[..., None] * new[:, None], 0 * new
                if beta is not None:
                    new = beta[s][:, None] * (new - torch.einsum("gkv,gk->gv", state, phi_k[s]))
                state = state + phi_k[s][..., None] * new[:, None]
                norm = keep[s] * norm + phi_k[s]
                if scan is not None:
                    state = scan_token(scan, s, old, phi_k[s], values[s])
            read, factor = phi_q[t], scale
            if spec["memory"]["name"] == "slots":
                read, factor = (scale * torch.einsum("hk,hkm->hm", phi_q[t], slots[owners])).softmax(-1), 1
            memory = factor * torch.einsum("hk,hkv->hv", read, state[owners])
            if spec["memory"]["name"] == "retain":
                memory, log_weight = read_retained(kept, phi_q[t], phi_k, values, scaling)
            if "memory.skip.weight" in named:
                memory = memory + named["memory.skip.weight"] * values[t][owners]
            if spec["output_gate"] == "silu":
                z = (named["output_gate.weight"] @ x[t]).view_as(memory)
                memory = memory * z / (1 + (-z).exp())
            weight = scale * (phi_q[t] * norm[owners]).sum(-1)
            if spec["memory"]["name"] == "retain":
                weight = log_weight
            if spec["normalize"] and spec["combine"]["name"] != "shared_softmax":
                memory = memory / weight.clamp(min=1e-6)[:, None]
            if spec["output_norm"] == "group":
                centred = memory - memory.mean(-1, keepdim=True)
                memory = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            elif spec["output_norm"]:
                epsilon = 1e-5 if spec["output_norm"] == "per_head" else 1e-6
                memory = memory * (memory.square().mean(-1, keepdim=True) + epsilon).rsqrt() * named["norm.weight"]
        if size:
            visible = [j for j in range(t + 1) if j < sinks or t - j < size]
            if terrace:
                visible = [j for j in range(t + 1) if j // size >= t // size - 1]
            window_k, window_v = (
                u[visible].repeat_interleave(heads // groups, 1) for u in (window_keys, window_values)
            )
            scores = scaling * torch.einsum("hd,jhd->hj", window_q[t], window_k)
            seen = window_v.transpose(0, 1)
        mix = COMBINES[spec["combine"]["name"]]
        outputs.append(mix(scores, seen, memory, weight, of("combine") | {"x": x[t]}, **options(spec["combine"])))
    out = torch.stack(outputs)
    if spec["output_gate"] is True:
        out = out * (x @ named["output_gate.weight"].T + named["output_gate.bias"]).sigmoid().view_as(out)
    return out


def check_naive(spec, heads, head_dim, documents):
    """Rule 2: the mixer's full form, and its cached chunks and steps, against the recurrence.

    Of mxint8, the mixer is given what its layer rounds, in fp64, and the recurrence rounds by itself.
    """
    torch.manual_seed(0)
    groups, hidden, length, rounds = heads[1], 24, sum(documents), spec["cache_dtype"] == "mxint8"
    mixer = TokenMixer(HeadShape(*heads, head_dim, hidden), spec, head_dim**-0.5)
    perturb(mixer)
    x = torch.randn(1, length, hidden)
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    q, k, v = (torch.randn(1, length, n, head_dim) for n in (heads[0], groups, groups))
    q_rotated, k_rotated = rope(q[0], positions[0])[None], rope(k[0], positions[0])[None]
    if rounds:
        mixer, (x, q, k, v) = mixer.double(), (t.double() for t in (x, q, k, v))
        q_rotated, k_rotated = q_rotated.double(), k_rotated.double()
    k_read, v_read = (microscaled(t) if rounds else t for t in (k_rotated, v))

    def cut(begin, end, k_rotated=k_read, v=v_read):
        return (
            x[:, begin:end],
            (q[:, begin:end], k[:, begin:end]),
            (q_rotated[:, begin:end], k_rotated[:, begin:end]),
            v[:, begin:end],
        )

    def rotate(begin, end):
        return lambda *tensors: tuple(rope(t[0], positions[0, begin:end])[None] for t in tensors)

    ends = [0, *itertools.accumulate(documents)]
    expected = []
    for begin, end in itertools.pairwise(ends):
        one = cut(begin, end, k_rotated, v)
        expected.append(
            naive(
                mixer, spec, head_dim**-0.5, one[0][0].double(), *(tuple(t[0].double() for t in p) for p in one[1:3]),
                one[3][0].double(),
            )
        )  # fmt: skip
    expected = torch.cat(expected)
    with torch.no_grad():
        context = sequence_context(1, length, None, positions, None)
        full = mixer(*cut(0, length), context, rotate=rotate(0, length))
        assert_close(full[0].double(), expected, "full form", tolerance(spec))
        cache, outputs, last = {}, [], ends[-2]
        for begin, end in [(0, last + 3), (last + 3, last + 8), *((t, t + 1) for t in range(last + 8, length))]:
            context = sequence_context(1, end - begin, None, positions[:, begin:end], None)
            outputs.append(mixer(*cut(begin, end), context, cache, rotate(begin, end)))
    assert_close(torch.cat(outputs, 1)[0].double(), expected, "chunks and steps", tolerance(spec))


@pytest.mark.parametrize(("mixer", "heads", "head_dim"), RECIPE_CASES)
def test_recipe_mixer_is_its_recurrence(mixer, heads, head_dim):
    check_naive(mixer, heads, head_dim, (23, 80))


@random_mixers(30)
def test_random_mixer_is_its_recurrence(mixer, shape):
    if all(
        mixer[kind]["name"] in known
        for kind, known in (
            ("feature_map", FEATURES),
            ("gate", GATES),
            ("combine", COMBINES),
            ("memory", ("additive", "delta", "slots", "scan", "retain")),
        )
    ):
        check_naive(mixer, *shape, (9, 37))


TERRACE = {"size": 5, "kind": "terrace"}
RETAIN = {"memory": {"name": "retain", "slots": 6}, "feature_map": "identity", "rotary": True, "overlap": False,
          "combine": "joint"}  # fmt: skip
# Combinations that no recipe has and random draws seldom hit.
VARIANTS = {
    "delta, negative eigenvalues": {"memory": {"name": "delta", "negative": True}, "gate": "fixed"},
    "delta, decay per channel": {"memory": {"name": "delta", "bias": 1.0}, "gate": "key", "output_norm": True},
    "delta, disjoint": {"memory": "delta", "gate": "scalar", "window": {"size": 5, "sinks": 2}, "overlap": False},
    "hgrn2, normalized": {"feature_map": "softmax", "gate": "hgrn2", "normalize": True, "rotary": True},
    "relu_mlp, query key maps": {"feature_map": "relu_mlp", "rotary": "features", "k_map_heads": "query"},
    "relu_mlp, disjoint": {
        "feature_map": {"name": "relu_mlp", "identity": True},
        "gate": {"name": "fixed", "slopes": True},
        "rotary": "features",
        "output_norm": "group",
        "overlap": False,
    },
    "convolution": {"memory": "delta", "gate": "key", "conv": 4, "output_norm": True},
    "convolution, rotary": {"feature_map": "softmax", "conv": 3, "rotary": True, "normalize": True, "overlap": False},
    "slots, fast decay": {"memory": {"name": "slots", "scale": 0.5}, "gate": "key_softplus", "rotary": True},
    "slots, disjoint": {"memory": "slots", "gate": {"name": "key", "bias": 1.0}, "overlap": False, "output_norm": True},
    "t2r": {"feature_map": "t2r", "rotary": True, "normalize": True, "k_map_heads": "query"},
    "t2r, disjoint": {
        "feature_map": {"name": "t2r", "identity": True, "dim": 16},
        "combine": "shared_softmax",
        "overlap": False,
    },
    "terrace": {"feature_map": "hedgehog", "combine": "shared_softmax", "overlap": False, "window": TERRACE},
    "terrace, overlapping": {"gate": "scalar", "window": TERRACE, "output_norm": True},
    "terrace, decay": {"gate": "key", "overlap": False, "output_norm": True, "window": TERRACE},
    "terrace, delta": {"memory": "delta", "gate": "scalar", "overlap": False, "window": TERRACE},
    "terrace, slots": {"memory": "slots", "gate": "key", "overlap": False, "window": TERRACE},
    "taylor": {"feature_map": {"name": "taylor", "dim": 5}, "gate": "scalar", "normalize": True},
    "exp": {"feature_map": "exp", "gate": "key", "normalize": True},
    "dt, per KV head": {"gate": {"name": "dt", "fastest": 0.5}, "conv": 4, "output_norm": "per_head", "overlap": False},
    "dt, normalized": {"feature_map": "softmax", "gate": "dt", "normalize": True, "output_gate": "silu"},
    "scan, per KV head": {"memory": {"name": "scan", "state": 8, "rank": 3}, "gate": "none", "rotary": True},
    "scan, disjoint": {
        "memory": "scan",
        "overlap": False,
        "conv": {"taps": 3, "inputs": "v", "activation": "silu", "identity": False},
        "output_gate": "silu",
    },
    "gated": {"memory": "delta", "feature_map": {"name": "unit_hedgehog", "dim": 8}, "combine": "gated"},
    "gated, disjoint": {"gate": "scalar", "combine": "gated", "overlap": False},
    "retain": RETAIN,
    "retain, one slot": {**RETAIN, "memory": {"name": "retain", "slots": 1}, "window": {"size": 3}},
    "retain, every token": {**RETAIN, "memory": "retain", "output_gate": True},
    "retain, gated": {**RETAIN, "output_gate": "silu", "window": {"size": 1, "sinks": 1}},
    "delta, alone": {"memory": "delta", "window": None, "combine": "memory_only", "k_map_heads": "query"},
}


@pytest.mark.parametrize(("name", "heads"), zip(VARIANTS, itertools.cycle(HEADS)))
def test_variant_is_its_recurrence_and_keeps_the_contract(converted, make_mixer, name, heads):
    spec = make_mixer(**{"feature_map": "l2norm", "window": {"size": 7, "sinks": 3}, **VARIANTS[name]})
    check_mixer(spec)
    check_naive(spec, heads, 16, (23, 70))
    model = converted(spec, heads, 16)
    check_padding_and_decode(model, 40)
    check_packing(model, 40)
    check_causal(model, 20)


# Keys and values in mxint8: layers whose window, exact heads or both have them, through each form of the decode step.
MXINT8 = {
    "window and sinks": {"combine": "window_only"},
    "window alone": {"combine": "window_only", "window": {"size": 5}},
    "gated linear": {"gate": "key", "output_norm": True},
    "delta, disjoint": {"memory": "delta", "gate": "scalar", "overlap": False, "output_norm": True},
    "slots": {"memory": "slots", "gate": "key"},
    "terrace": {"gate": "scalar", "window": TERRACE, "output_norm": True},
    "shared": {"feature_map": "hedgehog", "combine": "shared_softmax", "rotary": True},
    "retain": {
        "memory": {"name": "retain", "slots": 6},
        "feature_map": "identity",
        "rotary": True,
        "overlap": False,
        "combine": "joint",
    },
    "no window": {"window": None, "combine": "memory_only", "gate": "key"},
}


@pytest.mark.parametrize("exact", [0, 1, 2])
@pytest.mark.parametrize("name", MXINT8)
def test_mxint8_keys_and_values_keep_the_contract(random_teacher, make_mixer, name, exact):
    """In fp64, where a key's last bit, which depends on how many rows are multiplied at once, moves no rounding."""
    parts = {"feature_map": "l2norm", "window": {"size": 7, "sinks": 3}, **MXINT8[name]}
    model = random_teacher("llama", (4, 2), 16, num_hidden_layers=1, attn_implementation="eager")
    ids = tokens(2, 40)
    spec = make_mixer(**parts, cache_dtype="mxint8")
    convert(model, spec, exact_heads=[(0, head) for head in range(exact)])
    attention = model.double().model.layers[0].self_attn
    with torch.no_grad():
        rounded = model(ids, use_cache=False).logits
        cache = model(ids, use_cache=True).past_key_values.layers[0].tensors
        attention.microscaled = False
        plain = model(ids, use_cache=False).logits
        attention.microscaled = True
    kinds = {key: t.dtype for key, t in cache.items() if key.startswith(("window_", "sink_", "exact_"))}
    kinds.pop("exact_length", None)
    assert set(kinds.values()) <= {torch.uint8} and (kinds or name == "no window")
    assert (rounded - plain).abs().max() > 1e-3
    check_padding_and_decode(model, 40, tolerance(spec))
    check_packing(model, 40, tolerance(spec))
    check_causal(model, 20)


@pytest.mark.parametrize("exact", [0, 1, 2])
def test_an_mxint8_layer_is_softmax_over_rounded_keys_and_values(random_teacher, make_mixer, exact):
    """A window with sinks and exact heads in one layer, whose keys are rounded behind the rotary embedding."""
    model = random_teacher("llama", (4, 2), 16, num_hidden_layers=1).double()
    spec = make_mixer(combine="window_only", window={"size": 7, "sinks": 3}, cache_dtype="mxint8")
    convert(model, spec, exact_heads=[(0, head) for head in range(exact)])
    attention, length = model.model.layers[0].self_attn, 30
    x = 3 * torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0)).double()
    cos, sin = model.model.rotary_emb(x, torch.arange(length)[None])
    with torch.no_grad():
        got = attention(x, position_embeddings=(cos, sin))[0][0]
        q, k, v = (getattr(attention, f"{n}_proj")(x[0]).view(length, -1, 16) for n in "qkv")
        q, k = (t * cos[0, :, None] + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin[0, :, None] for t in (q, k))
        k, v = mxint8_reference(k), mxint8_reference(v)
        heads = torch.zeros(length, 4, 16).double()
        for t, head in itertools.product(range(length), range(4)):
            group = head // 2
            seen = [j for j in range(t + 1) if group < exact or j < 3 or t - j < 7]
            heads[t, head] = (k[seen, group] @ q[t, head] / 4).softmax(0) @ v[seen, group]
        expected = attention.o_proj(heads.flatten(1))
        size = expected.abs().max()  # about 20, of which the window's fp32 keeps seven digits
        torch.testing.assert_close(got / size, expected / size, rtol=0, atol=2e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", RECIPES)
def test_memory_lives_on_kv_heads(name, heads):
    """Rule 6."""
    spec, head_dim = RECIPES[name], 16
    mixer = TokenMixer(HeadShape(*heads, head_dim, 8), spec, 1.0)
    cache = {}
    x, q, k = torch.randn(1, 9, 8), torch.randn(1, 9, heads[0], head_dim), torch.randn(1, 9, heads[1], head_dim)
    with torch.no_grad():
        mixer(x, (q, k), (q, k), k, SequenceContext(), cache)
    memory_heads = heads[0] if spec["k_map_heads"] == "query" else heads[1]
    for key, tensor in cache.items():
        if key.startswith(("state", "norm")):
            assert tensor.shape[1] == memory_heads
        elif key.startswith(("window", "sink")):
            powers = 1 if spec["cache_dtype"] == "mxint8" else 0
            assert tensor.shape[2:] == (heads[1], head_dim + powers)


def fp32_tensors(model):
    """What lies in a mixer's fp32 parts: their parameters and buffers by name."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, part in model.named_modules()
        if isinstance(part, Fp32Part)
        for name, tensor in itertools.chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
    }


@random_mixers(12)
def test_decays_and_states_stay_fp32_in_a_bfloat16_model(converted, mixer, shape):
    """Rule 7."""
    model = converted(mixer, *shape)
    before = {name: tensor.clone() for name, tensor in fp32_tensors(model).items()}
    model.to(torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    after = fp32_tensors(model)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in before)
    with torch.no_grad():
        out = model(tokens(1, 12), use_cache=True)
        model(tokens(1, 1), past_key_values=out.past_key_values)
    for layer, cached in zip(model.model.layers, out.past_key_values.layers, strict=True):
        memory = layer.self_attn.mixer.memory
        as_they_came = ("state_keys", "state_values") if getattr(memory, "log_weights", False) else ()
        for name in memory.state_names if memory is not None else ():
            assert cached.tensors[name].dtype == (torch.bfloat16 if name in as_they_came else torch.float32)


@pytest.mark.parametrize("name", RECIPES)
def test_the_state_is_computed_in_fp32_under_autocast(name):
    """Rule 7, as training runs: bf16 projections, but the recurrence itself is not rounded to bf16."""
    spec = RECIPES[name]
    mixer = TokenMixer(HeadShape(4, 2, 16, 8), spec, 0.25)
    perturb(mixer)
    torch.manual_seed(0)
    x, q, k, v = torch.randn(1, 50, 8), torch.randn(1, 50, 4, 16), *torch.randn(2, 1, 50, 2, 16)
    plain, cast = {}, {}
    with torch.no_grad():
        expected = mixer(x, (q, k), (q, k), v, SequenceContext(), plain)
        with torch.autocast("cpu", torch.bfloat16):
            got = mixer(x, (q, k), (q, k), v, SequenceContext(), cast)
    torch.testing.assert_close(got, expected)
    for key in plain:
        torch.testing.assert_close(cast[key], plain[key], msg=lambda text, key=key: f"{key}: {text}")


LOAD = """
import sys, torch
import linearize.modeling
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = load_file(folder + "/test.safetensors")
    with torch.no_grad():
        given["logits"] = model(given["ids"]).logits
        given["decoded"] = model.generate(given["ids"][:, :9], max_new_tokens=5, do_sample=False)
    save_file(given, folder + "/test.safetensors")
"""


def test_round_trip_through_a_fresh_process_is_bit_equal(converted, tmp_path):
    """Rule 8, for each recipe's mixer, with an exact head and without."""
    expected = {}
    for index, (name, mixer) in enumerate(RECIPES.items()):
        model = converted(mixer, HEADS[index % 3], 16, [(0, 1)] if index % 2 else None)
        ids, folder = tokens(2, 30), tmp_path / str(index)
        save_checkpoint(model, None, folder)
        with torch.no_grad():
            expected[name] = (
                folder,
                model(ids).logits,
                model.generate(ids[:, :9], max_new_tokens=5, do_sample=False),
            )
        save_file({"ids": ids}, folder / "test.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *(str(folder) for folder, *_ in expected.values())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, (folder, logits, decoded) in expected.items():
        got = load_file(folder / "test.safetensors")
        assert torch.equal(got["logits"], logits), name
        assert torch.equal(got["decoded"], decoded), name
