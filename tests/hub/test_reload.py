"""A stranger's machine: what was pushed loads by transformers alone, where `linearize` cannot be imported."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from transformers import AutoTokenizer

from linearize import cli
from linearize.api import load
from linearize.generation import generate_text

from .conftest import TOKEN

ALONE = """
import sys
sys.modules["linearize"] = None  # importing it is an error
"""
THEN = """
import json, torch
ids = inputs["input_ids"]
with torch.no_grad():
    logits = model(ids).logits
written = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1]:])
print(json.dumps({"logits": logits.double().flatten().tolist(), "written": written}))
"""
PROMPT = "The capital of France is"


def test_a_push_loads_without_linearize_and_has_the_same_logits(run_folder, hub, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["push", str(run_folder), "me/tiny", "--private"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"{hub.url}/me/tiny/commit/" in printed
    assert "Tag v0.1.0 on commit" in printed
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }
    card = hub.files("me/tiny")["README.md"].decode()
    example = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)' in example
    command = [sys.executable, "-c", ALONE + example + THEN]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "custom code" not in done.stdout
    theirs = json.loads(done.stdout.splitlines()[-1])
    model = load(run_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        ours = model(ids).logits
    assert torch.equal(ours.double().flatten(), torch.tensor(theirs["logits"], dtype=torch.float64))
    assert theirs["written"] == "".join(generate_text(run_folder, PROMPT, max_new_tokens=8))


def test_linearize_loads_what_was_pushed_by_its_name(run_folder, hub, tmp_path, monkeypatch) -> None:
    from linearize.hub import push

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    push(run_folder, "me/tiny", api=HfApi(endpoint=hub.url, token=TOKEN))
    model, own = load("me/tiny@v0.1.0"), load(run_folder)
    assert model.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_card_on_the_hub_names_the_repository(run_folder, hub) -> None:
    from linearize.hub import push

    push(run_folder, "me/tiny", api=HfApi(endpoint=hub.url, token=TOKEN))
    card = ModelCard(hub.files("me/tiny")["README.md"].decode())
    assert 'linearize.load("me/tiny")' in card.text
    results = json.loads((run_folder / "results.json").read_text())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["perplexity"] == pytest.approx(results["rows"][-1]["perplexity"], rel=1e-5)


def test_a_dry_run_lists_and_sends_nothing(run_folder, hub, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    (run_folder / "mine.txt").write_text("not the run's")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["push", str(run_folder), "me/tiny", "--dry-run"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for words in ("model.safetensors", "figures/quality.png", "nothing was sent", "tag v0.1.0", "write it: mine.txt"):
        assert words in printed
    assert hub.requests == []
    (run_folder / "mine.txt").unlink()
