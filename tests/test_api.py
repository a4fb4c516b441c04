"""The whole path on a tiny teacher: what a run leaves, how it goes on after a kill, what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize import yaml_io
from linearize.api import linearize, load, plan
from linearize.errors import LinearizeError
from linearize.eval import kv_cache_bytes
from linearize.evaluation import evaluate_folder
from linearize.generation import generate_text
from linearize.hub import choose_files, written_files
from linearize.recipe import Recipe

FILES = {
    "README.md",
    "config.json",
    "figures/quality.png",
    "figures/transfer.png",
    "generation_config.json",
    "metrics.jsonl",
    "model.safetensors",
    "modeling_linearized.py",
    "recipe.lock.yaml",
    "report.html",
    "results.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def teacher(make_teacher) -> str:
    return str(make_teacher())


def small(recipe: Recipe | str = "liger", tokens: int = 768) -> dict:
    stages = len(Recipe.resolve(recipe).stages)
    batches = [f"stages.{i}.{key}" for i in range(stages) for key in ("batch=2", "micro_batch=1")]
    return {
        "data": "builtin",
        "tokens": tokens,
        "overrides": ["data.length=64", "data.held_out=2", "data.loss=all", *batches],
    }


def test_a_run_leaves_a_checkpoint_with_everything_in_it(teacher, tmp_path) -> None:
    settings = {**small(), "tokens": 777}
    result = linearize(teacher, "liger", tmp_path / "out", **settings)
    planned = [stage.tokens for stage in plan(teacher, "liger", **settings).stages]
    assert [row["tokens"] for row in result.results["rows"][2:]] == [planned[0], sum(planned)]
    assert set(written_files(result.output)) == FILES
    assert yaml_io.read(result.output / "recipe.lock.yaml")["files"] == sorted(FILES)
    assert not (tmp_path / "out.partial").exists()
    names = [row["name"] for row in result.results["rows"]]
    assert names == ["teacher", "after surgery", "after transfer", "after distill"]
    assert result.results["rows"][-1]["tokens"] == sum(
        s.steps(64) * 128 for s in plan(teacher, "liger", **small()).recipe.stages
    )
    records = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"transfer", "distill"}
    model = load(result.output)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        cached = model(ids, use_cache=True).past_key_values
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    assert tokenizer("abc").input_ids
    student = next(row for row in plan(teacher, "liger", **small()).cache.values())[1]
    assert cached.nbytes() == student


def test_every_stage_in_a_row(teacher, tmp_path) -> None:
    """Full parameters, a copy of the teacher, kept logits and builtin pairs, as `--quick` would run them."""
    distill = {
        "stage": "distill",
        "train": "full",
        "top_k": 8,
        "cache": True,
        "optimizer": {"lr": 1e-4, "mixer_lr": 1e-3},
    }
    stages = [
        {"stage": "transfer"},
        distill,
        {"stage": "distill", "hidden": 0.1},
        {"stage": "preference", "train": "full"},
    ]
    liger = Recipe.from_yaml("liger").model_dump(mode="json")
    recipe = Recipe.parse({**liger, "stages": stages}, "all")
    events: list[dict] = []
    result = linearize(teacher, recipe, tmp_path / "out", watch=events.append, **small(recipe, tokens=2048))
    names = [row["name"] for row in result.results["rows"]]
    assert names[2:] == ["after transfer", "after distill", "after distill-2", "after preference"]
    last = [event for event in events if event["event"] == "step"][-1]
    assert last["stage"] == "preference" and {"margin", "accuracy"} <= last.keys()
    data = [event["description"] for event in events if event["event"] == "data"]
    assert len(data) == 2 and data[1].startswith("builtin: 8 training pairs in rows of 64 tokens")
    assert not list(tmp_path.rglob("teacher-*"))


def test_stages_on_rows_of_their_own_length(teacher, tmp_path) -> None:
    """The first stage cuts the rows of 64 tokens into four; the last has them whole."""
    first, last = ({"stage": "finetune", "tokens": tokens, "batch": 2} for tokens in (256, 512))
    liger = Recipe.from_yaml("liger").model_dump(mode="json")
    recipe = Recipe.parse({**liger, "stages": [{**first, "length": 16}, last]}, "two")
    settings = {"data": "builtin", "overrides": ["data.length=64", "data.held_out=2", "data.loss=all"]}
    assert [stage.steps for stage in plan(teacher, recipe, **settings).stages] == [8, 4]
    seen: dict[str, list[dict]] = {}

    def watch(event: dict) -> None:
        if event["event"] == "step":
            seen.setdefault(event["stage"], []).append(event)

    result = linearize(teacher, recipe, tmp_path / "out", watch=watch, **settings)
    assert [(len(events), events[-1]["tokens"]) for events in seen.values()] == [(8, 256), (4, 512)]
    assert [row["tokens"] for row in result.results["rows"]] == [0, 0, 256, 768]
    corpus = json.loads((result.output / "results.json").read_text())["provenance"]["data"]["description"]
    assert "12 training rows of 64 tokens (768 from" in corpus


@pytest.mark.parametrize("train", ["full", "lora"])
def test_layers_are_replaced_in_rounds(make_teacher, tmp_path, monkeypatch, train: str) -> None:
    """Three layers in two rounds; stopped in either, it ends with the same weights to the bit."""
    teacher = make_teacher("three", num_hidden_layers=3)
    liger = Recipe.from_yaml("liger").model_dump(mode="json")
    sizes = {"tokens": 512, "batch": 2, "micro_batch": 1}
    distill = {"stage": "distill", "train": train, **sizes, "optimizer": {"lr": 1e-3, "mixer_lr": 1e-2}}
    stages = [{"stage": "transfer", **sizes}, distill, {"stage": "preference", **sizes}]
    data = {"length": 64, "held_out": 2}
    recipe = Recipe.parse({**liger, "name": "r", "stages": stages, "data": data, "progressive": 2}, "r")
    steps: list[dict] = []
    whole = linearize(teacher, recipe, tmp_path / "whole", watch=steps.append)
    layers = [(e["stage"], sorted(e["layers"])) for e in steps if e["event"] == "step" and "layers" in e]
    assert layers == [("transfer", [0, 2])] * 2 + [("transfer-2", [1])] * 2
    names = [row["name"] for row in whole.results["rows"][2:]]
    assert names == [f"after {s}" for s in ("transfer", "distill", "transfer-2", "distill-2", "preference")]
    planned = plan(teacher, recipe)
    assert [(stage.name, stage.steps) for stage in planned.stages] == [
        *[("transfer", 2), ("distill", 2)] * 2,
        ("preference", 4),
    ]
    assert planned.stages[0].trained == 2 * planned.stages[2].trained
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    for place in (("distill", 2), ("distill-2", 2)):

        def stop(event: dict, place=place) -> None:
            if event["event"] == "step" and (event["stage"], event["step"]) == place:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            linearize(teacher, recipe, tmp_path / "stopped", watch=stop)
    resumed = linearize(teacher, recipe, tmp_path / "stopped")
    assert (whole.output / "model.safetensors").read_bytes() == (resumed.output / "model.safetensors").read_bytes()
    assert load(resumed.output).config.linearize["layers"] == [0, 1, 2]


def test_a_second_run_reads_the_first_and_a_changed_one_says_what_changed(teacher, tmp_path) -> None:
    first = linearize(teacher, "control/window-only", tmp_path / "out", **small("control/window-only"))
    again = linearize(teacher, "control/window-only", tmp_path / "out", **small("control/window-only"))
    assert again.finished_before and again.results == first.results
    with pytest.raises(LinearizeError, match=r"seed: 0 -> 1"):
        linearize(teacher, "control/window-only", tmp_path / "out", seed=1, **small("control/window-only"))
    fresh = linearize(
        teacher, "control/window-only", tmp_path / "out", seed=1, fresh=True, **small("control/window-only")
    )
    assert not fresh.finished_before


def test_the_headline_command_with_a_tiny_llama_in_the_cache(cache, make_teacher, tmp_path, monkeypatch) -> None:
    make_teacher("cache/models/llama-3-8b")
    monkeypatch.chdir(tmp_path)
    result = linearize("llama-3-8b", "liger", **small())
    assert result.output == Path("llama-3-8b-liger")
    assert result.results["model"] == "llama-3-8b"


def test_the_headline_plan_needs_no_download(cache) -> None:
    made = plan("llama-3-8b", "liger", device="cpu")
    assert [layer.kind for layer in made.layers] == ["converted"] * 32
    assert made.cache[1024][0] == 32 * 2 * 8 * 128 * 4 * 1024


def test_planned_teacher_bytes_are_those_of_a_softmax_cache(teacher) -> None:
    config = AutoModelForCausalLM.from_pretrained(teacher).config
    assert plan(teacher, "liger", **small()).cache[8192][0] == kv_cache_bytes(config, 8192, torch.float32)


def test_exact_heads_and_some_layers(teacher, tmp_path) -> None:
    settings = small()
    settings["overrides"] += ["layers=[1]", "exact_heads=[[1, 1]]"]
    result = linearize(teacher, "liger", tmp_path / "out", **settings)
    model = load(result.output)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :30], use_cache=True)
        rest = [model(ids[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(30, 50)]
    torch.testing.assert_close(torch.cat([first.logits, *rest], 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": ["data.length=512"]}, "context ends at 256"),
        ({"overrides": ["stages.1.lora.targets=[q_prj]"]}, "q_prj"),
        ({"overrides": ["exact_heads=[[0, 9]]"]}, "KV head 9"),
        ({"overrides": ["mixer.gate=kye"]}, "Did you mean 'key'"),
        ({"overrides": ["mixer.gate={name: key, normaliser: 2.0}"]}, "Did you mean 'normalizer'"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"data": ""}, "`data.source` names '', and there is no such"),
        ({"dtype": "fp8"}, "Unknown dtype"),
        ({"overrides": ["probe.tasks=[passkee]"]}, r"`probe\.tasks.*Did you mean 'passkey'"),
        ({"track": "tensorbord"}, "Did you mean 'tensorboard'"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(teacher, tmp_path, changes, message) -> None:
    settings = small()
    settings["overrides"] += changes.get("overrides", [])
    with pytest.raises(LinearizeError, match=message):
        linearize(
            teacher, "liger", tmp_path / "out", **{**settings, **{k: v for k, v in changes.items() if k != "overrides"}}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_empty_data_is_refused_and_leaves_nothing(teacher, tmp_path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(LinearizeError, match=r"empty\.jsonl"):
        linearize(teacher, "liger", tmp_path / "out", **{**small(), "data": str(tmp_path / "empty.jsonl")})
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ("data.source=[builtin, {}]", "`data.source`"),
        ("stages=[{{stage: transfer}}, {{stage: preference, source: '{}'}}]", "the stage 'preference'"),
    ],
)
def test_a_source_that_is_missing_is_found_before_anything_loads(teacher, tmp_path, change: str, setting: str) -> None:
    (tmp_path / "books.txt").write_text("Near.")
    events: list[dict] = []
    settings = {**small(), "data": None, "overrides": ["data.length=64", change.format(tmp_path / "book.txt")]}
    with pytest.raises(LinearizeError, match=rf"{setting} names .*book\.txt', and there is.*Did you mean .*books\.txt"):
        linearize(teacher, "liger", tmp_path / "out", watch=events.append, **settings)
    assert not [event for event in events if event["event"] == "load"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []


def test_a_stopped_run_needs_its_source_no_more(teacher, tmp_path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(f"Paragraph {i} of a text with some words in it." for i in range(200)))
    settings = {**small(), "data": str(source)}

    def stop(event: dict) -> None:
        if event["event"] == "stage":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linearize(teacher, "liger", tmp_path / "out", watch=stop, **settings)
    source.unlink()
    assert linearize(teacher, "liger", tmp_path / "out", **settings).output == tmp_path / "out"


def test_a_folder_that_is_not_ours_is_left_alone(teacher, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(LinearizeError, match="not written by linearize"):
            linearize(teacher, "liger", tmp_path / "out", fresh=fresh, **small())
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_a_linearized_model_is_not_linearized_again(teacher, tmp_path) -> None:
    done = linearize(teacher, "control/window-only", tmp_path / "out", **small("control/window-only")).output
    with pytest.raises(LinearizeError, match="linearized"):
        linearize(str(done), "liger", tmp_path / "twice", **small())


def test_no_disk_space_is_found_before_the_run(teacher, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(LinearizeError, match="free"):
        linearize(teacher, "liger", tmp_path / "out", **small())
    assert not (tmp_path / "out.partial").exists()


def test_two_runs_do_not_share_a_folder(teacher, tmp_path) -> None:
    def watch(event) -> None:
        if event["event"] == "stage":
            with pytest.raises(LinearizeError, match="Another run"):
                linearize(teacher, "liger", tmp_path / "out", **small())

    linearize(teacher, "liger", tmp_path / "out", watch=watch, **small())


def test_the_softmax_control_is_a_plain_checkpoint(teacher, tmp_path) -> None:
    result = linearize(teacher, "control/softmax-lora", tmp_path / "out", **small("control/softmax-lora"))
    assert [row["name"] for row in result.results["rows"]] == ["teacher", "after distill"]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (teacher, result.output))
    assert before.keys() == after.keys()
    changed = {
        name.rpartition(".")[0].rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_evaluate_and_generate_a_finished_folder(teacher, tmp_path) -> None:
    result = linearize(teacher, "liger", tmp_path / "out", **small())
    models = evaluate_folder(result.output, against=teacher, recall="none", samples=1)["models"]
    assert [model["name"] for model in models][:3] == ["teacher", "out", "memory zeroed"]
    for page in ("README.md", "report.html"):  # written anew with the evaluation
        assert "zeroing it changes the loss on held-out" in (result.output / page).read_text()
    assert "eval/eval.md" in choose_files(result.output).files
    measured = models[1]["text"]["held-out"]
    assert measured["perplexity"] == pytest.approx(result.results["rows"][-1]["perplexity"], rel=1e-5)
    assert measured["kl"] == pytest.approx(result.results["rows"][-1]["kl"], rel=1e-3)
    text = "".join(generate_text(result.output, "abc", max_new_tokens=5))
    assert isinstance(text, str)
    with pytest.raises(LinearizeError, match="no token"):
        list(generate_text(result.output, ""))
    with pytest.raises(ValueError, match="max_new_tokens"):  # what fails in the writing thread comes out here
        list(generate_text(result.output, "abc", max_new_tokens=-1))
    lock = result.output / "recipe.lock.yaml"
    for damage, words in (("settings: {}\n", "is damaged"), ("[]\n", "is damaged"), (None, "has no recipe.lock.yaml")):
        lock.unlink()
        if damage is not None:
            lock.write_text(damage)
        with pytest.raises(LinearizeError, match=words):
            evaluate_folder(result.output)


def test_a_push_uploads_the_finished_folder(teacher, tmp_path, monkeypatch) -> None:
    pushed = []
    monkeypatch.setattr("linearize.api.push", lambda folder, repo: pushed.append((folder, repo)))
    with pytest.raises(LinearizeError, match="owner/name"):
        linearize(teacher, "liger", tmp_path / "out", push_to_hub="model", **small())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]
    result = linearize(teacher, "liger", tmp_path / "out", push_to_hub="me/model", **small())
    assert pushed == [(result.output, "me/model")]
    assert linearize(teacher, "liger", tmp_path / "out", push_to_hub="me/other", **small()).finished_before
    assert pushed[1:] == [(result.output, "me/other")]
    modes = {path.stat().st_mode for path in result.output.rglob("*") if path.is_file()}
    assert len(modes) == 1  # others may read what one may read
