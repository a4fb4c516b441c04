"""Stages on a tiny model: what trains, what stays, and that nothing but memory depends on how a batch is cut."""

from pathlib import Path

import pytest
import torch

from linearize.data import Corpus, PackedRows
from linearize.data.masking import Masking, mask_rows
from linearize.errors import LinearizeError
from linearize.modeling.classes import packed_inputs
from linearize.recipe import Recipe
from linearize.recipe_mixer import Mixer, Part, Window
from linearize.recipe_stages import Distill, Finetune, Lora, Optimizer, Stage, Transfer
from linearize.stages import finetune, run_stage
from linearize.stages.base import Progress, learning_rate, train
from linearize.stages.distill import DistillRunner
from linearize.stages.finetune import FinetuneRunner
from linearize.stages.meanwhile import windows_of
from linearize.stages.teachers import Teacher
from linearize.stages.transfer import TransferRunner
from linearize.surgery import convert

LIGER = Mixer(
    feature_map={"name": "softmax"},
    gate={"name": "key", "bias": 2.0},
    window={"size": 8, "sinks": 2},
    combine={"name": "learned"},
)
ENCODER = Mixer(feature_map={"name": "hedgehog"}, window=None, combine={"name": "memory_only"}, normalize=True)
FAST = Optimizer(lr=1e-2, warmup=0.0, schedule="constant")


TRAINS = [("llama", "mixer"), ("llama", "qk"), ("llama", "qkvo"), ("gpt2", "qkvo"), ("falcon", "qkvo")]


@pytest.mark.parametrize(("family", "train"), TRAINS)
@pytest.mark.parametrize("target", ["before_o_proj", "after_o_proj"])
def test_transfer_brings_mixers_nearer_and_leaves_the_teacher_as_it_was(make_run, family, train, target) -> None:
    run = make_run(LIGER, family=family)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        model = run.surgery.undo()
        before = model(ids).logits
    run.surgery = convert(model, LIGER.model_dump())
    settings = Transfer(tokens=48 * 2 * 30, batch=2, optimizer=FAST, train=train, target=target)
    losses = []
    run.progress = lambda record: losses.append(record["loss"])
    run_stage(settings, run, "transfer")
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    with torch.no_grad():
        assert torch.equal(run.surgery.undo()(ids).logits, before)


def test_transfer_trains_each_layer_as_if_it_were_alone(make_run, corpus) -> None:
    """The gradients of all layers in one pass are those of each layer's own loss on the teacher's input to it."""
    run = make_run(LIGER)
    runner = TransferRunner(Transfer(loss="mse"), run)
    trained = runner.prepare()
    runner.ready()
    runner.backward(corpus.train[:2], 1.0)
    got = {name: p.grad.clone() for name, p in trained.items()}
    seen = {}
    teacher_side = run.model.get_decoder()
    for index, layer in runner.layers.items():
        layer.register_forward_pre_hook(lambda m, a, kw, i=index: seen.__setitem__(i, kw), with_kwargs=True)
    runner._pass(corpus.train[:2], training=False)
    for index, layer in runner.layers.items():
        kwargs = seen[index]
        x, context = kwargs.pop("hidden_states"), layer.context
        heads = []
        hook = layer.teacher.o_proj.register_forward_pre_hook(lambda m, a, heads=heads: heads.append(a[0]))
        layer.teacher(x, **kwargs)
        hook.remove()
        made = layer.student.heads(x, kwargs["position_embeddings"], context).flatten(-2)
        mixers = dict(layer.student.mixer.named_parameters())
        wanted = torch.autograd.grad((made - heads[0]).square().mean(), list(mixers.values()))
        for name, grad in zip(mixers, wanted, strict=True):
            torch.testing.assert_close(got[f"layers.{index}.mixer.{name}"], grad, rtol=1e-4, atol=1e-7)
    assert teacher_side.layers[0].self_attn is runner.layers[0].student


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_learns_masked_tokens_and_nothing_but_them(make_run, corpus, family) -> None:
    masking = Masking(token=59, vocabulary=59)
    held_out = mask_rows(corpus.held_out, masking, 0)
    run = make_run(ENCODER, family=family)
    run.corpus = Corpus(corpus.train, held_out, "", "", {"masking": {"token": 59, "vocabulary": 59}})
    runner = FinetuneRunner(Finetune(train_mixer=True), run)
    torch.manual_seed(0)
    rows = runner.batch(corpus.train[:4])
    assert rows.masked and not torch.equal(rows.input_ids, runner.batch(corpus.train[:4]).input_ids)
    runner.prepare()
    runner.ready()
    run.model.eval()  # no dropout
    loss = runner.backward(rows, 1.0)["loss"]
    inputs = packed_inputs(run.model.config, {k: v for k, v in rows.inputs().items() if k != "labels"})
    with torch.no_grad():
        logits = run.model(**inputs).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.long().flatten())
    assert loss == pytest.approx(float(wanted), rel=1e-4)
    runner.finish()
    losses = []
    run = make_run(ENCODER, family=family)
    run.corpus = Corpus(corpus.train, held_out, "", "", {"masking": {"token": 59, "vocabulary": 59}})
    run.progress = lambda record: losses.append(record["loss"])
    run_stage(Transfer(tokens=48 * 2 * 20, batch=2, optimizer=FAST), run, "transfer")
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])
    run_stage(Finetune(tokens=48 * 8 * 30, batch=8, train="full", optimizer=FAST), run, "finetune")
    assert sum(losses[-4:]) < 0.9 * sum(losses[20:24])


@pytest.mark.parametrize("stage", ["transfer", "finetune", "distill"])
def test_adapters_of_an_encoder_leave_its_teacher_alone(make_run, corpus, stage) -> None:
    """BERT keeps its projections one module further inside, and teacher and student do not share those modules."""
    run = make_run(ENCODER, family="bert")
    run.corpus = Corpus(corpus.train, corpus.held_out, "", "", {"masking": {"token": 59, "vocabulary": 59}})
    teacher, rows = Teacher(run), corpus.train[:1].inputs()
    before, student = teacher.states(rows)[0], run.model.state_dict()
    student = {name: tensor.clone() for name, tensor in student.items()}
    settings = {
        "transfer": Transfer(tokens=48 * 2 * 3, batch=2, optimizer=FAST, train="qkvo"),
        "finetune": Finetune(tokens=48 * 2 * 3, batch=2, optimizer=FAST),
        "distill": Distill(tokens=48 * 2 * 3, batch=2, optimizer=FAST, hidden=0.5),
    }[stage]
    run_stage(settings, run, stage)
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, student[name])}
    assert any("attention.self.query" in name for name in changed)
    assert torch.equal(teacher.states(rows)[0], before)


def gradients(runner_class, settings, run, rows: PackedRows, micro: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    runner = runner_class(settings, run)
    trained = runner.prepare()
    runner.ready()
    weights = (rows.labels[:, 1:] != -100).sum(1).double()
    for start in range(0, len(rows), micro):
        runner.backward(rows[start : start + micro], float(weights[start : start + micro].sum() / weights.sum()))
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def test_how_a_batch_is_cut_does_not_change_gradients(make_run, corpus) -> None:
    settings = Finetune(train_mixer=True)
    whole = gradients(FinetuneRunner, settings, make_run(LIGER), corpus.train[:4], 4)
    cut = gradients(FinetuneRunner, settings, make_run(LIGER), corpus.train[:4], 1)
    assert whole.keys() == cut.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(cut[name], grad, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(make_run, corpus) -> None:
    plain = gradients(FinetuneRunner, Finetune(train_mixer=True), make_run(LIGER), corpus.train[:2], 2)
    checkpointed = gradients(
        FinetuneRunner, Finetune(train_mixer=True, gradient_checkpointing=True), make_run(LIGER), corpus.train[:2], 2
    )
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-8)


def test_chunked_cross_entropy_is_the_mean_over_labels(make_run, corpus, monkeypatch) -> None:
    monkeypatch.setattr("linearize.stages.finetune.TOKENS_PER_CHUNK", 7)
    run = make_run(LIGER)
    runner = FinetuneRunner(Finetune(train="full"), run)
    trained = runner.prepare()
    runner.ready()
    rows = corpus.train[:2]
    loss = runner.backward(rows, 1.0)["loss"]
    got = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    run.model.zero_grad()
    inputs = rows.inputs()
    logits = run.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, grad in got.items():
        torch.testing.assert_close(grad, dict(run.model.named_parameters())[name].grad, rtol=1e-3, atol=1e-6)


def test_z_loss_adds_the_mean_squared_log_sum_exp(make_run, corpus, monkeypatch) -> None:
    monkeypatch.setattr("linearize.stages.finetune.TOKENS_PER_CHUNK", 11)
    rows, factor = corpus.train[:2], 0.3
    plain, squared = make_run(LIGER), make_run(LIGER)
    losses, gradients = [], []
    for run, settings in ((plain, Finetune(train="full")), (squared, Finetune(train="full", z_loss=factor))):
        runner = FinetuneRunner(settings, run)
        trained = runner.prepare()
        runner.ready()
        losses.append(runner.backward(rows, 1.0)["loss"])
        gradients.append(trained["lm_head.weight"].grad.clone())
        run.model.zero_grad()
    inputs = rows.inputs()
    logits = plain.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
    logits = logits[:, :-1][inputs["labels"][:, 1:] != -100]
    extra = factor * sum(float(row.exp().sum().log()) ** 2 for row in logits.detach().double()) / len(logits)
    assert losses[1] - losses[0] == pytest.approx(extra, rel=1e-4)
    (factor * logits.exp().sum(-1).log().square().mean()).backward()
    wanted = gradients[0] + plain.model.lm_head.weight.grad
    torch.testing.assert_close(gradients[1], wanted, rtol=1e-3, atol=1e-5)


def test_the_loss_is_of_the_logits_that_the_model_gives(make_run, corpus) -> None:
    run = make_run(family="granite", logits_scaling=3.0)
    rows = corpus.train[:1]
    runner = FinetuneRunner(Finetune(), run)
    loss = runner.held_out_loss(rows)
    inputs = rows.inputs()
    labels = inputs.pop("labels")[:, 1:]
    logits = run.model(**inputs, use_cache=False).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    runner.prepare()
    runner.ready()
    assert runner.backward(rows, 1.0)["loss"] == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize("mixer", [None, LIGER])
def test_lora_trains_only_its_targets_and_is_merged(make_run, mixer) -> None:
    run = make_run(mixer)
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    lora = Lora(r=2, alpha=2.5, targets=["q_proj", "o_proj"])
    run_stage(Finetune(tokens=48 * 4, batch=2, lora=lora, optimizer=FAST), run, "finetune")
    after = run.model.state_dict()
    assert after.keys() == before.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "o_proj"}


def test_merging_is_judged_on_keys_and_values_that_are_not_rounded(make_run, monkeypatch) -> None:
    """What merging moves by a last bit, here by 1e-5, can move a rounding by a level; the merged model rounds again."""
    run = make_run(Mixer(combine=Part(name="window_only"), cache_dtype="mxint8"))
    attention, merge, factor = run.model.model.layers[0].self_attn, finetune.merge_lora, 1 + 1e-5

    def inexact(model) -> None:
        merge(model)
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(factor)

    monkeypatch.setattr(finetune, "merge_lora", inexact)
    monkeypatch.setattr(finetune, "MERGE_TOLERANCE", {torch.float32: 2e-4})
    stage = Finetune(tokens=48 * 4, batch=2, lora=Lora(r=2), optimizer=FAST)
    run_stage(stage, run, "finetune")
    assert attention.microscaled
    factor = 1.1
    with pytest.raises(LinearizeError, match="changed logits"):
        run_stage(stage, run, "finetune-2")
    assert attention.microscaled


def test_a_lora_target_that_matches_nothing_is_an_error(make_run) -> None:
    with pytest.raises(LinearizeError, match="q_prj"):
        run_stage(Finetune(lora=Lora(targets=["q_proj", "q_prj"])), make_run(LIGER), "finetune")


def test_full_fine_tuning_trains_everything(make_run) -> None:
    run = make_run(LIGER)
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    run_stage(Finetune(train="full", tokens=48 * 8, batch=2, optimizer=FAST), run, "finetune")
    after = run.model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_attention_alone_trains_in_the_layers_that_are_converted_by_then(make_run) -> None:
    run = make_run(LIGER)
    run.surgery.activate([1])
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    run_stage(Finetune(train="attention", tokens=48 * 4, batch=2, optimizer=FAST), run, "finetune")
    after = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1.self_attn." in name}
    assert {name.split(".")[4] for name in changed} >= {"q_proj", "k_proj", "v_proj", "o_proj", "mixer"}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("own", "size"), [(8, 3), (3, 8), (3, 48)])
@pytest.mark.parametrize("kind", [Transfer, Distill])
def test_a_stage_window_trains_as_a_recipe_of_that_window_and_goes_with_the_stage(
    make_run, kind, own, size, overlap
) -> None:
    stage = kind(tokens=48 * 2 * 3, batch=2, window=size, optimizer=FAST)

    def mixer(size: int) -> Mixer:
        return LIGER.model_copy(update={"window": Window(size=size, sinks=2), "overlap": overlap})

    def windows(run) -> list[int]:
        return [layer.self_attn.mixer.window for layer in run.model.model.layers]

    trained, losses = [], []
    for window, settings in ((own, stage), (size, stage.model_copy(update={"window": None}))):
        torch.manual_seed(0)
        run = make_run(mixer(window), folder=f"window-{window}")
        records = []
        run.progress = records.append
        run_stage(settings, run, "stage")
        assert windows(run) == [window] * 2
        trained.append(run.model.state_dict())
        losses.append([record["loss"] for record in records])
    assert losses[0] == losses[1] and trained[0].keys() == trained[1].keys()
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())
    torch.manual_seed(0)
    without = make_run(mixer(own), folder="without")

    def stop(record) -> None:
        assert record["loss"] != losses[0][0] and windows(without) == [own] * 2
        raise KeyboardInterrupt

    without.progress = stop
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage.model_copy(update={"window": None}), without, "stage")


def test_a_stopped_stage_leaves_windows_as_they_were(make_run) -> None:
    run = make_run(LIGER)
    seen = []

    def stop(record) -> None:
        seen.extend(layer.self_attn.mixer.window for layer in run.model.model.layers)
        raise KeyboardInterrupt

    run.progress = stop
    with pytest.raises(KeyboardInterrupt):
        run_stage(Finetune(tokens=48 * 2 * 3, batch=2, window=3), run, "finetune")
    assert seen == [3, 3]
    assert [layer.self_attn.mixer.window for layer in run.model.model.layers] == [8, 8]


def test_compiled_layers_notice_other_windows(make_run) -> None:
    model, ids = make_run(LIGER).model, torch.arange(3, 43)[None]
    outputs = []
    with torch.no_grad():
        for compiled in (False, True):
            for layer in model.model.layers if compiled else ():
                layer.compile(dynamic=False, backend="eager")
            for limit in (None, 3, None):
                with windows_of(model, limit):
                    outputs.append(model(ids, use_cache=False).logits)
    for eager, traced in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=1e-5)
    assert torch.equal(outputs[0], outputs[2]) and (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_clipping_happens(make_run) -> None:
    run = make_run(LIGER)
    runner = FinetuneRunner(Finetune(), run)
    trained = runner.prepare()
    runner.ready()
    runner.backward(run.corpus.train[:2], 1.0)
    from linearize.stages.gradients import clip

    limit = 1e-3
    norm = clip(runner.clip_groups(trained), limit)
    assert norm > limit
    left = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm()
    assert float(left) == pytest.approx(limit, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(make_run) -> None:
    run = make_run(LIGER)
    run.model.get_decoder().layers[0].mlp.up_proj.weight.data.fill_(torch.inf)
    with pytest.raises(LinearizeError, match="Lower `optimizer"):
        run_stage(Finetune(tokens=96, batch=2), run, "finetune")


def test_learning_rates() -> None:
    cosine = Stage(optimizer=Optimizer(lr=1.0, warmup=0.1, min_lr=0.1))
    rates = [learning_rate(cosine, step, 100) for step in range(100)]
    assert (
        rates[0] == pytest.approx(1 / 11)
        and rates[10] == 1.0
        and rates == rates[:11] + sorted(rates[11:], reverse=True)
    )
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    constant = Stage(optimizer=Optimizer(lr=1.0, warmup=0.0, schedule="constant"))
    assert {learning_rate(constant, step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("settings", [Finetune(), Distill(train_mixer=True, cache=True, top_k=4), Transfer()])
def test_the_held_out_rows_of_a_plateau_are_as_long_as_the_stages(settings, make_run, corpus, monkeypatch) -> None:
    monkeypatch.setattr("linearize.stages.base.PLATEAU_STEPS", 1)
    lengths: set[int] = set()
    run = make_run(LIGER)
    run.corpus = corpus.with_length(24)

    def note(module, args, given) -> None:
        rows, length = (*args, given.get("input_ids"))[0].shape
        if rows > 1:  # merging adapters is judged on one
            lengths.add(length)

    run.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    update = {"tokens": 24 * 4 * 3, "batch": 4, "optimizer": Optimizer(lr=1e-3, schedule="plateau", warmup=0.0)}
    run_stage(settings.model_copy(update=update), run, settings.stage)
    assert lengths == {24}


def test_a_plateau_lowers_the_rate_and_survives_a_restart(make_run, monkeypatch) -> None:
    monkeypatch.setattr("linearize.stages.base.PLATEAU_STEPS", 1)
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(FinetuneRunner, "held_out_loss", lambda self, rows: 1.0)
    optimizer = Optimizer(lr=1e-3, schedule="plateau", warmup=0.0, min_lr=1e-5)
    settings = Finetune(tokens=48 * 2 * 16, batch=2, optimizer=optimizer)
    rates: list[float] = []

    def stop_at(step: int):
        def progress(record) -> None:
            rates.append(record["lr"])
            if record["step"] == step:
                raise KeyboardInterrupt

        return progress

    run = make_run(LIGER)
    run.progress = stop_at(8)
    with pytest.raises(KeyboardInterrupt):
        run_stage(settings, run, "finetune")
    again = make_run(LIGER)
    again.progress = stop_at(99)
    run_stage(settings, again, "finetune")
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4)
    assert Path(again.metrics).read_text().count("\n") == 16


def logits_of(run, rows: PackedRows) -> torch.Tensor:
    """The logits [N, vocabulary] that a run's model gives for the labelled tokens of rows."""
    inputs = rows.inputs()
    out = run.model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
    return out[:, :-1][inputs["labels"][:, 1:] != -100]


def move(parameters, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "settings",
    [
        Distill(),
        Distill(divergence="reverse", temperature=2.0, lora=Lora(targets=["q_proj", "up_proj", "lm_head"])),
        Distill(train="mixer", temperature=0.5, kl=0.7, cross_entropy=0.3),
    ],
)
def test_distillation_is_the_mean_divergence_per_label(make_run, corpus, monkeypatch, settings) -> None:
    """Against the formula on whole logits, where the teacher is another model and adapters are far from zero."""
    monkeypatch.setattr("linearize.stages.finetune.TOKENS_PER_CHUNK", 7)
    rows = corpus.train[:2]
    with torch.no_grad():
        teacher = logits_of(make_run(), rows).double()
    run = make_run(LIGER)
    runner = DistillRunner(settings, run)
    trained = runner.prepare()
    runner.ready()
    move(trained.values())
    loss = runner.backward(rows, 1.0)["loss"]
    got = {name: p.grad.clone() for name, p in trained.items()}
    run.model.zero_grad()
    inputs = rows.inputs()
    targets = inputs["labels"][:, 1:][inputs["labels"][:, 1:] != -100]
    student = logits_of(run, rows).double()
    wanted = torch.zeros(()).double()
    for ours, theirs, target in zip(student, teacher, targets, strict=True):
        p, q = (theirs / settings.temperature).softmax(0), (ours / settings.temperature).softmax(0)
        if settings.divergence == "reverse":
            p, q = q, p
        wanted = wanted + settings.kl * settings.temperature**2 * (p * (p / q).log()).sum()
        wanted = wanted - settings.cross_entropy * ours.softmax(0)[target].log()
    wanted = wanted / len(targets)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    for name, parameter in trained.items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert set(got) == {n for n, p in run.model.named_parameters() if p.requires_grad}


def test_distillation_lowers_the_divergence_and_leaves_the_teacher_as_it_was(make_run) -> None:
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        before = make_run().model(ids).logits
    run = make_run(LIGER)
    losses = []
    run.progress = lambda record: losses.append(record["loss"])
    settings = Distill(tokens=48 * 2 * 30, batch=2, optimizer=FAST)
    run_stage(settings, run, "distill")
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    with torch.no_grad():
        assert torch.equal(run.surgery.undo()(ids).logits, before)


def test_a_stage_that_is_loaded_again_leaves_the_teacher_as_it_was(make_run, corpus) -> None:
    """A restarted run distills from the same teacher as one that was not interrupted."""
    lora = Lora(r=2, targets=["q_proj", "v_proj"])
    first = Finetune(tokens=48 * 8, batch=2, lora=lora, optimizer=FAST)
    runs = [make_run(LIGER), make_run(LIGER)]
    references = []
    for run in runs:
        run_stage(first, run, "finetune")
        inputs = corpus.train[:1].inputs()
        references.append(Teacher(run).states(inputs)[0])
    assert torch.equal(*references)
    with torch.no_grad():
        students = [run.model(corpus.train.input_ids[:1].long()).logits for run in runs]
        assert torch.equal(*students)
        assert torch.equal(
            runs[1].surgery.undo()(torch.arange(9)[None]).logits, make_run().model(torch.arange(9)[None]).logits
        )


def test_held_out_distillation_loss_is_the_mean_over_rows(make_run, corpus, monkeypatch) -> None:
    monkeypatch.setattr("linearize.stages.finetune.TOKENS_PER_CHUNK", 7)
    runner = DistillRunner(Distill(cross_entropy=0.5), make_run(LIGER))
    runner.prepare()
    runner.ready()
    each = [runner.backward(corpus.train[i : i + 1], 1.0)["loss"] for i in range(2)]
    assert runner.held_out_loss(corpus.train[:2]) == pytest.approx(sum(each) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"stage": "distill"}, {"stage": "transfer"}], "behind a `distill`"),
        ([{"stage": "distill", "train": "mixer", "train_mixer": False}], "trains nothing"),
    ],
)
def test_distillation_without_its_teacher_is_an_error(stages, words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        Recipe.parse({"name": "r", "stages": stages}, "r")


def test_distillation_without_a_mixer_has_the_labels_alone_to_learn(make_run, corpus) -> None:
    """The softmax control: divergence from itself is 0 at first, and its teacher stays as it was."""
    with pytest.raises(LinearizeError, match="starts at its optimum"):
        Recipe.parse({"name": "r", "mixer": None, "stages": [{"stage": "distill"}]}, "r")
    run = make_run()
    settings = Distill(cross_entropy=0.5, tokens=48 * 2 * 8, batch=2, optimizer=FAST)
    runner, plain = DistillRunner(settings, run), FinetuneRunner(Finetune(), make_run())
    runner.prepare()
    runner.ready()
    rows = corpus.train[:2]
    plain.prepare()
    assert runner.held_out_loss(rows) == pytest.approx(0.5 * plain.held_out_loss(rows), rel=1e-5)
    losses: list[float] = []
    run = make_run(folder="again")
    run.progress = lambda record: losses.append(record["loss"])
    run_stage(settings, run, "distill")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "runner_class"),
    [(Finetune(train="full"), FinetuneRunner), (Distill(), DistillRunner), (Transfer(train="qk"), TransferRunner)],
)
def test_mixers_have_their_own_learning_rate(make_run, settings, runner_class) -> None:
    run = make_run(LIGER)
    runner = runner_class(settings, run)
    trained = runner.prepare()
    runner.ready()
    optimizer = Optimizer(lr=1e-4, mixer_lr=1e-2, warmup=0.0)
    progress = Progress(trained, settings.model_copy(update={"optimizer": optimizer}))
    rest, own = progress.optimizer.param_groups
    mixers = {id(p) for layer in run.model.model.layers for p in layer.self_attn.mixer.parameters()}
    assert {id(p) for p in own["params"]} == mixers
    assert {id(p) for p in rest["params"]} == {id(p) for p in trained.values()} - mixers and rest["params"]
    progress.schedule(50, 100)
    assert progress.rates == {"lr": pytest.approx(0.5e-4), "mixer_lr": pytest.approx(0.5e-2)}
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    before = [(group["params"][0].clone(), group) for group in (rest, own)]
    progress.advance(lambda: 0.0)
    for parameter, group in before:
        moved = (parameter - group["params"][0]).detach().abs().max()
        assert float(moved) == pytest.approx(group["lr"], rel=1e-2)  # Adam's first step is the learning rate


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"stages": [{"stage": "transfer", "optimizer": {"mixer_lr": 1e-3}}]}, "mixers alone train"),
        (
            {"mixer": None, "stages": [{"stage": "finetune", "train": "full", "optimizer": {"mixer_lr": 1e-3}}]},
            "no effect where `mixer` is null",
        ),
    ],
)
def test_a_mixers_learning_rate_without_an_effect_is_an_error(recipe, words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        Recipe.parse({"name": "r", **recipe}, "r")


def test_weights_that_train_in_fp32_come_back_in_their_own_dtype(make_run) -> None:
    run = make_run(LIGER)
    run.model.to(torch.bfloat16)
    run.autocast = torch.bfloat16
    before = {name: tensor.dtype for name, tensor in run.model.state_dict().items()}
    seen = []
    run.progress = lambda record: seen.append({p.dtype for p in run.model.parameters()})
    run_stage(Finetune(train="full", tokens=48 * 4, batch=2, optimizer=FAST), run, "finetune")
    assert seen == [{torch.float32}] * 2
    assert {name: tensor.dtype for name, tensor in run.model.state_dict().items()} == before
    assert torch.bfloat16 in before.values()


def test_a_second_stage_of_adapters_warns_of_nothing(make_run, recwarn) -> None:
    run = make_run(LIGER)
    for name in ("one", "two"):
        run_stage(Finetune(tokens=96, batch=2, optimizer=FAST), run, name)
        run_stage(Transfer(train="qk", tokens=96, batch=2, optimizer=FAST), run, f"transfer-{name}")
    assert not [warning for warning in recwarn if "peft_config" in str(warning.message)]


@pytest.mark.parametrize(
    ("stage", "way"), [(Finetune, r"Set the stage's `gradient_checkpointing`"), (Transfer, "Give rows")]
)
def test_a_row_that_does_not_fit_into_memory_is_one_message(make_run, stage, way) -> None:
    settings = stage(tokens=48 * 4, batch=4, optimizer=FAST)
    runner = {Finetune: FinetuneRunner, Transfer: TransferRunner}[stage](settings, make_run(LIGER))

    def backward(rows, share):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 MiB. 1 MiB is free. See the docs.\nMore")

    runner.backward = backward
    with pytest.raises(LinearizeError, match=rf"one row of 48 tokens .*1 MiB is free\)\. {way}") as found:
        train(runner, stage.__name__.lower())
    assert "See the docs" not in str(found.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(torch.OutOfMemoryError, "simulated"), (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")],
)
def test_a_batch_that_does_not_fit_into_memory_is_cut_and_gives_the_same_weights(make_run, kind, words) -> None:
    ends, told = [], []
    for fits in (4, 1):
        run = make_run(LIGER, folder=str(fits))
        run.tell = told.append
        settings = Finetune(tokens=48 * 4 * 3, batch=4, lora=Lora(r=2, alpha=4), optimizer=FAST)
        runner = FinetuneRunner(settings, run)
        plain = runner.backward

        def backward(rows, share, plain=plain, fits=fits):
            if len(rows) > fits:
                raise kind(words)
            return plain(rows, share)

        runner.backward = backward
        train(runner, "finetune")
        ends.append({name: t.clone() for name, t in run.model.state_dict().items()})
    assert [event["rows"] for event in told if event["event"] == "memory"] == [2, 1]
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5)
