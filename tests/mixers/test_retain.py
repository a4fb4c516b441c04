"""The memory of whole tokens: one softmax with the window where nothing is left out, and which tokens stay."""

import itertools

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.kernels.microscaling import microscaled, numbers
from linearize.kernels.window import WindowOutput
from linearize.mixers import check_mixer
from linearize.mixers.context import SequenceContext
from linearize.mixers.mixer import TokenMixer
from linearize.mixers.parts import HeadShape
from linearize.mixers.retain import RetainMemory, expiries
from linearize.registry import combines
from linearize.surgery import convert

FIELDS = {
    "memory": {"name": "retain", "slots": 6},
    "rotary": True,
    "overlap": False,
    "combine": "joint",
    "window": {"size": 5, "sinks": 2},
}


def tokens(rows, length):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("family", "heads", "options"),
    [
        ("llama", (9, 3), {}),
        ("llama", (8, 8), {}),
        ("qwen2", (14, 2), {}),
        ("gemma2", (4, 2), {"sliding_window": 4096}),
        ("gpt2", (4, 4), {}),
    ],
)
def test_with_a_slot_for_each_token_it_is_the_teachers_softmax(random_teacher, make_mixer, family, heads, options):
    """Padding, documents, chunks and decode steps; gemma2 caps its scores and scales them by another number."""
    ids, mask = tokens(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[1, :40] = 0
    model = random_teacher(family, heads, 16, num_hidden_layers=2, **options)
    positions = torch.cat([torch.arange(130), torch.arange(170)])[None]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        parts = [model(part).logits for part in ids.split((130, 170), 1)]
        convert(model, make_mixer(**{**FIELDS, "memory": {"name": "retain", "slots": 300}}))
        for layer in (module for module in model.modules() if isinstance(module, RetainMemory)):
            layer.weight.data.normal_()
        got = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)
        got = model(ids, position_ids=positions.expand(2, -1), use_cache=False).logits
        torch.testing.assert_close(got, torch.cat(parts, 1), rtol=0, atol=1e-4)
        cache, outputs = None, []
        for begin, end in itertools.pairwise((0, 3, 150, 280, *range(281, 301))):
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outputs.append(out.logits)
        got = torch.cat(outputs, 1)
        torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


def kept_places(memory, scores, state=None):
    """Which tokens a memory of one head keeps, and those that its full form and its steps let each query see.

    Token t's value is one in channel t alone, and all keys are zero, so that what is read is even over what is kept.
    """
    length = len(scores)
    q = torch.zeros(1, length, 1, length)
    stream = {
        "k": torch.zeros(1, length, 1, length),
        "v": torch.eye(length)[None, :, None],
        "score": torch.tensor(scores)[None, :, None],
    }
    o, lse, after = memory(q, stream, None, state)
    state, steps = memory.initial_state(1, stream["k"]), []
    for t in range(length):
        out, sums = memory.step(q[:, t], {name: x[:, t] for name, x in stream.items()}, state)
        steps.append({int(i) for i in out[0, 0].nonzero()})
        torch.testing.assert_close(out, o[:, t])
        torch.testing.assert_close(sums, lse[:, t])
        assert sums.exp().item() == pytest.approx(len(steps[-1]))
    for end in (after, state):
        filled = end["state_scores"][0, 0] > 0
        assert {int(i) for i in end["state_values"][0, 0][filled].argmax(-1)} == (steps[-1] if filled.any() else set())
    return steps


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.5, 0.5], [{0}, {0, 1}, {0, 1}]),
        ([0.3, 0.3, 0.5, 0.5, 0.6], [{0}, {0, 1}, {0, 2}, {2, 3}, {2, 4}]),
        ([0.0, 0.0, 0.2, 0.0, 0.1, 0.3], [set(), set(), {2}, {2}, {2, 4}, {2, 5}]),
        ([0.9, 0.8, 0.1, 0.85], [{0}, {0, 1}, {0, 1}, {0, 3}]),
    ],
)
def test_the_highest_scores_stay_and_of_equal_ones_the_earlier(scores, expected):
    memory = RetainMemory(HeadShape(1, 1, len(scores), 8), len(scores), True, slots=2)
    assert kept_places(memory, scores) == expected


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_full_form_and_steps_keep_what_a_sort_keeps(slots):
    length = 150
    scores = (torch.randint(0, 20, (length,), generator=torch.Generator().manual_seed(slots)) / 20).tolist()
    memory = RetainMemory(HeadShape(1, 1, length, 8), length, True, slots=slots)
    for t, kept in enumerate(kept_places(memory, scores)):
        order = sorted((-score, place) for place, score in enumerate(scores[: t + 1]) if score)
        assert kept == {place for _, place in order[:slots]}


def test_gradients_of_both_branches_are_those_of_one_softmax(make_mixer):
    torch.manual_seed(0)
    spec = make_mixer(**{**FIELDS, "memory": {"name": "retain", "slots": 200}})
    mixer = TokenMixer(HeadShape(4, 2, 8, 24), spec, 8**-0.5)
    x = torch.randn(1, 170, 24)
    q, k, v = (torch.randn(1, 170, n, 8, requires_grad=True) for n in (4, 2, 2))
    out = mixer(x, (q, k), (q, k), v, SequenceContext())
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)
    weight = torch.randn_like(out)
    for got, right in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got, right, rtol=0, atol=1e-4)


def test_the_cache_has_one_size_however_many_tokens_it_saw(random_teacher, make_mixer):
    model = random_teacher("llama", (4, 2), 16)
    convert(model, make_mixer(**FIELDS))
    sizes = []
    with torch.no_grad():
        for length in (1, 9, 90):
            cache = model(tokens(1, length), use_cache=True).past_key_values
            sizes.append({name: t.shape for name, t in cache.layers[0].tensors.items()})
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0]["state_keys"] == sizes[0]["state_values"] == (1, 2, 6, 16)


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize(
    ("cache_dtype", "dtype", "token"),
    [
        ("model", torch.float32, 2 * 64 * 4),
        ("model", torch.bfloat16, 2 * 64 * 2),
        ("mxint8", torch.float32, 2 * 66),
        ("mxint8", torch.bfloat16, 2 * 66),
    ],
)
def test_kept_tokens_cost_what_those_of_the_window_do(random_teacher, make_mixer, cache_dtype, dtype, token, exact):
    """A slot has its score and order besides; a token that waits in the window has its score."""
    model = random_teacher("llama", (4, 2), 64, num_hidden_layers=1).to(dtype)
    convert(model, make_mixer(**FIELDS, cache_dtype=cache_dtype), exact_heads=[(0, head) for head in range(exact)])
    with torch.no_grad():
        cache = model(tokens(1, 30), use_cache=True).past_key_values
        model(tokens(1, 1), past_key_values=cache)
    sizes = {name: t.nbytes for name, t in cache.layers[0].tensors.items() if not name.startswith("exact_")}
    groups = 2 - exact
    assert sizes.pop("length") == 8
    assert sum(sizes.pop(f"window_{side}") + sizes.pop(f"sink_{side}") for side in "kv") == groups * (5 + 2) * token
    assert sizes.pop("state_keys") + sizes.pop("state_values") == groups * 6 * token
    assert sizes.pop("state_scores") + sizes.pop("state_order") == groups * 6 * 8
    assert sizes == {"pending_score": groups * 5 * 4}


@pytest.mark.parametrize("cache_dtype", ["model", "mxint8"])
@pytest.mark.parametrize("cuts", [(1, *range(2, 41)), (3, 11, *range(12, 41)), (25, 40)])
def test_the_same_tokens_are_kept_to_the_bit_however_they_came(random_teacher, make_mixer, cache_dtype, cuts):
    """In bf16, of the projections of all tokens at once, so that chunks and steps get the same ones."""
    torch.manual_seed(0)
    mixer = TokenMixer(HeadShape(4, 2, 64, 24), make_mixer(**FIELDS, cache_dtype=cache_dtype), 0.125)
    mixer.memory.weight.data.normal_()
    x, q, k, v = torch.randn(2, 40, 24), torch.randn(2, 40, 4, 64), *torch.randn(2, 2, 40, 2, 64)
    x, q, k, v = (t.bfloat16() for t in (x, q, k, v))
    k, v = (microscaled(t) if cache_dtype == "mxint8" else t for t in (k, v))
    caches = {}, {}
    with torch.no_grad():
        whole = mixer(x, (q, k), (q, k), v, SequenceContext(), caches[0])
        parts = [
            mixer(x[:, a:b], (q[:, a:b], k[:, a:b]), (q[:, a:b], k[:, a:b]), v[:, a:b], SequenceContext(), caches[1])
            for a, b in itertools.pairwise((0, *cuts))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-2)
    kept, stepped = (
        {name: cache[name].take_along_dim(order.view(*order.shape, *(1,) * (cache[name].dim() - 3)), 2)
         for name in ("state_keys", "state_values", "state_scores")}
        for cache in caches
        for order in [cache["state_order"].argsort(-1)]
    )  # fmt: skip
    for name, t in kept.items():
        assert torch.equal(t, stepped[name]), name
    for name, came in (("state_keys", k), ("state_values", v)):
        found = numbers(kept[name], torch.bfloat16)[:, :, :, None] == came.movedim(1, 2)[:, :, None]  # [B, G, M, T, D]
        assert found.all(-1).any(-1).all()


WRONG = {
    "joint needs retain": ({"memory": "additive"}, "joint.*softmax over tokens.*use retain"),
    "retain needs joint": ({"combine": "learned"}, "retain.*combine: learned.*use joint"),
    "rotary": ({"rotary": False}, "mixer.rotary: true.*got false"),
    "overlap": ({"overlap": True}, "mixer.overlap: false"),
    "feature map": ({"feature_map": "softmax"}, "mixer.feature_map: identity.*softmax"),
    "gate": ({"gate": "key"}, "mixer.gate: none.*key"),
    "normalize": ({"normalize": True}, "mixer.normalize: false"),
    "output norm": ({"output_norm": "group"}, "mixer.output_norm: false.*group"),
    "conv": ({"conv": 4}, "mixer.conv: null"),
    "terrace": ({"window": {"size": 8, "kind": "terrace"}}, "mixer.window.kind: sliding.*terrace"),
    "query heads": ({"k_map_heads": "query"}, "mixer.k_map_heads: kv.*query"),
    "no window": ({"window": None}, "joint.*needs a window"),
    "no slots": ({"memory": {"name": "retain", "slots": 0}}, "`slots` must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_retain_is_refused(make_mixer, name):
    changes, words = WRONG[name]
    with pytest.raises(LinearizeError, match=words):
        check_mixer(make_mixer(**{**FIELDS, **changes}))


def test_an_encoder_has_no_retain(make_mixer):
    with pytest.raises(LinearizeError, match=r"memory: retain.*runs forward alone"):
        check_mixer(make_mixer(**{**FIELDS, "window": None, "combine": "memory_only"}), causal=False)


def test_joint_of_two_empty_branches_is_zero_and_has_finite_gradients():
    nothing = torch.full((1, 2, 3), -torch.inf, requires_grad=True)
    o = torch.zeros(1, 2, 3, 4, requires_grad=True)
    out = combines.get("joint")(HeadShape(3, 1, 4, 8))(WindowOutput(o, nothing, nothing), o, nothing)
    assert not out.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (o, nothing)))


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)])
def test_a_compiler_finds_expiries_to_be_what_it_says(form):
    score = form(torch.rand(2, 3, 150, generator=torch.Generator().manual_seed(0)))
    first = torch.zeros(2, 150, dtype=torch.long)
    torch.library.opcheck(expiries, (score, first, 8))
    assert expiries(score, first, 8).is_contiguous()
