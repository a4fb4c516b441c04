"""DPO against its formula, with the teacher as reference, and what training does to a preference."""

import pytest
import torch

from linearize.data import Corpus, PackedRows
from linearize.recipe import Recipe
from linearize.recipe_stages import Optimizer, Preference
from linearize.stages import run_stage
from linearize.stages.base import _accumulate
from linearize.stages.preference import PreferenceRunner

HALF = 24


@pytest.fixture
def pairs(corpus: Corpus) -> Corpus:
    """Eight pairs: prompts of 5 tokens, chosen answers of 8, rejected ones of 4 to 11, and padding."""
    rows = corpus.train
    positions, labels = torch.zeros_like(rows.input_ids), torch.full_like(rows.labels, -100)
    for row in range(len(rows)):
        for begin, size in ((0, 8), (HALF, 4 + row)):
            answer = slice(begin + 5, begin + 5 + size)
            positions[row, begin : answer.stop] = torch.arange(5 + size)
            positions[row, answer.stop : begin + HALF] = torch.arange(HALF - 5 - size)
            labels[row, answer] = rows.input_ids[row, answer]
    made = PackedRows(rows.input_ids, positions, labels)
    return Corpus(made, made[:2], "", "", {})


def log_probabilities(model, pairs: PackedRows) -> torch.Tensor:
    """Sums over the answers' tokens in fp64, [pairs, 2], each answer run on its own."""
    made = []
    for row in range(len(pairs)):
        for begin in (0, HALF):
            size = int((pairs.labels[row, begin : begin + HALF] != -100).sum())
            ids = pairs.input_ids[row, begin : begin + 5 + size].long()[None]
            logits = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            made.append(sum(logits[t - 1, ids[0, t]] for t in range(5, 5 + size)))
    return torch.stack(made).view(-1, 2)


@pytest.mark.parametrize("train", ["mixer", "full"])
def test_the_loss_and_its_gradient_are_the_formulas(make_run, liger, pairs, monkeypatch, train) -> None:
    monkeypatch.setattr("linearize.stages.finetune.TOKENS_PER_CHUNK", 7)
    beta, rows = 0.3, pairs.train[:4]
    run = make_run(liger)
    run.corpus = pairs
    runner = PreferenceRunner(Preference(train=train, beta=beta, batch=2, tokens=48 * 8), run)
    trained = runner.prepare()
    runner.ready()
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    losses = _accumulate(runner, rows, 2)
    got = {name: parameter.grad.clone() for name, parameter in trained.items()}
    run.model.zero_grad()
    with torch.no_grad():
        reference = log_probabilities(make_run().model, rows)
    gain = log_probabilities(run.model, rows) - reference
    margins = beta * (gain[:, 0] - gain[:, 1])
    wanted = (1 + (-margins).exp()).log().mean()
    wanted.backward()
    assert losses["loss"] == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert losses["margin"] == pytest.approx(float(margins.detach().mean()), rel=1e-3)
    assert losses["accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    assert 0 < losses["accuracy"] < 1
    for name, parameter in trained.items():
        if parameter.grad is None:
            assert not got[name].any()
        else:
            torch.testing.assert_close(got[name], parameter.grad, rtol=2e-3, atol=2e-6)
    with torch.no_grad():
        each = (1 + (-margins).exp()).log()
        assert runner.held_out_loss(rows) == pytest.approx(float(each.mean()), rel=1e-4)


def test_training_prefers_the_chosen_answers(make_run, liger, pairs) -> None:
    run = make_run(liger)
    run.corpus = pairs
    records = []
    run.progress = records.append
    optimizer = Optimizer(lr=3e-3, warmup=0.0, schedule="constant")
    run_stage(Preference(tokens=48 * 4 * 25, batch=4, micro_batch=2, optimizer=optimizer), run, "preference")
    assert records[-1]["accuracy"] == 1.0 and records[-1]["margin"] > records[0]["margin"] + 0.5
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]


def test_the_teacher_judges_every_pair_once(make_run, liger, pairs, monkeypatch) -> None:
    run = make_run(liger)
    run.corpus = pairs
    judged = []
    original = PreferenceRunner._answer
    monkeypatch.setattr(PreferenceRunner, "_answer", lambda self: lambda row: judged.append(row) or original(self)(row))
    settings = Preference(tokens=48 * 2 * 8, batch=2)
    run_stage(settings, run, "preference")
    assert len(judged) == len(pairs.train)


def test_the_reference_is_the_teacher_and_not_the_student_of_the_stage_before() -> None:
    finetune, distill = {"stage": "finetune", "train": "full"}, {"stage": "distill"}
    for earlier, copied in ((finetune, True), (distill, False)):
        recipe = Recipe.parse({"name": "r", "stages": [earlier, {"stage": "preference", "train": "full"}]}, "r")
        assert recipe.needs_teacher_copy(1) is copied


def test_quick_runs_on_builtin_pairs() -> None:
    recipe = Recipe(name="r", stages=[Preference(source="some/pairs", split="test", format="chat")])
    stage = recipe.with_quick().stages[0]
    assert (stage.source, stage.split, stage.format) == ("builtin", "train", "auto")
