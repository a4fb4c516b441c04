"""A run's folders: the work folder `<output>.partial` while it runs, the finished folder by one rename at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from linearize import __version__, yaml_io
from linearize.checkpoint import sync, write_text
from linearize.data import Corpus
from linearize.errors import LinearizeError
from linearize.teacher import TeacherInfo

SETTINGS, LOCK, RESULTS, FINAL = "settings.json", "recipe.lock.yaml", "results.json", "final"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "triton")


def work_folder(output: Path) -> Path:
    """Return where the run that makes `output` keeps its state."""
    return output.with_name(output.name + ".partial")


def finished_results(output: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Any] | None:
    """Return what a finished folder holds, or None where the run is still to be made.

    Raises:
        LinearizeError: the folder is not linearize's, or was made with other settings and `fresh` is not set.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    lock = output / LOCK
    if not output.is_dir() or not lock.is_file() or not (output / RESULTS).is_file():
        raise LinearizeError(
            f"{output} exists and was not written by linearize; it is left as it is. Give another folder with --output."
        )
    if fresh:
        return None
    _same_settings(locked_settings(output), settings, output, "was made")
    shutil.rmtree(work_folder(output), ignore_errors=True)
    results: dict[str, Any] = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    return results


def locked_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that a finished folder was made with.

    Raises:
        LinearizeError: its lock file is missing or damaged.
    """
    lock = folder / LOCK
    if not lock.is_file():
        raise LinearizeError(f"{folder} has no {LOCK}, which says how it was made; give the whole folder of a run.")
    content = yaml_io.read(lock)
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or not {"model", "seed", "recipe"} <= settings.keys():
        raise LinearizeError(f"{lock} is damaged: it has no `settings` with model, seed and recipe. Make the run anew.")
    return settings


def open_work_folder(output: Path, settings: dict[str, Any], fresh: bool, check: Callable[[], None]) -> Path:
    """Return the work folder, made if there is none; `check` runs before anything is written.

    Raises:
        LinearizeError: it belongs to a run with other settings and `fresh` is not set, or cannot be written.
    """
    work = work_folder(output)
    if work.exists() and not (work / SETTINGS).is_file() and any(work.iterdir()):
        raise LinearizeError(f"{work} exists and is not a run of linearize. Remove it or give another --output.")
    if (work / SETTINGS).is_file():
        if not fresh:
            _same_settings(json.loads((work / SETTINGS).read_text(encoding="utf-8")), settings, work, "was begun")
            return work
        shutil.rmtree(work)
    check()
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / SETTINGS, json.dumps(settings, indent=2))
    except OSError as error:
        raise LinearizeError(
            f"{work} cannot be written: {error.strerror}. Give another folder with --output."
        ) from error
    return work


def missing_parents(output: Path) -> list[Path]:
    """Return the folders above `output` that do not exist, innermost first."""
    return [parent for parent in output.absolute().parents if not parent.exists()]


def discard(work: Path, made: list[Path]) -> None:
    """Remove a work folder and the folders above it that were made for it."""
    shutil.rmtree(work)
    for parent in made:
        parent.rmdir()


@contextlib.contextmanager
def hold(work: Path) -> Iterator[None]:
    """Keep other runs out of the work folder.

    Raises:
        LinearizeError: another run has it.
    """
    with (work / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LinearizeError(f"Another run is at work in {work}. Wait for it, or give another --output.") from error
        yield


def publish(work: Path, output: Path) -> None:
    """Let the finished folder appear by one rename, and remove the work folder."""
    old = output.with_name(output.name + ".old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    mode = (work / SETTINGS).stat().st_mode
    for path in (work / FINAL).iterdir():
        path.chmod(mode)  # safetensors lets its owner alone read what it writes
    (work / FINAL).rename(output)
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(work)


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the path of a finished linearized checkpoint.

    Raises:
        LinearizeError: it is none.
    """
    path = Path(folder)
    config = path / "config.json"
    if not config.is_file():
        raise LinearizeError(f"There is no model in {path} (no config.json). Give a folder that `linearize` wrote.")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LinearizeError(f"{config} is not JSON: {error}.") from error
    if not settings.get("linearize"):
        raise LinearizeError(
            f"{path} holds a {settings.get('model_type')!r} model that is not linearized; load it with transformers."
        )
    return path


def provenance(settings: dict[str, Any], teacher: TeacherInfo, corpus: Corpus, seconds: float) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run."""
    return {
        **machine(settings["device"]),
        "dtype": settings["dtype"],
        "seed": settings["seed"],
        "teacher": {"source": teacher.source, "revision": teacher.revision, "sha256": teacher.sha256},
        "data": {"description": corpus.description, "fingerprint": corpus.fingerprint},
        "seconds": round(seconds, 1),
    }


def machine(device: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return versions, commit and hardware.

    Args:
        device: `cpu` or `cuda`.
        more: packages to name besides the usual ones.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "linearize": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in (*PACKAGES, *more) if _installed(name)},
        "device": f"{name}, {torch.get_num_threads()} threads" if device == "cpu" else name,
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str | None:
    """The commit of a checkout that the package runs from, with a mark if it was changed since."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "-c", f"safe.directory={here.parent}"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answers = [
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, env=environment).stdout.strip()
            for words in (["ls-files", "api.py"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    tracked, commit, changes = answers
    return (commit + ("-dirty" if changes else "")) if tracked else None


def _same_settings(before: dict[str, Any], now: dict[str, Any], folder: Path, verb: str) -> None:
    old, new = dict(_flat(before)), dict(_flat(json.loads(json.dumps(now))))
    changed = [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    ]
    if changed:
        raise LinearizeError(
            f"{folder} {verb} with other settings: {'; '.join(changed)}. Give another folder with --output, or start "
            "anew with --fresh."
        )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for index, entry in enumerate(value):
            yield from _flat(entry, f"{prefix}.{index}")
    else:
        yield prefix, value
