"""`streamgen bench --suite engine | viewers | pipeline`: many streams on a device, live viewers, a stream on two ranks.

engine    8 streams made together (passes share forwards) beside the same 8 made one after the other, and what a
          decision of the scheduler costs with 64 streams
viewers   as many viewers as admission lets in, times `SHARE`, for some time in real time: missed deadlines, jitter and
          memory, beside what the simulator says for the same costs
pipeline  blocks per second of one stream on one rank and on two, beside what the planner says
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamgen import __version__
from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen_infer import machine
from streamgen_infer.cost_model import Z90, CostModel
from streamgen_infer.engine import Engine, Work
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.live_stream import LiveStream
from streamgen_infer.report import check_report, write_report
from streamgen_infer.requests import MadeBlock, Refused, StreamEvent, StreamRequest
from streamgen_infer.runtime import Runtime
from streamgen_infer.scheduler import Rules, StreamView, choose
from streamgen_infer.simulate.scenario import Scenario, Viewers
from streamgen_infer.simulator import simulate
from streamgen_infer.sinks import check_place

STREAMS, BLOCKS, ROUNDS = 8, 3, 3
DECISION_STREAMS, DECISIONS = 64, 400
SHARE = 0.9
"""Of the viewers that admission lets in."""
PROMPT = "a large red star spinning over a snow background"


SUITES = ("engine", "viewers", "pipeline")


def run(
    interrupts: Interrupts, *, suite: str, dtype: str, threads: int, seconds: float, json: Path | None, overwrite: bool
) -> int:
    """The command for these suites; returns the exit code."""
    if not 5 <= seconds <= 86_400:
        raise UserError(f"--seconds is {seconds:g}; it must be 5 to 86400")
    if json is not None:
        check_place(json, "--json")
        check_report(json, "--json", overwrite=overwrite)
    pipe = StreamPipeline.from_pretrained("sprites", dtype="auto" if dtype == "all" else dtype, threads=threads)
    print(f"measuring {suite} in {pipe.dtype_name} ...", file=sys.stderr, flush=True)
    with interrupts.deferred() as stop:
        if suite == "engine":
            result = engine(pipe, stop)
        elif suite == "viewers":
            result = viewers(pipe, seconds, stop)
        else:
            result = pipeline(pipe, threads, stop)
        if result is None:
            return INTERRUPTED
        result = {"suite": suite, "dtype": pipe.dtype_name, "threads": threads, **result}
        for name, value in result.items():
            print(f"{name}: {_short(value)}")
        if json is not None:
            values = {
                "command": "bench",
                "version": __version__,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "cpu": machine.cpu_name(),
                "interrupted": stop.requested,
                "results": [result],
            }
            write_report(json, values)
    return INTERRUPTED if stop.requested else 0


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items())
    return "; ".join(_short(one) for one in value) if isinstance(value, list | tuple) else str(value)


def pipeline(pipe: StreamPipeline, threads: int, stop: Stop) -> dict[str, Any] | None:
    """One stream, same-level visibility, on one rank and on two, by steps and by layers."""
    from streamgen.parallel.measure import measure_pipeline

    found: dict[str, Any] = {}
    for split in ("step_chain", "layer_ring"):
        if stop.requested:
            return None
        one, two = measure_pipeline(pipe, split, (1, 2), threads=threads, force=True)
        found[split] = {
            "one": dataclasses.asdict(one),
            "two": dataclasses.asdict(two),
            "gain": two.fps / one.fps,
            "planned_gain": two.fps_bound / one.fps_bound,
        }
    return found


def engine(pipe: StreamPipeline, stop: Stop) -> dict[str, Any] | None:
    """Seconds of `STREAMS` streams together and one by one, taken in turns; medians."""
    runner, alone_s, together_s = Engine(pipe), [], []
    for _ in range(ROUNDS + 1):
        if stop.requested:
            return None
        alone_s.append(sum(_timed(lambda s=seed: _make(runner, [s])) for seed in range(STREAMS)))  # type: ignore[misc]
        together_s.append(_timed(lambda: _make(runner, list(range(STREAMS)))))
    one, all_s = statistics.median(alone_s[1:]), statistics.median(together_s[1:])  # the first round warms up
    return {
        "streams": STREAMS,
        "blocks": BLOCKS,
        "one_by_one_s": one,
        "together_s": all_s,
        "together_over_one_by_one": all_s / one,
        "decision_ms": _decisions(),
    }


def _make(runner: Engine, seeds: Sequence[int]) -> None:
    works = [Work(runner.pipe.stream(PROMPT, seed=seed)) for seed in seeds]
    for _ in range(BLOCKS):
        for work in works:
            work.begin()
        while works[0].run is not None:
            if runner.forward(works):
                raise Failure("a launch of the bench failed; see `streamgen doctor`")
            for work in works:
                if not work.advanced() and work.finished:
                    runner.decode(work)


def _decisions() -> dict[str, float]:
    """Milliseconds of `scheduler.choose` for 64 streams at random places of their blocks."""
    rng, costs, took_ms = random.Random(0), CostModel(), []
    for rows in (1, 8, 16):
        costs.give("forward", "block", rows, 0.01 + 0.002 * rows, p90_s=0.012 + 0.002 * rows)
        costs.give("decode", "block", rows, 0.002 * rows, p90_s=0.0025 * rows)
    for _ in range(DECISIONS):
        views = [
            StreamView(
                id=str(number),
                shape="block",
                ready=rng.choice(("step", "step", "commit")),
                due_at_s=rng.uniform(-0.2, 1.5),
                period_s=0.75,
                trained_steps=(4, 2, 1),
                passes_left=rng.choice((None, 1, 2, 3, 4)),
                last_served_s=-0.1,
                not_before_s=rng.choice((-math.inf, 0.3)),
                decode_due_s=rng.choice((None, None, 0.4)),
            )
            for number in range(DECISION_STREAMS)
        ]
        started = time.perf_counter()
        choose(0.0, views, costs, Rules())
        took_ms.append(1000 * (time.perf_counter() - started))
    cuts = statistics.quantiles(took_ms, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


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


def viewers(pipe: StreamPipeline, seconds: float, stop: Stop) -> dict[str, Any] | None:
    """A run in real time; UserError or Failure when not even one viewer is admitted."""
    runtime = Runtime(pipe, max_streams=64)
    runtime.start()
    try:
        admitted = _admitted(runtime)
        if admitted == 0:
            raise Failure("no viewer is admitted: this machine makes a block more slowly than it plays")
        count = max(1, int(SHARE * admitted))
        runtime.limits = dataclasses.replace(runtime.limits, most_streams=count)
        seen = [_Viewer() for _ in range(count)]
        lives = [_open(runtime, viewer, seed) for seed, viewer in enumerate(seen)]
        offered = count
        refused = _over(runtime, count)  # twice as many come: the others are turned away
        start_mb, rss_mb, started_s = None, [], time.monotonic()
        while not stop.requested and time.monotonic() - started_s < seconds:
            time.sleep(min(1.0, seconds / 10))
            rss_mb.append((time.monotonic() - started_s, machine.rss_mb() or math.nan))
            if start_mb is None and time.monotonic() - started_s > min(10.0, seconds / 4):
                start_mb = rss_mb[-1][1]
        costs, stats = runtime.costs, runtime.stats()
        for live in lives:
            live.close()
    finally:
        runtime.close()
    failed = [viewer.ended for viewer in seen if viewer.ended]
    if failed:
        raise Failure(f"{len(failed)} of {count} streams failed: {failed[0]}")
    return {
        "admitted": admitted,
        "viewers": count,
        "offered": offered + refused,
        "refused": refused,
        "seconds": time.monotonic() - started_s,
        **_figures(pipe, seen),
        "busy": stats.busy_s / (time.monotonic() - started_s),
        "rss_mb": {"start": start_mb, "end": rss_mb[-1][1] if rss_mb else None},
        "simulated": _simulated(pipe, costs, count, seconds),
    }


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


def _over(runtime: Runtime, count: int) -> int:
    refused = 0
    for number in range(count):
        try:
            _open(runtime, _Viewer(), number).close()
        except Refused:
            refused += 1
    return refused


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


def _simulated(pipe: StreamPipeline, costs: CostModel, count: int, seconds: float) -> dict[str, Any]:
    """The same viewers in the simulator, with the costs that the run has learned."""
    geometry = pipe.geometry
    shape = f"{geometry.block_size(1)} latent frames"
    points = [point for curve in costs.values()["curves"] if curve["shape"] == shape for point in curve["points"]]
    noise = statistics.median(math.log(point["p90_s"] / point["p50_s"]) / Z90 for point in points)
    stay = Viewers(
        per_minute=600.0,
        mean_s=1e6,
        shape=shape,
        block_s=geometry.block_pixel_frames(1) / geometry.fps,
        trained_steps=pipe.scheduler.trained_steps,
    )
    scenario = Scenario(viewers=(stay,), seconds=max(seconds, 60.0), noise=max(noise, 1e-3))
    scenario = dataclasses.replace(
        scenario, limits=dataclasses.replace(scenario.limits, most_streams=count, most_load=1.0)
    )
    values = simulate(scenario, costs).values()
    return {name: values[name] for name in ("miss_rate", "jitter", "utilisation")} | {"noise": noise}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
