"""Upload a finished checkpoint to the Hugging Face Hub: what the run wrote, in one commit, with a tag."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from linearize import yaml_io
from linearize.errors import LinearizeError

LOCK, CARD = "recipe.lock.yaml", "README.md"
ADAPTER, ADAPTER_NOTE = "adapter.safetensors", "adapter.json"
NEEDED = ("config.json", LOCK, "*.safetensors")
EVALUATION = ("eval/eval.json", "eval/eval.md", "eval/perplexity.png", "eval/recall.png", "eval/cost.png")
STALE = ("*.safetensors", "*.safetensors.index.json", ADAPTER_NOTE, "modeling_linearized.py", "figures/*", "eval/*")
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
PLACE = re.compile(r'(linearize\.load|from_pretrained)\("[^"\n]*"')
TRIES = 3
TIMEOUT = 120.0
TRANSIENT = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """What of a folder goes up.

    Attributes:
        files: bytes of each file by its name in the folder, sorted.
        left_out: what else lies there and stays; folders end in a slash.
        version: of the linearize that made it.
    """

    files: dict[str, int]
    left_out: list[str]
    version: str


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Attributes:
        url: of the commit, or of the pull request.
        commit: its hash.
        tag: the tag on it; None for a pull request, or where the tag is on another commit already.
        note: what the user should know besides, or nothing.
        upload: what went up.
    """

    url: str
    commit: str
    tag: str | None
    note: str
    upload: Upload


def check_finished(folder: Path) -> None:
    """Refuse a folder that is not what a finished run leaves.

    Raises:
        LinearizeError: a file that every finished checkpoint has is missing.
    """
    missing = [name for name in NEEDED if not any(folder.glob(name))]
    if missing:
        raise LinearizeError(
            f"{folder} is no finished linearize checkpoint: it has no {', no '.join(missing)}. Give the output folder "
            "of a run that has ended; running the same command again continues one that has not."
        )


def check_repository(repo_id: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        LinearizeError: it is not `owner/name`.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise LinearizeError(
            f"{repo_id!r} names no repository of the Hub. Expected `owner/name`, such as `me/my-model`."
        )


def check_target(repo_id: str, revision: str | None = None, pr: bool = False) -> None:
    """Refuse what is no place for a push.

    Raises:
        LinearizeError: the repository is not `owner/name`, the revision no branch, or given with a pull request.
    """
    check_repository(repo_id)
    if revision is not None and not REVISION.fullmatch(revision):
        raise LinearizeError(f"--revision {revision!r} is no name of a branch. Expected one such as `main` or `long`.")
    if pr and revision is not None:
        raise LinearizeError("--pr opens a pull request against `main`, so --revision has no place; leave one out.")


def written_files(folder: Path) -> list[str]:
    """Return the names of all files under a folder, sorted; hidden ones are left out."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts))


def choose_files(folder: str | Path) -> Upload:
    """Return what of a finished folder goes up: the files that the run wrote, and the report of its evaluation.

    Raises:
        LinearizeError: the folder is not finished, or lacks a file of the run.
    """
    folder = Path(folder)
    check_finished(folder)
    lock = yaml_io.read(folder / LOCK)
    lock = lock if isinstance(lock, dict) else {}
    names, provenance = lock.get("files"), lock.get("provenance")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(provenance, dict)):
        raise LinearizeError(
            f"{folder / LOCK} does not say which files the run wrote (`files`), so that nothing else goes up: it is "
            "damaged, or from an earlier linearize. Take the file from the run's own folder, or make the run anew."
        )
    here = written_files(folder)
    missing = sorted(set(names) - set(here))
    if missing:
        raise LinearizeError(
            f"{folder} lacks {len(missing)} of the files that the run wrote, {missing[0]} among them. Copy the whole "
            "folder of the run again."
        )
    chosen = sorted({*names, *(name for name in EVALUATION if name in here)})
    others = sorted(set(here) - set(chosen))
    whole = {name.partition("/")[0] for name in chosen if "/" in name}
    left = {
        name if "/" not in name or name.partition("/")[0] in whole else f"{name.partition('/')[0]}/" for name in others
    }
    return Upload({name: (folder / name).stat().st_size for name in chosen}, sorted(left), str(provenance["linearize"]))


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pr: bool = False,
    adapter_only: bool = False,
    token: str | None = None,
    api: Any = None,
) -> Pushed:
    """Upload a finished checkpoint in one commit and tag it; the repository is created where there is none.

    What went up before a connection broke is not sent again when the call is repeated: whole files of an LFS
    repository, chunks of them through Xet. An unchanged folder makes no new commit.

    Args:
        folder: the output folder of a finished run.
        repo_id: `owner/name`.
        private: make a new repository private.
        revision: a branch, created where there is none; `main` by default.
        pr: open a pull request in a repository that exists.
        adapter_only: leave out what is the teacher's; `linearize.load` joins both again.
        token: of the Hub; None takes the one that `hf auth login` stored.
        api: a `huggingface_hub.HfApi`; None makes one with `token`.

    Returns:
        Commit and tag.

    Raises:
        LinearizeError: the folder is not finished, the name is no repository's, the repository holds another model, or
            the Hub refuses.
    """
    check_target(repo_id, revision, pr)
    with chosen_folder(Path(folder), adapter_only) as source:
        return _push(source, Path(folder), repo_id, private, revision, pr, token, api)


@contextlib.contextmanager
def chosen_folder(folder: Path, adapter_only: bool) -> Iterator[Path]:
    """Give the folder that goes up: the finished one, or a temporary one with its adapter alone.

    Raises:
        LinearizeError: there is no adapter in it.
    """
    if not adapter_only:
        yield folder
        return
    from linearize.adapter import write_adapter

    with tempfile.TemporaryDirectory() as place:
        write_adapter(folder, Path(place) / "adapter")
        yield Path(place) / "adapter"


def _push(
    source: Path, folder: Path, repo_id: str, private: bool, revision: str | None, pr: bool, token: str | None, api: Any
) -> Pushed:
    upload = choose_files(source)
    from huggingface_hub import HfApi

    api = api or HfApi(token=token)
    branch = revision or "main"

    def prepare() -> None:
        if not pr:
            api.create_repo(repo_id, repo_type="model", private=True if private else None, exist_ok=True)
            if branch != "main" and not branch.startswith("refs/"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)

    def commit() -> Any:
        return _commit(api, source, upload, repo_id, branch, private, pr)

    refused = _refusal(folder, repo_id, pr)
    _try(prepare, refused)
    made = _try(commit, refused, tries=1 if pr else TRIES)  # a second try could open a second pull request
    if pr:
        return Pushed(str(made.pr_url), str(made.oid), None, "", upload)
    tag = f"v{upload.version}"
    where = _try(lambda: _tag(api, repo_id, tag, str(made.oid)), refused)
    if where == made.oid:
        return Pushed(str(made.commit_url), str(made.oid), tag, "", upload)
    note = f"The tag {tag} stays on the earlier commit {where[:7]}."
    return Pushed(str(made.commit_url), str(made.oid), None, note, upload)


def _commit(api: Any, folder: Path, upload: Upload, repo_id: str, branch: str, private: bool, pr: bool) -> Any:
    """Make the commit, which also removes weights and figures of an earlier push that this one has not.

    The card goes up with the repository's name in its examples, in place of the folder's.
    """
    from fnmatch import fnmatchcase

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    info = api.repo_info(repo_id, revision=branch)
    present = {entry.rfilename for entry in info.siblings or ()}
    if private and info.private is False:
        raise LinearizeError(
            f"{repo_id} exists and is public, and --private is for a new repository. Make it private on its settings "
            "page, or push to another name; nothing was sent."
        )
    others = sorted(name for name in present if name == "config.json" or Path(name).suffix in (".safetensors", ".bin"))
    if others and LOCK not in present and not pr:
        raise LinearizeError(
            f"{repo_id} exists and holds a model that linearize did not make ({', '.join(others[:3])}, no {LOCK}); it "
            "is left as it is. Push to another name, or propose the change with --pr."
        )
    stale = sorted(
        name for name in present - upload.files.keys() if any(fnmatchcase(name, pattern) for pattern in STALE)
    )
    adding = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in upload.files if name != CARD
    ]
    if CARD in upload.files:
        text = PLACE.sub(rf'\1("{repo_id}"', (folder / CARD).read_text(encoding="utf-8"))
        adding.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text.encode()))
    deleting = [CommitOperationDelete(path_in_repo=name) for name in stale]
    return api.create_commit(
        repo_id,
        operations=[*adding, *deleting],
        commit_message=f"Upload a checkpoint made by linearize {upload.version}",
        revision=branch,
        create_pr=pr,
    )


def _tag(api: Any, repo_id: str, tag: str, commit: str) -> str:
    """Tag a commit, unless the tag is there already; return the commit that it is on."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if _status(error) != 409:
            raise
        refs = api.list_repo_refs(repo_id)
        return next((str(ref.target_commit) for ref in refs.tags if ref.name == tag), "")
    return commit


def _try(call: Callable[[], T], refused: Callable[[Exception], LinearizeError], tries: int = TRIES) -> T:
    """Return what a call returns; on a fault that passes (a lost connection, 429, 5xx) call again, later.

    Raises:
        LinearizeError: it failed for good.
    """
    from huggingface_hub import errors, get_session

    lost: type[Exception] = vars(errors)["HTTPError"]  # httpx's or httpx2's, by the version of huggingface_hub
    for turn in range(1, tries + 1):
        session = get_session()
        patience, session.timeout = session.timeout, TIMEOUT  # the library's own is to wait for ever
        try:
            return call()
        except (lost, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, LinearizeError):
                raise
            cause = _cause(error, lost)
            status = _status(cause)
            passing = status in TRANSIENT if status else isinstance(cause, (lost, json.JSONDecodeError))
            if turn == tries or not passing:
                raise refused(cause) from error
            time.sleep(_pause(cause, turn))
        finally:
            session.timeout = patience
    raise AssertionError


def _cause(error: BaseException, lost: type[Exception]) -> Exception:
    """The error of the connection behind those that wrap it."""
    inner: BaseException = error
    while not isinstance(inner, lost) and inner.__cause__ is not None:
        inner = inner.__cause__
    assert isinstance(inner, Exception)
    return inner


def _status(error: Exception) -> int | None:
    """The status code that the Hub answered with."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _pause(error: Exception, turn: int) -> float:
    """Seconds to wait: what the Hub asks for, up to a minute, or longer each time."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    return min(60.0, float(asked)) if asked.isdigit() else 2.0 ** (turn - 1)


def _refusal(folder: Path, repo_id: str, pr: bool) -> Callable[[Exception], LinearizeError]:
    """Return what turns an error into one paragraph."""

    def refused(error: Exception) -> LinearizeError:
        from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

        status = _status(error)
        message = getattr(error, "server_message", None) or str(error)
        reason = next(iter(message.strip().splitlines()), "").strip().rstrip(".") or type(error).__name__
        said = f"The Hub did not take {folder} as {repo_id!r}: {reason}{f' (status {status})' if status else ''}."
        again = "The folder is unchanged, and the same command goes on with what is already there."
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            return LinearizeError(
                f"{said} Log in with `hf auth login`, or set HF_TOKEN to a token that writes. {again}"
            )
        if status == 403:
            owner = repo_id.partition("/")[0]
            return LinearizeError(
                f"{said} The token may not write to {owner!r}: take one with the role `write` from the Hub's settings, "
                f"log in with it (`hf auth login`), and check that {owner!r} is you or your organization. {again}"
            )
        if status == 404 and pr:
            return LinearizeError(f"{said} --pr needs a repository that exists; leave it out to create one.")
        if isinstance(error, OfflineModeIsEnabled):
            return LinearizeError(f"{said} Unset HF_HUB_OFFLINE. {again}")
        return LinearizeError(f"{said} Check the name and the connection. {again}")

    return refused
