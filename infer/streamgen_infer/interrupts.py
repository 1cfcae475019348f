"""SIGINT and SIGTERM end the program with status 130 at any moment, politely while there is something to keep."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Stop:
    """What a body of `Interrupts.deferred` asks between two pieces of work."""

    requested: bool = False


class Interrupts:
    """The process's handler of both signals.

    By default a signal ends the process on the spot: an exception that appears inside an import or a load may be
    swallowed or turned into another one, and so early there is nothing to keep. Inside `deferred` the first signal
    asks for a stop, the second raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._stop: Stop | None = None
        self._on_stop: Callable[[], None] = lambda: None

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        """Both signals are handled here during the body."""
        at_home = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
        before = {number: signal.signal(number, self._handle) for number in SIGNALS if at_home}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self, on_stop: Callable[[], None] = lambda: None) -> Iterator[Stop]:
        """During the body a first signal sets `Stop.requested` and calls `on_stop`, which must not block."""
        stop = Stop()
        self._stop, self._on_stop = stop, on_stop
        try:
            yield stop
        finally:
            self._stop = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stop is None:
            os.write(2, b"streamgen: interrupted\n")
            os._exit(INTERRUPTED)
        if self._stop.requested:
            raise KeyboardInterrupt
        self._stop.requested = True
        self._on_stop()
