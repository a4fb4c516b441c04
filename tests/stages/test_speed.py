"""What a GPU replays leaves the gradients that the same pass leaves step by step. Skipped where there is no GPU."""

import pytest
import torch

from linearize.recipe_mixer import Mixer
from linearize.recipe_stages import Distill, Finetune, Lora, Transfer
from linearize.stages import RUNNERS, speed
from linearize.stages.base import _accumulate

MIXERS = {
    "liger": {"feature_map": "softmax", "gate": {"name": "key", "bias": 2.0}, "window": {"size": 16, "sinks": 2}},
    "lolcats": {
        "feature_map": "hedgehog",
        "combine": "shared_softmax",
        "normalize": True,
        "overlap": False,
        "rotary": True,
        "window": {"size": 16, "sinks": 2},
    },
    "gdn": {
        "feature_map": "l2norm",
        "memory": "delta",
        "gate": "scalar",
        "window": {"size": 16, "sinks": 2},
        "combine": "learned",
        "conv": 4,
    },
}
SETTINGS = {"tokens": 48 * 4 * 8, "batch": 4, "micro_batch": 2}
STAGES = {
    "transfer": Transfer(**SETTINGS),
    "finetune": Finetune(**SETTINGS, train_mixer=True, lora=Lora(r=4, alpha=8)),
    "full": Finetune(**SETTINGS, train="full"),
    "distill": Distill(**SETTINGS, train_mixer=True, lora=Lora(r=4, alpha=8), cross_entropy=0.5),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_replayed_pass_leaves_the_gradients_of_an_eager_one(stage, mixer, make_run, corpus, monkeypatch) -> None:
    found = []
    for passes in (10**9, 1):
        monkeypatch.setattr(speed, "PASSES", passes)
        torch.manual_seed(0)
        run = make_run(Mixer.model_validate(MIXERS[mixer]), folder=f"{stage}-{passes}", head_dim=32)
        run.model.cuda()
        run.device = torch.device("cuda")
        settings = STAGES[stage]
        runner = RUNNERS[settings.stage](settings, run)
        trained = runner.prepare()
        for index, parameter in enumerate(trained.values()):
            torch.manual_seed(index)
            parameter.data += 0.02 * torch.randn(parameter.shape).to(parameter)  # LoRA starts at 0
        steps = []
        for step in range(4):  # the second and later are replayed
            rows = corpus.train[4 * (step % 2) : 4 * (step % 2) + 4]
            losses = _accumulate(runner, rows, 2)
            steps.append((losses["loss"], {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}))
            for parameter in trained.values():
                parameter.grad = None
        if passes == 1:
            fast = runner.fast if stage == "transfer" else runner.decoder
            assert (fast.graph if stage == "transfer" else fast.graphed) is not None
        found.append(steps)
        runner.finish()
    for (eager_loss, eager), (fast_loss, fast) in zip(*found, strict=True):
        assert fast_loss == pytest.approx(eager_loss, rel=1e-4)
        assert fast.keys() >= eager.keys()
        for name, wanted in eager.items():
            apart = (fast[name] - wanted).norm() / wanted.norm().clamp(min=1e-8)
            assert apart < 2e-3, (name, float(apart))
