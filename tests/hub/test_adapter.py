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
from linearize.api import load
from linearize.errors import LinearizeError
from linearize.hub import choose_files, push

from .conftest import TOKEN


@pytest.fixture(scope="module")
def adapter(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "out"
    write_adapter(run_folder, out)
    return out


def same(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_it_holds_what_the_teacher_does_not_have(run_folder, adapter) -> None:
    own, before = (
        load_file(run_folder / "model.safetensors"),
        load_file(run_folder.parent / "teacher" / "model.safetensors"),
    )
    kept = load_file(adapter / "adapter.safetensors")
    different = {name for name in own if name not in before or not torch.equal(own[name], before[name])}
    assert set(kept) == different
    assert any("mixer" in name for name in kept)
    assert any(name.endswith("q_proj.weight") for name in kept)
    assert not any("norm" in name or "embed" in name for name in kept)
    assert not (adapter / "model.safetensors").exists()
    assert "auto_map" not in json.loads((adapter / "config.json").read_text())
    card = (adapter / "README.md").read_text()
    assert "loads with `linearize` alone" in card
    assert "trust_remote_code" not in card
    assert card.count("## Quality") == 1


def test_it_loads_as_the_same_model(run_folder, adapter) -> None:
    assert same(load(adapter), load(run_folder))
    half = load(adapter, dtype=torch.bfloat16)
    assert same(half, load(run_folder, dtype=torch.bfloat16))
    assert half.generation_config.to_dict() == load(run_folder).generation_config.to_dict()


def test_it_goes_up_and_comes_back_by_its_name(run_folder, hub, tmp_path, monkeypatch) -> None:
    push(run_folder, "me/tiny", adapter_only=True, api=HfApi(endpoint=hub.url, token=TOKEN))
    held = hub.files("me/tiny")
    assert not {"model.safetensors", "modeling_linearized.py"} & set(held)
    assert b'linearize.load("me/tiny")' in held["README.md"]
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert same(load("me/tiny"), load(run_folder))
    push(run_folder, "me/tiny", api=HfApi(endpoint=hub.url, token=TOKEN))
    held = hub.files("me/tiny")
    assert not {"adapter.safetensors", "adapter.json"} & set(held)
    assert held["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()


def test_another_teacher_is_refused(run_folder, adapter, save_teacher, tmp_path) -> None:
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(LinearizeError, match=r"is not the teacher that .* its weights are others"):
        load(adapter, teacher=str(other))
    moved = shutil.copytree(run_folder.parent / "teacher", tmp_path / "moved")
    assert same(load(adapter, teacher=str(moved)), load(run_folder))
    with pytest.raises(LinearizeError, match="needs no teacher"):
        load(run_folder, teacher=str(moved))


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


def test_a_model_of_which_all_was_trained_has_no_adapter(run_folder, tmp_path) -> None:
    copy = shutil.copytree(run_folder, tmp_path / "copy")
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
