"""What a GPU replays leaves the gradients that the same pass leaves step by step. Skipped where there is no GPU."""

from contextlib import nullcontext
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

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


@pytest.mark.parametrize(
    ("passes", "tokens", "compiled"),
    [(299, 10, False), (300, 10, True), (1, 2 * 10**9, True), (1, 10**9, False), (0, 2 * 10**9, False)],
)
def test_a_stage_is_compiled_for_many_passes_or_for_much_work(passes, tokens, compiled, make_run, monkeypatch) -> None:
    model = make_run(Mixer.model_validate({"window": {"size": 4}, "combine": "window_only"})).model
    monkeypatch.setattr(speed, "_on_gpu", lambda _: True)
    monkeypatch.setattr(speed, "WORK", 1.5e9 * sum(p.numel() for p in model.get_decoder().parameters()))
    decoder = speed.FastDecoder(model, passes, tokens, graph=False)
    assert bool(decoder.layers) == compiled
    decoder.close()


def test_layers_that_differ_are_all_compiled(make_run, monkeypatch) -> None:
    windows = list(range(2, 14))
    mixer = {"window": {"size": windows, "sinks": 2}, "combine": "window_only"}
    model = make_run(Mixer.model_validate(mixer), num_hidden_layers=len(windows)).model
    monkeypatch.setattr(speed, "_on_gpu", lambda _: True)
    monkeypatch.setattr(speed, "PASSES", 1)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    decoder = speed.FastDecoder(model, 1, graph=False)
    for length in (24, 48):  # rows of two stages
        places = torch.arange(length)[None]
        decoder(3 + places, places)
    assert counters["stats"]["unique_graphs"] == 2 * len(windows)
    decoder.close()
    assert torch._dynamo.config.recompile_limit == limit < len(windows)


def test_what_is_captured_is_warmed_up_on_rows_of_several_documents(make_run, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda call, given, **_: seen.append(given[1]) or call)
    decoder = speed.FastDecoder(make_run(Mixer.model_validate(MIXERS["gdn"])).model, 0)
    decoder.captures = True
    places = torch.arange(24)[None]
    decoder(3 + places, places)
    assert seen[0].tolist() == [[*range(12), *range(12)]]

    weight = torch.nn.Parameter(torch.ones(()))

    def function(input_ids, position_ids):
        seen.append(position_ids.tolist())
        loss = (weight * input_ids).sum()
        loss.backward()
        return loss.detach()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: weight.grad.add_(places.sum())))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    seen.clear()
    fast = speed.FastPass(function, [weight], speed.PASSES, torch.device("cuda"))
    for times in range(3):
        fast(places.float(), places)
        assert weight.grad == (times + 1) * places.sum()
    assert seen == [places.tolist(), places.tolist(), [[*range(12), *range(12)]], places.tolist()]


def test_passes_of_one_step_add_up_in_gradients_that_a_graph_lends(make_run, monkeypatch) -> None:
    model = make_run(Mixer.model_validate(MIXERS["gdn"])).model
    decoder = speed.FastDecoder(model, 0)
    decoder.captures = True
    buffers = [torch.zeros_like(p) for p in decoder.decoder.parameters()]

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, ids, *parameters):
            ctx.ids = ids
            return sum(p.sum() for p in parameters) * ids.sum()

        @staticmethod
        def backward(ctx, grad):
            for buffer in buffers:
                buffer.fill_(float(grad * ctx.ids.sum()))
            return None, *(buffer.detach() for buffer in buffers)

    def capture(*_, **__):
        return lambda ids, _: Replayed.apply(ids, *decoder.decoder.parameters())

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    places = torch.arange(24)[None]
    parameters = list(decoder.decoder.parameters())
    for passes in (1, 3, 2):
        for times in range(passes):
            decoder(places + times, places).backward()
        wanted = sum(float((places + times).sum()) for times in range(passes))
        assert all(torch.equal(p.grad, torch.full_like(p, wanted)) for p in parameters)
        for parameter, buffer in zip(parameters, buffers, strict=True):
            assert (parameter.grad.data_ptr() == buffer.data_ptr()) == (passes == 1)  # nothing is copied for one pass
            parameter.grad = None


def test_a_capture_that_fails_says_what_went_wrong_first(make_run, monkeypatch) -> None:
    def capture(*_, **__):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nMore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    decoder = speed.FastDecoder(make_run(Mixer.model_validate(MIXERS["gdn"])).model, 0)
    decoder.captures = True
    places = torch.arange(24)[None]
    with pytest.warns(UserWarning, match="No CUDA graph .*: operation not permitted when stream is capturing$"):
        decoder(3 + places, places)
