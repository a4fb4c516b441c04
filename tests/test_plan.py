"""Plans: right for the aliases' published sizes, equal to what a run builds, and strict."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from linearize import planning
from linearize.aliases import alias_names
from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval.memory import tensor_bytes
from linearize.planning import check_disk, make_plan
from linearize.recipe import Recipe, recipe_names
from linearize.surgery import convert
from linearize.teacher import load_config, resolve

PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def short(name: str, *overrides: str) -> Recipe:
    """A packaged recipe on rows that fit the tiny teacher."""
    return Recipe.from_yaml(name).with_overrides(["data.length=64", *overrides])


@pytest.mark.parametrize("alias", alias_names())
def test_alias(alias: str, cache: Path) -> None:
    plan = make_plan(Recipe.from_yaml("liger"), load_config(resolve(alias)), model=alias)
    assert plan.parameters == PUBLISHED.get(alias, plan.parameters)
    assert {layer.kind for layer in plan.layers} == {"converted"}
    assert not cache.exists()


def test_the_headline(cache: Path) -> None:
    plan = make_plan(Recipe.from_yaml("liger"), load_config(resolve("llama-3-8b")), model="llama-3-8b")
    assert [layer.index for layer in plan.layers] == list(range(32))
    assert all((layer.window, layer.sinks, layer.memory) == (64, 4, "softmax, key, additive") for layer in plan.layers)
    assert plan.cache[1024][0] == 2 * 32 * 8 * 128 * 2 * 1024
    console = Console(record=True, width=120)
    console.print(plan.render())
    text = console.export_text()
    for words in ("32 layers, 32 converted", "8,030,261,248", "transfer", "finetune", "64K", "│ 31 "):
        assert words in text


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_a_plan_counts_what_a_run_builds(name: str, family: str, tiny_config) -> None:
    config = tiny_config(family)
    plan = make_plan(short(name), config, dtype=torch.float32)
    recipe = planning.place_heads(short(name), config, torch.float32)
    model = AutoModelForCausalLM.from_config(config)
    assert plan.parameters == model.num_parameters()
    teacher_cache = model(torch.ones(1, 200, dtype=torch.long)).past_key_values
    mixers = {}
    if recipe.mixer is not None:
        layers = recipe.converted_layers(config.num_hidden_layers)
        convert(model, recipe.mixer.model_dump(), layers)
        mixers = {index: model.model.layers[index].self_attn.mixer for index in layers}
    assert plan.mixer_parameters == sum(p.numel() for mixer in mixers.values() for p in mixer.parameters())
    student_cache = model(torch.ones(1, 200, dtype=torch.long)).past_key_values
    held = [tensor_bytes([(layer.keys, layer.values) for layer in teacher_cache.layers])]
    if recipe.mixer is None:
        held.append(tensor_bytes([(layer.keys, layer.values) for layer in student_cache.layers]))
    else:
        held.append(student_cache.nbytes())
    planned = planning._cache_bytes(recipe, config, mixers, 200, torch.float32)
    assert list(planned) == held
    assert [stage.steps for stage in plan.stages] == [stage.steps(64) for stage in recipe.stages]


def test_the_given_config_is_left_alone(tiny_config) -> None:
    config = tiny_config()
    before = config.to_dict()
    make_plan(short("liger"), config)
    assert config.to_dict() == before
    assert type(config).__name__ == "LlamaConfig"


def test_layers_that_stay_softmax_are_planned_and_converted_alike(tiny_config) -> None:
    plan = make_plan(short("liger", "layers={every: 3}"), tiny_config(num_hidden_layers=7), dtype=torch.float32)
    assert [layer.index for layer in plan.layers if layer.kind == "softmax"] == [2, 5]
    softmax_layer = 2 * 2 * 16 * 4
    assert plan.cache[8192][1] - plan.cache[1024][1] == 2 * softmax_layer * (8192 - 1024)
    with pytest.raises(LinearizeError, match="layer 2, which `layers` keeps"):
        make_plan(short("liger", "layers={every: 3}", "exact_heads=[[2,0]]"), tiny_config(num_hidden_layers=7))


def test_exact_heads_grow(tiny_config) -> None:
    recipe = short("liger", "layers=[1]", "exact_heads=[[1,0]]")
    plan = make_plan(recipe, tiny_config(), dtype=torch.float32)
    assert [(layer.kind, layer.exact_heads) for layer in plan.layers] == [("softmax", ()), ("converted", (0,))]
    growth = plan.cache[8192][1] - plan.cache[1024][1]
    softmax_layer, exact_head = 2 * 2 * 16 * 4, 2 * 16 * 4
    assert growth == (softmax_layer + exact_head) * (8192 - 1024)


@pytest.mark.parametrize(
    ("budget", "dtype", "heads"), [(0.125, "bfloat16", 9), (0.10, "bfloat16", 7), (0.125, "float32", 4)]
)
def test_a_cache_budget_buys_heads(budget: float, dtype: str, heads: int, cache: Path) -> None:
    recipe = Recipe.from_yaml("untrained", [f"exact_heads.cache={budget}"])
    config, kind = load_config(resolve("smollm2-135m")), getattr(torch, dtype)
    plan = make_plan(recipe, config, dtype=kind)
    pair, size = 2 * 64 * kind.itemsize, 30 * 3 * 2 * 64 * 2 * 8192
    assert plan.exact_heads == heads
    assert plan.cache_share == pytest.approx(pair * (heads * 8192 + (90 - heads) * 132) / size, rel=1e-3)
    assert plan.cache_share <= budget < plan.cache_share + pair * 8192 / size
    assert plan.recipe == recipe and all(layer.exact_heads == () for layer in plan.layers)
    text = Console(record=True, width=120)
    text.print(plan.render())
    assert f"exact KV heads {heads}, chosen by recall" in text.export_text()


def test_a_budget_that_the_rest_of_the_cache_exceeds(tiny_config) -> None:
    with pytest.raises(LinearizeError, match=r"1\.0%.*3\.\d% already, in float32.*smaller window"):
        make_plan(short("untrained", "exact_heads.cache=1%"), tiny_config(), dtype=torch.float32)
    plan = make_plan(short("untrained", "exact_heads.cache=4%"), tiny_config(), dtype=torch.float32)
    assert plan.exact_heads == 0
    plan = make_plan(short("untrained", "exact_heads.cache=99%"), tiny_config(), dtype=torch.bfloat16)
    assert plan.exact_heads == 3


def test_a_layer_of_exact_heads_alone(tiny_config) -> None:
    plan = make_plan(short("liger", "exact_heads=[[0,0],[0,1]]"), tiny_config())
    assert (plan.layers[0].window, plan.layers[0].memory) == (0, "")
    assert plan.layers[1].window == 64


def test_sliding_window_teacher(tiny_config) -> None:
    plan = make_plan(short("control/softmax-lora"), tiny_config("mistral", sliding_window=128), dtype=torch.float32)
    assert plan.cache[1024] == plan.cache[65536] == (2 * 2 * 2 * 16 * 128 * 4,) * 2


def test_lora_counts(tiny_config) -> None:
    plan = make_plan(short("paper/liger"), tiny_config())
    assert plan.stages[0].trained == 2 * 8 * ((64 + 64) + 2 * (64 + 32))
    plan = make_plan(short("liger", "stages.0.train=qk"), tiny_config())
    assert plan.stages[0].trained == plan.mixer_parameters + 2 * 8 * ((64 + 64) + (64 + 32))
    full = make_plan(short("paper/liger", "stages=[{stage: finetune, train: full}]"), tiny_config())
    assert full.stages[0].trained == full.parameters + full.mixer_parameters


def test_what_distillation_keeps_is_planned(tiny_config) -> None:
    def plan(options: str):
        recipe = short("liger", f"stages=[{{stage: distill, tokens: 6400, batch: 2{options}}}]")
        return make_plan(recipe, tiny_config(), dtype=torch.float32)

    plain, full, kept = plan(""), plan(", train: full"), plan(", train: full, cache: true, top_k: 9")
    weights = 4 * (plain.parameters + plain.mixer_parameters)
    assert full.stages[0].trained == plain.parameters + plain.mixer_parameters
    assert full.memory - kept.memory == weights
    assert kept.disk - full.disk == 6400 * 10 * 8
    assert plan(", train: full, teacher_device: cpu").memory == kept.memory
    assert plan(", hidden: 0.1").memory > plain.memory


def test_what_transfer_keeps_is_planned(tiny_config) -> None:
    def memory(options: str = "", name: str = "lolcats") -> int:
        recipe = short(name, f"stages=[{{stage: transfer, tokens: 6400, batch: 2, micro_batch: 1{options}}}]")
        return make_plan(recipe, tiny_config(), dtype=torch.float32).stages[0].memory

    assert memory(", order: layerwise") - memory() == 6400 * 64 * 4
    assert memory(", maps: 1.0") - memory() == 6 * 4 * 64 * 64 * 4
    per_token = 4 * (13 * 64 + 4 * 96)
    assert memory(", block: 2") - memory() == 64 * per_token
    with pytest.raises(LinearizeError, match="no attention map: its `combine`"):
        memory(", maps: 1.0", "liger")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.length=300"], ["`data.length` is 300", "256"]),
        (["layers=[0,2]"], ["layer 2", "0 to 1"]),
        (["exact_heads=[[2,0]]"], ["layer 2", "0 to 1"]),
        (["exact_heads=[[0,2]]"], ["KV head 2 of layer 0", "0 to 1"]),
        (["stages.1.lora.targets=[q_proj, w_proj]"], ["'w_proj'", "matches no linear layer", "down_proj"]),
        (["mixer.gate=nope"], ["'nope'", "mixer.gate"]),
        (["mixer.gate.biass=1.0"], ["`biass`", "Did you mean 'bias'"]),
        (["mixer.gate.normalizer=x"], ["`mixer.gate.normalizer`", "'x'"]),
        (["mixer.combine=window_only"], ["`stages.0` (transfer) trains nothing"]),
    ],
)
def test_what_does_not_fit_is_named(overrides: list[str], words: list[str], tiny_config) -> None:
    with pytest.raises(LinearizeError) as caught:
        make_plan(short("liger", *overrides), tiny_config())
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_fused_projections_say_which_targets_exist(tiny_config) -> None:
    with pytest.raises(LinearizeError, match=r"'q_proj' matches no linear layer.*qkv_proj"):
        make_plan(short("liger"), tiny_config("phi3"))
    targets = "stages.1.lora.targets=[qkv_proj, o_proj]"
    assert make_plan(short("liger", targets), tiny_config("phi3")).stages[1].trained
    with pytest.raises(LinearizeError, match=r"`train: qk`.*phi3.*`train: mixer`"):
        make_plan(short("liger", targets, "stages.0.train=qk"), tiny_config("phi3"))


def test_unknown_family() -> None:
    from transformers import GPT2Config

    with pytest.raises(UnknownNameError, match="model family 'gpt2'"):
        make_plan(short("liger"), GPT2Config())


def test_disk(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there" / "yet", 1000)
    with pytest.raises(LinearizeError, match="--output"):
        check_disk(tmp_path / "not" / "there" / "yet", 2**60)
