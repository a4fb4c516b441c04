"""What a run says, and what it leaves on the disk, when something goes wrong; and that nothing is lost by it.

`scripts/fault_table.py` runs these tests and writes the table in docs/reliability.md; each test checks its row there.
"""

import ctypes
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from linearize import checkpoint, cli
from linearize.api import linearize
from linearize.report.metrics import MetricsWriter
from linearize.stages.finetune import FinetuneRunner

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "reliability.md"
RECIPE = """
name: small
mixer:
  feature_map: softmax
  gate: key
  window: {size: 8}
stages:
- {stage: transfer, tokens: 128, batch: 2, micro_batch: 1}
- {stage: finetune, tokens: 640, batch: 2, micro_batch: 1, train_mixer: true}
data: {source: builtin, length: 64, held_out: 2}
"""
WORDS = ["--model", "./teacher", "--recipe", "small.yaml", "--output", "out"]
NUMBERS = re.compile(r"\b[0-9a-f]{64}\b|[\d.]+ [KMG]iB|(?<=now loss )[\d.]+|(?<=Known: )[^.]+(\.[^ ][^.]*)*")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, save_teacher: Any) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> bytes:
    """The weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(RECIPE)
    output = linearize(teacher, folder / "small.yaml", folder / "out").output
    return (output / "model.safetensors").read_bytes()


@pytest.fixture
def run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run the command in an empty folder, saving at every step; return its exit code and what it said last."""
    shutil.copytree(teacher, tmp_path / "teacher")
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/linearize/__main__.py"])
    monkeypatch.setattr("linearize.api.write_pages", lambda *given, **more: None)  # dear, and not what is tested here
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)

    def start(*more: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([*WORDS, *more])
        said = capsys.readouterr()
        print(said.out, said.err)
        return int(stopped.value.code or 0), said.err.strip() or said.out

    return start


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., None]:
    """Compare a fault's row with the table's, or keep it where the table is being made."""

    def keep(fault: str, code: int, message: str, left: str) -> None:
        message = re.sub(r"\S*python\S* -m linearize (.*)", "`linearize ...`", " ".join(message.split()))
        message = NUMBERS.sub("...", message.replace(f"{tmp_path}/", "").replace(str(tmp_path), "."))
        row = f"| {fault} | {code} | {message.replace('|', chr(92) + '|')} | {left} |"
        target = os.environ.get("LINEARIZE_FAULTS")
        if target:
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        else:
            assert row in TABLE.read_text(encoding="utf-8").splitlines(), f"run scripts/fault_table.py; now {row}"

    return keep


def at_step(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, act: Callable[[], None]) -> None:
    """Do something once, when a step is logged."""
    write, done = MetricsWriter.write, []

    def logged(self: MetricsWriter, name: str, number: int, **more: Any) -> None:
        if (name, number) == (stage, step) and not done:
            done.append(True)
            act()
        write(self, name, number, **more)

    monkeypatch.setattr(MetricsWriter, "write", logged)


def left(folder: Path) -> str:
    """What a work folder holds, in words; only whole checkpoints are counted."""
    stages = sorted(path.name for path in (folder / "stages").glob("*"))
    whole = {name: checkpoint.state_of(folder / "stages" / name) for name in stages}
    words = [
        f"`{name}`" + (f" (step {state['step']})" if "step" in state else "") for name, state in whole.items() if state
    ]
    return f"`{folder.name}`" + (f" with {', '.join(words)}" if words else "")


def finished(run: Callable[..., tuple[int, str]], whole: bytes) -> str:
    """Give the same command again: it ends with the weights of an undisturbed run. Return what it said."""
    code, said = run()
    assert code == 0
    assert Path("out/model.safetensors").read_bytes() == whole
    assert sorted(path.name for path in Path().iterdir()) == ["out", "small.yaml", "teacher"]
    logged = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    steps = [(entry["stage"], entry["step"]) for entry in logged]
    assert steps == [(stage, step) for stage, last in (("transfer", 1), ("finetune", 5)) for step in range(1, last + 1)]
    return said


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C (SIGINT)")])
def test_a_signal_saves_and_names_the_command_that_goes_on(
    number: int, name: str, run, record, whole, monkeypatch
) -> None:
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 3600.0)
    at_step(monkeypatch, "finetune", 3, lambda: os.kill(os.getpid(), number))
    code, said = run("--fresh")
    assert code == 128 + number
    command = said.splitlines()[-1]
    assert command.split()[1:] == ["-m", "linearize", *WORDS]
    assert Path(shutil.which(command.split()[0]) or "").resolve() == Path(sys.executable).resolve()
    record(f"{name} while training", code, said, left(Path("out.partial")))
    assert "Going on from step 3" in finished(run, whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_between_stages_stops_at_once(run, record, whole, monkeypatch) -> None:
    from linearize import api

    evaluate, calls = api.evaluate, []

    def measured(*args: Any) -> Any:
        calls.append(True)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(api, "evaluate", measured)
        code, said = run()
    assert code == 143
    record("SIGTERM while evaluating", code, said, left(Path("out.partial")))
    assert "transfer: all 1 steps were done before" in finished(run, whole)


def in_fork(act: Callable[[], Any]) -> int:
    """Do something in a copy of this process, and return how that ended: an exit code, or minus a signal."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except SystemExit as stopped:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(stopped.code or 0))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_while_saving(operation: int, half: bool) -> None:
    """Run the command, and die by SIGKILL at the n-th operation of all that saving is made of.

    Args:
        operation: the n.
        half: where that operation writes the tensors, half of their file is written.
    """

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal operation
            operation -= 1
            if operation == 0:
                if half and call is save_file:
                    call(*args, **options)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    save_file = checkpoint.save_file
    for name in ("save_file", "sync", "write_text", "_digest", "_promote"):
        setattr(checkpoint, name, deadly(getattr(checkpoint, name)))
    Path.rename = deadly(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment]
    cli.main(WORDS)


def test_killed_in_the_middle_of_saving_it_ends_with_the_same_weights(run, record, whole) -> None:
    """Three times SIGKILL at a random operation of saving, half-way through the file of tensors among them."""
    dice = random.Random(6)
    for half in (True, False, False):
        assert in_fork(lambda half=half: die_while_saving(dice.randint(8, 30), half)) == -signal.SIGKILL
    said = finished(run, whole)
    line = [line for line in said.splitlines() if line.startswith("Going on from") or "done before" in line][-1]
    record("killed (SIGKILL, power) while saving; three times", 0, line, "the finished folder, equal to the bit")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let every file end at some size, as the system does where there is no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("place", ["a checkpoint", "metrics.jsonl", "the finished folder"])
def test_a_disk_that_fills_up(place: str, run, record, whole, monkeypatch, full_disk) -> None:
    from linearize import api

    with monkeypatch.context() as patch:
        if place == "the finished folder":
            save = api.save_checkpoint
            patch.setattr(api, "save_checkpoint", lambda *given: full_disk(50_000) or save(*given))
        else:
            at_step(patch, "finetune", 3, lambda: full_disk(20_000 if place == "a checkpoint" else 1_000))
        code, said = run()
        full_disk(resource.RLIM_INFINITY)
    assert code == 2
    assert os.strerror(errno.EFBIG) in said
    assert not list(Path("out.partial/stages").glob("*.new"))
    record(f"the disk fills up at {place}", code, said, left(Path("out.partial")))
    finished(run, whole)


def test_a_disk_that_is_too_small_is_seen_before(run, record, monkeypatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    code, said = run()
    assert sorted(path.name for path in Path().iterdir()) == ["small.yaml", "teacher"]
    record("the disk is too small for the run", code, said, "nothing")


def without_override() -> None:
    """Take from root what lets it write where file modes say no (CAP_DAC_OVERRIDE)."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice 32 bits
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0


def test_a_read_only_folder(run, record, tmp_path) -> None:
    (tmp_path / "shelf").mkdir(mode=0o555)

    def child() -> None:
        sys.stderr = (tmp_path / "said.txt").open("w", encoding="utf-8")
        without_override()
        cli.main([*WORDS[:-1], "shelf/out"])

    code = in_fork(child)
    said = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert not list((tmp_path / "shelf").iterdir())
    record("the output folder is read-only", code, said, "nothing")


def interrupted(run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run that stopped in its second stage."""
    with monkeypatch.context() as patch:
        at_step(patch, "finetune", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run()[0] == 143


def test_lost_teacher_files(run, record, whole, monkeypatch) -> None:
    interrupted(run, monkeypatch)
    before = left(Path("out.partial"))
    Path("teacher").rename("elsewhere")
    code, said = run()
    record("the teacher's folder is gone at the second start", code, said, left(Path("out.partial")))
    Path("elsewhere").rename("teacher")
    Path("teacher/model.safetensors").rename("model.safetensors")
    code, said = run()
    record("the teacher's weights are gone at the second start", code, said, left(Path("out.partial")))
    assert left(Path("out.partial")) == before
    Path("model.safetensors").rename("teacher/model.safetensors")
    finished(run, whole)


def test_another_teacher_at_the_same_place(run, record, monkeypatch) -> None:
    interrupted(run, monkeypatch)
    file = Path("teacher/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, said = run()
    assert said.count("sha256") == 1
    record("the teacher's weights changed before the second start", code, said, left(Path("out.partial")))


def test_a_second_run_in_the_same_folder(run, record, whole, monkeypatch) -> None:
    answers: list[tuple[int, str]] = []

    def second() -> None:
        answers.extend([run(), run("--fresh")])

    with monkeypatch.context() as patch:
        at_step(patch, "finetune", 3, second)
        finished(run, whole)
    assert answers[0] == answers[1]
    record("a second run in the same folder, with --fresh or without", *answers[0], "the first run, which goes on")


def test_another_recipe_at_the_second_start(run, record, monkeypatch) -> None:
    interrupted(run, monkeypatch)
    code, said = run("mixer.window.size=16", "stages.1.optimizer.lr=1e-3")
    record("a changed recipe at the second start", code, said, left(Path("out.partial")))


def test_a_damaged_checkpoint(run, record, whole, monkeypatch) -> None:
    interrupted(run, monkeypatch)
    file = Path("out.partial/stages/finetune/tensors.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = finished(run, whole)
    line = next(line for line in said.splitlines() if line.startswith("Going on from"))
    record("a bit of the newest checkpoint flips", 0, line, "the finished folder, equal to the bit")


def test_a_damaged_end_of_a_stage(run, record, whole, monkeypatch) -> None:
    interrupted(run, monkeypatch)
    Path("out.partial/stages/transfer-ended/state.json").write_text("{}")
    said = finished(run, whole)
    line = next(line for line in said.splitlines() if "damaged" in line)
    record("a bit of a finished stage's weights flips", 0, line, "the finished folder, equal to the bit")


def test_numbers_that_are_not_finite(run, record, monkeypatch) -> None:
    backward = FinetuneRunner.backward

    def broken(self: Any, rows: Any, share: float) -> dict[str, Any]:
        losses = backward(self, rows, share)
        for name, parameter in self.run.model.named_parameters():
            if parameter.grad is not None and "layers.1." in name:
                parameter.grad.fill_(float("nan"))
        return losses

    monkeypatch.setattr(FinetuneRunner, "backward", broken)
    code, said = run()
    record("every gradient of a layer is NaN", code, said, left(Path("out.partial")))


def test_weights_that_are_not_finite_at_the_end_of_a_stage(run, record, monkeypatch) -> None:
    finish = FinetuneRunner.finish

    def broken(self: Any) -> None:
        finish(self)
        next(part for name, part in self.run.model.named_parameters() if self.changes(name)).data.fill_(float("inf"))

    monkeypatch.setattr(FinetuneRunner, "finish", broken)
    code, said = run()
    record("a weight is not finite at the end of a stage", code, said, left(Path("out.partial")))


def test_damaged_data(run, record, whole, monkeypatch) -> None:
    interrupted(run, monkeypatch)
    file = Path("out.partial/data/rows.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, said = run()
    record("a bit of the tokenized data flips", code, said, left(Path("out.partial")))
    shutil.rmtree("out.partial/data")
    finished(run, whole)


def test_a_folder_of_somebody_else(run, record) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("dear")
    code, said = run("--fresh")
    record("the output folder holds something else", code, said, "that folder, as it was")
    assert Path("out/thesis.tex").read_text() == "dear"
    assert not Path("out.partial").exists()


def test_fresh_leaves_a_neighbour_with_a_like_name_alone(run, whole) -> None:
    Path("out.old").mkdir()
    Path("out.old/thesis.tex").write_text("dear")
    assert run()[0] == 0
    assert run("--fresh")[0] == 0
    assert Path("out.old/thesis.tex").read_text() == "dear"
    assert Path("out/model.safetensors").read_bytes() == whole
