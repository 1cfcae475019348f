"""How long a device takes between two moments, without making it wait for the host."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments of the device's work."""

    def mark(self) -> Any: ...

    def reach(self, moment: Any) -> None:
        """Until the device has come to a moment."""
        ...

    def ms(self, start: Any, end: Any) -> float:
        """Between two moments that the device has come to."""
        ...

    def wait(self) -> None:
        """Until the device has done all it was given."""
        ...


class EventClock:
    """CUDA events on a device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def reach(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


class WallClock:
    """Of a CPU, where work is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def reach(self, moment: float) -> None:
        return None

    def ms(self, start: float, end: float) -> float:
        return 1000 * (end - start)

    def wait(self) -> None:
        return None


def clock_of(device: torch.device) -> Clock:
    return EventClock(device) if device.type == "cuda" else WallClock()


class Laps:
    """Milliseconds of the stages of a piece of work; on a GPU they are read when all of it is done."""

    def __init__(self, device: torch.device) -> None:
        self.clock = clock_of(device)
        self._began_s = time.perf_counter()
        self._start = self.clock.mark()
        self._moments: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        """A stage has been given to the device in full."""
        self._moments.append((stage, self.clock.mark()))

    def read(self) -> tuple[dict[str, list[float]], float]:
        """(stage -> one entry each time it was marked, wall time of all), after the device has come to the last."""
        stages: dict[str, list[float]] = {}
        before = self._start
        if self._moments:
            self.clock.reach(self._moments[-1][1])
        for stage, moment in self._moments:
            stages.setdefault(stage, []).append(self.clock.ms(before, moment))
            before = moment
        return stages, 1000 * (time.perf_counter() - self._began_s)
