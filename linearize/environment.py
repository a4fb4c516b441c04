"""What is found around a command before its work begins."""

from __future__ import annotations

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
    """Raise unless a folder can be written, or made where there is none; nothing is left behind.

    Args:
        folder: to be written later.
        advice: what to do otherwise, such as `Give another with --output.`

    Raises:
        LinearizeError: it cannot.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]  # innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LinearizeError(f"{folder} cannot be written: {error.strerror}. {advice}") from error
    finally:
        for path in made:
            if os.path.isdir(path):
                os.rmdir(path)
