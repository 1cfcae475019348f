"""Where the time of a step goes: a stopwatch whose phases objectives mark too.

    with timed("rollout"):
        ...

Outside a training step that does nothing. A phase inside another one is taken out of it, so shares add up to one. The
loop marks data, forward, backward, exchange (between processes) and optimiser; what is left is rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

REST, BACKWARD = "rest", "backward"
_current: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)  # of the step that is being made


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Count the time of the body as phase `name` of the step. (Not in a backward: what is recomputed there belongs to
    it, and on CUDA it runs in another thread.)
    """
    watch = _current.get()
    if watch is None or watch.phase == BACKWARD:
        yield
        return
    before = watch.switch(name)
    try:
        yield
    finally:
        watch.switch(before)


class Stopwatch:
    """Seconds by phase. On CUDA they are the device's, between events on its stream, read when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._waiting: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since: float | torch.cuda.Event = 0.0
        self.phase: str | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run for the length of the body."""
        self._since, self.phase = self._now(), REST
        token = _current.set(self)
        try:
            yield
        finally:
            self.switch(None)
            _current.reset(token)

    def switch(self, name: str | None) -> str | None:
        """Go over to another phase; -> the one before."""
        before, now = self.phase, self._now()
        if before is not None:
            if isinstance(self._since, float) and isinstance(now, float):
                self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
            elif not isinstance(self._since, float) and not isinstance(now, float):
                self._waiting.append((before, self._since, now))
        self._since, self.phase = now, name
        return before

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def shares(self) -> dict[str, float]:
        """`share_PHASE` of the time since this was last asked, between 0 and 1; starts anew."""
        if self._waiting:
            torch.cuda.synchronize()
        for name, start, end in self._waiting:
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        total = sum(self._seconds.values())
        shares = {f"share_{name}": seconds / total for name, seconds in self._seconds.items()} if total > 0 else {}
        self._seconds, self._waiting = {}, []
        return shares
