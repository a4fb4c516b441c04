import copy

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.eval.controls import CONTROLS, applicable, memory_alone, memory_silenced, mixer_silenced, window_alone
from linearize.surgery import convert

IDS = torch.randint(1, 61, (2, 24), generator=torch.Generator().manual_seed(1))
WINDOW = {"size": 5, "sinks": 1}
SHARED = {"combine": "shared_softmax", "feature_map": "hedgehog", "rotary": True}
MIXES = {
    "average": {"combine": "average", "feature_map": "softmax", "gate": "key"},
    "learned": {"combine": {"name": "learned", "memory": 1.0}, "feature_map": "softmax"},
    "shared": {**SHARED, "overlap": False},
    "delta": {"combine": "average", "feature_map": "l2norm", "memory": "delta", "output_norm": True},
    "retain": {"combine": "joint", "memory": {"name": "retain", "slots": 9}, "rotary": True, "overlap": False},
}


def student(random_teacher, make_mixer, **parts):
    model = random_teacher()
    convert(model, make_mixer(**{"window": WINDOW, **parts}))
    return model


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def decoded(model):
    cache, outputs = None, []
    for piece in IDS.split([7, *[1] * 17], dim=1):
        with torch.no_grad():
            out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_decodes_as_it_runs_forward_and_leaves_no_trace(random_teacher, make_mixer, mix, control) -> None:
    model = student(random_teacher, make_mixer, **MIXES[mix])
    before = logits(model)
    with CONTROLS[control](model):
        changed = logits(model, use_cache=False)
        torch.testing.assert_close(decoded(model), changed, rtol=0, atol=1e-4)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("mix", MIXES)
def test_the_window_alone_is_a_window_only_model(random_teacher, make_mixer, mix) -> None:
    expected = logits(student(random_teacher, make_mixer, combine="window_only"))
    model = student(random_teacher, make_mixer, **MIXES[mix])
    with window_alone(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "alone"),
    [
        (MIXES["learned"], {"combine": "memory_only", "feature_map": "softmax", "window": None}),
        (SHARED, {**SHARED, "combine": "memory_only", "normalize": True, "window": None}),
    ],
)
def test_the_memory_alone_is_a_memory_only_model(random_teacher, make_mixer, parts, alone) -> None:
    torch.manual_seed(0)
    expected = logits(student(random_teacher, make_mixer, **alone))
    torch.manual_seed(0)
    model = student(random_teacher, make_mixer, **parts)
    with memory_alone(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_the_memory_alone_silences_windows_of_layers_without_a_memory(random_teacher, make_mixer) -> None:
    """The layer that has the window alone attends to nothing then."""
    model = student(random_teacher, make_mixer, **MIXES["average"], memory_layers=[1])
    without = copy.deepcopy(model)
    without.model.layers[0].self_attn.o_proj.weight.data.zero_()
    with memory_alone(without):
        expected = logits(without)
    with memory_alone(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_a_zeroed_memory_leaves_the_trained_mix(random_teacher, make_mixer) -> None:
    model = student(random_teacher, make_mixer, **MIXES["average"])
    halved = student(random_teacher, make_mixer, combine="window_only")
    for layer in halved.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(0.5)
    with memory_silenced(model):
        torch.testing.assert_close(logits(model), logits(halved), rtol=0, atol=1e-5)


def test_a_zeroed_memory_has_no_weight_in_a_joint_softmax(random_teacher, make_mixer) -> None:
    expected = logits(student(random_teacher, make_mixer, combine="window_only"))
    with memory_silenced(model := student(random_teacher, make_mixer, **MIXES["retain"])):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_no_mixer_is_no_attention(random_teacher, make_mixer) -> None:
    without = copy.deepcopy(random_teacher())
    for layer in without.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    model = student(random_teacher, make_mixer, **MIXES["average"])
    with mixer_silenced(model):
        torch.testing.assert_close(logits(model), logits(without), rtol=0, atol=1e-5)


def test_only_controls_that_change_something_apply(random_teacher, make_mixer) -> None:
    assert applicable(random_teacher()) == []
    assert applicable(student(random_teacher, make_mixer, combine="window_only")) == ["no mixer"]
    memory = student(random_teacher, make_mixer, combine="memory_only", window=None)
    assert applicable(memory) == ["memory zeroed"]  # no mixer is the same
    with memory_silenced(memory):
        zeroed = logits(memory)
    with mixer_silenced(memory):
        assert torch.equal(logits(memory), zeroed)
    assert applicable(student(random_teacher, make_mixer, **MIXES["average"])) == list(CONTROLS)


def test_a_control_that_reaches_nothing_is_an_error(random_teacher, make_mixer) -> None:
    model = student(random_teacher, make_mixer, **MIXES["average"])
    for layer in model.model.layers:
        layer.self_attn.mixer._finish = lambda window, memory, normalizer, x: window.o
    with pytest.raises(LinearizeError, match="changed nothing"), memory_silenced(model):
        logits(model)
