"""Upload a finished checkpoint to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError

NEEDED = ("config.json", "recipe.lock.yaml", "*.safetensors")
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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


def push(folder: str | Path, repo_id: str, private: bool = False, token: str | None = None, api: Any = None) -> str:
    """Upload a finished checkpoint in one commit; the repository is created where there is none.

    Args:
        folder: the output folder of a finished run.
        repo_id: `owner/name`.
        private: make a new repository private.
        token: of the Hub; None takes the one that `hf auth login` stored.
        api: a `huggingface_hub.HfApi`; None makes one with `token`.

    Returns:
        The address of the commit.

    Raises:
        LinearizeError: the folder is not finished, the name is no repository's, or the Hub refuses.
    """
    folder = Path(folder)
    check_finished(folder)
    check_repository(repo_id)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = api or HfApi(token=token)
    try:
        api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload a checkpoint made by linearize",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LinearizeError(
            f"The Hub did not take {folder} as {repo_id!r}: {reason[0].rstrip('.')}. Log in with `hf auth login` (the "
            "token must be one that writes), check the name and the connection, push again; the folder is unchanged."
        ) from error
    return str(commit)
