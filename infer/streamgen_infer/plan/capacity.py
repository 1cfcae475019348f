"""Viewers that a machine holds, by compute and by memory, for every schedule a model may be streamed with.

A schedule on `devices` devices is one pipeline; a machine with more of them runs several pipelines, each with its share
of the viewers. Compute: the bounds of streamgen/initiation.py at P90 costs, filled to the share of the time that
admission fills. Memory: weights, and for each viewer what its timeline holds at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.grid import Grid, Visibility
from streamgen.initiation import Interval, interval, resource
from streamgen.launches import peak_frames
from streamgen.schedules import SCHEDULES, Costs, Machine, by_layers, layer_ranges, on_one, timeline
from streamgen_infer.models.fit import Demand as Bytes
from streamgen_infer.models.fit_sizes import ModelSizes

MOST_STREAMS = 4096
"""Of one pipeline; nobody counts further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of every device."""

    fps: float
    steps: int
    devices: int
    memory_bytes: float
    """Of each device."""
    load: float
    """The share of the time that may be planned."""
    most_rows: int
    """The most streams of a launch."""
    costs: Costs
    """In ms."""
    block_frames: int
    """Frames on the screen per block."""

    @property
    def block_ms(self) -> float:
        """Time on screen of a block."""
        return 1000 * self.block_frames / self.fps


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one schedule can do with the machine."""

    schedule: str
    visibility: Visibility
    pipelines: int
    devices: int
    """Of a pipeline."""
    by_compute: int
    """Viewers of all pipelines."""
    by_memory: int
    alone: Interval
    """Bounds of one viewer in a pipeline, ms."""
    next_one: Interval
    """Bounds with one viewer more than there are, ms: what limits."""
    fixed_bytes: float
    """Of the fullest device: weights, and room for a launch."""
    viewer_bytes: float
    """Of the fullest device, for each viewer of its pipeline."""
    depth: int
    """Blocks of a stream that are in progress at once."""

    @property
    def viewers(self) -> int:
        return min(self.by_compute, self.by_memory)

    @property
    def limit(self) -> str:
        """memory, or the bound that holds, in words."""
        return "memory" if self.by_memory < self.by_compute else self.next_one.limit

    @property
    def limit_kind(self) -> str:
        """memory, resource (a device is busy) or recurrence (a block waits for another)."""
        return self.limit.partition(":")[0]


def offers(sizes: ModelSizes, visibilities: dict[str, Visibility], demand: Demand, needs: Bytes) -> list[Offer]:
    """One for each schedule and size of pipeline that fits, the most viewers first; equal ones by the shorter delay."""
    found = []
    for name, visibility in visibilities.items():
        for devices in (d for d in range(1, demand.devices + 1) if demand.devices % d == 0):
            offer = _offer(sizes, name, visibility, devices, demand, needs)
            if offer is not None:
                found.append(offer)
    return sorted(found, key=lambda offer: (-offer.viewers, offer.depth, offer.devices, offer.alone.period))


def _offer(
    sizes: ModelSizes, name: str, visibility: Visibility, devices: int, demand: Demand, needs: Bytes
) -> Offer | None:
    row, machine = SCHEDULES[name], Machine(devices=devices, most_rows=demand.most_rows)

    def grid(streams: int, blocks: int = 1) -> Grid:
        return grid_of(sizes, visibility, ((demand.steps,) * blocks,) * streams)

    if devices > 1 and (row.place is on_one or devices > row.devices(grid(1))[0]):
        return None
    if devices == 1 and row.place is not on_one and not row.mixes_streams:
        return None  # one device alone is no chain and no ring: that is serial, or a stream batch
    steady = sizes.scheduler.sink_frames + 1  # a block beyond the sink

    alone = interval(name, grid(1, steady), machine, demand.costs)

    def bounds(streams: int) -> Interval:  # what a stream waits for of itself is the same among many
        return replace(alone, resource=resource(row, grid(streams, steady), machine, demand.costs))

    most = _most(lambda streams: bounds(streams).period <= demand.load * demand.block_ms)
    depth = row.depth(grid(1), machine)
    sample = grid(1, steady + sizes.scheduler.window_frames // sizes.geometry.block_frames + 2 * depth + 2)
    peaks = peak_frames(sample, [one.launch for one in timeline(name, sample, machine)])
    layers, window = sizes.transformer.num_layers, sizes.scheduler.window_frames
    viewer_bytes = needs.kv / window / layers * max(peaks.values())
    viewer_bytes += needs.prompt + needs.codec_state + latent_bytes(sizes.geometry, window)
    owned = max(b - a for a, b in layer_ranges(layers, machine)) if row.place is by_layers else layers

    def fixed_bytes(streams: int) -> float:
        rows = depth if visibility == "joint" else row.rows(grid(streams), machine)
        weights = needs.transformer * owned / layers + needs.codec + (0 if needs.text_offloads else needs.text)
        return weights + max(needs.model_pass * rows, needs.decode)

    held = _most(lambda streams: fixed_bytes(streams) + streams * viewer_bytes <= demand.memory_bytes)
    pipelines = demand.devices // devices
    return Offer(
        schedule=name,
        visibility=visibility,
        pipelines=pipelines,
        devices=devices,
        by_compute=pipelines * most,
        by_memory=pipelines * held,
        alone=alone,
        next_one=bounds(most + 1),
        fixed_bytes=fixed_bytes(max(1, min(most, held))),
        viewer_bytes=viewer_bytes,
        depth=depth,
    )


def grid_of(sizes: ModelSizes, visibility: Visibility, steps: Sequence[tuple[int, ...]]) -> Grid:
    """The grid of a model's streams, as its card says."""
    scheduler = sizes.scheduler
    return Grid(
        geometry=sizes.geometry,
        steps=tuple(steps),
        visibility=visibility,
        window_frames=scheduler.window_frames,
        sink_frames=scheduler.sink_frames,
        lag_blocks=max(1, scheduler.lag_blocks),
        layers=sizes.transformer.num_layers,
    )


def _most(fits: Callable[[int], bool]) -> int:
    """The largest count that fits; 0 if 1 does not. What fits, fits for fewer."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MOST_STREAMS and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST_STREAMS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_held(found: Sequence[Offer], demand: Demand, streams: int | None) -> None:
    """UserError, with the numbers, where not even one viewer can be held, or fewer than are wanted."""
    allowed_ms, best = demand.load * demand.block_ms, found[0]
    if all(offer.by_compute == 0 for offer in found):
        best = min(found, key=lambda offer: offer.alone.period)
        fps = demand.fps * allowed_ms / best.alone.period
        raise UserError(
            f"{demand.fps:g} frames per second cannot be held: a block of {demand.block_frames} frames may take "
            f"{allowed_ms:.4g} ms ({demand.load:.0%} of the {demand.block_ms:.4g} ms that it is on the screen), and "
            f"takes {best.alone.period:.4g} ms of {best.schedule} with {demand.steps} steps (P90; {best.alone.limit}); "
            f"at most {fps:.3g} frames per second, or fewer steps, or more or faster devices"
        )
    if best.viewers == 0:
        need = best.fixed_bytes + best.viewer_bytes
        raise UserError(
            f"{demand.memory_bytes / 1e9:.4g} GB per device are too little: the first viewer needs {need / 1e9:.4g} GB "
            f"({best.fixed_bytes / 1e9:.4g} GB for the model, {best.viewer_bytes / 1e9:.4g} GB for the viewer)"
        )
    if streams is not None and streams > best.viewers:
        if best.limit == "memory":
            why = (
                f"{best.by_memory} fit into {demand.memory_bytes / 1e9:.4g} GB per device, "
                f"{best.viewer_bytes / 1e6:.4g} MB each beside {best.fixed_bytes / 1e9:.4g} GB"
            )
        else:
            why = (
                f"one more would need {best.next_one.period:.4g} ms for every block, and {allowed_ms:.4g} ms may be "
                f"used (P90; {best.limit})"
            )
        raise UserError(
            f"{streams} viewers cannot be held; {best.viewers} can, by {best.schedule} on {demand.devices} "
            f"device{'s' if demand.devices > 1 else ''}: {why}"
        )


def block_frames(geometry: VideoGeometry) -> int:
    """Frames on the screen of a block that is not the first."""
    return geometry.block_pixel_frames(1)


def latent_bytes(geometry: VideoGeometry, frames: int) -> int:
    """Of so many latent frames, which a stream keeps in float32."""
    return 4 * frames * geometry.latent_channels * geometry.latent_height * geometry.latent_width
