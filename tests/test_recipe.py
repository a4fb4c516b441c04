"""Recipes: YAML in and out, strictness, overrides, budgets, and what the packaged ones promise."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize import yaml_io
from linearize.errors import LinearizeError, UnknownNameError
from linearize.recipe import Recipe, recipe_names, recipe_path
from linearize.recipe_mixer import Mixer, Part, Window
from linearize.recipe_stages import Distill, Finetune, Transfer


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        name="mine",
        mixer=Mixer(gate=Part(name="key", normalizer=16.0)),
        exact_heads=[(1, 2)],
        stages=[Transfer(tokens=300), Finetune(tokens=100)],
    )


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe(name: str) -> None:
    recipe = Recipe.from_yaml(name)
    assert recipe.name == name
    first = recipe_path(name).read_text().splitlines()[0]
    assert first.startswith("# linearize --model ")
    assert first.endswith(f"--recipe {name}")
    assert Recipe.parse(yaml_io.parse(recipe.to_yaml(), name), name) == recipe
    assert sum(stage.tokens for stage in recipe.with_quick().stages) == (recipe.quick.tokens if recipe.stages else 0)


def test_packaged_names() -> None:
    expected = {"liger", "lolcats", "paper/liger", "paper/lolcats"}
    expected |= {"control/softmax-lora", "control/window-only", "control/memory-only"}
    assert expected <= set(recipe_names())


@pytest.mark.parametrize("name", ["liger", "lolcats"])
def test_demo_recipes_stay_small(name: str) -> None:
    recipe = Recipe.from_yaml(name).prepare(quick=True)
    assert recipe.mixer is not None
    assert recipe.mixer.window is not None
    assert recipe.mixer.window.size <= 64
    assert recipe.mixer.window.sinks <= 4
    assert recipe.exact_heads == []
    assert recipe.layers == "all"


def test_controls_train_as_liger_does() -> None:
    liger = Recipe.from_yaml("liger")
    for name in ("control/softmax-lora", "control/window-only", "control/memory-only"):
        control = Recipe.from_yaml(name)
        assert control.data == liger.data
        assert control.quick == liger.quick
        assert control.stages[-1].model_copy(update={"tokens": liger.stages[-1].tokens}) == liger.stages[-1]
        assert sum(s.tokens for s in control.stages) == sum(s.tokens for s in liger.stages)


def test_paper_settings() -> None:
    liger = Recipe.from_yaml("paper/liger")
    assert [type(stage) for stage in liger.stages] == [Finetune]
    assert liger.stages[0].optimizer.lr == 1e-3
    assert (liger.stages[0].lora.r, liger.stages[0].lora.alpha) == (8, 8)
    assert liger.stages[0].lora.targets == ["q_proj", "k_proj", "v_proj"]
    lolcats = Recipe.from_yaml("paper/lolcats")
    transfer, finetune = lolcats.stages
    assert isinstance(transfer, Transfer)
    assert (transfer.optimizer.lr, transfer.scale, transfer.loss) == (1e-2, 1000.0, "mse")
    assert transfer.target == "before_o_proj"
    assert finetune.optimizer.lr == 1e-4
    assert lolcats.mixer is not None
    assert lolcats.mixer.k_map_heads == "query"
    for name in ("paper/mamba1-llama", "paper/mamba2-llama"):
        distill, again, finetune, preference = (stage for _, stage in Recipe.from_yaml(name).schedule())
        assert (distill.train, distill.kl, distill.cross_entropy, distill.optimizer.lr) == ("attention", 0.1, 1.0, 8e-5)
        assert again == distill
        assert (finetune.train, finetune.optimizer.lr, finetune.optimizer.warmup) == ("full", 2e-5, 0.01)
        assert (preference.train, preference.beta, preference.optimizer.lr) == ("full", 0.01, 5e-7)
        converted = [
            Recipe.from_yaml(name, [f"layers={layers}"]).converted_layers(32)
            for layers in ("{keep: 0.5}", "{keep: 0.25}", "{keep: 0.125}", "all")
        ]
        assert Recipe.from_yaml(name).converted_layers(32) == converted[0] == list(range(0, 32, 2))
        assert [layer for layer in range(32) if layer not in converted[1]] == [3, 7, 11, 15, 19, 23, 27, 31]
        assert [layer for layer in range(32) if layer not in converted[2]] == [7, 15, 23, 31]
        assert converted[3] == list(range(32))


def test_yaml_round_trip(recipe: Recipe, tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe


def test_yaml_numbers_and_lists(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nexact_heads: [[18, 2], [23, 0]]\n"
        "stages: [{stage: transfer, optimizer: {lr: 1e-3, betas: [0.9, 0.95]}, tokens: 1_000}]\n"
    )
    recipe = Recipe.from_yaml(path)
    assert recipe.exact_heads == [(18, 2), (23, 0)]
    assert recipe.stages[0].optimizer.lr == 0.001
    assert recipe.stages[0].optimizer.betas == (0.9, 0.95)
    assert recipe.stages[0].tokens == 1000


def test_a_part_is_a_name_or_a_mapping() -> None:
    recipe = Recipe.parse({"name": "r", "mixer": {"gate": "none", "feature_map": {"name": "hedgehog", "d": 4}}}, "r")
    assert recipe.mixer is not None
    assert recipe.mixer.gate == Part(name="none")
    assert recipe.mixer.feature_map == Part(name="hedgehog", d=4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: r\nname: s", ["line 2", "'name' occurs twice"]),
        ("name: [r", ["line 1", "r.yaml"]),
        ("name: r\nmixr: null", ["`mixr`", "Did you mean 'mixer'?"]),
        ("name: r\nmixer: {window: {size: 64, sink: 4}}", ["`mixer.window.sink`", "'sinks'"]),
        ("name: r\nstages: [{stage: transfr}]", ["`stages.0`", "'transfr'", "Did you mean 'transfer'?"]),
        ("name: r\nstages: [{tokens: 4}]", ["`stages.0`", "needs a `stage` key"]),
        (
            "name: r\nstages: [{stage: transfer, optimizer: {lr: fast}}]",
            ["`stages.0.optimizer.lr`", "number", "'fast'"],
        ),
        ("name: r\nstages: [{stage: transfer, optimizer: {lr: .inf}}]", ["`stages.0.optimizer.lr`", "finite", "inf"]),
        ("name: r\nstages: [{stage: transfer, optimizer: {lr: 1e38}}]", ["`stages.0.optimizer.lr`", "equal to 1"]),
        (
            "name: r\nstages: [{stage: transfer, optimizer: {schedule: constant, min_lr: 1e-5}}]",
            ["`stages.0.optimizer`", "`min_lr` has no effect with `schedule: constant`"],
        ),
        ("name: r\nstages: [{stage: transfer, scale: .nan}]", ["`stages.0.scale`", "finite", "nan"]),
        ("name: r\nstages: [{stage: distill, temperature: .inf}]", ["`stages.0.temperature`", "finite", "inf"]),
        ("name: r\nexact_heads: {cache: nan%}", ["`exact_heads.cache`", "finite"]),
        ("name: r\nstages: [{stage: transfer, loss: msee}]", ["`stages.0.loss`", "Did you mean 'mse'"]),
        ("name: r\ndata: {length: '512'}", ["`data.length`", "integer", "'512' (str)"]),
        ("name: r\ndata: {length: 512.0}", ["`data.length`", "integer", "512.0 (float)"]),
        ("name: r\nmixer: {rotary: 1}", ["`mixer.rotary`", "boolean", "1 (int)"]),
        ("name: r\nmixer: {conv: 1}", ["`mixer.conv", "greater than or equal to 2"]),
        ("name: r\nmixer: {window: {sinks: 2, kind: terrace}}", ["`mixer.window`", "has no sinks"]),
        ("name: r\nlayers: [0, one]", ["`layers.1`", "'one' (str)"]),
        ("name: r\nlayers: some", ["`layers`", "'all' or a valid list"]),
        ("name: r\nlayers: {evry: 8}", ["`layers.evry`", "Did you mean 'every'?"]),
        ("name: r\nlayers: {every: 8, keep: 0.5}", ["`every` or `keep`"]),
        ("name: r\nlayers: {}", ["`every` or `keep`"]),
        ("name: r\nlayers: {keep: 1.5}", ["`layers.keep`", "less than 1"]),
        ("name: r\nexact_heads: [[1, 2, 3]]", ["`exact_heads.0`", "2 items"]),
        ("name: r\nexact_heads: [[1, 2], [1, 2]]", ["repeats a pair"]),
        ("name: r\nexact_heads: [[1, -2]]", ["`exact_heads.0.1`", "greater than or equal to 0"]),
        ("name: r\nexact_heads: {by: recall}", ["`exact_heads`", "`keep` or `cache`, one of them"]),
        ("name: r\nexact_heads: {keep: 2, cache: 10%}", ["`keep` or `cache`, one of them"]),
        ("name: r\nexact_heads: {keep: 2, by: recal}", ["`exact_heads.by`", "Did you mean 'recall'"]),
        ("name: r\nexact_heads: {cache: 200%}", ["`exact_heads.cache`", "less than 1"]),
        ("name: r\nexact_heads: {cache: x%}", ["`exact_heads.cache`", "number"]),
        ("name: r\nlayers: {every: 4, by: kl}", ["`layers.by`", "no choice"]),
        ("name: r\nprobe: {file: p.json}", ["`probe.file` has no effect"]),
        ("name: r\nmixer: null\nexact_heads: {keep: 2}", ["no effect where `mixer` is null"]),
        ("name: r\nlayers: [0]\nexact_heads: [[1, 0]]", ["layer 1 is not among `layers`"]),
        ("name: r\nmixer: null\nstages: [{stage: transfer}]", ["`mixer` is null"]),
        ("name: r\nstages: [{stage: finetune, batch: 8, micro_batch: 3}]", ["must divide"]),
        ("name: r\nstages: [{stage: finetune, length: 100}]", ["`length: 100` of stage `finetune`", "(1024)"]),
        ("name: r\nstages: [{stage: finetune, length: 2048}]", ["`length: 2048` of stage `finetune`", "(1024)"]),
        ("name: r\nstages: [{stage: finetune, train: full, lora: {r: 4}}]", ["no adapters"]),
        ("mixer: null", ["`name` is required"]),
        ("[1, 2]", ["mapping"]),
        ("", ["mapping"]),
        ("name: !!python/name:os.system r", ["could not determine a constructor"]),
    ],
)
def test_mistakes_are_named(tmp_path, text: str, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(LinearizeError) as caught:
        Recipe.from_yaml(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_unknown_recipe_has_near_matches() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'lolcats'"):
        Recipe.from_yaml("lolcat")
    with pytest.raises(LinearizeError, match="no recipe file"):
        Recipe.from_yaml("nowhere/lolcats.yaml")


def test_binary_file_is_refused(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LinearizeError, match="UTF-8"):
        Recipe.from_yaml(path)


def test_overrides(recipe: Recipe) -> None:
    changed = recipe.with_overrides(
        ["stages.0.optimizer.lr=1e-4", "mixer.gate.normalizer=8", "mixer.window={size: 16}", "mixer.window.sinks=2"]
    )
    assert changed.mixer is not None
    assert changed.stages[0].optimizer.lr == 1e-4
    assert changed.mixer.gate == Part(name="key", normalizer=8)
    assert changed.mixer.window == Window(size=16, sinks=2)
    assert recipe.stages[0].optimizer.lr == 1e-3
    short = recipe.with_overrides(["mixer.gate=none", "mixer.window=null", "exact_heads=[]"])
    assert short.mixer == Mixer(window=None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.optimizer.lrr=1", ["'lrr'", "Did you mean 'lr'"]),
        ("dta.length=2", ["'dta'", "Did you mean 'data'"]),
        ("stages.2.tokens=3", ["entry '2'", "a list of 2"]),
        ("stages.first.tokens=3", ["entry 'first'"]),
        ("name.x=1", ["`name`"]),
        ("stages.0.tokens=1e6", ["`stages.0.tokens`", "integer"]),
        ("data.length", ["key.path=value"]),
        ("=3", ["key.path=value"]),
        ("layers=[0", ["layers=[0"]),
    ],
)
def test_wrong_overrides(recipe: Recipe, override: str, words: list[str]) -> None:
    with pytest.raises(LinearizeError) as caught:
        recipe.with_overrides([override])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=5), st.integers(1000, 10**10))
def test_token_budget_is_split_in_ratio(tokens: list[int], total: int) -> None:
    recipe = Recipe(name="r", stages=[Transfer(tokens=n) for n in tokens])
    shares = [total * n / sum(tokens) for n in tokens]
    if min(shares) < 2:
        return
    scaled = [stage.tokens for stage in recipe.with_tokens(total).stages]
    assert sum(scaled) == total
    assert all(abs(got - share) <= 1 for got, share in zip(scaled, shares, strict=True))


def test_token_budget_too_small(recipe: Recipe) -> None:
    with pytest.raises(LinearizeError, match="more tokens"):
        recipe.with_tokens(1)
    with pytest.raises(LinearizeError, match="no stage"):
        Recipe(name="r").with_tokens(100)


def test_quick_uses_builtin_data(recipe: Recipe) -> None:
    changed = recipe.with_overrides(["data.source=some/hub", "data.loss=response", "quick.length=64", "quick.batch=3"])
    quick = changed.with_quick()
    assert quick.data.source == "builtin"
    assert quick.data.loss == "all"
    assert quick.data.length == 64
    assert [stage.batch for stage in quick.stages] == [3, 3]
    assert [stage.tokens for stage in quick.stages] == [30_000, 10_000]


@pytest.mark.parametrize(("size", "quick"), [(128, 64), (32, 32), ([16, 256], [16, 64]), ({"cache": 0.1}, 64)])
def test_quick_windows_and_text_are_no_more_than_its_section_says(size: object, quick: object) -> None:
    quick_section, stages = {"window": 64, "cross_entropy": 0.1}, [{"stage": "transfer"}, {"stage": "distill"}]
    recipe = Recipe.model_validate(
        {"name": "r", "mixer": {"window": {"size": size}}, "stages": stages, "quick": quick_section}
    )
    for factor, kept in ((1.0, 0.1), (0.05, 0.05)):
        stage = recipe.with_overrides([f"stages.1.cross_entropy={factor}"]).with_quick().stages[1]
        assert isinstance(stage, Distill)
        assert stage.cross_entropy == kept
    mixer = recipe.with_quick().mixer
    assert mixer is not None
    assert mixer.window is not None
    assert mixer.window.size == quick
    assert recipe.with_overrides(["mixer.window=null", "mixer.combine=memory_only"]).with_quick().stages


def test_assignment_is_validated(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="length"):
        recipe.data.length = 1
    assert Recipe(name="a").data is not Recipe(name="b").data


def test_prepare_orders_settings() -> None:
    liger = Recipe.from_yaml("liger")
    overrides = ["quick.tokens=50_000", "data.length=128", "stages.0.batch=4"]
    recipe = liger.prepare(quick=True, overrides=overrides)
    assert sum(stage.tokens for stage in recipe.stages) == 50_000
    assert (recipe.data.source, recipe.data.length) == ("builtin", 128)
    assert [stage.batch for stage in recipe.stages] == [4, liger.quick.batch]
    assert sum(stage.tokens for stage in liger.prepare(quick=True, tokens=9000).stages) == 9000
    assert liger.prepare() == liger


def test_prepare_replaces_data() -> None:
    liger = Recipe.from_yaml("paper/liger")
    other = liger.prepare(data="some/where").data
    assert (other.source, other.format, other.loss) == ("some/where", "auto", "response")
    assert liger.prepare(data="builtin").data.loss == "all"


def test_prepare_refuses_what_would_have_no_effect() -> None:
    liger = Recipe.from_yaml("liger")
    with pytest.raises(LinearizeError, match="together with --quick"):
        liger.prepare(overrides=["quick.tokens=5"])
    with pytest.raises(LinearizeError, match="both set token budgets"):
        liger.prepare(tokens=1000, overrides=["stages.0.tokens=5"])


@pytest.mark.parametrize(
    ("layers", "count", "kept"),
    [
        ("{every: 8}", 32, [7, 15, 23, 31]),
        ("{every: 8}", 30, [7, 15, 23]),
        ("{every: 2}", 5, [1, 3]),
        ("{every: 8}", 7, []),
        ("{keep: 0.25}", 32, [3, 7, 11, 15, 19, 23, 27, 31]),
        ("{keep: 0.25}", 10, [4, 9]),
        ("{keep: 0.3}", 10, [2, 5, 9]),
        ("{keep: 0.9}", 10, [0, 1, 2, 3, 4, 5, 6, 7, 9]),
    ],
)
def test_layers_that_stay_softmax_lie_evenly(layers: str, count: int, kept: list[int]) -> None:
    recipe = Recipe.from_yaml("liger", [f"layers={layers}"])
    assert [index for index in range(count) if index not in recipe.converted_layers(count)] == kept
    again = Recipe.parse(yaml_io.parse(recipe.to_yaml(), "r"), "r")
    assert again == recipe


def test_a_rule_that_keeps_no_layer_or_all_is_an_error() -> None:
    with pytest.raises(LinearizeError, match="keeps 0 of the model's 4 layers"):
        Recipe.from_yaml("liger", ["layers={keep: 0.1}"]).converted_layers(4)
    with pytest.raises(LinearizeError, match="keeps 2 of the model's 2 layers"):
        Recipe.from_yaml("liger", ["layers={keep: 0.9}"]).converted_layers(2)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"mixer": None, "stages": [{"stage": "finetune"}]}, "`progressive` repeats"),
        ({"stages": [{"stage": "preference"}]}, "`progressive` repeats"),
        ({"stages": [{"stage": "preference"}, {"stage": "distill"}]}, "`preference` stages come last"),
    ],
)
def test_rounds_without_an_effect_are_an_error(recipe, words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        Recipe.parse({"name": "r", "progressive": 2, **recipe}, "r")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"stages": [{"stage": "preference"}]}, "compares continuations"),
        ({"stages": [{"stage": "distill", "cache": True, "top_k": 4}]}, "which `causal: false` masks anew"),
        ({"exact_heads": {"keep": 2}}, "name layers and heads"),
        ({"mixer": {"cache_dtype": "mxint8"}}, "encoders have no cache"),
        ({"layers": {"keep": 0.5, "by": "kl"}}, "name layers and heads"),
    ],
)
def test_what_needs_a_decoder_is_refused_in_a_recipe_for_encoders(recipe, words: str) -> None:
    assert Recipe.parse({"name": "r", **recipe}, "r").causal
    with pytest.raises(LinearizeError, match=words):
        Recipe.parse({"name": "r", "causal": False, **recipe}, "r")


def test_a_cache_dtype_without_a_window_or_exact_heads_is_an_error() -> None:
    alone = {"combine": "memory_only", "window": None, "cache_dtype": "mxint8"}
    with pytest.raises(LinearizeError, match="there are none"):
        Recipe.parse({"name": "r", "mixer": alone}, "r")
    assert Recipe.parse({"name": "r", "mixer": alone, "exact_heads": [[0, 1]]}, "r").mixer.cache_dtype == "mxint8"
    with pytest.raises(LinearizeError, match="mixer"):
        Recipe.from_yaml("control/softmax-lora", ["mixer.cache_dtype=mxint8"])


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        (None, "there is no `mixer.window`"),
        ({"combine": "memory_only", "window": None}, "there is no `mixer.window`"),
        ({"window": {"size": 16, "kind": "terrace"}}, "`mixer.window.kind` is terrace"),
        ({"window": {"size": 8}}, "`mixer.window.size` is the same"),
        ({"window": {"size": [8, 8]}}, "`mixer.window.size` is the same"),
    ],
)
def test_a_stage_window_without_an_effect_is_an_error(mixer, words: str) -> None:
    recipe = {"name": "r", "mixer": mixer, "stages": [{"stage": "finetune", "window": 8}]}
    with pytest.raises(LinearizeError, match=re.escape(words)):
        Recipe.parse(recipe, "r")
    for sizes in (4, 9, [4, 8], {"cache": "5%", "among": [4, 8]}):
        assert Recipe.parse({**recipe, "mixer": {"window": {"size": sizes}}}, "r").stages[0].window == 8


def test_rounds_replace_layers_that_are_spread_over_the_model() -> None:
    recipe = Recipe.parse({"name": "r", "progressive": 3, "stages": [{"stage": "transfer", "tokens": 300}]}, "r")
    assert [recipe.joining(list(range(8)), turn) for turn in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert [(turn, stage.tokens) for turn, stage in recipe.schedule()] == [(0, 100), (1, 100), (2, 100)]
    with pytest.raises(LinearizeError, match="only 2 layers"):
        recipe.joining([0, 1], 0)


@pytest.mark.parametrize(
    ("stages", "schedule"),
    [
        ("tfp", "0t 0f 1t 1f 1p"),
        ("tdfp", "0t 0d 1t 1d 1f 1p"),
        ("df", "0d 1d 1f"),
        ("dfd", "0d 0f 0d 1d 1f 1d"),
    ],
)
def test_a_round_runs_up_to_the_last_distillation(stages: str, schedule: str) -> None:
    kinds = {"t": "transfer", "f": "finetune", "d": "distill", "p": "preference"}
    given = [{"stage": kinds[letter], "tokens": 100} for letter in stages]
    recipe = Recipe.parse({"name": "r", "progressive": 2, "stages": given}, "r")
    assert " ".join(f"{turn}{stage.stage[0]}" for turn, stage in recipe.schedule()) == schedule
    assert sum(stage.tokens for _, stage in recipe.schedule()) == 100 * len(stages)
