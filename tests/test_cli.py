"""The command: what it parses, what it prints, and how it fails."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import linearize
from linearize import api, cli
from linearize.errors import LinearizeError
from linearize.recipe import Recipe, recipe_names


def run(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return int(stopped.value.code or 0)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with one paragraph and exit code 2; return the paragraph."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def tiny(make_teacher) -> str:
    return str(make_teacher("tiny"))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['linearize', '--help']\n"
        "from linearize.cli import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "linearize.cli" in loaded
    assert not loaded & {"torch", "transformers", "pydantic", "numpy", "yaml", "peft", "datasets"}
    for word in ("run", "plan", "doctor", "generate", "validate"):
        assert word in done.stdout


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, linearize; dir(linearize); print('torch' in sys.modules, linearize.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", cli_version()]


def cli_version() -> str:
    import linearize

    return linearize.__version__


def test_every_public_name_exists() -> None:
    import linearize

    for name in linearize.__all__:
        assert getattr(linearize, name) is not None
    assert callable(linearize.linearize)
    assert callable(linearize.plan)
    with pytest.raises(AttributeError, match="linearise"):
        _ = linearize.linearise


def test_version_of_package_and_project(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == project["version"] == cli_version()


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "linearize", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, cli_version())


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ([], ["--help"]),
        (["--help"], ["--help"]),
        (["--model", "m"], ["run", "--model", "m"]),
        (["data.length=4", "--model", "m"], ["run", "data.length=4", "--model", "m"]),
        (["plan", "--model", "m"], ["plan", "--model", "m"]),
    ],
)
def test_bare_flags_mean_run(given: list[str], parsed: list[str]) -> None:
    assert cli._with_command(given) == parsed


@pytest.mark.parametrize("command", sorted(get_command(cli.app).commands))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "Usage: linearize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "count"),
    [("40000", 40_000), ("40_000", 40_000), ("40K", 40_000), ("2m", 2_000_000), ("1.5B", 1_500_000_000)],
)
def test_tokens(text: str, count: int) -> None:
    assert cli._tokens(text) == count


@pytest.mark.parametrize("text", ["many", "0", "-3", "1.5", "K", "nan", "inf"])
def test_wrong_tokens(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refuse(capsys, "plan", "--model", "llama-3-8b", "--recipe", "liger", "--tokens", text)
    assert repr(text) in message


def test_plan_of_the_headline(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert run("plan", "--model", "llama-3-8b", "--recipe", "liger") == 0
    printed = capsys.readouterr().out
    assert "32 layers, 32 converted" in printed
    assert printed.count("converted ") == 32
    assert run("--model", "llama-3-8b", "--recipe", "liger", "--dry-run") == 0
    assert capsys.readouterr().out == printed
    assert not cache.exists()


def test_plan_takes_every_setting(capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    words = ["--recipe", "liger", "--quick", "--tokens", "5120", "data.length=64", "mixer.window.size=8"]
    assert run("plan", "--model", tiny, *words) == 0
    printed = capsys.readouterr().out
    assert "rows of 64 tokens" in printed
    assert "1,344" in printed  # whole steps
    assert "3,776" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evl", "x"], ["'evl'", "Did you mean 'eval'"]),
        (["plan", "--model", "llama-3-8", "--recipe", "liger"], ["'llama-3-8'", "Did you mean 'llama-3-8b'"]),
        (["plan", "--model", "llama-3-8b", "--recipe", "lger"], ["'lger'", "Did you mean 'liger'"]),
        (["plan", "--model", "llama-3-8b", "--recipe", "liger", "dta.length=3"], ["'dta'", "Did you mean 'data'"]),
        (["plan", "--model", "llama-3-8b", "--recipe", "liger", "mixer.gate=kee"], ["'kee'", "mixer.gate", "key"]),
        (["plan", "--model", "llama-3-8b", "--recipe", "liger", "data.length=9000"], ["9000", "8192"]),
        (["plan", "--model", "llama-3-8b", "--recipe", "liger", "--dtype", "fp8"], ["'fp8'", "bfloat16"]),
        (["show", "lolcat"], ["Did you mean 'lolcats'"]),
        (["show", "no/such.yaml"], ["no recipe file"]),
        (["validate", "liger", "mixer.window=null"], ["mixer.window"]),
        (["validate", "liger", "--model", "qwen3-0.6b", "layers=[28]"], ["layer 28"]),
        (["ls", "recipe"], ["Did you mean 'recipes'"]),
        (["cp", "liger", "mine.txt"], [".yaml"]),
        (["eval", "no/such/folder"], ["no/such/folder"]),
        (["generate", "no/such/folder", "hello"], ["no/such/folder"]),
        (["push", "no/such/folder", "me/model"], ["no/such/folder", "it has no config.json"]),
        (["push", "no/such/folder", "model", "--dry-run"], ["'model'", "owner/name"]),
        (["push", "no/such/folder", "me/model", "--revision", "a b", "--dry-run"], ["'a b'", "branch"]),
        (["psh", "x", "me/model"], ["'psh'", "Did you mean 'push'"]),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    message = refuse(capsys, *arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "", "--recipe", "liger"], "--model"),
        (["--model=", "--recipe", "liger"], "--model"),
        (["--model", "x", "--recipe", "liger", "--data", ""], "--data"),
        (["--model", "x", "--recipe", "liger", "--output="], "--output"),
        (["--model", "x", "--recipe", "liger", "--track", "", "--quick"], "--track"),
        (["eval", "x", "--against", ""], "--against"),
        (["eval", ""], "An argument of `eval`"),
        (["compare", "x", ""], "An argument of `compare`"),
        (["generate", "", "hello"], "An argument of `generate`"),
    ],
)
def test_an_empty_value_is_no_value(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"error: {named} is empty. Give it a value" in refuse(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate", "x" * 300 + ".yaml"], "xx.yaml: File name too long."),
        (["cp", "liger", "x" * 300 + ".yaml"], "xx.yaml: File name too long."),
        (["--model", "{tiny}", "--recipe", "liger", "data.length=64", "--output", "x" * 300], "File name too long."),
        (["--model", "{tiny}", "--recipe", "liger", "data.length=64", "--output", "file/x"], "Not a directory."),
        (
            ["--model", "{tiny}", "--recipe", "liger", "data.length=64", "--data", "x" * 300 + ".txt"],
            "no such file or folder",
        ),
        (["eval", "caf\udce9"], r"'caf\udce9' is not UTF-8 text"),
        (["cp", "liger", "none/mine.yaml"], "There is no folder none"),
    ],
)
def test_what_the_system_refuses_is_one_message(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = [word.replace("{tiny}", tiny) for word in arguments]
    assert words in refuse(capsys, *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "tiny"]
    with pytest.raises((OSError, LinearizeError)):
        cli.main([*given, "--debug"])


@pytest.mark.parametrize("quick", [[], ["--quick"]])
@pytest.mark.parametrize("command", ["run", "plan", "validate"])
def test_a_probe_that_nothing_asks_for(
    command: str, quick: list[str], capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path
) -> None:
    words = ["liger"] if command == "validate" else ["--model", tiny, "--recipe", "liger", "data.length=64", *quick]
    assert "`probe` of recipe 'liger' has no effect" in refuse(capsys, command, *words, "probe.samples=2")
    assert run("plan", "--model", tiny, "--recipe", "liger", "data.length=64", *quick) == 0
    for chosen in ([], ["exact_heads=[]"]):  # what an override takes away leaves the recipe's settings of the probe
        assert run("validate", "untrained", "probe.samples=2", *chosen) == 0


def test_what_overrides_take_from_the_probe(tiny: str) -> None:
    taken = ["exact_heads=[]", "mixer.window.size=64", "stages.1.window=null", "data.length=64", "stages.0.length=64"]
    assert run("validate", "best", "--model", tiny, *taken) == 0
    api.plan(tiny, Recipe.resolve("best").with_overrides(taken))


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["probe"]])
def test_a_seed_that_is_none(
    command: list[str], seed: str, capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path
) -> None:
    words = ["--model", tiny, "--recipe", "untrained", "--output", str(tmp_path / "out"), "--seed", seed]
    assert f"--seed is {seed}; expected a whole number from 0 to 4294967295" in refuse(capsys, *command, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_seed_that_is_no_whole_number(tiny: str) -> None:
    with pytest.raises(LinearizeError, match="--seed is '1'"):
        linearize.plan(tiny, "untrained", seed="1")


@pytest.mark.parametrize("count", ["x", "", "0", "-2"])
@pytest.mark.parametrize("command", ["run", "ls"])
def test_a_launcher_that_says_no_number(
    command: str, count: str, capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    words = ["--model", tiny, "--recipe", "liger", "--output", str(tmp_path / "out"), "data.length=64"]
    assert f"WORLD_SIZE is '{count}' in the env" in refuse(capsys, command, *(words if command == "run" else []))


def test_a_launcher_that_is_none(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("accelerate.PartialState._shared_state", {})  # which a test before may have filled
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    words = ["--model", tiny, "--recipe", "liger", "--quick", "--output", str(tmp_path / "out"), "data.length=64"]
    assert "Start with `accelerate launch`" in refuse(capsys, *words)


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--modl", "x", "--recipe", "y") == 2
    assert "--model" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="Unknown recipe"):
        cli.main(["show", "nope", "--debug"])


@pytest.mark.parametrize("name", recipe_names())
def test_show_and_validate(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("show", name) == 0
    text = capsys.readouterr().out
    assert text.startswith("# linearize --model")
    assert run("show", name, "--full") == 0
    full = tmp_path / "full.yaml"
    full.write_text(capsys.readouterr().out)
    assert Recipe.from_yaml(full) == Recipe.from_yaml(name)
    assert run("validate", name) == 0


def test_show_with_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "liger", "data.length=77") == 0
    assert "length: 77" in capsys.readouterr().out


def test_copy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    assert run("cp", "paper/liger", str(mine)) == 0
    capsys.readouterr()
    assert mine.read_text().splitlines()[0].endswith(f"--recipe {mine}")
    copied, original = Recipe.from_yaml(mine), Recipe.from_yaml("paper/liger")
    assert copied.name == "mine"
    assert copied.model_dump(exclude={"name"}) == original.model_dump(exclude={"name"})
    before = mine.read_text()
    assert "exists already" in refuse(capsys, "cp", "liger", str(mine))
    assert "no folder" in refuse(capsys, "cp", "liger", str(tmp_path / "no" / "x.yaml"))
    assert mine.read_text() == before


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls") == 0
    printed = capsys.readouterr().out
    for word in ("paper/lolcats", "smollm2-135m", "hedgehog", "shared_softmax", "qwen3"):
        assert word in printed
    assert run("ls", "families") == 0
    assert "hedgehog" not in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    for word in ("torch", "transformers", "need a CUDA device", "parity"):
        assert word in printed
    kernels = Path(__file__).parent.parent / "kernels"
    ops = {op for path in kernels.glob("*.py") for op in re.findall(r'select\("(\w+)"', path.read_text())}
    assert ops
    for op in ops:
        assert re.search(rf"^{op} .* ok$", printed, re.MULTILINE)


def test_doctor_finds_a_wrong_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize import doctor

    window, reference = doctor.OPS["window"]
    monkeypatch.setattr(doctor, "OPS", {"window": (lambda q, k, v: window(q, k, v) * 1.001, reference)})
    assert run("doctor") == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "CUDA out of memory. Tried to allocate 3 MiB. See the docs",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_full_memory_is_one_message(
    words: str, capsys: pytest.CaptureFixture[str], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("linearize.evaluation.evaluate_folder", full)
    assert words.splitlines()[0].split(". ")[0] in refuse(capsys, "eval", tiny)
    with pytest.raises(RuntimeError, match="CU"):
        cli.main(["eval", tiny, "--debug"])
    words = "shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["eval", tiny])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("command", ["run", "plan", "generate", "doctor"])
def test_a_backend_that_cannot_run_here(
    command: str, backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: str, tmp_path
) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "config.json").write_text('{"linearize": {"mixer": {}}}')
    given = {"run": ["--output", str(tmp_path / "out")], "generate": [str(tmp_path), "hello"], "doctor": []}
    model = ["--model", tiny, "--recipe", "liger"] if command in ("run", "plan") else []
    capsys.readouterr()
    assert run(command, *model, *given.get(command, [])) == 2
    error = capsys.readouterr().err
    assert f"error: LINEARIZE_BACKEND='{backend}' {'is unknown' if backend == 'cuda' else 'needs a GPU'}" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_run_from_end_to_end(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "--model",
        tiny,
        "--recipe",
        "liger",
        "--quick",
        "--tokens",
        "1280",
        "--output",
        str(out),
        "data.length=64",
    ]
    assert run(*words) == 0
    printed = capsys.readouterr().out
    for word in ("teacher", "after surgery", "after transfer", "after distill", "65,536", str(out / "report.html")):
        assert word in printed
    assert run(*words) == 0
    again = capsys.readouterr().out
    assert "finished already" in again
    assert "after distill" in again
    assert "seed: 0 -> 1" in refuse(capsys, *words, "--seed", "1")
    assert run("eval", str(out), "--rows", "2", "--against", tiny) == 0
    assert "KL to teacher" in capsys.readouterr().out
    assert run("generate", str(out), "hello", "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearize import api

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_stage", stop)
    words = ["--model", tiny, "--recipe", "liger", "--quick", "--output", str(tmp_path / "out"), "data.length=64"]
    assert run(*words) == 130
    assert "Go on with:\n" in capsys.readouterr().err
    assert (tmp_path / "out.partial").is_dir()


def test_a_resumed_run_says_what_was_done_before(
    capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearize import api

    run_stage = api.run_stage

    def stop(settings: object, run: object, name: str) -> object:
        if name == "distill":
            raise KeyboardInterrupt
        return run_stage(settings, run, name)

    words = ["--model", tiny, "--recipe", "liger", "--quick", "--tokens", "1280", "data.length=64"]
    words += ["--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(api, "run_stage", stop)
        assert run(*words) == 130
    assert "done before" not in capsys.readouterr().out
    assert run(*words) == 0
    printed = capsys.readouterr().out
    assert re.search(r"transfer: all \d+ steps were done before", printed)
    assert "distill: all" not in printed


def test_the_headline_runs_on_a_tiny_llama_in_its_cache(
    capsys: pytest.CaptureFixture[str], cache: Path, make_teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_teacher("cache/models/llama-3-8b")
    monkeypatch.chdir(tmp_path)
    words = ["--data", "builtin", "--tokens", "1280", "data.length=64", "data.held_out=4", "data.loss=all"]
    assert run("--model", "llama-3-8b", "--recipe", "liger", *words) == 0
    assert (tmp_path / "llama-3-8b-liger" / "model.safetensors").is_file()
    assert "after distill" in capsys.readouterr().out


BAD_RUNS = {
    "unknown recipe": (["--recipe", "ligr"], "Did you mean 'liger'"),
    "unknown key": (["data.lenght=64"], "Did you mean 'length'"),
    "unknown part": (["mixer.feature_map=softmx"], "Did you mean 'softmax'"),
    "wrong type": (["data.length=long"], "integer"),
    "unknown model": (["--model", "smollm-135m"], "Did you mean 'smollm2-135m'"),
    "empty folder": (["--model", "{folder}/empty"], "holds no model"),
    "encoder": (["--model", "{folder}/encoder"], "encoder-only"),
    "linearized": (["--model", "{folder}/linearized"], "already linearized"),
    "truncated safetensors": (["--model", "{folder}/truncated"], "damaged"),
    "no GGUF": (["--model", "{folder}/a.gguf"], "not a GGUF file"),
    "missing data": (["--data", "{folder}/none.txt"], "none.txt"),
    "empty data": (["--data", "{folder}/empty.txt"], "empty.txt"),
    "too long": (["data.length=257"], "max_position_embeddings"),
    "LoRA target": (["stages.1.lora.targets=[w_proj]"], "LoRA target 'w_proj'"),
    "tracker": (["--track", "excel"], "'excel'"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory: pytest.TempPathFactory, random_teacher) -> Path:
    """A folder of things that are no teachers and no data."""
    import json
    import shutil

    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "a.gguf").write_bytes(b"nothing of the kind")
    random_teacher().save_pretrained(folder / "encoder")
    for name in ("linearized", "truncated"):
        shutil.copytree(folder / "encoder", folder / name)
    config = json.loads((folder / "encoder" / "config.json").read_text())
    (folder / "encoder" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    (folder / "linearized" / "config.json").write_text(json.dumps({**config, "linearize": {"mixer": {}}}))
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_a_bad_run_writes_nothing(
    kind: str, capsys: pytest.CaptureFixture[str], bad_inputs: Path, tiny: str, tmp_path: Path, cache: Path
) -> None:
    changes, words = BAD_RUNS[kind]
    command = ["--model", tiny, "--recipe", "liger", "--quick", "--output", str(tmp_path / "out"), "data.length=64"]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run(*command, *(word.format(folder=bad_inputs) for word in changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--data", "none.txt"], "`data.source` names 'none.txt', and there is no such file"),
        (["--data", "builtin", "stages.0={stage: preference, source: ./none.txt}"], "of the stage 'preference' names"),
        (["--track", "excel"], "'excel'"),
        (["--push-to-hub", "me/"], "'me/' names no repository"),
        (["--output", "file"], "was not written by linearize"),
        (["--output", "file/out"], "file/out.partial cannot be written: Not a directory. Give another folder"),
        (["--output", "mine"], "mine exists and was not written by linearize"),
        (["--output", "other"], "other.partial exists and is not a run of linearize"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(
    changes: list[str], words: str, capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for place in ("mine", "other.partial"):
        Path(place).mkdir()
        Path(place, "thesis.tex").touch()
    command = ["--model", tiny, "--recipe", "liger", "--quick", "--output", "new/out", "data.length=64"]
    before = sorted(tmp_path.rglob("*"))
    message = refuse(capsys, *command, *changes, "--dry-run")
    assert words in message
    assert message == refuse(capsys, *command, *changes)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(*command, "--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_knows_the_settings_of_a_run_that_was_begun(
    capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    settings = api.prepare_job(tiny, "liger", quick=True, overrides=["data.length=64"]).settings()
    (tmp_path / "out.partial" / "settings.json").write_text(json.dumps(settings))
    command = ["--model", tiny, "--recipe", "liger", "--quick", "--output", str(tmp_path / "out"), "data.length=64"]
    assert run(*command, "--dry-run") == 0
    message = refuse(capsys, *command, "--seed", "5", "--dry-run")
    assert "was begun with other settings: seed: 0 -> 5" in message
    assert message == refuse(capsys, *command, "--seed", "5")
    assert run(*command, "--seed", "5", "--dry-run", "--fresh") == 0


def test_a_prompt_may_look_like_an_empty_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is empty" not in refuse(capsys, "generate", "none", "--", "--lr=")


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_a_missing_file_of_data_is_found_by_every_check(
    command: str, capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path
) -> None:
    words = ["liger"] if command == "validate" else ["--model", tiny, "--recipe", "liger"]
    message = refuse(capsys, command, *words, "data.length=64", f"data.source={tmp_path}/none.jsonl")
    assert "`data.source` names" in message


def test_a_full_disk_is_seen_before_the_run(
    capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = refuse(
        capsys, "--model", tiny, "--recipe", "liger", "--quick", "--output", str(tmp_path / "out"), "data.length=64"
    )
    assert "0.98 KiB free" in message
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_is_not_ours_stays(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    words = ["--model", tiny, "--recipe", "liger", "--quick", "--output", str(tmp_path / "mine"), "data.length=64"]
    for fresh in ([], ["--fresh"]):
        assert "was not written by linearize" in refuse(capsys, *words, *fresh)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"
    assert [path.name for path in tmp_path.glob("mine*")] == ["mine"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_evaluation_or_a_probe_says_what_is_kept(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("linearize.evaluation.evaluate_folder", interrupted)
    monkeypatch.setattr("linearize.api.probe", interrupted)
    assert run("eval", "out/x", "--rows", "4") == 128 + number
    printed = capsys.readouterr().err
    assert f"Stopped by {number.name}. Answers to tasks are kept" in printed
    assert printed.endswith("linearize eval out/x --rows 4\n")
    assert run("probe", "--model", "x") == 128 + number
    assert capsys.readouterr().err == f"Stopped by {number.name}. A probe keeps nothing before its end.\n"
