"""A streamed transfer ends where the resident one does, holds one layer at a time, and survives being stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearize import checkpoint
from linearize.errors import LinearizeError
from linearize.eval import TeacherReference, evaluate
from linearize.layered import LayeredTeacher
from linearize.recipe_mixer import Mixer
from linearize.recipe_stages import Lora, Optimizer, Transfer
from linearize.registry import families
from linearize.stages import Run, run_stage
from linearize.stages.streamed import Stream, convert_layers
from linearize.surgery import convert
from linearize.teacher import load_config, load_teacher, resolve

LAYERS = 3
SIZES: dict[str, Any] = {"tokens": 48 * 4 * 4, "batch": 4, "micro_batch": 2, "optimizer": Optimizer(lr=1e-2)}
FEW: dict[str, Any] = {"tokens": 48 * 2 * 2, "batch": 2, "optimizer": Optimizer(lr=1e-2)}
PACKED = {"mixtral", "qwen3_moe", "gpt_neox"}  # experts in one tensor, another name for the head
HEDGEHOG = Mixer(feature_map={"name": "hedgehog"}, window=None, combine={"name": "memory_only"}, normalize=True)


@pytest.fixture
def both(make_teacher, corpus, liger, tmp_path):
    """A resident run and a stream over one teacher: `both("qwen3", Transfer(...))`."""

    def make(
        family: str, settings: Transfer, *, layers: list[int] | None = None, exact: Any = (), mixer: Any = liger, **more
    ) -> tuple[Run, Any]:
        folder = make_teacher(f"{family}-teacher", family=family, num_hidden_layers=LAYERS, initializer_range=0.2)
        source, cpu = resolve(str(folder)), torch.device("cpu")
        chosen = list(range(LAYERS)) if layers is None else layers
        model = load_teacher(source, torch.float32, "cpu")[0]
        before = TeacherReference(model, corpus.held_out)
        torch.manual_seed(5)
        surgery = convert(model, mixer.model_dump(), chosen, list(exact))
        metrics = tmp_path / "resident" / "metrics.jsonl"
        resident = Run(model, surgery, corpus, tmp_path / "resident", 0, cpu, metrics=metrics)
        resident.reference = before

        def stream(name: str = "streamed", part: range = range(LAYERS), progress: Any = None, disk: bool = True) -> Any:
            teacher = LayeredTeacher(folder, load_config(source), torch.float32, cpu)
            torch.manual_seed(5)
            start = tmp_path / name / "start"
            surgery = convert_layers(teacher, mixer.model_dump(), chosen, list(exact), start, part)
            run = replace(resident, model=teacher.model, surgery=surgery, folder=tmp_path / name / "stages")
            run.progress = progress or (lambda record: None)
            states = tmp_path / name / "states" if disk else None
            return Stream(teacher, surgery, settings, run, start, part, states, **{"measure": True, **more})

        return resident, stream

    return make


def ended(stream: Stream) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for block in stream.turns():
        found = checkpoint.load(stream.folder(block) / "transfer-ended")
        assert found is not None
        tensors |= found[0]
    return tensors


def changed(run: Run, names: Any) -> dict[str, torch.Tensor]:
    """The resident student's tensors that a stream has to write, at least all mixers'."""
    state = run.model.state_dict()
    assert {name for name in state if ".mixer." in name} <= set(names)
    return {name: state[name] for name in names}


def compare(run: Run, stream: Stream) -> None:
    got = ended(stream)
    for name, tensor in changed(run, got).items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("family", "settings", "more"),
    [
        *((family, Transfer(**FEW), {}) for family in families.names() if family not in PACKED),
        ("llama", Transfer(train="qkvo", lora=Lora(r=2), target="after_o_proj", **SIZES), {}),
        ("llama", Transfer(block=2, **SIZES), {"layers": [0, 2], "exact": [(2, 1)]}),
        ("gemma2", Transfer(train="qkvo", block=2, **SIZES), {"exact": [(0, 1)]}),
        ("gpt2", Transfer(train="qkvo", lora=Lora(r=2), **SIZES), {"exact": [(1, 2)]}),
        ("llama", Transfer(**SIZES), {"exact": [(1, 0), (1, 1)]}),
        ("llama", Transfer(window=3, **SIZES), {"exact": [(0, 1)]}),
    ],
)
def test_it_ends_where_the_resident_form_does(both, corpus, liger, family, settings, more) -> None:
    """Mixers, projections and what is measured on the held-out rows: of the teacher, before and after."""
    mixer = liger if families.get(family).causal else HEDGEHOG
    run, make = both(family, settings, mixer=mixer, **more)
    wanted = [run.reference.quality, evaluate(run.model, corpus.held_out, run.reference)]
    run_stage(settings, run, "transfer")
    wanted.append(evaluate(run.model, corpus.held_out, run.reference))
    stream = make()
    spent = stream.train()
    compare(run, stream)
    assert spent["tokens"] == settings.tokens
    found = list(stream.qualities())
    assert [name for name, _ in found] == ["teacher", "after surgery", "after transfer"]
    for (name, quality), other in zip(found, wanted, strict=True):
        for key in ("perplexity", "kl"):
            assert quality.row(name)[key] == pytest.approx(other.row(name)[key], rel=1e-5, abs=1e-6), (name, key)
    assert found[1][1].perplexity != found[2][1].perplexity
    assert stream.metrics()[-1]["tokens"] == settings.tokens
    assert [r["step"] for r in stream.metrics()] == list(range(1, len(stream.metrics()) + 1))


@pytest.mark.parametrize("family", sorted(PACKED - {"gpt_neox"}))
def test_a_checkpoint_in_another_layout_is_refused(both, family) -> None:
    with pytest.raises(LinearizeError, match=r"have no tensor 'model\.layers.*without --stream-layers"):
        both(family, Transfer(**SIZES))[1]()


@pytest.mark.parametrize("layers", [2, 6])
def test_what_is_held_at_once_is_the_embedding_or_a_layer_however_deep(both, make_teacher, corpus, layers) -> None:
    run, make = both("llama", Transfer(**SIZES))
    folder = make_teacher(f"deep-{layers}", num_hidden_layers=layers, tie_word_embeddings=True, vocab_size=2000)
    teacher = LayeredTeacher(folder, load_config(resolve(str(folder))), torch.float32, torch.device("cpu"))
    seen: list[int] = []
    original = teacher.load

    def load(names: Any) -> None:
        original(names)
        held = [p for p in teacher.model.parameters() if p.device.type != "meta"]
        seen.append(sum(p.nbytes for p in held))
        assert seen[-1] == teacher.live

    teacher.load = load
    surgery = convert_layers(teacher, HEDGEHOG.model_dump(), [0, 1], [], folder / "start", range(layers))
    own = replace(run, model=teacher.model, surgery=surgery, folder=folder / "stages")
    stream = Stream(teacher, surgery, Transfer(**SIZES), own, folder / "start", range(layers), None, True)
    # the mixers of the layer at hand are not the teacher's
    mixers = {id(p) for layer in teacher.model.model.layers[:2] for p in layer.self_attn.mixer.parameters()}
    assert mixers
    stream.train()
    list(stream.qualities())
    norm, embedding = 64 * 4, 2000 * 64 * 4
    assert max(seen) == teacher.peak == norm + embedding
    assert teacher.live == norm


@pytest.mark.parametrize("disk", [True, False])
def test_a_stopped_stream_goes_on_at_the_layer_and_step(both, monkeypatch, disk) -> None:
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    settings = Transfer(train="qk", **SIZES)
    run, make = both("llama", settings)
    whole = make("whole", disk=disk)
    whole.train()
    seen: list[int] = []

    def stop_at(step: int) -> Any:
        def progress(record: dict[str, Any]) -> None:
            seen.append(record["step"])
            if record["step"] == step:
                raise KeyboardInterrupt

        return progress

    for step in (2, 7, 12):
        with pytest.raises(KeyboardInterrupt):
            make("stopped", progress=stop_at(step), disk=disk).train()
    last = make("stopped", progress=stop_at(-1), disk=disk)
    last.train()
    # A step's checkpoint is written behind its record: the step that was stopped at runs again, and no step before it.
    assert seen == [1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 12]
    for name, tensor in ended(whole).items():
        assert torch.equal(ended(last)[name], tensor), name
    assert [r["loss"] for r in last.metrics()] == [r["loss"] for r in whole.metrics()]


def test_hidden_states_in_a_damaged_file_are_made_anew(both) -> None:
    run, make = both("llama", Transfer(**SIZES))
    make("whole").train()
    stream = make("damaged", progress=lambda record: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stream.train()
    files = sorted((stream.states / "training").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].unlink()
    again = make("damaged")
    assert again.training_states.places[:3] == [-1, -1, 0]
    again.train()
    for name, tensor in ended(make("whole")).items():
        assert torch.equal(ended(again)[name], tensor), name


def test_a_part_trains_its_layers_from_the_teachers_states(both) -> None:
    run, make = both("llama", Transfer(**SIZES), measure=False)
    whole = make("whole")
    whole.train()
    tensors: dict[str, torch.Tensor] = {}
    for part in (range(1, 3), range(1)):
        stream = make(f"part-{part.start}", part)
        stream.train()
        assert {int(name.split(".")[2]) for name in ended(stream)} == set(part)
        tensors |= ended(stream)
    assert tensors.keys() == ended(whole).keys()
    for name, tensor in ended(whole).items():
        assert torch.equal(tensors[name], tensor), name


def test_weights_are_read_a_few_rows_at_a_time_in_the_runs_dtype(make_teacher, monkeypatch) -> None:
    folder = make_teacher("half")
    path = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    monkeypatch.setattr("linearize.layered.CHUNK_BYTES", 5000)
    teacher = LayeredTeacher(folder, load_config(resolve(str(folder))), torch.float32, torch.device("cpu"))
    with teacher.at_hand([*teacher.embedding, *teacher.of(range(2)), *teacher.head]):
        loaded = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    wanted = load_teacher(resolve(str(folder)), torch.float32, "cpu")[0].state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_a_tensor_of_another_shape_is_named(make_teacher) -> None:
    folder: Path = make_teacher("wrong")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, path, {"format": "pt"})
    teacher = LayeredTeacher(folder, load_config(resolve(str(folder))), torch.float32, torch.device("cpu"))
    with pytest.raises(LinearizeError, match=r"layers\.1\.mlp\.up_proj.*\[2, 2\].*\[96, 64\]"):
        teacher.load(teacher.of(range(1, 2)))
