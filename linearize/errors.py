"""Errors that a user can cause, and the words for names that match nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class LinearizeError(ValueError):
    """A user's mistake: the command line prints it as one paragraph and exits with code 2.

    Args:
        message: the paragraph. Line breaks and control characters that it quotes become spaces, and a token of the Hub
            is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(TOKEN.sub("hf_...", CONTROL.sub(" ", message)))


def memory_full(error: RuntimeError) -> str | None:
    """Return what an error says of a device that has no memory left, be it PyTorch's, the driver's or a library's.

    Returns:
        Its first three sentences; None for another error.
    """
    words = str(error).lower()
    if type(error).__name__ != "OutOfMemoryError" and "out of memory" not in words and "alloc_failed" not in words:
        return None
    return ". ".join(str(error).partition("\n")[0].split(". ")[:3]).rstrip(".")


class UnknownNameError(LinearizeError):
    """A name that matches nothing that exists.

    Args:
        kind: what was looked for, as a noun ("gate", "recipe").
        name: what was given.
        known: every name that would have been accepted.
        where: the key or file that held the name.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], where: str = "") -> None:
        options = sorted(known)
        near = difflib.get_close_matches(str(name), options, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        place = f" at `{where}`" if where else ""
        listed = ", ".join(options) if options else "none"
        super().__init__(f"Unknown {kind} {name!r}{place}.{hint} Known: {listed}.")
