"""What is found around a command before its work begins."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from linearize.errors import LinearizeError


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
