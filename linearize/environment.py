"""What is found around a command before its work begins."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from linearize.errors import LinearizeError


def launched() -> int:
    """Return how many processes the launcher started, 1 without one.

    Raises:
        LinearizeError: `WORLD_SIZE` is no such number.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or int(count) < 1:
        raise LinearizeError(
            f"WORLD_SIZE is {count!r} in the environment, where a launcher says how many processes it made; unset it."
        )
    return int(count)


def check_writable(folder: Path, advice: str) -> None:
    """Raise unless a folder can be written, or made where there is none; it is not made.

    Args:
        folder: to be written later.
        advice: what to do otherwise, such as `Give another with --output.`

    Raises:
        LinearizeError: it cannot.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder)  # fails where a name is too long, or a parent is a file
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise LinearizeError(f"{folder} cannot be written: {error.strerror}. {advice}") from error
