"""A stranger's machine: what was pushed loads by transformers alone, where `linearize` cannot be imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from transformers import AutoTokenizer

from linearize import cli
from linearize.api import linearize, load
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, save_teacher) -> Path:
    """A run on a tiny teacher."""
    folder = tmp_path_factory.mktemp("run")
    teacher = save_teacher(folder / "teacher", initializer_range=0.3)
    batches = [f"stages.{i}.{key}" for i in range(2) for key in ("batch=2", "micro_batch=1")]
    settings = ["data.length=64", "data.held_out=2", "data.loss=all", *batches]
    return linearize(teacher, "liger", folder / "tiny", data="builtin", tokens=768, overrides=settings).output


def test_a_push_loads_without_linearize_and_has_the_same_logits(finished, hub, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["push", str(finished), "me/tiny", "--private"])
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
    model = load(finished).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        ours = model(ids).logits
    assert torch.equal(ours.double().flatten(), torch.tensor(theirs["logits"], dtype=torch.float64))
    assert theirs["written"] == "".join(generate_text(finished, PROMPT, max_new_tokens=8))


def test_linearize_loads_what_was_pushed_by_its_name(finished, hub, tmp_path, monkeypatch) -> None:
    from linearize.hub import push

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    push(finished, "me/tiny", api=HfApi(endpoint=hub.url, token=TOKEN))
    model, own = load("me/tiny@v0.1.0"), load(finished)
    assert model.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_card_on_the_hub_names_the_repository(finished, hub) -> None:
    from linearize.hub import push

    push(finished, "me/tiny", api=HfApi(endpoint=hub.url, token=TOKEN))
    card = ModelCard(hub.files("me/tiny")["README.md"].decode())
    assert 'linearize.load("me/tiny")' in card.text
    results = json.loads((finished / "results.json").read_text())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["perplexity"] == pytest.approx(results["rows"][-1]["perplexity"], rel=1e-5)


def test_a_dry_run_lists_and_sends_nothing(finished, hub, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    (finished / "mine.txt").write_text("not the run's")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["push", str(finished), "me/tiny", "--dry-run"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for words in ("model.safetensors", "figures/quality.png", "nothing was sent", "tag v0.1.0", "write it: mine.txt"):
        assert words in printed
    assert hub.requests == []
    (finished / "mine.txt").unlink()
