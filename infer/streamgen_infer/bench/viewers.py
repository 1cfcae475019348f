"""`streamgen bench --suite viewers`: live viewers in real time, beside what the simulator says of the same costs.

Without `overload` there are `SHARE` of the viewers that admission lets in. With it so many times what is admitted come,
and whoever is refused tries again every second: admission alone keeps the load down, and who is in must not suffer.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from streamgen.pipeline import StreamPipeline
from streamgen_infer import machine
from streamgen_infer.cost_model import CostModel
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import Stop
from streamgen_infer.live_stream import LiveStream
from streamgen_infer.requests import MadeBlock, Refused, StreamEvent, StreamRequest
from streamgen_infer.runtime import Runtime
from streamgen_infer.simulate.scenario import Scenario, Viewers
from streamgen_infer.simulator import simulate

SHARE = 0.9
"""Of the viewers that admission lets in."""
MOST_VIEWERS = 64
SIMULATED_S = 600.0
"""At least; more blocks make a rare miss a surer figure."""
PROMPT = "a large red star spinning over a snow background"


class RecordedCosts(CostModel):
    """Costs that keep by how much each launch missed its prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[float] = []

    def observe(self, kind: str, shape: str, rows: int, seconds: float) -> None:
        if self.known(kind, shape):
            self.factors.append(seconds / self.predict(kind, shape, rows))
        super().observe(kind, shape, rows, seconds)


@dataclasses.dataclass(slots=True)
class _Viewer:
    """What one viewer got."""

    blocks: int = 0
    late: int = 0
    ready_at_s: list[float] = dataclasses.field(default_factory=list)
    slack_s: list[float] = dataclasses.field(default_factory=list)
    ended: str = ""

    def on_block(self, block: MadeBlock) -> None:
        self.blocks += 1
        self.late += block.slack_s < 0
        self.slack_s.append(block.slack_s)
        self.ready_at_s.append(block.ready_at_s)

    def on_event(self, event: StreamEvent) -> None:
        if event.kind == "failed":
            self.ended = event.message


def viewers(pipe: StreamPipeline, seconds: float, stop: Stop, *, overload: float | None = None) -> dict[str, Any]:
    """A run in real time; Failure when not even one viewer is admitted, or a stream fails."""
    costs = RecordedCosts()
    runtime = Runtime(pipe, max_streams=MOST_VIEWERS, costs=costs)
    runtime.start()
    try:
        admitted = _admitted(runtime)
        if admitted == 0:
            raise Failure("no viewer is admitted: this machine makes a block more slowly than it plays")
        offered = max(1, int(SHARE * admitted)) if overload is None else math.ceil(overload * admitted)
        costs.factors.clear()
        busy_s, started_s = runtime.stats().busy_s, time.monotonic()
        crowd, rss_mb = _Crowd(runtime, offered), []
        while True:
            crowd.come()
            if stop.requested or time.monotonic() - started_s >= seconds:
                break
            time.sleep(min(1.0, seconds / 10))
            rss_mb.append((time.monotonic() - started_s, machine.rss_mb() or math.nan))
        took_s, busy_s = time.monotonic() - started_s, runtime.stats().busy_s - busy_s
        crowd.leave()
    finally:
        runtime.close()
    failed = [viewer.ended for viewer in crowd.seen if viewer.ended]
    if failed:
        raise Failure(f"{len(failed)} of {len(crowd.seen)} streams failed: {failed[0]}")
    figures = _figures(pipe, crowd.seen)
    simulated = simulated_figures(pipe, costs, costs.factors, len(crowd.seen), seconds)
    settled = [mb for at_s, mb in rss_mb if at_s > min(10.0, seconds / 4)]
    return {
        "overload": overload,
        "admitted": admitted,
        "viewers": len(crowd.seen),
        "offered": offered,
        "refused": crowd.refused,
        "seconds": took_s,
        **figures,
        "busy": busy_s / took_s,
        "rss_mb": {"start": settled[0] if settled else None, "end": rss_mb[-1][1] if rss_mb else None},
        "simulated": simulated,
        "predicted_misses": agreement(figures["late_blocks"], figures["blocks"], simulated["miss_rate"]),
    }


class _Crowd:
    """Those who want to watch: who is in, and who tries again."""

    def __init__(self, runtime: Runtime, offered: int) -> None:
        self.runtime, self.outside = runtime, offered
        self.seen: list[_Viewer] = []
        self.refused = 0
        self._lives: list[LiveStream] = []

    def come(self) -> None:
        """Everybody who is outside asks once."""
        for _ in range(self.outside):
            viewer = _Viewer()
            try:
                self._lives.append(_open(self.runtime, viewer, len(self.seen)))
            except Refused:
                self.refused += 1
                continue
            self.seen.append(viewer)
            self.outside -= 1

    def leave(self) -> None:
        for live in self._lives:
            live.close()


def _admitted(runtime: Runtime) -> int:
    """How many viewers come in before one is refused."""
    lives: list[LiveStream] = []
    try:
        while len(lives) < runtime.limits.most_streams:
            lives.append(_open(runtime, _Viewer(), len(lives)))
    except Refused:
        pass
    for live in lives:
        live.close()
    while runtime.stats().streams:
        time.sleep(0.01)
    return len(lives)


def _open(runtime: Runtime, viewer: _Viewer, seed: int) -> LiveStream:
    return runtime.open(StreamRequest(prompt=PROMPT, seed=seed), on_block=viewer.on_block, on_event=viewer.on_event)


def _figures(pipe: StreamPipeline, seen: Sequence[_Viewer]) -> dict[str, Any]:
    """Misses, and how evenly blocks come: the difference of two blocks' readiness from a block's time on screen."""
    period_s = pipe.geometry.block_pixel_frames(1) / pipe.geometry.fps
    lead = 4  # blocks made at once, before the media clock paces them
    gaps_ms = [
        1000 * abs(later - earlier - period_s)
        for viewer in seen
        for earlier, later in zip(viewer.ready_at_s[lead:], viewer.ready_at_s[lead + 1 :], strict=False)
    ]
    blocks, late = sum(viewer.blocks for viewer in seen), sum(viewer.late for viewer in seen)
    slack_ms = [1000 * slack for viewer in seen for slack in viewer.slack_s[1:]]
    return {
        "blocks": blocks,
        "late_blocks": late,
        "miss_rate": late / blocks if blocks else None,
        "worst_miss_rate": max((viewer.late / viewer.blocks for viewer in seen if viewer.blocks), default=None),
        "jitter_ms": _cuts(gaps_ms),
        "slack_ms": _cuts(slack_ms),
    }


def _cuts(values: Sequence[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p1": cuts[0], "p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def simulated_figures(
    pipe: StreamPipeline, costs: CostModel, factors: Sequence[float], count: int, seconds: float
) -> dict[str, Any]:
    """`count` viewers in the simulator: the costs learned by the run, and launches that miss them as they did there."""
    geometry = pipe.geometry
    stay = Viewers(
        per_minute=600.0,
        mean_s=1e6,
        shape=f"{geometry.block_size(1)} latent frames",
        block_s=geometry.block_pixel_frames(1) / geometry.fps,
        trained_steps=pipe.scheduler.trained_steps,
    )
    scenario = Scenario(viewers=(stay,), seconds=max(seconds, SIMULATED_S), factors=tuple(factors))
    limits = dataclasses.replace(scenario.limits, most_streams=count, most_load=1e3)
    values = simulate(dataclasses.replace(scenario, limits=limits), costs).values()
    names = ("blocks", "late_blocks", "miss_rate", "jitter", "utilisation")
    return {name: values[name] for name in names} | {"viewers": values["streams"]["admitted"]}


def agreement(late: int, blocks: int, predicted_rate: float | None) -> dict[str, Any]:
    """Late blocks of the run beside those that the simulator expects of as many; rare ones differ by chance, so one is
    added to both before they are divided."""
    expected = (predicted_rate or 0.0) * blocks
    ratio = (expected + 1) / (late + 1)
    return {"late": late, "expected": expected, "ratio": ratio, "within_factor_2": 0.5 <= ratio <= 2}
