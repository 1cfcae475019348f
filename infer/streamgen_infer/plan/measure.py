"""What a launch costs here: the curve c(m) over the streams that share it, measured on the engine; and cost files."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import StreamPipeline
from streamgen.schedules import Costs
from streamgen_infer.cost_model import CostModel
from streamgen_infer.engine import Engine, Work

ROWS = {"cpu": (1, 2, 4)}
"""Streams that share a launch, by kind of device: a CPU is busy with few of them."""
MANY_ROWS = (1, 2, 4, 8, 16)
LAUNCHES = 8
"""Timed of each."""
PROMPT = "a large red star spinning over a snow background"


def measure(pipe: StreamPipeline, rows: Sequence[int] = (), launches: int = LAUNCHES) -> CostModel:
    """Passes of 1, 2, ... streams together and decodings of one, with full windows. rows: by default as the device."""
    costs, engine, shape = CostModel(), Engine(pipe), shape_name(pipe.geometry)
    full = -(-pipe.scheduler.window_frames // pipe.geometry.block_frames)
    for count in rows or ROWS.get(pipe.device.type, MANY_ROWS):
        print(f"measuring launches of {count} ...", file=sys.stderr, flush=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the model was trained for")  # one step fills a window fastest
            works = [Work(pipe.stream(PROMPT, seed=seed, steps=1)) for seed in range(count)]
        for block in range(full + -(-launches // 2)):
            for work in works:
                work.begin()
            while works[0].run is not None:
                passed_s = _seconds(pipe, engine.forward, works)
                if block >= full:
                    costs.observe("forward", shape, count, passed_s)
                for work in works:
                    if not work.advanced() and work.finished:
                        decoded_s = _seconds(pipe, engine.decode, work)
                        if block >= full:
                            costs.observe("decode", shape, 1, decoded_s)
    return costs


def _seconds(pipe: StreamPipeline, call: Callable[..., object], *arguments: object) -> float:
    """Of one call, the device's work included."""
    started_s = time.perf_counter()
    call(*arguments)
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
    return max(time.perf_counter() - started_s, 1e-6)


def shape_name(geometry: VideoGeometry) -> str:
    """What the runtime calls the shape of a block that is not the first."""
    return f"{geometry.block_size(1)} latent frames"


def load_costs(path: Path, geometry: VideoGeometry) -> CostModel:
    """A file of CostModel.save. UserError unless it has passes and decodings of this model's blocks."""
    costs, shape = CostModel.load(path), shape_name(geometry)
    for kind in ("forward", "decode"):
        if not costs.known(kind, shape):
            there = ", ".join(f"{c['kind']} of {c['shape']}" for c in costs.values()["curves"]) or "nothing"
            raise UserError(f"{path}: there is no cost of {kind} for {shape}; it has: {there}")
    return costs


def known_rows(costs: CostModel, geometry: VideoGeometry) -> int:
    """The most streams in one launch whose cost was measured."""
    (curve,) = (c for c in costs.values()["curves"] if (c["kind"], c["shape"]) == ("forward", shape_name(geometry)))
    return max(int(point["rows"]) for point in curve["points"])


def in_ms(costs: CostModel, geometry: VideoGeometry, send_ms: float, quantile: float = 0.9) -> Costs:
    """Costs of a schedule, in ms at P90 (or P50). Beyond what was measured a stream costs its full share."""
    shape = shape_name(geometry)
    rows = range(1, known_rows(costs, geometry) + 2)
    return Costs(
        passes=tuple(1000 * costs.predict("forward", shape, count, quantile) for count in rows),
        decode=1000 * costs.predict("decode", shape, 1, quantile),
        send=send_ms,
    )
