"""Streamed runs and merged parts leave the folder that a resident run leaves."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearize.api import linearize, load, plan
from linearize.errors import LinearizeError
from linearize.recipe import Recipe
from linearize.stages.blocks import BlockInputs
from linearize.streaming import merge

SIZES = {"data": "builtin", "tokens": 768}
ROWS = ["data.length=64", "data.held_out=2", "data.loss=all"]
SMALL = ["stages.0.batch=2", "stages.0.micro_batch=1", *ROWS]


@pytest.fixture(scope="module")
def teacher(save_teacher, tmp_path_factory) -> Path:
    """Four layers in bf16, in files of their own for a layer or two."""
    from transformers import AutoModelForCausalLM

    folder: Path = save_teacher(tmp_path_factory.mktemp("t") / "teacher", num_hidden_layers=4, initializer_range=0.2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def transfer() -> Recipe:
    """lolcats up to its transfer, with exact heads, whose layers' projections are reordered."""
    recipe = Recipe.from_yaml("lolcats").model_dump(mode="json")
    return Recipe.parse({**recipe, "stages": recipe["stages"][:1], "exact_heads": [[1, 1]]}, "r")


@pytest.fixture(scope="module")
def resident(teacher, transfer, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("r") / "resident"
    return linearize(str(teacher), transfer, output, **SIZES, overrides=SMALL).output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder).state_dict())


def assert_same(folder: Path, other: Path) -> None:
    """The same checkpoint: tensors within 1e-5, dtypes, configuration and file names but for those of weights."""
    found, wanted = weights(folder), weights(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("config.json", "generation_config.json", "modeling_linearized.py", "tokenizer.json"):
        assert (folder / name).read_text() == (other / name).read_text()
    names = [{p.name for p in f.iterdir() if not p.name.startswith(("model.", "model-"))} for f in (folder, other)]
    assert names[0] == names[1]


def test_a_streamed_run_leaves_what_a_resident_one_leaves(teacher, transfer, resident, tmp_path) -> None:
    events: list[dict[str, Any]] = []
    result = linearize(
        str(teacher), transfer, tmp_path / "out", **SIZES, overrides=SMALL, stream_layers=True, watch=events.append
    )
    assert_same(result.output, resident)
    wanted = json.loads((resident / "results.json").read_text())
    assert [row["name"] for row in result.results["rows"]] == [row["name"] for row in wanted["rows"]]
    for row, other in zip(result.results["rows"], wanted["rows"], strict=True):
        assert row["tokens"] == other["tokens"]
        for key in ("perplexity", "kl"):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)
    assert "samples" not in result.results and result.results["cache"] == wanted["cache"]
    whole = sum(tensor.nbytes for name, tensor in weights(resident).items() if ".mixer." not in name)
    assert 0 < result.results["provenance"]["teacher_bytes_at_once"] < whole / 2
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, 4 * 6 + 1)) and events[-1]["event"] == "save"
    assert not (tmp_path / "out.partial").exists()
    again = linearize(str(teacher), transfer, tmp_path / "out", **SIZES, overrides=SMALL, stream_layers=True)
    assert again.finished_before
    with pytest.raises(LinearizeError, match="stream_layers: True -> absent"):
        linearize(str(teacher), transfer, tmp_path / "out", **SIZES, overrides=SMALL)


def test_files_that_nothing_changed_in_are_copied(teacher, transfer, tmp_path) -> None:
    """In the files' own dtype; layer 1, whose heads are reordered, and the mixers are written."""
    result = linearize(
        str(teacher), transfer, tmp_path / "out", **SIZES, overrides=SMALL, dtype="bfloat16", stream_layers=True
    )
    index = json.loads((result.output / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in result.output.glob("*.safetensors")}
    before = {path.read_bytes() for path in teacher.glob("*.safetensors")}
    after = {path: path.read_bytes() in before for path in sorted(result.output.glob("*.safetensors"))}
    copied = {name for path, same in after.items() if same for name in load_file(path)}
    assert "model.embed_tokens.weight" in copied and "model.layers.3.mlp.up_proj.weight" in copied
    assert not any(".mixer." in name or ".layers.1.self_attn." in name for name in copied)
    tensors = weights(result.output)
    original = {name: t for path in teacher.glob("*.safetensors") for name, t in load_file(path).items()}
    order = [16 + i for i in range(16)] + list(range(16))
    assert torch.equal(
        tensors["model.layers.1.self_attn.k_proj.weight"], original["model.layers.1.self_attn.k_proj.weight"][order]
    )
    assert torch.equal(tensors["lm_head.weight"], original["lm_head.weight"])


def test_parts_merge_into_the_one_run(teacher, transfer, resident, tmp_path, capsys) -> None:
    parts = []
    for layers in ("0:3", "3:"):
        folder = tmp_path / layers.replace(":", "-")
        made = linearize(str(teacher), transfer, folder, **SIZES, overrides=SMALL, layers=layers)
        assert not list(folder.glob("model*")) and made.results["rows"] == []
        parts.append(folder)
    with pytest.raises(LinearizeError, match="3 missing, none there twice"):
        merge(parts[:1], tmp_path / "merged")
    with pytest.raises(LinearizeError, match=r"3 missing, 0, 1, 2 there twice.*--layers 0:10"):
        merge([parts[0], parts[0]], tmp_path / "merged")
    result = merge(reversed(parts), tmp_path / "merged")
    assert_same(result.output, resident)
    assert result.results["rows"] == [] and "Quality" not in (result.output / "README.md").read_text()
    records = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 4 * 6 + 1))
    assert [int(next(iter(record["layers"]))) for record in records[::6]] == [0, 1, 2, 3]
    assert records[-1]["tokens"] == 768
    assert merge(parts, tmp_path / "merged").finished_before
    with pytest.raises(LinearizeError, match="whole run, not a part"):
        merge([resident], tmp_path / "other")
    with pytest.raises(LinearizeError, match="is no part of a run"):
        merge([tmp_path], tmp_path / "other")
    other = tmp_path / "other-part"
    linearize(str(teacher), transfer, other, **SIZES, seed=1, overrides=SMALL, layers="3:")
    with pytest.raises(LinearizeError, match="seed: 1 -> 0"):
        merge([parts[0], other], tmp_path / "other")
    changed = next(path for path in teacher.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    kept = changed.read_bytes()
    save_file({name: tensor + 1 for name, tensor in load_file(changed).items()}, changed, {"format": "pt"})
    try:
        with pytest.raises(LinearizeError, match="made from other weights"):
            merge(parts, tmp_path / "other")
    finally:
        changed.write_bytes(kept)
    assert not (tmp_path / "other").exists()


def test_later_stages_go_on_with_the_whole_model(teacher, tmp_path) -> None:
    """As they do behind a resident transfer."""
    overrides = [*SMALL, "stages.1.batch=2", "stages.1.micro_batch=1"]
    rows = []
    for stream in (False, True):
        folder = tmp_path / f"out-{stream}"
        made = linearize(str(teacher), "lolcats", folder, **SIZES, overrides=overrides, stream_layers=stream)
        rows.append(made.results["rows"])
    assert_same(tmp_path / "out-True", tmp_path / "out-False")
    stages = plan(str(teacher), "lolcats", **SIZES, overrides=overrides).stages
    assert [row["name"] for row in rows[1]] == ["teacher", "after surgery", "after transfer", f"after {stages[1].name}"]
    for row, other in zip(*rows, strict=True):
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
    logged = [json.loads(line)["stage"] for line in (tmp_path / "out-True" / "metrics.jsonl").read_text().splitlines()]
    assert logged == ["transfer"] * 4 * stages[0].steps + [stages[1].name] * stages[1].steps


def test_a_stopped_run_goes_on(teacher, transfer, resident, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("linearize.stream_plan.available_memory", lambda: 0)
    monkeypatch.setattr("linearize.planning.available_memory", lambda: 0)
    embedded = []
    original = BlockInputs._write
    monkeypatch.setattr(
        BlockInputs, "_write", lambda self, part, t, place: (embedded.append(place), original(self, part, t, place))
    )

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 15:
            raise KeyboardInterrupt

    options = {**SIZES, "overrides": SMALL, "stream_layers": True}
    with pytest.raises(KeyboardInterrupt):
        linearize(str(teacher), transfer, tmp_path / "out", watch=stop, **options)
    assert (tmp_path / "out.partial" / "states").is_dir()
    embedded.clear()
    result = linearize(str(teacher), transfer, tmp_path / "out", **options)
    assert min(embedded) == 3  # nothing was embedded or run through the first layers again
    assert_same(result.output, resident)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        (["progressive=2"], {"stream_layers": True}, "in rounds.*run it without --stream-layers"),
        (["stages=[{stage: finetune}]"], {"stream_layers": True}, "has finetune"),
        (["mixer=null", "stages=[]"], {"stream_layers": True}, "has no stage"),
        (["stages.0.patience=2"], {"stream_layers": True}, "stages.0.patience=null"),
        (["stages.0.optimizer.schedule=plateau"], {"stream_layers": True}, "schedule=cosine"),
        (["exact_heads={keep: 2}"], {"stream_layers": True}, "needs the whole teacher.*probe.file="),
        ([], {"layers": "0:2"}, r"stages behind it \(.*'stages=\[\{\"stage\": \"transfer\""),
        (["stages=[{stage: transfer, block: 2}]"], {"layers": "1:4"}, "cuts a block of 2"),
        (["stages=[{stage: transfer}]"], {"layers": "2"}, "'2' is no range of the model's 4 layers.*0:2 and 2:4"),
        (["stages=[{stage: transfer}]"], {"layers": "2:2"}, "no range"),
        (["stages=[{stage: transfer}]"], {"layers": "0:5"}, "no range"),
        (["stages=[{stage: transfer}]"], {"layers": "-1:2"}, "no range"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_anything_is_loaded(teacher, changes, options, words) -> None:
    with pytest.raises(LinearizeError, match=words):
        plan(str(teacher), "lolcats", overrides=[*ROWS, *changes], **options)


def test_the_override_that_an_error_names_makes_a_part(teacher, capsys) -> None:
    with pytest.raises(LinearizeError) as error:
        plan(str(teacher), "lolcats", overrides=ROWS, layers="0:2")
    (override,) = shlex.split(str(error.value).partition("with ")[2].removesuffix("."))
    chosen = plan(str(teacher), "lolcats", overrides=[*ROWS, override], layers="0:2")
    assert chosen.stream.layers == range(2)
    assert chosen.recipe.stages == Recipe.from_yaml("lolcats").stages[:1]


def test_a_part_cannot_be_pushed(teacher, transfer, tmp_path) -> None:
    with pytest.raises(LinearizeError, match="push the merge"):
        linearize(str(teacher), transfer, tmp_path / "o", layers="0:2", push_to_hub="me/it", overrides=ROWS)
