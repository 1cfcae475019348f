"""What stands where in a simulation: its streams and its devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from streamgen_infer.admission import Load
from streamgen_infer.cost_model import CostModel
from streamgen_infer.pacing import MediaClock
from streamgen_infer.scheduler import Launch, StreamView
from streamgen_infer.simulate.scenario import Viewers


@dataclass(slots=True, eq=False)
class SimulatedStream:
    """A viewer's stream: the numbers that the engine would have beside its tensors."""

    id: str
    viewers: Viewers
    clock: MediaClock
    came_s: float
    ends_s: float
    slow: bool
    slot: int = 0
    """Its place in the device's list of views."""
    block: int = 0
    stage: str = "step"
    passes_left: int | None = None
    undecoded: int | None = None
    """The block that waits for the codec."""
    delivered: int = 0
    """Blocks that the viewer was given; the next one must have this number."""
    prompt: bool = False
    """The next block begins with a re-cache."""
    served_s: float = 0.0
    passed_over: int = 0
    """Launches without it since it has waited for the longest time allowed."""
    gone: bool = False
    late: int = 0
    shown_s: float | None = None
    """When the last block came on screen."""
    position_s: float = 0.0
    """What a slow viewer really shows."""

    def view(self) -> StreamView:
        """What the scheduler is shown."""
        kind, stage, clock = self.viewers, self.stage, self.clock
        block_s = kind.block_s
        media_s = (self.block + (stage == "commit")) * block_s
        return StreamView(
            self.id,
            kind.shape,
            stage,  # type: ignore[arg-type]
            clock.origin_s + media_s,
            block_s,
            kind.trained_steps,
            self.served_s,
            self.passes_left,
            clock.not_before_s(media_s, block_s),
            None if self.undecoded is None else clock.origin_s + self.undecoded * block_s,
            kind.preview,
        )


@dataclass(slots=True, eq=False)
class Device:
    """A replica: its streams, its learned costs, and the launch that it is in."""

    index: int
    costs: CostModel
    random: np.random.Generator
    alive: bool = True
    lives: int = 0
    """Counts launches and deaths: events of an older life are void."""
    launch: Launch | None = None
    began_s: float = 0.0
    factor: float = 1.0
    streams: dict[str, SimulatedStream] = field(default_factory=dict)
    views: list[StreamView] = field(default_factory=list)
    order: list[SimulatedStream] = field(default_factory=list)
    most_streams: int = 0
    """That it has held at once."""
    served_s: float = inf
    """No stream was served longer ago than that."""
    noises: list[tuple[float, float]] = field(default_factory=list)

    def add(self, stream: SimulatedStream) -> None:
        """Take a stream."""
        stream.slot = len(self.views)
        self.streams[stream.id] = stream
        self.order.append(stream)
        self.views.append(stream.view())
        self.most_streams = max(self.most_streams, len(self.order))
        self.served_s = min(self.served_s, stream.served_s)

    def remove(self, stream: SimulatedStream) -> None:
        """Let go of a stream; the last one takes its place in the list."""
        last = self.order.pop()
        view = self.views.pop()
        if last is not stream:
            self.order[stream.slot], self.views[stream.slot] = last, view
            last.slot = stream.slot
        del self.streams[stream.id]

    def noise(self, sigma: float, factors: Sequence[float]) -> tuple[float, float]:
        """(factor on the launch's time, a number of [0, 1) that decides whether it fails)"""
        if not self.noises:
            drawn = self.random.choice(factors, 4096) if factors else np.exp(sigma * self.random.standard_normal(4096))
            times = np.asarray(drawn, float)
            self.noises = list(zip(times.tolist(), self.random.random(4096).tolist(), strict=True))
        return self.noises.pop()

    def loads(self) -> list[Load]:
        """Its streams as admission sees them."""
        return [load_of(stream) for stream in self.order]


def load_of(stream: SimulatedStream) -> Load:
    """A stream as admission sees it."""
    kind = stream.viewers
    return Load(
        shape=kind.shape,
        period_s=kind.block_s,
        steps=kind.trained_steps[0],
        bytes=kind.bytes,
        due_s=stream.clock.origin_s,
    )
