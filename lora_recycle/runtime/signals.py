"""Ctrl-C and SIGTERM: the step under way is finished and saved before the run ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, so that what is half written is cleared away and locks are given back."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = _handle({signal.SIGTERM: terminate})
    try:
        yield
    finally:
        _handle(previous)


class Interruption:
    """From now until `release` Ctrl-C and SIGTERM are noted in `asked` instead of ending the program.

    Args:
        patient (`bool`): a second signal is noted too. A launcher of many processes passes Ctrl-C on to processes
            that had it from the terminal already. Otherwise the second one ends the program at once.
    """

    def __init__(self, patient: bool = False):
        self.patient = patient
        self._number: int | None = None
        self._previous = _handle({signal.SIGINT: self._note, signal.SIGTERM: self._note})

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._number is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self.patient:
            self.deliver()
        self._number = number

    def deliver(self) -> None:
        """Do now what the signal would have done before; where another process had it, what Ctrl-C would have."""
        self.release()
        signal.raise_signal(self._number or signal.SIGINT)

    def release(self) -> None:
        _handle(self._previous)
        self._previous = {}


def _handle(handlers: dict) -> dict:
    """Install signal handlers and return those that they replace. Only the main thread has any."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    known = {number: signal.getsignal(number) for number in handlers}
    # None is a handler that is not Python's; what was started to ignore a signal, as `nohup` does, goes on ignoring it
    chosen = {n: handler for n, handler in known.items() if handler not in (None, signal.SIG_IGN)}
    for number in chosen:
        signal.signal(number, handlers[number])
    return chosen
