"""The cache: constant bytes for mixers, linear growth for exact heads, and every move that generation makes with it."""

import itertools

import pytest
import torch

from linearize.cache import LinearizedCache
from linearize.recipe import Recipe, recipe_names
from linearize.recipe_mixer import Mixer
from linearize.surgery import convert

IDS = torch.randint(1, 61, (3, 24), generator=torch.Generator().manual_seed(2))
MIXERS = {
    name: {**mixer.model_dump(), "window": None if mixer.window is None else {"size": 6, "sinks": mixer.window.sinks}}
    for name in recipe_names()
    if (mixer := Recipe.from_yaml(name).mixer) is not None
}
RETAIN = Mixer.model_validate(
    {"memory": {"name": "retain", "slots": 5}, "feature_map": "identity", "gate": "none", "combine": "joint",
     "rotary": True, "overlap": False, "output_norm": False, "window": {"size": 6, "sinks": 2}}
).model_dump()  # fmt: skip
MIXERS |= {"retain": RETAIN, "retain, mxint8": {**RETAIN, "cache_dtype": "mxint8"}}


@pytest.fixture(scope="module")
def make_student(random_teacher):
    def make(name="liger", exact_heads=((0, 1),), layers=None, **changes):
        """Two layers; with mxint8 one in fp64, where a last bit, of a key or of the layer before, moves no rounding."""
        rounds = MIXERS[name]["cache_dtype"] == "mxint8"
        layers = layers or (1 if rounds else 2)
        model = random_teacher("llama", (4, 2), 16, num_hidden_layers=layers, **changes)
        convert(model, MIXERS[name], exact_heads=list(exact_heads))
        return model.double() if rounds else model

    return make


def exact_bytes(layer):
    return sum(layer.tensors[name].nbytes for name in ("exact_k", "exact_v") if name in layer.tensors)


@torch.no_grad()
def run(model, ids, cache=None, **kwargs):
    out = model(ids, past_key_values=cache, use_cache=True, **kwargs)
    return out.logits, out.past_key_values


@pytest.mark.parametrize(("name", "tokens"), [(name, 2000 if name == "liger" else 40) for name in MIXERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_generation(make_student, name, tokens, dtype):
    """Mixers' bytes are constant from token window + sinks on; an exact head adds 2 x head_dim x itemsize a token.

    With mxint8 these are 2 x (head_dim + 1 for a block's power of two), in the rings as well.
    """
    if dtype == torch.bfloat16:
        tokens = min(tokens, 40)
    model = make_student(name, exact_heads=[(0, 1), (1, 0), (1, 1)], layers=2).to(dtype)
    rounds = MIXERS[name]["cache_dtype"] == "mxint8"
    window = MIXERS[name]["window"] or {"size": 0, "sinks": 0}
    settled = window["size"] + window["sinks"]
    sizes = []
    logits, cache = run(model, IDS[:1, :4])
    for _ in range(tokens):
        logits, cache = run(model, logits[:, -1:].argmax(-1), cache)
        sizes.append([(layer.nbytes() - exact_bytes(layer), exact_bytes(layer)) for layer in cache.layers])
        assert cache.nbytes() == sum(map(sum, sizes[-1]))
    recurrent = {tuple(layer[0] for layer in row) for row in sizes[settled:]}
    assert len(recurrent) == 1
    per_token = 2 * (16 + 1) if rounds else 2 * 16 * dtype.itemsize
    if rounds and MIXERS[name]["combine"]["name"] == "window_only":
        lengths = 2 * 8, 8  # two in the layer with a mixer, one in the other
        assert recurrent == {(per_token * settled + lengths[0], lengths[1])}
    for before, after in itertools.pairwise(sizes):
        assert [after[i][1] - before[i][1] for i in range(2)] == [per_token, 2 * per_token]
    assert sizes[-1][0][1] == per_token * (tokens + 4)


def test_a_model_without_exact_heads_caches_the_same_bytes_after_any_prompt(make_student):
    model = make_student(exact_heads=())
    settled = {run(model, torch.ones(1, n, dtype=torch.long))[1].nbytes() for n in (10, 11, 100, 700)}
    assert len(settled) == 1


@pytest.mark.parametrize("name", MIXERS)
def test_rows_can_be_picked_repeated_and_reordered(make_student, name):
    model = make_student(name)
    moves = {
        "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    }
    for change, rows in moves.values():
        _, cache = run(model, IDS[:, :15])
        change(cache)
        got = [run(model, IDS[rows, t : t + 1], cache)[0] for t in range(15, 20)]
        with torch.no_grad():
            expected = model(IDS[rows, :20], use_cache=False).logits[:, 15:]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)


def test_reordered_rows_do_not_share_memory(make_student):
    """Two beams of one parent go on by themselves."""
    model = make_student()
    _, cache = run(model, IDS[:, :15])
    cache.reorder_cache(torch.tensor([0, 0, 0]))
    got, _ = run(model, torch.tensor([[5], [6], [7]]), cache)
    for row, token in enumerate((5, 6, 7)):
        with torch.no_grad():
            alone = model(torch.cat([IDS[:1, :15], torch.tensor([[token]])], 1), use_cache=False).logits
        torch.testing.assert_close(got[row, 0], alone[0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("places", [None, 64])
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("first", [1, 9])
def test_a_reset_cache_is_as_good_as_a_new_one(make_student, name, places, first):
    model = make_student(name)
    cache = LinearizedCache(model.config, places)
    run(model, IDS[:, 3:], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    got = torch.cat([run(model, piece, cache)[0] for piece in IDS.split([first, *[1] * (24 - first)], 1)], 1)
    with torch.no_grad():
        torch.testing.assert_close(got, model(IDS, use_cache=False).logits, rtol=0, atol=1e-4)
    if places is None:
        fresh = run(model, IDS)[1]
        assert cache.nbytes() == fresh.nbytes()


@pytest.mark.parametrize("name", MIXERS)
def test_a_static_cache_keeps_its_buffers(make_student, name):
    model = make_student(name)
    cache = LinearizedCache(model.config, 24)
    run(model, IDS[:, :4], cache)
    before = [{key: t.data_ptr() for key, t in layer.tensors.items()} for layer in cache.layers]
    logits = [run(model, IDS[:, t : t + 1], cache)[0] for t in range(4, 24)]
    assert before == [{key: t.data_ptr() for key, t in layer.tensors.items()} for layer in cache.layers]
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits[:, 4:]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("places", [None, 40])
def test_an_mxint8_cache_holds_bytes_through_every_move(random_teacher, places):
    """One layer in fp64, where a key's last bit moves no rounding."""
    model = random_teacher("llama", (4, 2), 16, num_hidden_layers=1)
    convert(model, {**MIXERS["gdn"], "cache_dtype": "mxint8"}, exact_heads=[(0, 1)])
    model.double()
    cache, rows = LinearizedCache(model.config, places), torch.tensor([2, 0, 0])
    for begin, end in ((0, 9), (9, 13), (13, 14), (14, 15)):
        run(model, IDS[:, begin:end], cache)
    before = cache.nbytes()
    run(model, IDS[:, 15:16], cache)
    assert cache.nbytes() - before == (0 if places else 3 * 2 * (16 + 1))
    held = cache.layers[0].tensors
    assert held["window_k"].nbytes == held["window_v"].nbytes == 3 * 6 * (16 + 1)
    cache.reorder_cache(rows)
    cache.batch_repeat_interleave(2)
    ids = IDS[rows].repeat_interleave(2, 0)
    got = [run(model, ids[:, t : t + 1], cache)[0] for t in range(16, 24)]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 16:]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_static_cache_that_is_full_is_an_error(make_student, chunk):
    model = make_student()
    cache = LinearizedCache(model.config, 20)
    run(model, IDS[:, :18], cache)
    for _ in range(18, 20, chunk):
        run(model, IDS[:, :1], cache)
    with pytest.raises(ValueError, match="20 places"):
        run(model, IDS[:, :chunk], cache)


def test_a_recurrent_state_refuses_to_be_cropped(make_student):
    _, cache = run(make_student(), IDS)
    with pytest.raises(ValueError, match="recurrent"):
        cache.crop(5)


@pytest.mark.parametrize("length", [1, 2, 24])
@pytest.mark.parametrize(
    "window",
    [{"size": 1, "sinks": 0}, {"size": 1, "sinks": 4}, {"size": 3, "sinks": 9}, {"size": 100, "sinks": 30}],
)
@pytest.mark.parametrize("overlap", [True, False])
def test_odd_windows_decode_as_they_prefill(random_teacher, make_mixer, window, overlap, length):
    """A window of one token, more sinks than window, and both longer than the input; prompts of one token."""
    model = random_teacher()
    convert(model, make_mixer(feature_map="softmax", gate="key", window=window, overlap=overlap), exact_heads=[(1, 0)])
    ids = torch.cat([IDS, IDS.flip(1)], 1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    logits, cache = run(model, ids[:, :length])
    outputs = [logits]
    for begin in (length, length + 5):
        logits, cache = run(model, ids[:, begin : begin + 5], cache)
        outputs.append(logits)
    for t in range(length + 10, ids.shape[1]):
        logits, cache = run(model, ids[:, t : t + 1], cache)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_that_is_all_padding_stays_finite_and_empty(make_student, name):
    """Rows of a batch may have nothing to say yet, in the first call and in later ones, of one token too."""
    model = make_student(name)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, :9] = 0
    cache, outputs, begin = None, [], 0
    for size in (1, 4, 4, 6, *[1] * 9):
        end = begin + size
        logits, cache = run(model, IDS[:, begin:end], cache, attention_mask=mask[:, :end])
        assert logits.isfinite().all()
        outputs.append(logits)
        begin = end
    got = torch.cat(outputs, 1)
    with torch.no_grad():
        torch.testing.assert_close(got[0], model(IDS[:1], use_cache=False).logits[0], rtol=0, atol=1e-4)
        alone = model(IDS[1:2, 9:], use_cache=False).logits[0]
    torch.testing.assert_close(got[1, 9:], alone, rtol=0, atol=1e-4)
