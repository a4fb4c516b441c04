"""A stage that is stopped at any step and started again ends with the same weights to the bit."""

from typing import Any

import pytest
import torch

from linearize.recipe_mixer import Mixer
from linearize.recipe_stages import Distill, Finetune, Optimizer, Preference, Transfer
from linearize.stages import Run, run_stage

STEPS = 6
SIZES: dict[str, Any] = {"tokens": 48 * 2 * STEPS, "batch": 2, "micro_batch": 1}
TWO_RATES = Optimizer(lr=1e-3, mixer_lr=1e-2)

STAGES = {
    "finetune with two rates": Finetune(train="full", optimizer=TWO_RATES, **SIZES),
    "distill from kept logits": Distill(top_k=5, cache=True, optimizer=TWO_RATES, **SIZES),
    "distill with hidden states": Distill(hidden=0.5, top_k=5, **SIZES),
    "distill all parameters": Distill(train="full", **SIZES),
    "preference": Preference(**SIZES),
    "transfer with patience": Transfer(patience=1, optimizer=Optimizer(lr=0.3, schedule="constant"), **SIZES),
    "finetune with shorter windows": Finetune(window=3, train_mixer=True, **SIZES),
    "transfer in blocks": Transfer(block=2, train="qk", **SIZES),
    "transfer layer by layer": Transfer(order="layerwise", **SIZES),
}


def stop_at(run: Run, step: int) -> None:
    """Stop the run, as ctrl-C would, behind a step."""

    def progress(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise KeyboardInterrupt

    run.progress = progress


@pytest.mark.parametrize("name", STAGES)
def test_a_stopped_stage_ends_as_if_it_had_not_been(make_run, liger: Mixer, monkeypatch, name: str) -> None:
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("linearize.stages.base.PLATEAU_STEPS", 1)
    settings = STAGES[name]

    def start(folder: str) -> Run:
        torch.manual_seed(0)
        run: Run = make_run(liger, folder=folder)
        run.teacher_copy = getattr(settings, "train", "") == "full"
        return run

    whole, records = start("whole"), []
    whole.progress = records.append
    run_stage(settings, whole, "stage")
    for step in (2, len(records) - 1):
        stopped = start("stopped")
        stop_at(stopped, step)
        with pytest.raises(KeyboardInterrupt):
            run_stage(settings, stopped, "stage")
    resumed = start("stopped")
    run_stage(settings, resumed, "stage")
    got = resumed.model.state_dict()
    assert got.keys() == whole.model.state_dict().keys()
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(got[key], tensor), key
    assert whole.metrics.read_text().count("\n") == resumed.metrics.read_text().count("\n") == len(records)
    again = start("stopped")
    run_stage(settings, again, "stage")
    assert all(torch.equal(again.model.state_dict()[key], tensor) for key, tensor in got.items())
