"""Plans: right for the aliases' published sizes, equal to what a run builds, and strict."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from linearize import checkpoint, planning
from linearize.aliases import alias_names
from linearize.api import stage_names
from linearize.data import Corpus, PackedRows
from linearize.errors import LinearizeError, UnknownNameError
from linearize.eval.memory import tensor_bytes
from linearize.head_scores import ProbeScores, UnitScore
from linearize.modeling import auto_class
from linearize.modeling.classes import family_of
from linearize.planning import check_disk, make_plan, resolve_heads
from linearize.recipe import Recipe, recipe_names
from linearize.recipe_stages import Lora
from linearize.speeds import read_speeds
from linearize.stages import Run, run_stage
from linearize.stages.adapters import add_lora, lora_parameters, lora_targets
from linearize.surgery import convert
from linearize.teacher import load_config, resolve

PUBLISHED = {
    "gemma3-270m": 268_098_176,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def rows_of(recipe: Recipe, length: int) -> list[str]:
    """Overrides for rows of `length` tokens, a stage's own ones as much shorter as its recipe has them."""
    own = {index: stage.length for index, stage in enumerate(recipe.stages) if stage.length is not None}
    shorter = {index: max(8, each * length // recipe.data.length) for index, each in own.items()}
    return [f"data.length={length}", *(f"stages.{index}.length={each}" for index, each in shorter.items())]


def short(name: str, *overrides: str) -> Recipe:
    """A packaged recipe on rows that fit the tiny teacher."""
    recipe = Recipe.from_yaml(name)
    if recipe.mixer is not None and recipe.mixer.memory.name == "retain":  # it learns from 64 queries behind a window
        return recipe.with_overrides(["data.length=200", *(f"stages.{i}.length=200" for i in range(3)), *overrides])
    return recipe.with_overrides([*rows_of(recipe, 64), *overrides])


@pytest.mark.parametrize("alias", alias_names())
def test_alias(alias: str, cache: Path) -> None:
    plan = make_plan(Recipe.from_yaml("liger"), load_config(resolve(alias)), model=alias)
    assert plan.parameters == PUBLISHED.get(alias, plan.parameters)
    kept = {"softmax"} if "gemma" in alias else set()  # its local layers
    assert {layer.kind for layer in plan.layers} == {"converted", *kept}
    assert not cache.exists()


def test_the_headline(cache: Path) -> None:
    plan = make_plan(Recipe.from_yaml("liger"), load_config(resolve("llama-3-8b")), model="llama-3-8b")
    assert [layer.index for layer in plan.layers] == list(range(32))
    assert all((layer.window, layer.sinks, layer.memory) == (128, 4, "softmax, key, additive") for layer in plan.layers)
    assert plan.cache[1024][0] == 2 * 32 * 8 * 128 * 2 * 1024
    console = Console(record=True, width=120)
    console.print(plan.render())
    text = console.export_text()
    for words in ("32 layers, 32 converted", "8,030,261,248", "transfer", "distill", "64K", "│ 31 "):
        assert words in text


@pytest.mark.parametrize("name", [name for name in recipe_names() if Recipe.from_yaml(name).causal])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "falcon"])
def test_a_plan_counts_what_a_run_builds(name: str, family: str, tiny_config) -> None:
    config = tiny_config(family, num_hidden_layers=2 * short(name).progressive)
    plan = make_plan(short(name), config, dtype=torch.float32)
    recipe = planning.place_heads(short(name), config, torch.float32)
    model = AutoModelForCausalLM.from_config(config)
    assert plan.parameters == model.num_parameters()
    teacher_cache = model(torch.ones(1, 200, dtype=torch.long)).past_key_values
    mixers = {}
    if recipe.mixer is not None:
        layers = planning.converted_layers(recipe, config)
        surgery = convert(model, recipe.mixer.model_dump(), layers, recipe.exact_heads)
        family_class, decoder = family_of(model.config), model.get_decoder()
        mixers = {index: family_class.module(decoder, index).mixer for index in surgery.teachers}
        mixers = {index: mixer for index, mixer in mixers.items() if mixer is not None}
    assert plan.mixer_parameters == sum(p.numel() for mixer in mixers.values() for p in mixer.parameters())
    student_cache = model(torch.ones(1, 200, dtype=torch.long)).past_key_values
    held = [tensor_bytes([(layer.keys, layer.values) for layer in teacher_cache.layers])]
    if recipe.mixer is None:
        held.append(tensor_bytes([(layer.keys, layer.values) for layer in student_cache.layers]))
    else:
        held.append(student_cache.nbytes())
    planned = planning._cache_bytes(recipe, config, mixers, 200, torch.float32)
    assert list(planned) == held
    assert [stage.steps for stage in plan.stages] == [stage.steps(64) for _, stage in recipe.schedule()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [[], [[0, 1], [1, 0], [1, 1]]])
def test_a_plan_counts_the_bytes_of_mxint8(exact: list[list[int]], dtype: torch.dtype, tiny_config) -> None:
    recipe = short("gdn", "mixer.cache_dtype=mxint8", f"exact_heads={exact}")
    config = tiny_config()
    share = make_plan(short("gdn", f"exact_heads={exact}"), config, dtype=dtype).cache_share
    plan = make_plan(recipe, config, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    convert(model, recipe.mixer.model_dump(), exact_heads=recipe.exact_heads)
    cache = model(torch.ones(1, 1024, dtype=torch.long)).past_key_values
    assert plan.cache[1024][1] == cache.nbytes()
    held = [(name, t.numel()) for layer in cache.layers for name, t in layer.tensors.items()]
    one = 2 * (16 + 1)  # bytes of a key and a value: 16 numbers of a byte, and the power of two of their block
    stored = sum(count for name, count in held if name.startswith(("window_", "sink_"))) + 8192 * one * len(exact)
    saved = stored // (16 + 1) * 16 * dtype.itemsize - stored
    assert share - plan.cache_share == pytest.approx(saved * dtype.itemsize / (plan.cache[8192][0] * 2))


@pytest.mark.parametrize("cache_dtype", ["model", "mxint8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [[], [[0, 1], [1, 0], [1, 1]]])
def test_a_plan_counts_the_bytes_of_kept_tokens(exact, dtype: torch.dtype, cache_dtype: str, tiny_config) -> None:
    parts = ["combine=joint", "memory={name: retain, slots: 9}", "feature_map=identity", "gate=none", "rotary=true"]
    parts += ["overlap=false", "output_norm=false", "window={size: 7, sinks: 2}", f"cache_dtype={cache_dtype}"]
    recipe = short("gdn", *(f"mixer.{part}" for part in parts), "mixer.conv=null", f"exact_heads={exact}")
    recipe = recipe.with_overrides(["data.length=96"])
    config = tiny_config()
    plan = make_plan(recipe, config, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    convert(model, recipe.mixer.model_dump(), exact_heads=recipe.exact_heads)
    cache = model(torch.ones(1, 1024, dtype=torch.long)).past_key_values
    assert plan.cache[1024][1] == cache.nbytes()
    one = 2 * 17 if cache_dtype == "mxint8" else 2 * 16 * dtype.itemsize  # bytes of a key and a value
    heads = 4 - len(exact)
    mixed = heads * ((7 + 2 + 9) * one + 9 * 8 + 7 * 4) + 8 * (1 if exact else 2)
    assert cache.nbytes() == mixed + len(exact) * 1024 * one + (8 * 2 if exact else 0)


def test_rows_that_teach_nothing_of_what_to_keep_are_refused(tiny_config):
    """Sinks have no label, and a token has one once 64 queries stand behind its window, as long as the stage has it."""
    words = ["mixer.memory={name: retain, slots: 8}", "mixer.combine=joint", "mixer.overlap=false", "mixer.rotary=true"]
    words += ["mixer.window={size: 16, sinks: 3}", "mixer.feature_map=identity", "mixer.gate=none"]
    stages = "stages=[{stage: transfer, tokens: 64, batch: 1}]"
    recipe = Recipe.from_yaml("untrained").with_overrides([*words, "exact_heads=[]", "data.length=83", stages])
    assert make_plan(recipe, tiny_config()).stages[0].trained
    with pytest.raises(LinearizeError, match=r"`stages.0` learns .* rows of 82 tokens have none. Rows of 83 tokens"):
        make_plan(recipe.with_overrides(["data.length=82"]), tiny_config())
    shorter = ["data.length=82", "stages.0.window=15"]
    assert make_plan(recipe.with_overrides(shorter), tiny_config()).stages[0].trained


def test_a_stage_window_that_the_teachers_own_makes_idle_is_an_error(tiny_config) -> None:
    recipe = short("control/window-only", "mixer.window.size=32", "stages.0.window=16")
    assert make_plan(recipe, tiny_config("mistral", sliding_window=17)).stages
    with pytest.raises(LinearizeError, match=r"stages.0.window` is 16.*no effect"):
        make_plan(recipe, tiny_config("mistral", sliding_window=16))


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


def test_local_layers_stay_softmax_and_every_eighth_counts_the_global_ones(tiny_config) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    config = tiny_config("gemma3_text", num_hidden_layers=6, layer_types=kinds)
    plan = make_plan(short("liger"), config, dtype=torch.float32)
    assert [layer.kind for layer in plan.layers] == ["softmax", "converted"] * 3
    plan = make_plan(short("liger", "layers={every: 3}"), config)
    assert [layer.index for layer in plan.layers if layer.kind == "converted"] == [1, 3]
    plan = make_plan(short("liger", "layers=[0,1]"), config)
    assert [layer.index for layer in plan.layers if layer.kind == "converted"] == [0, 1]
    local = tiny_config("gemma3_text", layer_types=["sliding_attention"] * 2)
    with pytest.raises(LinearizeError, match=r"All layers of this model are local.*layers=\[0,1\]"):
        make_plan(short("liger"), local)


def test_a_distill_stage_behind_lora_loads_its_teacher_where_layers_stay_softmax(tiny_config) -> None:
    """LoRA changes Gemma's local layers, which the student shares with the teacher."""
    stages = "stages=[{stage: finetune}, {stage: distill}]"
    for family, copied in (("llama", False), ("gemma3_text", True)):
        recipe, config = short("liger", stages), tiny_config(family)
        assert planning.needs_teacher_copy(recipe, config, 1) == copied
        alone = make_plan(short("liger", "stages=[{stage: distill}]"), config, dtype=torch.float32)
        behind = make_plan(recipe, config, dtype=torch.float32)
        weights = alone.stages[0].memory + (4 * alone.parameters if copied else 0)
        assert behind.stages[1].memory >= weights
        assert (behind.stages[1].memory > alone.stages[0].memory) == copied


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
    local = tiny_config("gemma3_text", num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    with pytest.raises(LinearizeError, match=r"already, in float32, with the 2 layers that stay as they are\. Take"):
        make_plan(short("untrained", "exact_heads.cache=1%"), local, dtype=torch.float32)
    plan = make_plan(short("untrained", "exact_heads.cache=4%"), tiny_config(), dtype=torch.float32)
    assert plan.exact_heads == 0
    plan = make_plan(short("untrained", "exact_heads.cache=99%"), tiny_config(), dtype=torch.bfloat16)
    assert plan.exact_heads == 3


@pytest.mark.parametrize("heads", [{"cache": 0.9}, {"keep": 7}])
@pytest.mark.parametrize("best", [0, 7])
def test_memories_make_way_for_exact_heads_that_fill_their_layers(heads, best: int, tiny_config) -> None:
    config = tiny_config(num_hidden_layers=8, num_key_value_heads=1, max_position_embeddings=8192)
    window = {"size": 16, "sinks": 4}
    mixer = {"window": window, "memory": "additive", "memory_layers": {"keep": 0.25}}
    recipe = Recipe.parse({"name": "r", "mixer": mixer, "exact_heads": heads}, "r")
    assert make_plan(recipe, config, dtype=torch.bfloat16).exact_heads == 7
    worth = [-abs(layer - best) for layer in range(8)]
    units = tuple(UnitScore(i, head, *[float(worth[i])] * 5) for i in range(8) for head in (0, None))
    scores = ProbeScores("m", 8, 1, window, {}, {}, units)
    built = make_plan(resolve_heads(recipe, scores, config, torch.bfloat16), config, dtype=torch.bfloat16)
    assert [layer.index for layer in built.layers if layer.memory] == [7 - best] and built.exact_heads == 7
    assert built.cache_share <= heads.get("cache", 1)


def test_a_layer_of_exact_heads_alone(tiny_config) -> None:
    plan = make_plan(short("liger", "exact_heads=[[0,0],[0,1]]"), tiny_config())
    assert (plan.layers[0].window, plan.layers[0].memory) == (0, "")
    assert plan.layers[1].window == 128


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


@pytest.mark.parametrize(
    ("layers", "progressive", "stages"),
    [
        ("[1]", 1, [{"train": "qk"}, {"lora": {"targets": ["v_proj", "down_proj"]}}]),
        ("all", 2, [{}, {"train_mixer": True}]),
        ("[1]", 1, [{}, {"train": "mixer", "train_mixer": True}, {"train": "full"}]),
        ("all", 2, [{"train": "qkvo"}, {"train": "attention"}]),
    ],
)
def test_the_disk_holds_what_finished_stages_keep(layers, progressive, stages, random_teacher, tmp_path) -> None:
    kinds = ["transfer", "finetune", "finetune"]
    stages = [{"stage": kind, "tokens": 96, "batch": 2, **own} for kind, own in zip(kinds, stages, strict=False)]
    overrides = [f"layers={layers}", f"progressive={progressive}", "data.length=48", f"stages={json.dumps(stages)}"]
    recipe = short("liger", *overrides)
    ids = torch.randint(3, 61, (4, 48), dtype=torch.int32)
    rows = PackedRows(ids, torch.arange(48).int().expand(4, -1), ids)
    model = random_teacher().to(torch.bfloat16)
    plan = make_plan(recipe, model.config, dtype=torch.bfloat16)
    chosen = planning.converted_layers(recipe, model.config)
    surgery = convert(model, recipe.mixer.model_dump(), chosen, recipe.exact_heads)
    run = Run(model, surgery, Corpus(rows, rows[:2], "", "", {}), tmp_path, 0, torch.device("cpu"), torch.bfloat16)
    run.metrics = tmp_path / "metrics.jsonl"
    for name, settings, turn in stage_names(recipe):
        surgery.activate(chosen if progressive == 1 else chosen[: turn + 1])
        run.surgery = surgery.only(recipe.joining(chosen, turn)) if settings.stage == "transfer" else surgery
        run_stage(settings, run, name)
    ended = [checkpoint.load(folder).tensors for folder in tmp_path.glob("*-ended")]
    assert len(ended) == len(plan.stages)
    weights = tensor_bytes([list(model.parameters())])
    training = 2 * 12 * max(stage.trained for stage in plan.stages)  # the two newest checkpoints
    kept = sum(tensor.nbytes for tensors in ended for tensor in tensors.values())
    assert plan.disk == weights + training + kept + planning.SMALL_FILES


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


def test_layers_that_are_watched_or_sharded_are_planned_uncompiled(tiny_config) -> None:
    def launches(tokens: int, options: str = "") -> dict[str, int]:
        recipe = short("liger", f"stages=[{{stage: distill, tokens: {tokens}, batch: 2{options}}}]")
        return make_plan(recipe, tiny_config(), dtype=torch.float32).stages[0].launches

    short_run, long = launches(6400), launches(6_400_000)
    assert long["one GPU"] < short_run["one GPU"]
    assert long["FSDP2 x2"] == short_run["FSDP2 x2"]
    assert launches(6400, ", hidden: 0.1") == launches(6_400_000, ", hidden: 0.1")


def test_transfer_takes_what_its_fullest_layer_takes(tiny_config) -> None:
    def memory(memories: str) -> int:
        parts = ["mixer.feature_map=hedgehog", "mixer.gate=none", "mixer.conv=4", f"mixer.memory_layers={memories}"]
        recipe = short("liger", *parts, "stages=[{stage: transfer, tokens: 6400, batch: 2}]")
        return make_plan(recipe, tiny_config(), dtype=torch.float32).stages[0].memory

    assert memory("[1]") == memory("[0]")


def test_what_transfer_keeps_is_planned(tiny_config) -> None:
    def memory(options: str = "", name: str = "lolcats") -> int:
        recipe = short(name, f"stages=[{{stage: transfer, tokens: 6400, batch: 2, micro_batch: 1{options}}}]")
        return make_plan(recipe, tiny_config(), dtype=torch.float32).stages[0].memory

    assert memory(", order: layerwise") - memory() == 6400 * 64 * 4
    assert memory(", maps: 1.0") - memory() == 6 * 4 * 64 * 64 * 4
    per_token = 4 * (20 * 64 + 4 * 96)
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
        (["stages.1.lora.targets=[q_proj, w_proj]"], ["LoRA target 'w_proj'", "down_proj"]),
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


# LoRA targets of a feed-forward part, and the modules of the same size in a family.
FEED_FORWARD = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "phi3": ["gate_up_proj", "down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["dense_h_to_4h", "dense_4h_to_h"],
    "mixtral": [],
    "qwen3_moe": [],
}


@pytest.mark.parametrize("family", FEED_FORWARD)
def test_feed_forward_targets_are_found_in_every_decoder(family: str, tiny_config) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    attention = lora_targets(model, ["q_proj", "k_proj", "v_proj", "o_proj"])
    parts = ["gate_proj", "up_proj", "down_proj"]
    assert lora_targets(model, ["q_proj", "k_proj", "v_proj", "o_proj", *parts]) == attention + FEED_FORWARD[family]
    if not FEED_FORWARD[family]:
        with pytest.raises(UnknownNameError, match="LoRA target 'gate_proj'"):
            lora_targets(model, parts)
    with pytest.raises(UnknownNameError, match="LoRA target 'gate'"):
        lora_targets(model, ["q_proj", "k_proj", "v_proj", "gate"])
    add_lora(model, Lora(r=3, targets=parts), lora_targets(model, ["q_proj", "k_proj", "v_proj", *parts]))
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in lora_parameters(model)}
    assert {name.rpartition(".")[2] for name in FEED_FORWARD[family]} <= adapted


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_feed_forward_target_that_is_not_there_alone_is_an_error(family: str, tiny_config) -> None:
    model = auto_class(family).from_config(tiny_config(family))
    with pytest.raises(UnknownNameError, match="LoRA target 'gate_proj'"):
        lora_targets(model, ["gate_proj"])


def test_fused_projections_take_all_of_q_k_and_v(tiny_config) -> None:
    plain = make_plan(short("liger"), tiny_config("phi3"))
    named = make_plan(
        short("liger", "stages.1.lora.targets=[qkv_proj, o_proj, gate_up_proj, down_proj]"), tiny_config("phi3")
    )
    assert plain.stages[1].trained == named.stages[1].trained
    with pytest.raises(LinearizeError, match=r"'up_proj' without 'gate_proj'.*gate_up_proj"):
        make_plan(short("liger", "stages.1.lora.targets=[up_proj, o_proj]"), tiny_config("phi3"))
    with pytest.raises(LinearizeError, match=r"'q_proj' without 'v_proj'.*qkv_proj"):
        make_plan(short("liger", "stages.1.lora.targets=[q_proj, k_proj]"), tiny_config("phi3"))
    with pytest.raises(LinearizeError, match=r"'q_proj' without 'v_proj'.*qkv_proj"):
        make_plan(short("liger", "stages.0.train=qk"), tiny_config("phi3"))
    assert make_plan(short("liger", "stages.0.train=qkvo"), tiny_config("phi3")).stages[0].trained


def test_unknown_family() -> None:
    from transformers import OPTConfig

    with pytest.raises(UnknownNameError, match="model family 'opt'"):
        make_plan(short("liger"), OPTConfig())


def test_each_way_of_launching_has_an_estimate(cache: Path) -> None:
    """FSDP2 shards layers and not what is outside of them; a stream holds a layer, whatever the depth."""
    config = load_config(resolve("llama-3.1-70b"))
    plan = make_plan(Recipe.from_yaml("liger"), config, dtype=torch.bfloat16, stream=True)
    transfer, behind = (stage.launches for stage in plan.stages)
    layers = 80 * (plan.parameters - 2 * 128256 * 8192 - 8192) // 80 * 2
    assert transfer["one GPU"] > 2 * plan.parameters and transfer["DDP"] == transfer["one GPU"]
    assert transfer["FSDP2 x2"] - transfer["FSDP2 x8"] == pytest.approx(layers * (1 / 2 - 1 / 8), rel=0.2)
    assert transfer["streamed"] == plan.stages[0].memory < 6 * 2**30 and behind["streamed"] is None
    assert plan.stages[1].memory == behind["one GPU"]
    config.num_hidden_layers = 160
    deeper = make_plan(Recipe.from_yaml("liger"), config, dtype=torch.bfloat16, stream=True)
    assert deeper.stages[0].memory == pytest.approx(plan.stages[0].memory, rel=1e-4)
    assert deeper.stages[0].launches["one GPU"] > 1.9 * transfer["one GPU"]
    text = Console(record=True, width=200)
    text.print(plan.render())
    for words in ("is streamed: at most 1.96 GiB", "load the whole model; for transfer alone: 'stages=[", "FSDP2 x4"):
        assert words in text.export_text(clear=False)


def test_hidden_states_lie_in_memory_where_they_fit_twice(tiny_config, monkeypatch) -> None:
    recipe = short("liger", "stages=[{stage: transfer, tokens: 6400, batch: 2}]", "data.held_out=4")
    size = (6400 + 3 * 4 * 64) * 64 * 4
    for free, on_disk in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr(planning, "available_memory", lambda free=free: free)
        plan = make_plan(recipe, tiny_config(), dtype=torch.float32, stream=True)
        assert (plan.stream.states, plan.stream.on_disk) == (size, on_disk)
        plain = make_plan(recipe, tiny_config(), dtype=torch.float32)
        assert plan.disk - plain.disk == (size if on_disk else 0)


def test_time_comes_from_measured_speeds_alone(tiny_config, tmp_path: Path) -> None:
    recipe = short("liger", "stages=[{stage: transfer, tokens: 6_000_000}, {stage: finetune, tokens: 900}]")
    plan = make_plan(recipe, tiny_config(), dtype=torch.float32)
    rows = [
        {"name": "teacher", "tokens": 0, "seconds": 0.0},
        {"name": "after transfer", "tokens": 5000, "seconds": 10.0},
        {"name": "after finetune", "tokens": 5600, "seconds": 12.0},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    names = ["transfer", "finetune"]
    assert read_speeds(str(tmp_path), names) == {"transfer": 500.0, "finetune": 300.0}
    text = Console(record=True, width=200)
    text.print(plan.render())
    assert "time" not in text.export_text()
    text.print(plan.render(read_speeds("transfer=1_000", names)))
    assert "1 h 40 min" in text.export_text(clear=False) and "│ -" in text.export_text()
    for wrong, words in (
        ("tranfer=5", "transfer"),
        ("transfer=fast", "tokens a second"),
        ("nowhere", "no results.json"),
    ):
        with pytest.raises(LinearizeError, match=words):
            read_speeds(wrong, names)


def test_disk(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there" / "yet", 1000)
    with pytest.raises(LinearizeError, match="--output"):
        check_disk(tmp_path / "not" / "there" / "yet", 2**60)
