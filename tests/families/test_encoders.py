"""Encoders: exact heads give the teacher's logits, padding and other documents are invisible, and nothing is causal."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from linearize.api import linearize, load
from linearize.errors import LinearizeError
from linearize.evaluation import evaluate_folder
from linearize.generation import generate_text
from linearize.mixers.mixer import TokenMixer
from linearize.modeling.classes import packed_inputs
from linearize.recipe import Recipe, recipe_names
from linearize.registry import families
from linearize.surgery import convert

ENCODERS = [name for name in families.names() if not families.get(name).causal]
RECIPES = {name: recipe for name in recipe_names() if not (recipe := Recipe.from_yaml(name)).causal}
IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
PARTS = {
    **{name: recipe.mixer.model_dump() for name, recipe in RECIPES.items()},
    "selective": {"feature_map": "softmax", "gate": "scalar", "normalize": True},
    "per channel": {"feature_map": "softmax", "gate": "key", "output_norm": True},
}


@pytest.fixture
def encoder(random_teacher, make_mixer):
    def make(family="bert", parts=None, layers=None, exact_heads=None, **changes):
        model = random_teacher(family, pad_token_id=1, **changes)
        if parts is not None:
            convert(model, make_mixer(**{**parts, "window": None, "combine": "memory_only"}), layers, exact_heads)
        return model

    return make


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_exact_heads_give_the_teachers_logits_with_and_without_padding(encoder, make_mixer, family, implementation):
    model = encoder(family)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(IDS)
    mask[1, 13:] = 0
    before, padded = logits(model), logits(model, attention_mask=mask)
    mixer = make_mixer(feature_map="softmax", window=None, combine="memory_only")
    convert(model, mixer, exact_heads=[(i, h) for i in range(2) for h in reversed(range(4))])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    got = logits(model, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], padded[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "beside softmax"])
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("parts", PARTS)
def test_padding_and_other_documents_are_invisible(encoder, family, parts, layers):
    model = encoder(family, PARTS[parts], layers, [(1, 2)])
    first = families.get(family).first_position(model.config)
    alone = [logits(model, IDS[:1, :8]), logits(model, IDS[:1, 8:])]
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0
    torch.testing.assert_close(logits(model, attention_mask=mask)[:1, :8], alone[0], rtol=0, atol=1e-5)
    left = torch.cat([IDS.new_ones(2, 5), IDS[:, :8]], 1)  # 1 is the padding token
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 8)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0) + first
    got = logits(model, left, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got[:1, 5:], alone[0], rtol=0, atol=1e-5)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    inputs = packed_inputs(model.config, {"input_ids": IDS, "position_ids": positions})
    with torch.no_grad():
        packed = model(**inputs).logits
    torch.testing.assert_close(packed[:1], torch.cat(alone, 1), rtol=0, atol=1e-4)
    inputs.pop("attention_mask")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, packed)


@pytest.mark.parametrize("family", ENCODERS)
def test_a_teacher_keeps_packed_documents_apart(encoder, family):
    model = encoder(family)
    alone = torch.cat([logits(model, part) for part in IDS.split([8, 12], 1)], 1)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    with torch.no_grad():
        packed = model(**packed_inputs(model.config, {"input_ids": IDS, "position_ids": positions})).logits
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_tokens_see_later_ones(encoder):
    model = encoder("bert", PARTS["hedgehog-encoder"])
    changed = IDS.clone()
    changed[:, -1] = 60 - changed[:, -1]
    assert not torch.allclose(logits(model, changed)[:, 0], logits(model)[:, 0], atol=1e-4)


def test_a_mask_that_does_not_fit_the_positions_is_refused(encoder):
    model = encoder("bert", PARTS["lion"])
    positions = torch.arange(20)[None].expand(2, -1)
    with pytest.raises(ValueError, match="mask"):
        logits(model, position_ids=positions, attention_mask=torch.eye(20).bool().expand(2, 1, -1, -1))


@pytest.mark.parametrize(("family", "recipe"), [("bert", "hedgehog-encoder"), ("roberta", "lion")])
def test_a_run_leaves_a_masked_language_model_that_loads_anywhere(make_teacher, tmp_path, family, recipe):
    teacher, folder = make_teacher(family=family), tmp_path / "out"
    settings = ["data.length=64", "data.held_out=4"]
    result = linearize(str(teacher), recipe, folder, quick=True, tokens=2000, overrides=settings)
    rows = {row["name"]: row for row in result.results["rows"]}
    assert list(rows) == ["teacher", "after surgery", "after transfer", "after finetune"]
    assert rows["teacher"]["kl"] == pytest.approx(0, abs=1e-5) and rows["after surgery"]["kl"] > 0
    assert result.results["cache"] == []
    again = evaluate_folder(folder, against=str(teacher))["models"]
    assert [model["name"] for model in again] == ["teacher", "out", "memory zeroed"]
    for name, model in zip(("teacher", "after finetune"), again, strict=False):
        assert model["text"]["held-out"]["perplexity"] == pytest.approx(rows[name]["perplexity"], rel=1e-4)
        assert not {"recall", "generation"} & model.keys()
    with pytest.raises(LinearizeError, match="--recall passkey is for models that go on"):
        evaluate_folder(folder, recall="passkey")
    text = tmp_path / "text.txt"
    text.write_text("some words that are to be masked " * 50)
    own = evaluate_folder(folder, against="none", data=str(text), rows=2, length=32, output=tmp_path / "eval")
    assert own["texts"][0]["rows"] == 2 and own["models"][0]["text"]["text"]["perplexity"] > 1
    with pytest.raises(LinearizeError, match="fills masks"):
        next(generate_text(folder, "One"))
    text = (folder / "README.md").read_text()
    assert "AutoModelForMaskedLM" in text and "fill-mask" in text and "generate(" not in text
    save_file({"logits": logits(load(folder).eval(), IDS)}, tmp_path / "logits.safetensors")
    code = (
        "import sys, torch; sys.modules['linearize'] = None\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModelForMaskedLM\n"
        "torch.set_num_threads(1)\n"
        f"model = AutoModelForMaskedLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        f"expected = load_file({str(tmp_path / 'logits.safetensors')!r})['logits']\n"
        f"print(torch.equal(model(torch.tensor({IDS.tolist()})).logits, expected))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


MISTAKES = {
    "a window": ({"combine": "average", "window": {"size": 4}}, "has no window"),
    "a memory that runs forward": ({"feature_map": "l2norm", "memory": "delta"}, "runs forward alone"),
    "a convolution": ({"conv": 4}, "looks back alone"),
    "a cache": ({"cache_dtype": "mxint8"}, "encoders have no cache"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_looks_back_alone_is_refused(random_teacher, make_mixer, mistake):
    parts, words = MISTAKES[mistake]
    model = random_teacher("bert", pad_token_id=1)
    with pytest.raises(LinearizeError, match=words):
        convert(model, make_mixer(**{"window": None, "combine": "memory_only", **parts}))
    assert not any(isinstance(module, TokenMixer) for module in model.modules())
