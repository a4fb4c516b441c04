"""A run's folders: the work folder `<output>.partial` while it runs, the finished folder by one rename at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from linearize import __version__, yaml_io
from linearize.checkpoint import replace_text, sync, sync_all, write_text
from linearize.data import Corpus
from linearize.environment import check_writable
from linearize.errors import LinearizeError
from linearize.teacher import TeacherInfo

SETTINGS, LOCK, RESULTS, FINAL, STAGES = "settings.json", "recipe.lock.yaml", "results.json", "final", "stages"
LOCK_FILE, TEACHER = ".lock", "teacher.json"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
OS_ERROR = re.compile(r"os error (\d+)")  # as safetensors words it
SHOWN = 12
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
    same_settings(locked_settings(output), settings, output, "was made")
    results: dict[str, Any] = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    return results


def clear(output: Path) -> None:
    """Remove the work folder that a run left when it was killed behind its last rename; not one that is at work."""
    work = work_folder(output)
    if not work.is_dir():
        return
    with contextlib.suppress(LinearizeError), _lock(work):
        shutil.rmtree(work)


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


def begun(work: Path) -> bool:
    """Return whether a run that was begun lies in its work folder.

    Raises:
        LinearizeError: something else does, or the folder cannot be written.
    """
    if (work / SETTINGS).is_file():
        return True
    if work.exists() and (not work.is_dir() or any(path.name != LOCK_FILE for path in work.iterdir())):
        raise LinearizeError(f"{work} exists and is not a run of linearize. Remove it or give another --output.")
    check_writable(work, "Give another folder with --output.")
    return False


def same_begun(work: Path, settings: dict[str, Any]) -> None:
    """Raise unless the run in a work folder was begun with these settings; see `same_settings`."""
    same_settings(json.loads((work / SETTINGS).read_text(encoding="utf-8")), settings, work, "was begun")


@contextlib.contextmanager
def hold(output: Path, settings: dict[str, Any], fresh: bool, check: Callable[[], None]) -> Iterator[Path]:
    """Give the work folder of a run, made if there is none, and keep other runs out of it.

    Where the run ends with a `LinearizeError` before anything was trained, what was made for it here is removed.

    Args:
        output: the finished folder that is to be.
        settings: must be those that the work folder was begun with.
        fresh: begin anew, whatever they are.
        check: runs before a new run writes anything.

    Raises:
        LinearizeError: it belongs to a run with other settings, is another run's at this moment, or cannot be written.
    """
    work = work_folder(output)
    found = begun(work)
    if not found:
        check()
    above = [parent for parent in output.absolute().parents if not parent.exists()]  # innermost first
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _lock(work):
            if found and fresh:
                found = False
                _empty(work)
                check()
            if not found:
                write_text(work / SETTINGS, json.dumps(settings, indent=2))
            same_begun(work, settings)
            try:
                yield work
            except LinearizeError:
                if not found and not (work / STAGES).exists():
                    shutil.rmtree(work)
                    for parent in above:
                        parent.rmdir()
                raise
    except (OSError, SafetensorError) as error:
        raise _cannot_write(error, work) from error


def _cannot_write(error: Exception, work: Path) -> Exception:
    """Return the error for a disk that takes no more, or what it was if it is something else."""
    code = error.errno if isinstance(error, OSError) else int((OS_ERROR.search(str(error)) or [0, 0])[1])
    name = Path(getattr(error, "filename", None) or work)
    if code not in UNWRITABLE or not name.absolute().is_relative_to(work.absolute().parent):
        return error
    words = f"{name} cannot be written: {os.strerror(code)}."
    if not (work / SETTINGS).is_file():
        return LinearizeError(f"{words} Give another folder with --output.")
    return LinearizeError(
        f"{words} What was saved before in {work} is whole: make room there, and the same command goes on from it."
    )


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Hold a work folder's lock, which the system drops when the process ends, however it ends.

    Raises:
        LinearizeError: another run has it.
    """
    busy = LinearizeError(f"Another run is at work in {work}. Wait for it, or give another --output.")
    with (work / LOCK_FILE).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if not (work / LOCK_FILE).exists():  # the other run has just finished, and removed the folder
            raise busy
        yield


def waiting(error: LinearizeError, model: str | Path, output: str | Path | None) -> LinearizeError:
    """Return an error that came before a run could go on, with a word on that run where one waits for this model."""
    settings = None if output is None else work_folder(Path(output)) / SETTINGS
    if settings is None or not settings.is_file():
        return error
    begun = json.loads(settings.read_text(encoding="utf-8"))["model"]
    if Path(begun).expanduser() != Path(model).expanduser():
        return error
    return LinearizeError(
        f"{error} The run in {settings.parent} was begun with this model and is kept: once the model can be read "
        "again, the same command goes on."
    )


def publish(work: Path, output: Path) -> None:
    """Let the finished folder appear by one rename, and remove the work folder."""
    mode = (work / SETTINGS).stat().st_mode
    for path in (work / FINAL).rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors lets its owner alone read what it writes
    sync_all(work / FINAL)
    if output.exists():
        output.rename(work / "replaced")
    (work / FINAL).rename(output)
    sync(output.parent)
    shutil.rmtree(work)


def same_teacher(work: Path, teacher: TeacherInfo) -> None:
    """Note what a run's teacher is at its first start, and compare with it at later ones.

    Raises:
        LinearizeError: it is another one now.
    """
    now = {"revision": teacher.revision, "sha256": teacher.sha256}
    note = work / TEACHER
    if note.is_file():
        same_settings({"teacher": json.loads(note.read_text(encoding="utf-8"))}, {"teacher": now}, work, "was begun")
        return
    replace_text(note, json.dumps(now))


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


def same_settings(before: dict[str, Any], now: dict[str, Any], folder: Path, verb: str) -> None:
    """Raise unless two runs' settings are the same.

    Args:
        before: those that a folder has.
        now: those of the run.
        folder: named in the error.
        verb: what was done with the folder, such as `was made`.

    Raises:
        LinearizeError: they differ.
    """
    old, new = dict(_flat(before)), dict(_flat(json.loads(json.dumps(now))))
    changed = [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
    ]
    if changed:
        listed = "; ".join(changed[:SHOWN]) + (f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else "")
        raise LinearizeError(
            f"{folder} {verb} with other settings: {listed}. Give another folder with --output, or start "
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
