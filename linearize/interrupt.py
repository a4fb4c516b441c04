"""SIGTERM and Ctrl-C: a run that is asked to stop saves what it has and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.processes import Processes

USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
PATIENCE = 2.0  # a launcher hands on the signal that its workers got from the terminal already
NOTICE = b"\nStopping: the run is being saved. Ctrl-C once more stops it at once.\n"


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop.

    Args:
        number: of the signal.

    Attributes:
        kept: what was saved, in words.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.kept = ""


class Signals:
    """Turns signals into `Stopped` while inside; where work must not be torn, it waits for the end of that work.

    Handlers that the program has set itself stay, and so do all of them outside the main thread.
    """

    def __init__(self) -> None:
        self.before: list[signal.Signals] = []
        self.received: int | None = None
        self.at = 0.0
        self.waits = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number, usual in USUAL.items():
                if signal.getsignal(number) == usual:
                    signal.signal(number, self._receive)
                    self.before.append(number)
        return self

    def __exit__(self, *error: object) -> None:
        for number in self.before:
            signal.signal(number, USUAL[number])
        self.before.clear()

    def check(self) -> None:
        """Stop here, if a signal came.

        Raises:
            Stopped: one did.
        """
        if self.received is not None:
            raise Stopped(self.received)

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Let a signal wait until the end of the block, and of the one around it."""
        around, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits = around
        if not around:
            self.check()

    def agree(self, processes: Processes) -> None:
        """Stop here, in all processes, if a signal came to any of several.

        Raises:
            Stopped: one did.
        """
        if processes.count > 1:
            self.received = processes.largest(self.received or 0) or None
            self.check()

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            if not self.waits:
                raise Stopped(number)
            os.write(2, NOTICE)
        elif time.monotonic() - self.at > PATIENCE:
            raise KeyboardInterrupt
