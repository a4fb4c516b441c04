"""The contract of every family: reading a teacher's attention, replacing it and putting it back."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import linearize.modeling
from linearize.api import load
from linearize.errors import LinearizeError
from linearize.mixers.attention import LinearizedAttention
from linearize.mixers.context import sequence_context, visible_mask
from linearize.modeling.classes import auto_name, family_of
from linearize.modeling.export import save_checkpoint
from linearize.modeling.heads import logits_of
from linearize.registry import families
from linearize.surgery import convert

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.5, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "decoupled head dim": {"head_dim": 80},
    "multi-head": {"heads": (6, 6)},
    "one KV head": {"heads": (6, 1)},
    "biases": {"attention_bias": True},
    "llama3 rotary": {"rope_parameters": LLAMA3_ROPE},
    "long rotary": {"head_dim": 8, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64},
    "a rotary embedding for each kind of layer": {
        "rope_parameters": {
            "full_attention": LLAMA3_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "tied embeddings": {"tie_word_embeddings": True},
    "sliding window": {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
    "eager": {"attn_implementation": "eager"},
    "no rotary embedding": {"no_rope_layers": [1, 0]},
    "partial rotary embedding": {"partial_rotary_factor": 0.5},
    "scores divided by the layer's number": {"scale_attn_by_inverse_layer_idx": True},
    "multi-query": {"heads": (6, 1), "multi_query": True, "new_decoder_architecture": False},
    "residuals one after the other": {"parallel_attn": False, "new_decoder_architecture": False, "heads": (6, 6)},
    "one norm for both": {"num_ln_in_parallel_attn": 1},
    "without parallel residual": {"use_parallel_residual": False},
    "scores divided by another number": {"query_pre_attn_scalar": 5},
    "capped scores": {"attn_logit_softcapping": 1.5},
    "capped logits": {"final_logit_softcapping": 3.0},
    "global layers": {"layer_types": ["full_attention", "full_attention"], "query_pre_attn_scalar": 5},
    "scaled logits": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
}


QWEN = ("use_sliding_window", "max_window_layers")


def builds(family, changes):
    """Whether the family's configuration has these settings: what it lacks cannot be a variant of it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family == "phi3" and changes.get("rope_parameters", {}).get("rope_type") == "llama3":  # it knows LongRoPE alone
        return False
    if "rope_parameters" in changes and ("full_attention" in changes["rope_parameters"]) != (family == "gemma3_text"):
        return False
    if family == "falcon" and "partial_rotary_factor" in changes:  # it turns whole heads
        return False
    known = CONFIG_MAPPING[family]().to_dict()
    if not hasattr(CONFIG_MAPPING[family], "num_key_value_heads"):  # GPT-2 and its like: heads follow from the width
        heads = changes.get("heads", (6, 6))
        if "head_dim" in changes or (heads[0] != heads[1] and "num_kv_heads" not in known):
            return False
    needed = [key for key in changes if key not in ("head_dim", "heads", "attn_implementation", *QWEN)]
    return all(key in known or key in (known.get("rope_parameters") or {}) for key in needed)


ALL_CASES = [
    pytest.param(family, changes, id=f"{family}-{name}")
    for family in families.names()
    for name, changes in VARIANTS.items()
    if builds(family, changes)
]
CASES = [case for case in ALL_CASES if families.get(case.values[0]).causal]
DECODERS = [name for name in families.names() if families.get(name).causal]
ENCODERS = [name for name in families.names() if name not in DECODERS]
IDS = torch.randint(1, 61, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(random_teacher):
    def make(family, changes):
        changes = copy.deepcopy(changes)  # configurations write into what they are given
        implementation = changes.pop("attn_implementation", None)
        config = linearize.modeling.classes_for(family).config()
        if hasattr(config, "attention_multiplier"):  # its default of 1 makes scores that fp32 rounds coarsely
            changes.setdefault("attention_multiplier", 0.1)
        if not hasattr(config, "max_window_layers"):
            changes = {k: v for k, v in changes.items() if k not in ("use_sliding_window", "max_window_layers")}
        model = random_teacher(family, **changes)
        if implementation:
            model.set_attn_implementation(implementation)
        return model

    return make


def kv_heads(model):
    return family_of(model.config).heads(None, model.config)[1]


def attentions(model):
    family, decoder = family_of(model.config), model.get_decoder()
    return [family.module(decoder, index) for index in range(model.config.num_hidden_layers)]


def recorded(family):
    """What transformers can record of a family's decoder."""
    return linearize.modeling.classes_for(family).base._can_record_outputs


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize(("family", "changes"), ALL_CASES)
@pytest.mark.parametrize("exact", [[], [(0, 0), (1, -1)]], ids=["", "exact heads"])
def test_undo_restores_the_teacher_to_the_bit(teacher, make_mixer, family, changes, exact):
    model = teacher(family, changes)
    last = kv_heads(model) - 1
    before, weights, classes = logits(model), copy.deepcopy(model.state_dict()), (type(model), type(model.config))
    config = model.config.to_dict()
    mixer = make_mixer(feature_map="softmax", gate="key", window={"size": 4, "sinks": 1}, combine="average")
    if family in ENCODERS:
        mixer |= make_mixer(feature_map="softmax", gate="key", window=None, combine="memory_only")
    surgery = convert(model, mixer, [0, 1], exact_heads=[(layer, head % (last + 1)) for layer, head in exact])
    assert all(isinstance(attention, LinearizedAttention) for attention in attentions(model))
    if exact and last == 0:  # the layers' only KV head stays exact
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    else:
        assert not torch.allclose(logits(model), before, atol=1e-3)
    assert surgery.undo() is model
    assert (type(model), type(model.config)) == classes
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_window_as_long_as_the_input_gives_the_teachers_logits(teacher, make_mixer, family, changes):
    model = teacher(family, changes)
    before = logits(model)
    convert(model, make_mixer(combine="window_only", window={"size": IDS.shape[1]}), [0, 1])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_exact_heads_give_the_teachers_logits_in_prefill_and_decode(teacher, make_mixer, family, changes):
    model = teacher(family, changes)
    before = logits(model)
    groups = kv_heads(model)
    heads = [(i, g) for i in range(2) for g in reversed(range(groups))]
    convert(model, make_mixer(combine="average"), [0, 1], heads)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    cache, outputs = None, []
    for piece in IDS.split([7, 8, *[1] * 9], dim=1):
        with torch.no_grad():
            out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
    torch.testing.assert_close(torch.cat(outputs, 1), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_one_converted_layer_beside_a_softmax_layer(teacher, make_mixer, family):
    """A layer that keeps softmax and one that does not share one cache, one mask and one batch with padding."""
    model = teacher(family, {})
    convert(model, make_mixer(feature_map="softmax", gate="key", window={"size": 5}), layers=[1])
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    alone = logits(model, IDS[1:, 6:], use_cache=False)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = logits(model, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(full[1:, 6:], alone, rtol=0, atol=1e-4)
    cache, outputs = None, []
    for begin, end in [(0, 9), *((t, t + 1) for t in range(9, 24))]:
        with torch.no_grad():
            out = model(
                IDS[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        outputs.append(out.logits)
    decoded = torch.cat(outputs, 1)
    torch.testing.assert_close(decoded[0], full[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded[1, 6:], full[1, 6:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_stay_apart_in_a_model_with_a_softmax_layer(teacher, make_mixer, family):
    model = teacher(family, {})
    convert(model, make_mixer(feature_map="softmax", gate="key", window={"size": 5}), layers=[0])
    alone = torch.cat([logits(model, part, use_cache=False) for part in IDS[:1].split([10, 14], 1)], 1)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    packed = logits(model, IDS[:1], position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
    if not families.get(family).passes_context:  # Falcon's own class drops what it does not know, `cu_seq_lens_q` too
        return
    ends = torch.tensor([0, 10, 24], dtype=torch.int32)
    packed = logits(model, IDS[:1], cu_seq_lens_q=ends, use_cache=False)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_local_layers_stay_softmax_unless_they_are_named(teacher, make_mixer, family):
    model = teacher(family, {"num_hidden_layers": 4})
    surgery = convert(model, make_mixer())
    assert model.config.linearize["layers"] == [1, 3] == list(surgery.teachers)
    surgery.undo()
    assert list(convert(model, make_mixer(), [0, 3]).teachers) == [0, 3]


def test_a_window_in_the_configuration_of_a_family_without_one_is_not_read(random_teacher, make_mixer):
    """Llama's attention ignores a stray `sliding_window`, so its student does."""
    model = random_teacher("llama", sliding_window=4)
    before = logits(model)
    convert(model, make_mixer(combine="window_only", window={"size": 24}))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "changes"), ALL_CASES)
def test_finetuning_sees_the_models_own_logits(teacher, family, changes):
    model = teacher(family, changes)
    with torch.no_grad():
        states = model.get_decoder()(IDS).last_hidden_state
        torch.testing.assert_close(logits_of(model, states), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [name for name in families.names() if "router" in str(recorded(name))])
def test_a_converted_mixture_of_experts_returns_its_router_logits(teacher, make_mixer, family):
    model = teacher(family, {})
    before = model(IDS, output_router_logits=True)
    convert(model, make_mixer(combine="window_only", window={"size": IDS.shape[1]}))
    after = model(IDS, output_router_logits=True)
    for got, expected in zip(after.router_logits, before.router_logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "family", [*{families.get(name): name for name in families.names()}.values(), "mixtral", "granite"]
)
def test_a_checkpoint_loads_with_and_without_the_package(teacher, make_mixer, tmp_path, family):
    teacher(family, {}).save_pretrained(tmp_path / "teacher")
    model = linearize.modeling.auto_class(family).from_pretrained(tmp_path / "teacher").eval()
    parts = {"window": {"size": 5}} if family in DECODERS else {"window": None, "combine": "memory_only"}
    convert(model, make_mixer(feature_map="softmax", gate="key", **parts), [0, 1], [(0, 1)])
    save_checkpoint(model, None, tmp_path)
    save_file({"logits": logits(model)}, tmp_path / "logits.safetensors")
    assert torch.equal(logits(load(tmp_path)), logits(model))
    code = (
        "import sys, torch; sys.modules['linearize'] = None\n"
        "from safetensors.torch import load_file\n"
        f"from transformers import {auto_name(family)} as Auto\n"
        "torch.set_num_threads(1)\n"
        f"model = Auto.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()\n"
        f"expected = load_file({str(tmp_path / 'logits.safetensors')!r})['logits']\n"
        f"print(torch.equal(model(torch.tensor({IDS.tolist()})).logits, expected))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


MISTAKES = {
    "a layer that does not exist": ({"layers": [0, 2]}, "layer 2"),
    "a negative layer": ({"layers": [-1]}, "layer -1"),
    "an exact head of a layer that is not converted": ({"layers": [0], "exact_heads": [(1, 0)]}, "layer 1"),
    "an exact head that does not exist": ({"exact_heads": [(0, 2)]}, "KV head 2"),
    "an unknown part": ({"gate": {"name": "kee"}}, "'key'"),
    "an option out of its range": ({"combine": {"name": "shared_softmax", "factor": 2.0}, "normalize": True}, "factor"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_and_leaves_the_teacher_as_it_was(random_teacher, make_mixer, mistake):
    model = random_teacher()
    changes, words = MISTAKES[mistake]
    surgery = {key: value for key, value in changes.items() if key in ("layers", "exact_heads")}
    mixer = {**make_mixer(feature_map="softmax"), **{k: v for k, v in changes.items() if k not in surgery}}
    before, kind = logits(model), type(model)
    with pytest.raises(LinearizeError, match=words):
        convert(model, mixer, **{"exact_heads": [(0, 1)], **surgery})
    assert type(model) is kind
    assert not hasattr(model.config, "linearize")
    assert torch.equal(logits(model), before)


REFUSED = {
    "bert": ({"is_decoder": True}, "set up as a decoder"),
    "gpt2": ({"add_cross_attention": True}, "cross attention"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "both directions"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_family_cannot_convert_is_refused_with_the_reason(random_teacher, make_mixer, family):
    changes, words = REFUSED[family]
    model = random_teacher(family, **changes)
    kind = type(model)
    with pytest.raises(LinearizeError, match=words):
        convert(model, make_mixer())
    assert type(model) is kind
    assert not hasattr(model.config, "linearize")


@pytest.mark.parametrize("causal", [True, False])
def test_a_softmax_layers_mask_keeps_documents_and_padding_apart(causal):
    """Padding anywhere, two documents: each token sees its own document, and only padding sees padding."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 0, 1, 0, 0, 1]])
    documents = torch.tensor([[0, 0, 1, 1, 1, 1], [-1, 0, 0, -2, 1, 1]])
    got = visible_mask(sequence_context(2, 6, mask, positions, None), 2, 6, causal, mask.device)[:, 0]
    for row, i, j in itertools.product(range(2), range(6), range(6)):
        if i != j and mask[row, i]:
            same = documents[row, i] == documents[row, j] and (j <= i or not causal)
            assert got[row, i, j] == same, (row, i, j)


def test_a_converted_model_is_not_converted_again(random_teacher, make_mixer):
    model = random_teacher()
    convert(model, make_mixer())
    with pytest.raises(LinearizeError, match="already"):
        convert(model, make_mixer())


def test_a_family_that_is_not_registered_is_named(random_teacher, make_mixer):
    from transformers import OPTConfig

    model = AutoModelForCausalLM.from_config(OPTConfig(num_hidden_layers=1, vocab_size=11, hidden_size=24, ffn_dim=8))
    with pytest.raises(LinearizeError, match="opt"):
        convert(model, make_mixer())
