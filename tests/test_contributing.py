"""The examples of CONTRIBUTING.md run as they stand."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import linearize
from linearize.registry import families, feature_maps, gates
from linearize.surgery import convert

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
IDS = torch.randint(1, 61, (2, 24), generator=torch.Generator().manual_seed(1))


def block(language: str, first: str) -> str:
    """The code block whose first line begins with these words."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if text.startswith(f"# {first}")]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Import a code block as a module of its own; what it registers is gone after the test."""
    for registry in (families, feature_maps, gates):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    def execute(name: str, text: str) -> object:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return execute


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def decoded(model) -> torch.Tensor:
    cache, outputs = None, []
    for piece in IDS.split([7, *[1] * 17], dim=1):
        with torch.no_grad():
            out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    ("first", "kind", "name", "parts"),
    [
        ("feature map", feature_maps, "elu1", {"feature_map": "elu1", "gate": "scalar", "normalize": True}),
        ("gate", gates, "low_rank", {"feature_map": "softmax", "gate": {"name": "low_rank", "rank": 4}}),
    ],
)
def test_a_part_decodes_as_it_runs_forward(run, random_teacher, make_mixer, first, kind, name, parts) -> None:
    assert name not in kind
    run(f"contributed_{name}", block("python", first))
    assert (kind.get(name).__doc__ or "").strip()
    model = random_teacher()
    before = logits(model)
    surgery = convert(model, make_mixer(window={"size": 5, "sinks": 1}, combine="average", **parts))
    full = logits(model, use_cache=False)
    assert not torch.allclose(full, before, atol=1e-3)
    torch.testing.assert_close(decoded(model), full, rtol=0, atol=1e-4)
    surgery.undo()
    assert torch.equal(logits(model), before)


def test_the_recipe_plans_and_trains(make_teacher, tmp_path: Path) -> None:
    file, teacher = tmp_path / "retnet.yaml", make_teacher("teacher")
    file.write_text(block("yaml", "linearize --model"))
    settings = ["data.length=32", "data.held_out=1", "stages.0.tokens=128", "stages.1.tokens=128"]
    settings += ["stages.0.batch=2", "stages.1.batch=2"]
    options = {"overrides": settings, "data": "builtin"}
    plan = linearize.plan(teacher, file, **options)
    assert [(stage.name, stage.steps) for stage in plan.stages] == [("transfer", 2), ("finetune", 2)]
    assert linearize.plan("llama-3-8b", file).layers[31].memory == "identity, fixed, additive"
    result = linearize.linearize(teacher, file, tmp_path / "out", **options)
    names = [row["name"] for row in result.results["rows"]]
    assert names == ["teacher", "after surgery", "after transfer", "after finetune"]
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in steps if "loss" in line]) >= 4


def test_the_family_is_exact(run, random_teacher, make_mixer) -> None:
    assert "arcee" not in families
    run("contributed_family", block("python", "family"))
    model = random_teacher("arcee")
    before = logits(model)
    surgery = convert(model, make_mixer(combine="window_only", window={"size": IDS.shape[1]}))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    surgery.undo()
    assert torch.equal(logits(model), before)


def test_the_kernel_agrees_with_its_reference(run, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = run("contributed_kernel", block("python", "kernel"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 63, 5, generator=generator, requires_grad=True)
    decay = (-torch.rand(2, 63, 5, generator=generator)).requires_grad_()
    weight = torch.randn(2, 63, 5, generator=generator)
    results = []
    for backend in ("torch", "reference"):
        monkeypatch.setenv("LINEARIZE_BACKEND", backend)
        out = kernel.leaky_sum(x, decay)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (x, decay))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_every_file_that_the_document_names_exists() -> None:
    root = Path(__file__).parent.parent
    for path in re.findall(r"`((?:linearize|kernels|recipes|configs|tests|\.ci)/[\w./-]*)`", TEXT):
        if "NAME" not in path:
            assert (root / path).exists(), path
