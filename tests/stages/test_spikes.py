"""Steps that must not be made are skipped and counted, and too many of them stop the run; gradient norms by layer."""

import json
import math
from typing import Any

import pytest
import torch

from linearize import checkpoint
from linearize.errors import LinearizeError
from linearize.recipe_stages import Finetune, Transfer
from linearize.stages import Run, run_stage
from linearize.stages.base import Progress
from linearize.stages.finetune import FinetuneRunner
from linearize.stages.gradients import layer_norms, layer_of
from linearize.stages.spikes import LIMIT, RECENT, Spikes
from linearize.stages.transfer import TransferRunner

STEPS = 14
FINETUNE = Finetune(train="full", tokens=48 * 2 * STEPS, batch=2)


def break_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int], runner: Any = FinetuneRunner) -> None:
    """Let the losses and gradients of some steps (from 0) be NaN."""
    backward = runner.backward

    def broken(self: Any, rows: Any, share: float) -> dict[str, Any]:
        losses = backward(self, rows, share)
        if torch.initial_seed() - self.seed in steps:  # what the training loop seeds each step with
            for parameter in self.run.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        return losses

    monkeypatch.setattr(runner, "backward", broken)


def records(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_a_step_with_a_broken_gradient_changes_nothing_and_is_counted(make_run, liger, monkeypatch) -> None:
    break_steps(monkeypatch, {0, 4})
    weights: list[torch.Tensor] = []
    run = make_run(liger)
    run.progress = lambda record: weights.append(run.model.lm_head.weight.detach().clone())
    run_stage(FINETUNE, run, "finetune")
    assert [record["skipped"] for record in records(run)] == [1] * 4 + [2] * 10
    assert torch.equal(weights[3], weights[4])
    assert not torch.equal(weights[4], weights[5])
    assert all(bool(tensor.isfinite().all()) for tensor in run.model.state_dict().values())


def test_a_resumed_run_skips_what_it_would_have_skipped(make_run, liger, monkeypatch) -> None:
    break_steps(monkeypatch, {2, 3, 7})
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("linearize.stages.spikes.RECENT", 4)
    whole = make_run(liger, folder="whole")
    run_stage(FINETUNE, whole, "finetune")
    for step in (2, 4, 9):
        run = make_run(liger, folder="stopped")

        def stop(record: dict[str, Any], step: int = step) -> None:
            if record["step"] == step:
                raise KeyboardInterrupt

        run.progress = stop
        with pytest.raises(KeyboardInterrupt):
            run_stage(FINETUNE, run, "finetune")
    run = make_run(liger, folder="stopped")
    run_stage(FINETUNE, run, "finetune")
    assert [r["skipped"] for r in records(run)] == [r["skipped"] for r in records(whole)]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name


def test_too_many_in_a_row_stop_the_run_behind_its_last_good_checkpoint(make_run, liger, monkeypatch) -> None:
    break_steps(monkeypatch, set(range(3, 99)))
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    run = make_run(liger)
    with pytest.raises(
        LinearizeError, match=rf"step {3 + LIMIT}: {LIMIT} steps in a row .* the gradient of layer 1"
    ) as e:
        run_stage(FINETUNE, run, "finetune")
    assert f"step 3, in {run.folder / 'finetune'}" in str(e.value)
    found = checkpoint.load(run.folder / "finetune")
    assert found is not None and found.state["step"] == 3 and found.state["spikes"]["streak"] == 0
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())


def test_a_short_stage_whose_every_step_is_broken_is_not_done(make_run, liger, monkeypatch) -> None:
    break_steps(monkeypatch, {0, 1})
    with pytest.raises(LinearizeError, match="2 steps in a row"):
        run_stage(Finetune(train="full", tokens=48 * 4, batch=2), make_run(liger), "finetune")


def test_the_layer_with_the_broken_output_is_named(make_run, liger) -> None:
    run = make_run(liger)
    run.model.get_decoder().layers[1].mlp.register_forward_hook(lambda module, args, output: output * math.nan)
    with pytest.raises(LinearizeError, match="the output of layer 1 is not finite"):
        run_stage(Finetune(tokens=96, batch=2), run, "finetune")


def test_the_weight_that_is_not_finite_is_named(make_run, liger) -> None:
    run = make_run(liger)
    run.model.get_decoder().layers[0].mlp.up_proj.weight.data[0, 0] = math.inf
    with pytest.raises(LinearizeError, match=r"the weight .*layers\.0\.mlp\.up_proj\.weight is not finite"):
        run_stage(Finetune(tokens=96, batch=2), run, "finetune")


def test_transfer_names_the_layer_whose_loss_is_broken(make_run, liger, monkeypatch) -> None:
    run = make_run(liger)
    student = run.model.get_decoder().layers[1].self_attn
    monkeypatch.setattr(student, "heads", lambda *args: args[0].new_full((2, 48, 4, 16), math.nan).requires_grad_())
    with pytest.raises(LinearizeError, match="the loss of layer 1 is not finite"):
        run_stage(Transfer(tokens=96, batch=2), run, "transfer")


def test_a_spike_is_far_above_everything_recent_and_data_that_stay_hard_cost_one_step() -> None:
    spikes = Spikes()
    assert all(spikes.fit(2.0 + 0.5 * (step % 3), 1.0) for step in range(RECENT))
    assert spikes.fit(50.0, 1.0)  # a loss alone, or a gradient alone, is no spike
    spikes = Spikes()
    assert all(spikes.fit(2.0, 1.0) for _ in range(RECENT - 1))
    assert spikes.fit(50.0, 50.0)  # too early to tell
    spikes = Spikes()
    assert all(spikes.fit(2.0, 1.0) for _ in range(RECENT))
    assert not spikes.fit(50.0, 50.0)
    assert (spikes.skipped, spikes.streak) == (1, 1)
    assert spikes.fit(50.0, 50.0)
    assert (spikes.skipped, spikes.streak) == (1, 0)
    again = Spikes()
    again.resume(json.loads(json.dumps(spikes.state())))
    assert again.state() == spikes.state()


@pytest.mark.parametrize(
    ("runner", "settings"), [(FinetuneRunner, Finetune(train="full")), (TransferRunner, Transfer())]
)
def test_gradient_norms_by_layer(make_run, liger, runner: Any, settings: Any) -> None:
    run = make_run(liger)
    stage = runner(settings, run)
    trained = stage.prepare()
    stage.backward(run.corpus.train[:2], 1.0)
    norms = layer_norms(trained)
    expected: dict[str, float] = {}
    for name, parameter in trained.items():
        if parameter.grad is not None:
            layer = next((part for part in name.split(".") if part.isdigit()), "rest")
            expected[layer] = expected.get(layer, 0.0) + float(parameter.grad.double().square().sum())
    assert norms == {layer: pytest.approx(square**0.5, rel=1e-3) for layer, square in expected.items()}
    assert norms.keys() == ({"0", "1"} if runner is TransferRunner else {"0", "1", "rest"})


def test_metrics_have_the_gradient_norm_of_each_layer(make_run, liger) -> None:
    run = make_run(liger)
    run_stage(Finetune(tokens=96, batch=2), run, "finetune")
    (record,) = records(run)
    assert record["grad_norms"].keys() == {"0", "1"}
    total = math.hypot(*record["grad_norms"].values())
    assert total == pytest.approx(record["grad_norm"], rel=1e-3)
    assert record["skipped"] == 0


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.lora_A.default.weight", "11"),
        ("transformer.h.3.attn.mixer.gate.bias", "3"),
        ("layers.0.mixer.bias", "0"),
        ("lm_head.weight", "rest"),
        ("model.norm2.weight", "rest"),
    ],
)
def test_the_layer_of_a_parameter(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_a_checkpoint_that_takes_long_is_written_less_often(make_run, liger, monkeypatch) -> None:
    from linearize.stages.base import SAVE_SECONDS, Saves

    run = make_run(liger)
    runner = FinetuneRunner(Finetune(), run)
    saves = Saves(run.folder / "stage", Progress(runner.prepare(), Finetune()), runner)
    saves.at -= SAVE_SECONDS + 1
    assert saves.due
    saves.cost = 60.0
    assert not saves.due
    saves.at -= 60.0 * 20
    assert saves.due
    saves.progress.spikes.streak = 1
    assert not saves.due
