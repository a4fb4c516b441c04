"""The wheel holds all that `linearize` needs, and nothing else: installed alone, it runs the demo to its end."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "recipes", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("linearize", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".toml", ".md", ".txt", ""):
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True)
    return zipfile.ZipFile(next(out.glob("linearize-*.whl")))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".py", ".yaml") and p.is_file()}


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folders_are_inside(wheel: zipfile.ZipFile, folder: str) -> None:
    assert (ROOT / "linearize" / folder).is_symlink()
    expected = {f"linearize/{folder}/{name}" for name in files(ROOT / folder)}
    assert expected <= set(wheel.namelist())


def test_the_package_is_inside(wheel: zipfile.ZipFile) -> None:
    own = {p for p in (ROOT / "linearize").rglob("*.py") if not set(LINKED) & set(p.relative_to(ROOT).parts)}
    assert {str(p.relative_to(ROOT)) for p in own} <= set(wheel.namelist())
    assert "linearize/py.typed" in wheel.namelist()


def test_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"linearize"}


def test_the_wheel_finds_its_recipes(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import linearize, linearize.recipe as r; print(linearize.__file__); print(*r.recipe_names())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    place, names = done.stdout.splitlines()
    assert place.startswith(str(tmp_path))
    assert set(names.split()) == {
        str(p.relative_to(ROOT / "recipes").with_suffix("")) for p in (ROOT / "recipes").rglob("*.yaml")
    }


def test_the_command_is_declared(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "linearize = linearize.cli:main" in wheel.read(entry).decode()


def test_twine_finds_the_metadata_fit_for_the_index(wheel: zipfile.ZipFile) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel.filename)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment in which linearize comes from the wheel; the other packages are this one's."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel.filename)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_wheel_alone_runs_the_demo_to_its_end(installed: Path, save_teacher, tmp_path: Path) -> None:
    """The README's command, on a tiny model in the place of the demo's."""
    save_teacher(tmp_path / "cache" / "models" / "smollm2-135m", max_position_embeddings=512)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"LINEARIZE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    where = [installed / "python", "-c", "import linearize; print(linearize.__file__)"]
    found = subprocess.run(where, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(installed.parent))
    words = ["--model", "smollm2-135m", "--recipe", "liger", "--quick", "--output", "out/demo", "--tokens", "1024"]
    command = [installed / "linearize", *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Checkpoint: out/demo   report: out/demo/report.html" in done.stdout
    assert (tmp_path / "out" / "demo" / "report.html").is_file()


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_dependency_is_pinned() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {pin.name.lower().replace("_", "-"): pin for pin in pins}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        pin = pinned[requirement.name.lower().replace("_", "-")]
        version = next(iter(pin.specifier)).version
        assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"
    assert str(pinned["torch"]) == "torch==2.13.0"
