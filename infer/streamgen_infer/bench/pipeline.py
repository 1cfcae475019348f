"""`streamgen bench --suite pipeline`: blocks per second of one stream on one rank and on two, beside the prediction.

The prediction uses nothing of the pipelines' own run. From this process: the time of a pass and of a decode. From two
processes that make passes side by side: how much slower both are than one alone; two hyperthreads of one core, or two
processes on one processor, are no two devices, and the planner is given devices of that speed.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from streamgen.grid import Grid
from streamgen.initiation import interval
from streamgen.parallel.balance import GAIN, best_counts, slowest_s
from streamgen.parallel.job import Split, even_bounds
from streamgen.pipeline import StreamPipeline
from streamgen.schedules import Costs, Machine
from streamgen_infer.engine import Engine, Work
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import Stop

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

SPLITS: tuple[Split, ...] = ("step_chain", "layer_ring")
RANKS = 2
PASS_BLOCKS = 8
"""Blocks timed for the costs, after the window is full."""
PROMPT = "a large red star spinning over a snow background"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CellTimes:
    """Medians of one process, in ms."""

    pass_ms: float
    decode_ms: float


def pipeline(pipe: StreamPipeline, threads: int, stop: Stop) -> dict[str, Any] | None:
    """One stream, same-level visibility, on one rank and on two, by steps and by layers; None if interrupted."""
    from streamgen.parallel.measure import measure_pipeline

    alone = cell_times(pipe)
    if stop.requested:
        return None
    slowdown = side_by_side(pipe, threads)
    found: dict[str, Any] = {"cells": dataclasses.asdict(alone), "slowdown_of_two": slowdown}
    for split in SPLITS:
        if stop.requested:
            return None
        one, two = measure_pipeline(pipe, split, (1, RANKS), threads=threads, force=True)
        predicted = [predicted_fps(pipe, split, ranks, alone, slowdown) for ranks in (1, RANKS)]
        found[split] = {
            "one": dataclasses.asdict(one),
            "two": dataclasses.asdict(two),
            "gain": two.fps / one.fps,
            "planned_gain": two.fps_bound / one.fps_bound,
            "predicted_fps": {"one": predicted[0], "two": predicted[1]},
            "predicted_gain": predicted[1] / predicted[0],
            "predicted_over_measured": {
                "one": predicted[0] / one.fps,
                "two": predicted[1] / two.fps,
                "gain": predicted[1] / predicted[0] / (two.fps / one.fps),
            },
        }
    return found


def predicted_fps(pipe: StreamPipeline, split: Split, ranks: int, cells: CellTimes, slowdown: float) -> float:
    """What the planner says of `ranks` processes, each `slowdown` times slower than one that is alone; 1 is alone.

    A ring is taken as its balancer leaves it: layers move when the slowest rank gains enough by that.
    """
    steps, layers = pipe.scheduler.trained_steps[0], pipe.transformer.config.num_layers
    lasting = pipe.scheduler.sink_frames // pipe.geometry.block_frames + 2
    grid = Grid(
        geometry=pipe.geometry,
        steps=((steps,) * lasting,),
        visibility="same_level",
        window_frames=pipe.scheduler.window_frames,
        sink_frames=pipe.scheduler.sink_frames,
        layers=layers,
    )
    costs = Costs(passes=(cells.pass_ms,), decode=cells.decode_ms)
    speed = 1.0 if ranks == 1 else 1 / slowdown
    machine = Machine(devices=ranks, speeds=(speed,) * ranks)
    period_ms = interval(split, grid, machine, costs).period
    if split == "layer_ring" and ranks > 1:
        per_layer, other = [steps * cells.pass_ms / layers] * ranks, [cells.decode_ms, *[0.0] * (ranks - 1)]
        bounds = even_bounds(layers, ranks)
        even = [stop - first for first, stop in itertools.pairwise(bounds)]
        best = best_counts(layers, per_layer, other)
        best_ms, even_ms = (slowest_s(counts, per_layer, other) for counts in (best, even))
        period_ms = (best_ms if best_ms <= (1 - GAIN) * even_ms else even_ms) / speed
    return 1000 * pipe.geometry.block_pixel_frames(1) / period_ms


def cell_times(pipe: StreamPipeline) -> CellTimes:
    """Of passes that see a full window, and of decoding a block."""
    engine, work = Engine(pipe), Work(pipe.stream(PROMPT, seed=0))
    full = -(-pipe.scheduler.window_frames // pipe.geometry.block_frames)
    passes_ms, decodes_ms = [], []
    for block in range(full + PASS_BLOCKS):
        work.begin()
        while work.run is not None:
            began_s = time.perf_counter()
            if engine.forward([work]):
                raise Failure("a launch of the bench failed; see `streamgen doctor`")
            passed_s = time.perf_counter()
            if block >= full:
                passes_ms.append(1000 * (passed_s - began_s))
            if not work.advanced() and work.finished:
                engine.decode(work)
                if block >= full:
                    decodes_ms.append(1000 * (time.perf_counter() - passed_s))
    return CellTimes(pass_ms=statistics.median(passes_ms), decode_ms=statistics.median(decodes_ms))


def side_by_side(pipe: StreamPipeline, threads: int) -> float:
    """How much longer a pass takes while another process makes passes, too: 1 if they do not disturb each other."""
    alone_ms, together_ms = (statistics.fmean(_processes(pipe, threads, count)) for count in (1, RANKS))
    return max(1.0, together_ms / alone_ms)


def _processes(pipe: StreamPipeline, threads: int, count: int) -> Sequence[float]:
    """The median pass of each of `count` processes at once, ms."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_meet, initargs=(barrier,)) as pool:
        futures = [pool.submit(_passes, str(pipe.folder), pipe.dtype_name, threads) for _ in range(count)]
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise Failure("a process of the bench was killed; free memory and try again") from error


_barrier: Barrier | None = None


def _meet(barrier: Barrier) -> None:
    """A process keeps what it is to wait at."""
    global _barrier
    _barrier = barrier


def _passes(folder: str, dtype: str, threads: int) -> float:
    """In a process of its own: all begin together."""
    pipe = StreamPipeline.from_pretrained(folder, dtype=dtype, threads=threads)
    assert _barrier is not None
    _barrier.wait(timeout=300)
    return cell_times(pipe).pass_ms
