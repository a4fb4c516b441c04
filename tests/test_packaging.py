"""The wheel holds every file of the linked folders, and `linearize` is its only top-level name."""

import shutil
import subprocess
import sys
import tomllib
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
