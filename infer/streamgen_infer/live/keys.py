"""Where typed lines come from: a terminal, key by key, or a pipe, line by line. Each reads in a thread of its own."""

from __future__ import annotations

import importlib.util
import os
import select
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from streamgen_infer.live.lines import Editor

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Typed:
    """A line; None: there will be no more."""

    line: str | None


class Keys(Protocol):
    editor: Editor
    """The line being typed."""

    def start(self, put: Callable[[Typed], None]) -> None:
        """Read from now on; `put` is called from another thread."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class LineKeys:
    """Whole lines of stdin."""

    def __init__(self) -> None:
        self.editor = Editor()

    def start(self, put: Callable[[Typed], None]) -> None:
        threading.Thread(target=self._read, args=(put,), name="streamgen-lines", daemon=True).start()

    def _read(self, put: Callable[[Typed], None]) -> None:
        for line in sys.stdin:
            put(Typed(line.rstrip("\n")))
        put(Typed(None))

    def close(self) -> None:
        return


class TerminalKeys:
    """Single keys of a terminal, not echoed; Ctrl-C stays a signal."""

    def __init__(self) -> None:
        import termios
        import tty

        self.editor = Editor()
        self._over = threading.Event()
        self._file = sys.stdin.fileno()
        self._before: list[Any] = termios.tcgetattr(self._file)
        tty.setcbreak(self._file)

    @staticmethod
    def possible() -> bool:
        """Whether this system has such terminals."""
        return importlib.util.find_spec("termios") is not None

    def start(self, put: Callable[[Typed], None]) -> None:
        threading.Thread(target=self._read, args=(put,), name="streamgen-keys", daemon=True).start()

    def _read(self, put: Callable[[Typed], None]) -> None:
        while not self._over.is_set():
            if not select.select([self._file], [], [], POLL_S)[0]:
                continue
            data = os.read(self._file, 4096)
            if not data:
                put(Typed(None))
                return
            for line in self.editor.feed(data):
                put(Typed(line))

    def close(self) -> None:
        import termios

        self._over.set()
        termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)
