"""`push --adapter-only`: what goes up is what the teacher does not have, and with it becomes the same model again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from linearize import yaml_io
from linearize.adapter import write_adapter
from linearize.api import linearize, load
from linearize.errors import LinearizeError
from linearize.hub import choose_files, push

from .conftest import TOKEN


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, save_teacher) -> Path:
    """A run on a tiny teacher of several layers whose embedding, MLP and half of the attention stay as they were."""
    folder = tmp_path_factory.mktemp("run")
    teacher = save_teacher(folder / "teacher", initializer_range=0.3)
    batches = [f"stages.{i}.{key}" for i in range(2) for key in ("batch=2", "micro_batch=1")]
    settings = ["data.length=64", "data.held_out=2", "data.loss=all", "exact_heads=[[1,1]]", *batches]
    return linearize(teacher, "liger", folder / "tiny", data="builtin", tokens=768, overrides=settings).output


@pytest.fixture(scope="module")
def adapter(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "out"
    write_adapter(finished, out)
    return out


def same(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_it_holds_what_the_teacher_does_not_have(finished, adapter) -> None:
    own, before = (
        load_file(finished / "model.safetensors"),
        load_file(finished.parent / "teacher" / "model.safetensors"),
    )
    kept = load_file(adapter / "adapter.safetensors")
    different = {name for name in own if name not in before or not torch.equal(own[name], before[name])}
    assert set(kept) == different
    assert any("mixer" in name for name in kept)
    assert any(name.endswith("q_proj.weight") for name in kept)
    assert not any("mlp" in name or "embed" in name for name in kept)
    assert not (adapter / "model.safetensors").exists()
    assert "auto_map" not in json.loads((adapter / "config.json").read_text())
    card = (adapter / "README.md").read_text()
    assert "loads with `linearize` alone" in card
    assert "trust_remote_code" not in card
    assert card.count("## Quality") == 1


def test_it_loads_as_the_same_model(finished, adapter) -> None:
    assert same(load(adapter), load(finished))
    half = load(adapter, dtype=torch.bfloat16)
    assert same(half, load(finished, dtype=torch.bfloat16))
    assert half.generation_config.to_dict() == load(finished).generation_config.to_dict()


def test_it_goes_up_and_comes_back_by_its_name(finished, hub, tmp_path, monkeypatch) -> None:
    push(finished, "me/tiny", adapter_only=True, api=HfApi(endpoint=hub.url, token=TOKEN))
    held = hub.files("me/tiny")
    assert not {"model.safetensors", "modeling_linearized.py"} & set(held)
    assert b'linearize.load("me/tiny")' in held["README.md"]
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert same(load("me/tiny"), load(finished))
    push(finished, "me/tiny", api=HfApi(endpoint=hub.url, token=TOKEN))
    held = hub.files("me/tiny")
    assert not {"adapter.safetensors", "adapter.json"} & set(held)
    assert held["model.safetensors"] == (finished / "model.safetensors").read_bytes()


def test_another_teacher_is_refused(finished, adapter, save_teacher, tmp_path) -> None:
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(LinearizeError, match=r"is not the teacher that .* its weights are others"):
        load(adapter, teacher=str(other))
    moved = shutil.copytree(finished.parent / "teacher", tmp_path / "moved")
    assert same(load(adapter, teacher=str(moved)), load(finished))
    with pytest.raises(LinearizeError, match="needs no teacher"):
        load(finished, teacher=str(moved))


def test_a_teacher_that_is_not_there_says_how_to_name_it(adapter, tmp_path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    note = json.loads((copy / "adapter.json").read_text())
    (copy / "adapter.json").write_text(json.dumps({**note, "teacher": "./nowhere"}))
    with pytest.raises(LinearizeError, match=r"is an adapter, and its teacher cannot be had: .*teacher="):
        load(copy)
    for damage in ("{", "[]", json.dumps({**note, "borrowed": {"x": "pickle"}}), json.dumps({**note, "sha256": 3})):
        (copy / "adapter.json").write_text(damage)
        with pytest.raises(LinearizeError, match="is a damaged adapter"):
            load(copy)


def test_a_model_of_which_all_was_trained_has_no_adapter(finished, tmp_path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "model.safetensors")
    with pytest.raises(LinearizeError, match="shares no tensor with its teacher"):
        write_adapter(copy, tmp_path / "out")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "linearize": None}))
    with pytest.raises(LinearizeError, match="was not converted"):
        write_adapter(copy, tmp_path / "out")


def test_an_adapters_folder_is_a_finished_one(adapter) -> None:
    upload = choose_files(adapter)
    assert upload.left_out == []
    assert {"adapter.json", "adapter.safetensors", "recipe.lock.yaml", "tokenizer.json"} <= set(upload.files)
    assert yaml_io.read(adapter / "recipe.lock.yaml")["files"] == sorted(upload.files)
