"""Signals: at once between pieces of work, at its end within one, at once again for who insists."""

import os
import signal
import threading

import pytest

from linearize.interrupt import Signals, Stopped


def test_at_once_where_nothing_can_be_torn() -> None:
    with Signals(), pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.number == signal.SIGTERM
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_at_the_end_of_work_or_where_work_asks() -> None:
    done = []

    def work() -> None:
        with signals.later():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("work")

    with Signals() as signals:
        with pytest.raises(Stopped):
            work()
        with pytest.raises(Stopped):
            signals.check()
    assert done == ["work"]


def test_a_second_signal_counts_only_when_it_is_no_echo_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with signals.later():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    with Signals() as signals:
        with pytest.raises(Stopped):
            work()
        monkeypatch.setattr("linearize.interrupt.PATIENCE", 0.0)
        with pytest.raises(KeyboardInterrupt) as stopped, signals.later():
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(stopped.value, Stopped)


def test_handlers_of_the_program_stay_and_threads_set_none() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with Signals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    found = []

    def work() -> None:
        with Signals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
