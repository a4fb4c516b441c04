"""Distillation's options: formulas in fp64, bounded logits, a teacher that is shared, copied or kept on the disk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linearize import checkpoint
from linearize.data import PackedRows
from linearize.errors import LinearizeError
from linearize.recipe import Recipe
from linearize.recipe_stages import Distill, Finetune, Lora, Optimizer
from linearize.stages import run_stage
from linearize.stages.base import _accumulate
from linearize.stages.distill import DistillRunner, coarse

FAST = Optimizer(lr=1e-2, warmup=0.0, schedule="constant")
VOCABULARY = 61


def move(parameters, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def outputs(model, rows: PackedRows, **options):
    inputs = rows.inputs()
    made = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False, **options)
    return made, inputs["labels"][:, 1:] != -100


def merged(p: torch.Tensor, keep: list[int]) -> list[torch.Tensor]:
    """Probabilities of the tokens to keep, and of the rest."""
    rest = sum((p[i] for i in range(len(p)) if i not in keep), torch.zeros(()).double())
    return [p[i] for i in keep] + [rest]


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_the_divergence_with_all_other_tokens_as_one(make_run, liger, corpus, divergence, temperature) -> None:
    rows, k = corpus.train[:2], 5
    settings = Distill(train="mixer", top_k=k, divergence=divergence, temperature=temperature)
    with torch.no_grad():
        made, chosen = outputs(make_run().model, rows)
    teacher = made.logits[:, :-1][chosen].double()
    run = make_run(liger)
    runner = DistillRunner(settings, run)
    trained = runner.prepare()
    runner.ready()
    move(trained.values())
    loss = runner.backward(rows, 1.0)["loss"]
    got = {name: parameter.grad.clone() for name, parameter in trained.items()}
    run.model.zero_grad()
    student = outputs(run.model, rows)[0].logits[:, :-1][chosen].double()
    wanted = torch.zeros(()).double()
    for ours, theirs in zip(student, teacher, strict=True):
        keep = theirs.argsort(descending=True)[:k].tolist()
        p, q = (merged((x / temperature).softmax(0), keep) for x in (theirs, ours))
        if divergence == "reverse":
            p, q = q, p
        wanted = wanted + temperature**2 * sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    wanted = wanted / len(teacher)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    for name, parameter in trained.items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_top_k_grows_to_the_whole_divergence_from_below(make_run, liger, corpus, divergence) -> None:
    losses = []
    for k in (1, 4, 16, VOCABULARY - 1, VOCABULARY, None):
        runner = DistillRunner(Distill(top_k=k, divergence=divergence), make_run(liger))
        runner.prepare()
        runner.ready()
        losses.append(runner.held_out_loss(corpus.train[:2]))
    *growing, whole, full = losses
    assert growing == sorted(growing) and growing[0] < 0.9 * full
    assert growing[-1] < full * (1 + 1e-6)
    assert whole == pytest.approx(full, rel=1e-6)


def test_a_certain_teacher_gives_finite_gradients() -> None:
    logits = torch.zeros(1, 9)
    logits[0, 3] = 500.0
    student = torch.zeros(1, 9, requires_grad=True)
    index = torch.tensor([[3, 1]])
    torch.nn.functional.kl_div(
        coarse(student, index), coarse(logits, index), reduction="sum", log_target=True
    ).backward()
    assert student.grad.isfinite().all() and student.grad[0, 3] == pytest.approx(1 / 9 - 1)


def test_more_than_the_vocabulary_is_an_error(make_run, liger) -> None:
    with pytest.raises(LinearizeError, match="`top_k` is 62; the model's vocabulary has 61"):
        DistillRunner(Distill(top_k=VOCABULARY + 1), make_run(liger)).prepare()


@pytest.mark.parametrize("micro", [1, 2])
def test_every_label_counts_the_same_however_the_batch_is_cut(make_run, liger, corpus, micro) -> None:
    """The mean is over tokens of the whole batch, where rows have 45, 20, 7 and 1 labels."""
    rows = corpus.train[:4]
    labels = rows.labels.clone()
    for row, count in enumerate((46, 20, 7, 1)):
        labels[row, count + 1 :] = -100
    rows = PackedRows(rows.input_ids, rows.position_ids, labels)
    results = []
    for size in (4, micro):
        torch.manual_seed(0)
        runner = DistillRunner(Distill(top_k=9, cross_entropy=0.4, hidden=0.3), make_run(liger))
        trained = runner.prepare()
        runner.ready()
        losses = _accumulate(runner, rows, size)
        results.append((losses["loss"], {name: p.grad.clone() for name, p in trained.items()}))
    (whole, gradients), (cut, cut_gradients) = results
    assert cut == pytest.approx(whole, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-3, atol=1e-6)


class Vocabulary(TorchDispatchMode):
    """Records the most rows of any tensor whose last axis is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"cross_entropy": 0.5, "divergence": "reverse"}])
def test_logits_exist_only_a_chunk_at_a_time(make_run, liger, corpus, monkeypatch, options) -> None:
    chunk = 33  # more than the rows of the output embedding, whose transpose has the vocabulary last as well
    monkeypatch.setattr("linearize.stages.finetune.TOKENS_PER_CHUNK", chunk)
    runner = DistillRunner(Distill(train="mixer", **options), make_run(liger))
    runner.prepare()
    runner.ready()
    rows = corpus.train[:4]
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
    with Vocabulary() as seen, keep:
        runner.backward(rows, 1.0)
        runner.held_out_loss(rows[:1])
    assert seen.rows == chunk
    assert saved and not [
        shape for shape in saved if shape[-1:] == (VOCABULARY,) and shape.numel() > chunk * VOCABULARY
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_are_aligned_layer_by_layer(make_run, liger, corpus, checkpointing) -> None:
    rows, factor = corpus.train[:2], 0.7
    settings = {"train": "mixer", "gradient_checkpointing": checkpointing}
    losses, gradients = [], []
    for hidden in (0.0, factor):
        run = make_run(liger)
        runner = DistillRunner(Distill(hidden=hidden, **settings), run)
        trained = runner.prepare()
        runner.ready()
        move(trained.values())
        losses.append(runner.backward(rows, 1.0)["loss"])
        gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
    run.model.zero_grad()
    run.model.gradient_checkpointing_disable()
    with torch.no_grad():
        seen = []
        teacher = make_run().model
        hooks = [layer.register_forward_hook(lambda m, a, out: seen.append(out)) for layer in teacher.model.layers]
        _, chosen = outputs(teacher, rows)
    made = []
    hooks += [layer.register_forward_hook(lambda m, a, out: made.append(out)) for layer in run.model.model.layers]
    outputs(run.model, rows)
    for hook in hooks:
        hook.remove()
    wanted = torch.zeros(()).double()
    for ours, theirs in zip(made, seen, strict=True):
        for a, b in zip(ours[:, :-1][chosen].double(), theirs[:, :-1][chosen].double(), strict=True):
            wanted = wanted + factor * ((a - b) @ (a - b)) / (b @ b)
    wanted = wanted / (len(made) * int(chosen.sum()))
    wanted.backward()
    assert losses[1] - losses[0] == pytest.approx(float(wanted.detach()), rel=1e-3)
    for name, parameter in trained.items():
        extra = gradients[1][name] - gradients[0][name]
        torch.testing.assert_close(extra, parameter.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"divergence": "reverse", "temperature": 2.0}])
def test_kept_logits_teach_what_the_teacher_teaches(make_run, liger, corpus, monkeypatch, options) -> None:
    monkeypatch.setattr("linearize.stages.teachers.ROWS_PER_SHARD", 3)
    losses = []
    for cache in (False, True):
        run = make_run(liger, folder=f"cache-{cache}")
        run.progress = lambda record: losses.append(record["loss"])
        settings = Distill(tokens=48 * 2 * 5, batch=2, optimizer=FAST, top_k=6, cache=cache, **options)
        run_stage(settings, run, "distill")
    assert losses[5:] == pytest.approx(losses[:5], rel=1e-5)
    shards = sorted((run.folder).glob("teacher-*/0*"))
    assert len(shards) == 3
    assert checkpoint.load(shards[0])[0]["made"].shape == (3 * 46, 7)


def test_kept_logits_are_written_once_and_only_for_rows_that_are_seen(make_run, liger, monkeypatch) -> None:
    monkeypatch.setattr("linearize.stages.teachers.ROWS_PER_SHARD", 2)
    asked = []
    original = DistillRunner._answer

    def counting(self):
        answer = original(self)

        def count(row):
            asked.append(len(row))
            if len(asked) == stop:
                raise KeyboardInterrupt
            return answer(row)

        return count

    monkeypatch.setattr(DistillRunner, "_answer", counting)
    settings = Distill(tokens=48 * 2 * 3, batch=2, top_k=4, cache=True)
    stop = 6
    with pytest.raises(KeyboardInterrupt):
        DistillRunner(settings, make_run(liger)).ready()
    stop = 0
    DistillRunner(settings, make_run(liger)).ready()
    assert len(asked) == 6 + 2  # four rows were whole on the disk
    DistillRunner(settings, make_run(liger)).ready()
    assert len(asked) == 8
    DistillRunner(settings.model_copy(update={"top_k": 5}), make_run(liger)).ready()
    assert len(asked) == 14


def test_everything_trains_beside_a_copy_of_the_teacher(make_run, liger, corpus) -> None:
    run = make_run(liger)
    run.teacher_copy = True
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    losses = []
    run.progress = lambda record: losses.append(record["loss"])
    settings = Distill(train="full", tokens=48 * 2 * 20, batch=2, optimizer=Optimizer(lr=3e-3, schedule="constant"))
    run_stage(settings, run, "distill")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert all(not torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    with torch.no_grad():
        made, chosen = outputs(make_run().model, corpus.train[:1])
        runner = DistillRunner(settings, run)
        runner.prepare()
        runner.ready()
        places = torch.nn.functional.pad(chosen, (0, 1))
        reference = runner._reference(corpus.train[:1], corpus.train[:1].inputs(), places)["states"]
        assert torch.allclose(runner.teacher.logits(reference), made.logits[:, :-1][chosen], atol=1e-6)


@pytest.mark.parametrize(
    ("stages", "copies"),
    [
        ([Distill()], [False]),
        ([Distill(train="full")], [True]),
        ([Distill(train="full", top_k=4, cache=True)], [False]),
        ([Distill(train="attention"), Distill()], [True, True]),
        ([Distill(teacher_device="cpu")], [True]),
        ([Finetune(), Distill()], [False, False]),
        ([Finetune(train="full"), Distill()], [False, True]),
        ([Finetune(lora=Lora(targets=["up_proj"])), Distill(top_k=4, cache=True)], [False, True]),
        ([Distill(train="mixer"), Distill(train="full"), Distill()], [False, True, True]),
    ],
)
def test_a_copy_is_loaded_only_where_the_weights_move(stages, copies) -> None:
    recipe = Recipe(name="r", stages=stages)
    assert [recipe.needs_teacher_copy(index) for index in range(len(stages))] == copies


def test_a_layer_that_stays_softmax_shares_its_adapted_projections_with_the_teacher() -> None:
    assert Recipe(name="r", layers=[0], stages=[Finetune(), Distill()]).needs_teacher_copy(1)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"cache": True}, "such as `top_k: 64`"),
        ({"cache": True, "top_k": 4, "hidden": 0.1}, "`hidden` needs the teacher's layers"),
        ({"train": "full", "lora": {"r": 4}}, "no adapters"),
        ({"train": "mixer", "optimizer": {"mixer_lr": 1e-3}}, "mixers alone train"),
        ({"train_mixer": False, "optimizer": {"mixer_lr": 1e-3}}, "`train_mixer` is false"),
        ({"optimizer": {"mixer_lr": 1e-6, "min_lr": 1e-5}}, "above mixer_lr"),
    ],
)
def test_an_option_without_an_effect_is_an_error(stage, words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        Recipe.parse({"name": "r", "stages": [{"stage": "distill", **stage}]}, "r")
