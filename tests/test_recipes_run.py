"""Every recipe on every family: what fits is planned and runs, what does not is refused with the reason."""

import random
from dataclasses import replace

import pytest
import torch

import linearize.modeling  # noqa: F401  (fills the registries)
from linearize import listing
from linearize.cli import main
from linearize.data import Corpus, PackedRows
from linearize.errors import LinearizeError
from linearize.planning import converted_layers, make_plan, needs_teacher_copy, place_heads
from linearize.recipe import Recipe, recipe_names
from linearize.recipe_stages import Preference, Transfer
from linearize.registry import combines, families, feature_maps, gates, memories
from linearize.stages import Run, run_stage
from linearize.surgery import convert

RECIPES = {name: Recipe.from_yaml(name) for name in recipe_names()}
CAUSAL = {name: families.get(name).causal for name in families.names()}
PAIRS = [(recipe, family) for recipe in RECIPES for family in CAUSAL if RECIPES[recipe].causal == CAUSAL[family]]
REFUSED = [(recipe, family) for recipe in RECIPES for family in CAUSAL if RECIPES[recipe].causal != CAUSAL[family]]
SEED = 5
LENGTH = 32
LONG = 200  # where a memory learns what to keep from 64 queries behind its window


def rotation(seed: int) -> list[tuple[str, str]]:
    """Two families for each recipe; over the recipes every family has its turn."""
    dice, chosen = random.Random(seed), []
    for causal in (True, False):
        names = [name for name in CAUSAL if CAUSAL[name] == causal]
        dice.shuffle(names)
        for place, recipe in enumerate(name for name in RECIPES if RECIPES[name].causal == causal):
            chosen += [(recipe, names[(2 * place + turn) % len(names)]) for turn in range(2)]
    return chosen


def retains(recipe: Recipe) -> bool:
    return recipe.mixer is not None and recipe.mixer.memory.name == "retain"


def rows_of(recipe: Recipe, length: int) -> list[str]:
    """Overrides for rows of `length` tokens, a stage's own ones as much shorter as its recipe has them."""
    least = length if retains(recipe) else 8
    own = {index: stage.length for index, stage in enumerate(recipe.stages) if stage.length is not None}
    shorter = {index: max(least, each * length // recipe.data.length) for index, each in own.items()}
    return [f"data.length={length}", *(f"stages.{index}.length={each}" for index, each in shorter.items())]


def length_of(recipe: Recipe) -> int:
    """Rows that fit the tiny teacher."""
    return LONG if retains(recipe) else LENGTH


def small(recipe: Recipe) -> Recipe:
    """A recipe with two steps of every stage, on rows that fit the tiny teacher and reach beyond the window."""
    length = length_of(recipe)
    recipe = recipe.with_overrides(rows_of(recipe, length))
    changes = ["data.held_out=1"]
    if recipe.mixer is not None and recipe.mixer.window is not None:
        changes.append("mixer.window.size=6")
    for index, own in enumerate(recipe.stages):
        changes += [f"stages.{index}.micro_batch=1", f"stages.{index}.batch=2"]
        rounds = sum(own == stage.model_copy(update={"tokens": own.tokens}) for _, stage in recipe.schedule())
        changes.append(f"stages.{index}.tokens={2 * 2 * own.row_length(length) * rounds}")
    return recipe.with_overrides(changes)


def test_ls_shows_every_recipe_part_and_family(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["ls"])
    lines = capsys.readouterr().out.splitlines()
    cells = {word for line in lines for word in line.replace("│", " ").replace("┃", " ").split()}
    names = [*RECIPES, *CAUSAL]
    names += [name for registry in (feature_maps, gates, memories, combines) for name in registry.names()]
    assert not [name for name in names if name not in cells]
    assert set(listing.KINDS) == {"recipes", "models", "parts", "families"}


@pytest.mark.parametrize(("recipe", "family"), PAIRS)
def test_a_recipe_plans_for_every_family_that_it_fits(tiny_config, recipe, family) -> None:
    config = tiny_config(family, num_hidden_layers=8)
    recipe = RECIPES[recipe]
    plan = make_plan(recipe.with_overrides(rows_of(recipe, length_of(recipe))), config)
    converted = [layer.index for layer in plan.layers if layer.kind == "converted"]
    assert converted == converted_layers(recipe, config)
    assert (recipe.mixer is None) == (converted == [])
    assert all(stage.trained for stage in plan.stages)


@pytest.mark.parametrize(("recipe", "family"), REFUSED)
def test_a_recipe_says_why_it_does_not_fit_a_family(tiny_config, recipe, family) -> None:
    words = "is causal.*encoder.*hedgehog-encoder" if RECIPES[recipe].causal else "is for encoders.*decoder.*liger"
    with pytest.raises(LinearizeError, match=words) as caught:
        make_plan(RECIPES[recipe], tiny_config(family))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("recipe", "family"), [("liger", "bert"), ("lion", "llama")])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_plan_and_run_end_with_2_and_the_reason(make_teacher, tmp_path, capsys, command, recipe, family) -> None:
    teacher = make_teacher(family=family)
    words = [command, "--model", str(teacher), "--recipe", recipe, "--quick", "data.length=64"]
    with pytest.raises(SystemExit) as ended:
        main([*words, *(["--output", str(tmp_path / "out")] if command == "run" else [])])
    assert ended.value.code == 2
    assert "encoder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]


def run_stages(random_teacher, folder, recipe: str, family: str) -> None:
    """Convert a tiny teacher and run two steps of every stage; each must change something and stay finite."""
    layers = 2 if RECIPES[recipe].layers == "all" else 8  # so many that Gemma has several that are not local
    model = random_teacher(family, num_hidden_layers=layers)
    chosen = place_heads(small(RECIPES[recipe]), model.config, torch.float32)
    length = length_of(RECIPES[recipe])
    ids = torch.randint(3, 61, (4, length), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    positions = torch.cat([torch.arange(12), torch.arange(length - 12)]).int().repeat(4, 1)
    rows = PackedRows(ids, positions, torch.where(positions == 0, -100, ids))
    halves = torch.arange(length // 2).repeat(2).int().repeat(4, 1)
    answers = PackedRows(ids, halves, torch.where(halves < 4, -100, ids))
    pairs = Corpus(answers, answers[:1], "", "", {})
    masking = {} if chosen.causal else {"masking": {"token": 60, "vocabulary": 60}}
    surgery = None
    if chosen.mixer is not None:
        places = converted_layers(chosen, model.config)
        surgery = convert(model, chosen.mixer.model_dump(), places, list(chosen.exact_heads))
    corpus = Corpus(rows, rows[:1], "", "", masking)
    run = Run(model, surgery, corpus, folder / "stages", 0, torch.device("cpu"), metrics=folder / "metrics.jsonl")
    run.load_teacher = lambda device: random_teacher(family, num_hidden_layers=layers)
    converted = [] if surgery is None else sorted(surgery.teachers)
    for index, (turn, stage) in enumerate(chosen.schedule()):
        assert stage.steps(length) == 2
        if surgery is not None and chosen.progressive > 1:
            surgery.activate(layer for earlier in range(turn + 1) for layer in chosen.joining(converted, earlier))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        own = replace(
            run,
            corpus=corpus.with_length(stage.row_length(length)),
            teacher_copy=needs_teacher_copy(chosen, model.config, index),
        )
        if surgery is not None and isinstance(stage, Transfer):
            own.surgery = surgery.only(chosen.joining(converted, turn))
        if isinstance(stage, Preference):
            own.corpus = pairs
        run_stage(stage, own, f"{stage.stage}-{index}")
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert any(not torch.equal(after[name], before[name]) for name in before)
        assert all(torch.isfinite(tensor).all() for tensor in after.values())


@pytest.mark.parametrize(("recipe", "family"), rotation(SEED))
def test_each_recipe_runs_on_two_families(random_teacher, tmp_path, recipe, family) -> None:
    run_stages(random_teacher, tmp_path, recipe, family)


def test_the_rotation_gives_every_family_its_turn() -> None:
    assert {family for _, family in rotation(SEED)} == set(CAUSAL)
    assert rotation(SEED) == rotation(SEED) != rotation(SEED + 1)


@pytest.mark.soak
@pytest.mark.parametrize(("recipe", "family"), PAIRS)
def test_each_recipe_runs_on_each_family(random_teacher, tmp_path, recipe, family) -> None:
    run_stages(random_teacher, tmp_path, recipe, family)
