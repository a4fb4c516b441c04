"""Two processes (gloo, on the CPU) against one: every stage, whole models and FSDP2; signals; launch files."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize import checkpoint
from linearize.data import Corpus, PackedRows
from linearize.errors import LinearizeError
from linearize.interrupt import Stopped
from linearize.mixers.context import SequenceContext  # noqa: F401  (loads what a child would load anew)
from linearize.modeling import auto_class
from linearize.processes import ACCEPTED, Processes, leave
from linearize.recipe_mixer import Mixer
from linearize.recipe_stages import Distill, Finetune, Lora, Optimizer, Preference, Transfer
from linearize.sharding import shard
from linearize.stages import Run, base, run_stage
from linearize.stages.transfer import TransferRunner
from linearize.surgery import convert

LENGTH, STEPS = 16, 20
SIZES: dict[str, Any] = {"tokens": LENGTH * 4 * STEPS, "batch": 4}
MIXER = Mixer.model_validate(
    {
        "feature_map": "softmax",
        "gate": {"name": "key", "bias": 2.0},
        "window": {"size": 4, "sinks": 1},
        "combine": "learned",
    }
)
PLATEAU = Optimizer(lr=1e-2, schedule="plateau")
STAGES = {
    "transfer": Transfer(train="qk", lora=Lora(r=2), patience=1, optimizer=PLATEAU, **SIZES),
    "finetune lora": Finetune(train_mixer=True, micro_batch=1, **SIZES),
    "finetune full": Finetune(train="full", window=2, optimizer=Optimizer(lr=1e-4, mixer_lr=1e-3, clip=0.5), **SIZES),
    "distill": Distill(train="full", hidden=0.5, gradient_checkpointing=True, **SIZES),
    "preference": Preference(**SIZES),
}


def teacher(tied: bool) -> Any:
    """Two random layers; nothing is drawn that depends on the process."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = auto_class("llama").from_config(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def corpus(pairs: bool) -> Corpus:
    """Eight rows; how many labels each has differs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (8, LENGTH), generator=generator, dtype=torch.int32)
    first = LENGTH // 2 if pairs else 5
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)]).int().expand(8, -1)
    labels = ids.masked_fill(positions == 0, -100)
    labels[:4, 1:5] = -100
    rows = PackedRows(ids, positions, labels)
    return Corpus(rows, rows[:2], "", "", {})


def make_run(name: str, folder: Path, processes: Processes) -> Run:
    """A run of one stage; its embeddings are tied in one of them."""
    tied = name == "finetune full"
    torch.manual_seed(0)
    model = teacher(tied)
    surgery = convert(model, MIXER.model_dump())

    def load(device: torch.device) -> Any:
        copy = teacher(tied)
        if processes.sharded:
            shard(copy, processes)
        return copy

    return Run(
        model,
        surgery,
        corpus(pairs=name == "preference"),
        folder,
        0,
        torch.device("cpu"),
        metrics=folder / "metrics.jsonl",
        load_teacher=load,
        teacher_copy=name == "distill",
        processes=processes,
    )


def run_stages(folder: Path) -> None:
    """Run every stage; process 0 leaves losses, gradient norms and weights in `folder`."""
    base.PLATEAU_STEPS = 5
    processes = Processes.start(torch.device("cpu"))
    for name, settings in STAGES.items():
        if processes.sharded and name == "finetune lora":  # preference trains the same, sharded
            continue
        at = folder / name.replace(" ", "-")
        run = make_run(name, at, processes)
        run_stage(settings, run, "stage")
        if processes.main:
            checkpoint.save(at / "weights", checkpoint.distinct(run.model.state_dict()).items(), {})


def stop_in_the_middle(folder: Path) -> None:
    """Process 1 alone gets a signal at step 3; all stop behind it with a checkpoint, and go on from it."""
    processes = Processes.start(torch.device("cpu"))
    name = "finetune full"
    at = folder / name.replace(" ", "-")
    run = make_run(name, at, processes)
    seen: list[int] = []

    def progress(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        if processes.rank == 1 and record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    run.progress = progress
    with pytest.raises(Stopped), run.signals:
        run_stage(STAGES[name], run, "stage")
    assert seen == [1, 2, 3]
    found = checkpoint.state_of(at / "stage")
    assert found is not None and found["step"] == 3
    again = make_run(name, at, processes)
    again.progress = lambda record: seen.append(record["step"])
    run_stage(STAGES[name], again, "stage")
    assert seen == list(range(1, STEPS + 1))
    if processes.main:
        checkpoint.save(at / "weights", checkpoint.distinct(again.model.state_dict()).items(), {})


def spread_out(folder: Path) -> None:
    """Under FSDP2 a process holds its part of what trains and of what does not; the head that is tied stays whole."""
    from torch.distributed.tensor import DTensor

    from linearize.sharding import training
    from linearize.stages.finetune import FinetuneRunner

    processes = Processes.start(torch.device("cpu"))
    for name, whole in (("finetune full", {"model.embed_tokens.weight"}), ("preference", set())):
        run = make_run(name, folder, processes)
        runner = FinetuneRunner(STAGES[name], run)
        with training(runner, runner.prepare()) as (worker, trained):
            kinds = {key for key, parameter in trained.items() if not isinstance(parameter, DTensor)}
            assert kinds == whole and worker.run.model is not run.model
            up = worker.run.model.model.layers[0].mlp.up_proj.weight
            assert up.to_local().shape[0] * 2 == up.shape[0] == run.model.model.layers[0].mlp.up_proj.weight.shape[0]


def ask_in_vain(folder: Path) -> None:
    """An error in process 0 is every process's error, and `in_turn` is one after the other."""
    processes = Processes.start(torch.device("cpu"))

    def fail() -> None:
        raise LinearizeError("no room")

    with pytest.raises(LinearizeError, match="no room"):
        processes.once(fail)
    assert processes.once(lambda: processes.rank) == 0
    note = folder / "note"

    def look() -> bool:
        found = note.exists()
        note.write_text("x")
        return found

    assert processes.in_turn(look) is not processes.main
    used = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    used[processes.rank].grad = torch.full((2,), 3.0)
    processes.sum_gradients(used)
    assert all(parameter.grad is not None and parameter.grad.tolist() == [3.0, 3.0] for parameter in used)
    assert processes.summed({"loss": 1.0, "layers": {3: 0.5}}) == {"loss": 2.0, "layers": {3: 1.0}}
    assert processes.largest(processes.rank) == 1


def read_a_stream(folder: Path) -> None:
    """Two processes tokenize a stream that process 0 alone can read; all have the same rows."""
    from linearize.data import build_corpus
    from linearize.recipe import Data

    processes = Processes.start(torch.device("cpu"))
    data = Data(source=str(folder / "stream.jsonl"), streaming=True, length=32, held_out=4)
    if not processes.main:
        data = data.model_copy(update={"source": str(folder / "unseen.jsonl")})
    made = build_corpus(data, stream_tokenizer(), train_tokens=32 * 150, seed=0, processes=processes)
    (folder / f"{processes.rank}.json").write_text(json.dumps([made.fingerprint, len(made.train)]))


def stream_tokenizer() -> Any:
    """One token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<unk>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123456789 "]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def _process(work: Any, folder: Path, rank: int, port: int, environment: dict[str, str]) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment})
    torch.set_num_threads(1)
    work(folder)
    leave()


def two_processes(work: Any, folder: Path, **environment: str) -> None:
    """Run a function of this module in two processes, and fail where one does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=_process, args=(work, folder, rank, port, environment)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of every stage."""
    folder = tmp_path_factory.mktemp("alone")
    before = base.PLATEAU_STEPS
    run_stages(folder)
    base.PLATEAU_STEPS = before
    return folder


def same(got: Path, wanted: Path, name: str) -> None:
    """Losses, and gradients as the norms of each layer, agree at every step, and weights at the end."""
    place = name.replace(" ", "-")
    records = [
        [json.loads(line) for line in (folder / place / "metrics.jsonl").read_text().splitlines()]
        for folder in (got, wanted)
    ]
    assert len(records[0]) == len(records[1]) == STEPS or name == "transfer"
    for mine, theirs in zip(*records, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), (name, mine["step"], key)
        assert mine["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3, abs=1e-5)
    mine, theirs = (checkpoint.load(folder / place / "weights") for folder in (got, wanted))
    assert mine is not None and theirs is not None and mine.tensors.keys() == theirs.tensors.keys()
    for key, tensor in theirs.tensors.items():
        torch.testing.assert_close(mine.tensors[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_train_as_one_does(alone: Path, tmp_path: Path, sharded: str) -> None:
    two_processes(run_stages, tmp_path, ACCELERATE_USE_FSDP=sharded, FSDP_VERSION="2")
    for name in STAGES if sharded == "false" else STAGES.keys() - {"finetune lora"}:
        same(tmp_path, alone, name)


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_a_signal_to_one_process_stops_all_behind_the_same_step(alone: Path, tmp_path: Path, sharded: str) -> None:
    two_processes(stop_in_the_middle, tmp_path, ACCELERATE_USE_FSDP=sharded, FSDP_VERSION="2")
    same(tmp_path, alone, "finetune full")


def test_fsdp2_shards_what_trains_and_what_does_not(tmp_path: Path) -> None:
    two_processes(spread_out, tmp_path, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def test_processes_share_errors_and_sums(tmp_path: Path) -> None:
    two_processes(ask_in_vain, tmp_path)


def test_processes_share_the_tokenizing_of_a_stream(tmp_path: Path) -> None:
    from linearize.data import build_corpus
    from linearize.recipe import Data

    lines = [json.dumps({"text": f"document {i} " + "word " * (i % 7 + 1)}) for i in range(300)]
    (tmp_path / "stream.jsonl").write_text("\n".join(lines))
    data = Data(source=str(tmp_path / "stream.jsonl"), streaming=True, length=32, held_out=4)
    wanted = build_corpus(data, stream_tokenizer(), train_tokens=32 * 150, seed=0)
    two_processes(read_a_stream, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [wanted.fingerprint, len(wanted.train)]


def test_what_is_sharded_cannot_train_in_blocks(tmp_path: Path) -> None:
    run = make_run("transfer", tmp_path, Processes(count=2, sharded=True))
    with pytest.raises(LinearizeError, match=r"block: 2.*ddp\.yaml"):
        TransferRunner(Transfer(block=2), run).prepare()


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_launchers_setting_that_is_not_served_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(name, "other")
    with pytest.raises(LinearizeError, match=f"{name} to other"):
        Processes.start(torch.device("cpu"))


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2"])
def test_the_launch_files_ask_for_what_is_served(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What `accelerate launch` puts into the environment for a file of configs/launch, without starting anything."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    from linearize.processes import _check_launcher

    monkeypatch.setenv("ACCELERATE_BYPASS_DEVICE_MAP", "true")
    file = Path(__file__).parents[2] / "configs" / "launch" / f"{name}.yaml"
    given = launch_command_parser().parse_args(["--config_file", str(file), "-m", "linearize"])
    given, _, _ = _validate_launch_command(given)
    made = prepare_multi_gpu_env(given)
    for key, value in made.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    _check_launcher()
    assert (made.get("ACCELERATE_USE_FSDP") == "true") is (name == "fsdp2")
    assert given.num_processes == (1 if name == "single" else 2)
