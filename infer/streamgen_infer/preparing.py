"""What a model does once before it streams on a GPU, told while it happens: kernels are compiled and compared,
attention is timed. The library says it to its logger; this shows it to a person.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from streamgen_infer.live_view import View, warn


class _Told(logging.Handler):
    def __init__(self, view: View) -> None:
        super().__init__(logging.INFO)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        line, done, of = record.getMessage(), getattr(record, "done", None), getattr(record, "of", None)
        if record.levelno >= logging.WARNING:
            warn(line)
        elif done is None or of is None:
            self._view.note(line)
        else:
            self._view.progress(line, done, of)


@contextmanager
def told(view: View) -> Iterator[None]:
    """Meanwhile what the library says goes to the view. A record with `done` and `of` is a step of so many."""
    log, handler = logging.getLogger("streamgen"), _Told(view)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
