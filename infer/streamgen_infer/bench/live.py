"""`streamgen bench --suite engine | viewers | pipeline`: many streams on a device, live viewers, a stream on two ranks.

engine    8 streams made together (passes share forwards) beside the same 8 made one after the other, and what a
          decision of the scheduler costs with 64 streams
viewers   live viewers in real time, beside what the simulator says (viewers.py)
pipeline  blocks per second of one stream on one rank and on two, beside what the planner says (pipeline.py)
"""

from __future__ import annotations

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
from streamgen_infer.bench.pipeline import pipeline
from streamgen_infer.bench.viewers import viewers
from streamgen_infer.cost_model import CostModel
from streamgen_infer.engine import Engine, Work
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.report import check_report, write_report
from streamgen_infer.scheduler import Rules, StreamView, choose
from streamgen_infer.sinks import check_place

STREAMS, BLOCKS, ROUNDS = 8, 3, 3
DECISION_STREAMS, DECISIONS = 64, 400
PROMPT = "a large red star spinning over a snow background"


SUITES = ("engine", "viewers", "pipeline")


def run(
    interrupts: Interrupts,
    *,
    suite: str,
    dtype: str,
    threads: int,
    seconds: float,
    overload: float | None,
    json: Path | None,
    overwrite: bool,
) -> int:
    """The command for these suites; returns the exit code."""
    if overload is not None and (suite != "viewers" or not 1 <= overload <= 100):
        raise UserError(f"--overload is {overload:g} with --suite {suite}; it is of viewers, and must be 1 to 100")
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
            result = viewers(pipe, seconds, stop, overload=overload)
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


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
