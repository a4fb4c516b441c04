"""Transfer's options: attention maps, early stop, blocks, and one layer after the other."""

import itertools
import math
from itertools import pairwise

import pytest
import torch

from linearize.data import Corpus, PackedRows
from linearize.errors import LinearizeError
from linearize.kernels.microscaling import microscaled
from linearize.mixers.context import sequence_context
from linearize.recipe import Recipe
from linearize.recipe_mixer import Mixer
from linearize.recipe_stages import Distill, Lora, Optimizer, Transfer
from linearize.registry import families
from linearize.stages import base, run_stage
from linearize.stages.transfer import TransferRunner

ENCODER = Mixer(feature_map={"name": "hedgehog"}, window=None, combine={"name": "memory_only"}, normalize=True)
FAST = Optimizer(lr=1e-2, warmup=0.0, schedule="constant")
LOLCATS = {
    "feature_map": "hedgehog",
    "window": {"size": 8, "sinks": 2},
    "combine": {"name": "shared_softmax", "memory": 0.1},
    "rotary": True,
    "normalize": True,
    "overlap": False,
}


@pytest.fixture
def lolcats() -> Mixer:
    return Mixer.model_validate(LOLCATS)


def softmax_maps(run, rows) -> list[torch.Tensor]:
    """The teacher's attention maps [B, H, T, T] by layer, with documents apart."""
    model, causal = run.surgery.undo(), families.get(run.model.config.model_type).causal
    model.set_attn_implementation("eager")
    inputs = rows.inputs()
    documents = (inputs["position_ids"] == 0).cumsum(1)
    visible = (documents[:, :, None] == documents[:, None])[:, None]
    visible = visible.tril() if causal else visible
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(
            inputs["input_ids"], attention_mask=mask, position_ids=inputs["position_ids"], output_attentions=True
        ).attentions


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3", "bert"])
def test_maps_are_compared_by_cross_entropy(make_run, lolcats, corpus, family) -> None:
    """Against the teacher's eager maps, and the mixer's map read off its response to each single value."""
    rows = corpus.train[:2]
    losses, runs = [], []
    mixer = lolcats if families.get(family).causal else ENCODER
    options = {
        "family": family,
        **({"sliding_window": 48} if family == "gemma2" else {}),
    }  # a mask given is all there is
    for maps in (0.0, 1.0):
        run = make_run(mixer, **options)
        runner = TransferRunner(Transfer(maps=maps), run)
        trained = runner.prepare()
        losses.append(runner._pass(rows, training=True))
        runs.append((run, runner, trained))
    run, runner, trained = runs[1]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    seen = {}
    for index, layer in runner.layers.items():

        def keep(module, args, i=index) -> None:
            seen.setdefault(i, (module, args))

        layer.student.mixer.register_forward_pre_hook(keep)
    runner._pass(rows, training=False)
    attentions = softmax_maps(make_run(mixer, **options), rows)
    for index in runner.layers:
        attention = attentions[index]
        mixer, (x, plain, rotated, v, context, _, rotate) = seen[index]
        batch, length, groups, dim = v.shape
        wanted = torch.zeros(()).double()
        for j in range(length):
            value = torch.zeros_like(v)
            value[:, j, :, 0] = 1
            with torch.no_grad():
                made = mixer(x, plain, rotated, value, context, None, rotate)[..., 0]
            assert (made > -1e-6).all()
            weights = attention[:, :, :, j].transpose(1, 2).double()
            wanted = wanted - (weights * made.double().clamp(min=1e-12).log()).sum()
        wanted = float(wanted) / (batch * length * attention.shape[1])
        assert losses[1][index] - losses[0][index] == pytest.approx(wanted, rel=1e-3)
        entropy = -(attention * attention.clamp(min=1e-30).log()).sum(-1).mean()
        assert wanted > float(entropy)


def test_maps_of_rounded_keys_are_of_the_keys_that_the_mixer_reads(make_run, lolcats, corpus) -> None:
    runner = TransferRunner(Transfer(maps=1.0), make_run(lolcats.model_copy(update={"cache_dtype": "mxint8"})))
    runner.prepare()
    keys = []
    mixer = runner.layers[1].student.mixer
    mixer.register_forward_pre_hook(lambda module, args: keys.append(args[2][1]))
    runner._pass(corpus.train[:2], training=False)
    assert len(keys) > 1 and all(torch.equal(seen, keys[0]) for seen in keys)
    assert torch.equal(keys[0], microscaled(keys[0]))


def test_maps_alone_bring_the_mixers_map_to_the_teachers(make_run, lolcats) -> None:
    run = make_run(lolcats)
    records = []
    run.progress = records.append
    run_stage(Transfer(tokens=48 * 2 * 30, batch=2, maps=1.0, scale=1e-6, optimizer=FAST), run, "transfer")
    assert records[-1]["loss"] < records[0]["loss"] - 0.02


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"combine": "learned"}, "`combine` is not"),
        ({"combine": "average", "normalize": False}, "`normalize: true`"),
        ({"combine": "average", "output_norm": True}, "`output_norm`"),
        ({"combine": "window_only", "overlap": True}, "`combine` is not"),
    ],
)
def test_a_mixer_without_a_map_is_an_error(make_run, changes, words: str) -> None:
    mixer = Mixer.model_validate({**LOLCATS, **changes})
    with pytest.raises(LinearizeError, match=words):
        TransferRunner(Transfer(maps=1.0), make_run(mixer)).prepare()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"maps": 1.0}, "`data.length` \\(2048\\), or `length` of the stage, to 1024"),
        ({"maps": 1.0, "block": 2}, "`block: 1`"),
        ({"order": "layerwise", "patience": 2}, "drop `patience`"),
        ({"order": "layerwise", "optimizer": {"schedule": "plateau"}}, "`schedule: plateau`"),
    ],
)
def test_options_that_do_not_go_together_are_an_error(stage, words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        Recipe.parse({"name": "r", "data": {"length": 2048}, "stages": [{"stage": "transfer", **stage}]}, "r")


@pytest.mark.parametrize("block", [1, 2])
def test_a_layer_that_waits_too_long_stops(make_run, liger, monkeypatch, block) -> None:
    """Layer 0's held-out loss is said to rise from the second look on: it stays as it is, and the other trains on."""
    monkeypatch.setattr(base, "PLATEAU_STEPS", 2)
    original, looks = TransferRunner._held_out, []

    def held_out(self, rows):
        looks.append(1)
        return {**original(self, rows), 0: float(len(looks))}

    monkeypatch.setattr(TransferRunner, "_held_out", held_out)
    run = make_run(liger)
    weights = [[], []]
    students = [layer.self_attn for layer in run.model.model.layers]
    records = []

    def progress(record) -> None:
        records.append(record)
        for kept, student in zip(weights, students, strict=True):
            kept.append(torch.cat([p.detach().flatten() for p in student.mixer.parameters()]))

    run.progress = progress
    settings = Transfer(tokens=48 * 2 * 12, batch=2, patience=2, block=block, optimizer=FAST)
    spent = run_stage(settings, run, "transfer")
    moved = [[not torch.equal(a, b) for a, b in pairwise(kept)] for kept in weights]
    assert moved[0] == [True] * 5 + [False] * 6  # looks behind steps 2, 4 and 6
    assert moved[1] == [True] * 11
    assert spent["tokens"] == 48 * 2 * 12
    assert {record["layers"][0] for record in records[6:]} == {3.0}


def test_the_stage_ends_where_every_layer_has_stopped(make_run, liger, monkeypatch) -> None:
    monkeypatch.setattr(base, "PLATEAU_STEPS", 2)
    monkeypatch.setattr(TransferRunner, "_held_out", lambda self, rows: {0: 1.0, 1: 1.0})
    settings = Transfer(tokens=48 * 2 * 12, batch=2, patience=1, optimizer=FAST)
    assert run_stage(settings, make_run(liger), "transfer")["tokens"] == 48 * 2 * 4


@pytest.mark.parametrize("target", ["before_o_proj", "after_o_proj"])
def test_a_block_trains_through_the_students_own_states(make_run, liger, corpus, target) -> None:
    """Four layers in blocks of two: gradients of the losses on a stream written out with the layers' own modules."""
    rows = corpus.train[:2]
    run = make_run(liger, num_hidden_layers=4)
    runner = TransferRunner(Transfer(block=2, target=target), run)
    trained = runner.prepare()
    losses = runner._pass(rows, training=True)
    got = {name: parameter.grad.clone() for name, parameter in trained.items()}
    run.model.zero_grad()
    inputs = rows.inputs()
    decoder = run.model.model
    positions = decoder.rotary_emb(decoder.embed_tokens(inputs["input_ids"]), inputs["position_ids"])
    context = sequence_context(2, 48, None, inputs["position_ids"], None)
    documents = (inputs["position_ids"] == 0).cumsum(1)
    mask = (documents[:, :, None] == documents[:, None]).tril()[:, None]

    def through(layer, attention, x):
        seen = []
        hook = attention.o_proj.register_forward_hook(
            lambda m, args, out: seen.append(out if target == "after_o_proj" else args[0])
        )
        mixed = attention(
            layer.input_layernorm(x), position_embeddings=positions, attention_mask=mask, sequence_context=context
        )[0]
        hook.remove()
        x = x + mixed
        return x + layer.mlp(layer.post_attention_layernorm(x)), seen[0]

    total = 0.0
    teacher_x = decoder.embed_tokens(inputs["input_ids"])
    for begin in (0, 2):
        student_x = teacher_x
        for index in (begin, begin + 1):
            layer = decoder.layers[index]
            with torch.no_grad():
                teacher_x, wanted = through(layer, run.surgery.teachers[index], teacher_x)
            student_x, made = through(layer, layer.self_attn, student_x)
            loss = ((made - wanted).square().mean((1, 2)) / wanted.square().mean((1, 2))).mean()
            assert losses[index] == pytest.approx(float(loss.detach()), rel=1e-4)
            total = total + loss
    total.backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)
    groups = runner.clip_groups(trained)
    assert len(groups) == 2 and sum(map(len, groups)) == len(trained)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train": "qkvo", "lora": Lora(r=2), "target": "after_o_proj", "optimizer": Optimizer(lr=1e-3, mixer_lr=1e-2)},
        {"block": 2, "optimizer": Optimizer(lr=1e-2, warmup=0.3)},
    ],
)
def test_layer_by_layer_ends_where_all_together_do(make_run, liger, options) -> None:
    settings = {"tokens": 48 * 4 * 6, "batch": 4, "micro_batch": 2, "optimizer": FAST, **options}
    ends, records = [], []
    for order in ("together", "layerwise"):
        run = make_run(liger, folder=order, num_hidden_layers=3)
        seen: list[dict] = []
        run.progress = seen.append
        spent = run_stage(Transfer(order=order, **settings), run, "transfer")
        ends.append(run.model.state_dict())
        records.append(seen)
        assert spent["tokens"] == 48 * 4 * 6
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    rounds = 2 if "block" in options else 3
    assert [record["step"] for record in records[1]] == list(range(1, 6 * rounds + 1))
    for record in records[1]:
        turn, step = divmod(record["step"] - 1, 6)
        same = records[0][step]["layers"]
        assert record["layers"].keys() <= same.keys() and min(record["layers"]) // options.get("block", 1) == turn
        assert record["layers"] == pytest.approx({k: same[k] for k in record["layers"]}, rel=1e-3)
        assert record["lr"] == records[0][step]["lr"]


def test_layers_that_train_nothing_have_no_turn(make_run, liger, random_teacher) -> None:
    """Layer 0 stays softmax and all heads of layer 2 are exact: layers 1 and 3 train."""
    from linearize.surgery import convert

    run = make_run(num_hidden_layers=4)
    run.surgery = convert(run.model, liger.model_dump(), [1, 2, 3], [(2, 0), (2, 1)])
    for order in ("together", "layerwise"):
        seen: list[dict] = []
        run.progress = seen.append
        run_stage(Transfer(tokens=48 * 2 * 2, batch=2, order=order), run, order)
        assert {layer for record in seen for layer in record["layers"]} == {1, 3}
        assert len(seen) == (2 if order == "together" else 4)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("family", families.names())
def test_blocks_of_every_family_begin_with_the_teachers_states(make_run, liger, corpus, family, block) -> None:
    """Blocks, run one after the other, see what they see in one pass of the whole decoder."""
    rows, losses = corpus.train[:2], []
    mixer = liger if families.get(family).causal else ENCODER
    for order in ("together", "layerwise"):
        run = make_run(mixer, family=family, num_hidden_layers=3)
        runner = TransferRunner(Transfer(order=order, block=block, tokens=48 * 8, batch=8), run)
        runner.prepare()
        seen = {}
        for turn in range(runner.rounds):
            runner.begin(turn)
            seen.update(runner._pass(rows, training=True))
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert min(losses[0].values()) > 1e-3


RETAIN = {
    "memory": {"name": "retain", "slots": 8},
    "window": {"size": 8, "sinks": 2},
    "combine": "joint",
    "rotary": True,
    "overlap": False,
}


@pytest.fixture
def long_corpus(corpus) -> Corpus:
    """Four rows of two documents, both longer than what a label needs."""
    ids = torch.randint(3, 61, (4, 260), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    positions = torch.cat([torch.arange(110), torch.arange(150)]).int().expand(4, -1)
    rows = PackedRows(ids, positions, torch.where(positions == 0, -100, ids))
    return Corpus(rows, rows[:2], "", "", {})


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_retention_scores_learn_what_the_teacher_attends_to_behind_the_window(make_run, long_corpus, family) -> None:
    """The loss against labels read off the teacher's eager maps; its gradient reaches the scores alone."""
    rows, mixer = long_corpus.train[:2], Mixer.model_validate(RETAIN)
    options = {"family": family, **({"sliding_window": 4096} if family == "gemma2" else {})}
    runner = TransferRunner(Transfer(), make_run(mixer, **options))
    trained = runner.prepare()
    assert {name.split(".", 2)[2] for name in trained} == {"mixer.memory.weight", "mixer.memory.bias"}
    for parameter in trained.values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    seen = {}
    for index, layer in runner.layers.items():

        def keep(module, args, i=index) -> None:
            seen.setdefault(i, args[0])

        layer.student.mixer.register_forward_pre_hook(keep)
    losses = runner._pass(rows, training=True)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    assert not [n for n, p in runner.run.model.named_parameters() if p.grad is not None and ".memory." not in n]
    runner._pass(rows, training=False)
    attentions = softmax_maps(make_run(mixer, **options), rows)
    for index, layer in runner.layers.items():
        memory = layer.student.mixer.memory
        groups = memory.weight.shape[0]
        total, wins = [], 0
        for row, (begin, end) in itertools.product(range(2), ((0, 110), (110, 260))):
            for j in range(begin + 2, end - 8 - 64 + 1):
                for group in range(groups):
                    heads = attentions[index][row].chunk(groups)[group]
                    wanted = bool((heads[:, j + 8 : end, j] > 0.1).any())
                    logit = (memory.weight[group] @ seen[index][row, j] + memory.bias[group]).double()
                    total.append(-(logit if wanted else -logit).sigmoid().log().item())
                    wins += wanted
        assert 0 < wins < len(total)
        entropy = sum(total) / len(total)
        assert losses[index] > entropy > 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linearize.stages.transfer.retains", lambda student: False)
            mean_square = runner._pass(rows, training=False)[index]
        assert losses[index] - mean_square == pytest.approx(entropy, rel=1e-3)


def test_how_a_batch_is_cut_does_not_change_what_retention_scores_learn(make_run, long_corpus) -> None:
    """Of four rows the first has long documents, the last only short ones, without a label."""
    rows = long_corpus.train
    places = torch.stack([torch.arange(260) % length for length in (260, 130, 100, 26)]).int()
    rows = PackedRows(rows.input_ids, places, torch.where(places == 0, -100, rows.input_ids))

    def gradients(micro: int) -> dict[str, torch.Tensor]:
        runner = TransferRunner(Transfer(batch=4), make_run(Mixer.model_validate(RETAIN)))
        trained = runner.prepare()
        base._accumulate(runner, rows, micro)
        return {name: parameter.grad for name, parameter in trained.items()}

    whole = gradients(4)
    for micro in (1, 2):
        for name, gradient in gradients(micro).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)


def test_transfer_lowers_the_loss_of_retention_scores(make_run, long_corpus) -> None:
    run = make_run(Mixer.model_validate(RETAIN))
    run.corpus = long_corpus
    settings = Transfer(tokens=260 * 2 * 40, batch=2, scale=1e-6, optimizer=FAST)

    def held_out_loss() -> float:
        runner = TransferRunner(settings, run)
        runner.prepare()
        return runner.held_out_loss(long_corpus.held_out)

    first = held_out_loss()
    run_stage(settings, run, "transfer")
    assert first == pytest.approx(math.log(2), rel=1e-3)
    assert held_out_loss() < first - 0.05


def test_retention_scores_have_no_blocks_of_layers(make_run) -> None:
    with pytest.raises(LinearizeError, match=r"memory: retain.*Use `block: 1`"):
        TransferRunner(Transfer(block=2), make_run(Mixer.model_validate(RETAIN))).prepare()


def test_retention_scores_alone_are_nothing_that_a_later_stage_trains(make_run) -> None:
    with pytest.raises(LinearizeError, match=r"scores of `memory: retain`.*`train: lora`"):
        run_stage(Distill(tokens=48 * 2, batch=2, train="mixer"), make_run(Mixer.model_validate(RETAIN)), "distill")


def test_a_later_stage_trains_adapters_through_what_is_kept(make_run) -> None:
    run, records = make_run(Mixer.model_validate(RETAIN)), []
    run.progress = records.append
    run_stage(Distill(tokens=48 * 2 * 30, batch=2, train="lora", optimizer=FAST), run, "distill")
    assert records[-1]["loss"] < records[0]["loss"]
