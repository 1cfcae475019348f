"""Whether one more stream fits: by measured P90 costs and by bytes, before anything is promised. A pure function.

Two numbers per device, both with the new stream in them. Load: the share of the time that all blocks of a period take
at P90, with rows shared as the scheduler shares them. Chain: the passes of one block run one after another, and that
must fit into its period, or into what is promised for the first frame, however many devices there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from streamgen_infer.cost_model import CostModel
from streamgen_infer.requests import Refused
from streamgen_infer.scheduler import Rules, chain_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A stream as admission sees it: one that runs, or one that wants to."""

    shape: str
    period_s: float
    """Time on screen of a block."""
    steps: int
    """The usual denoising passes of a block; admission does not count on fewer."""
    bytes: int
    """Memory that it holds while it runs: caches, checkpoints, frames of its lead."""
    due_s: float = 0.0
    """Any of its deadlines: says at which phase of the period they fall."""
    ends_s: float | None = None
    """When it will end, if that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes for streams: all, and those taken by what no `Load` counts."""

    total_bytes: int
    other_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The stream fits."""

    due_s: float
    """Deadline of its first frame: at most `start_s` from now, and as far from other streams' deadlines as that allows.

    Streams of equal period would otherwise fall into step and miss together."""
    load: float
    """Share of the device's time that is taken at P90, with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How full a device may be made."""

    most_load: float = 0.85
    """Of the device's time at P90; the rest is for what is not predicted."""
    most_streams: int = 64
    retry_s: float = 5.0
    """Time to try again when no stream's end is known."""


def admit(
    now_s: float,
    loads: Sequence[Load],
    wanted: Load,
    costs: CostModel,
    memory: Memory,
    *,
    start_s: float,
    rules: Rules,
    limits: Limits,
) -> Admitted | Refused:
    """Whether `wanted` fits beside `loads` on a device; `start_s` is the time promised for its first frame.

    Refused (returned, for a caller to raise or to try elsewhere) names the resource that is short: "streams", "memory",
    "time" (the device is full) or "latency" (a block takes longer than its period or than `start_s`, even so).
    """
    short = (
        _short_of_places(loads, limits)
        or _short_of_memory(loads, wanted, memory)
        or _short_of_speed(wanted, costs, rules, start_s)
        or _short_of_time(loads, wanted, costs, rules, limits)
    )
    after = [*loads, wanted]
    first_s = 0.0 if short else block_s(costs, wanted, _rows(after, wanted.shape, rules))
    if first_s > start_s:
        text = (
            f"the first frame would take {first_s:.2f} s (P90) beside the streams that run, {start_s:.2f} s is allowed"
        )
        short = _Shortage("latency", text, {"block_s": first_s, "start_s": start_s})
    if short:
        message = f"{short.resource}: {short.message}"
        return Refused(short.resource, message, retry_after_s=_retry_s(now_s, loads, limits), numbers=short.numbers)
    due_s = _phase(now_s + first_s, now_s + start_s, loads, wanted.period_s)
    return Admitted(due_s=due_s, load=device_load(after, costs, rules))


class _Shortage(NamedTuple):
    resource: str
    message: str
    numbers: dict[str, float]


def _short_of_places(loads: Sequence[Load], limits: Limits) -> _Shortage | None:
    if len(loads) < limits.most_streams:
        return None
    numbers = {"streams": float(len(loads)), "most_streams": float(limits.most_streams)}
    return _Shortage("streams", f"{len(loads)} streams run; {limits.most_streams} are allowed", numbers)


def _short_of_memory(loads: Sequence[Load], wanted: Load, memory: Memory) -> _Shortage | None:
    free = memory.total_bytes - memory.other_bytes - sum(load.bytes for load in loads)
    if wanted.bytes <= free:
        return None
    numbers = {"bytes": float(wanted.bytes), "free_bytes": float(free), "total_bytes": float(memory.total_bytes)}
    message = f"the stream needs {wanted.bytes / 2**20:.1f} MiB, {max(0, free) / 2**20:.1f} MiB are free"
    return _Shortage("memory", message, numbers)


def _short_of_speed(wanted: Load, costs: CostModel, rules: Rules, start_s: float) -> _Shortage | None:
    alone_s = device_load([wanted], costs, rules) * wanted.period_s
    first_s = block_s(costs, wanted, 1)
    numbers = {"block_s": alone_s, "first_s": first_s, "period_s": wanted.period_s, "start_s": start_s}
    if alone_s > wanted.period_s:
        message = f"a block of {wanted.steps} steps takes {alone_s:.3f} s (P90), but lasts {wanted.period_s:.3f} s"
    elif first_s > start_s:
        message = f"the first frame takes {first_s:.3f} s (P90); {start_s:.3f} s is allowed"
    else:
        return None
    return _Shortage("latency", message, numbers)


def _short_of_time(
    loads: Sequence[Load], wanted: Load, costs: CostModel, rules: Rules, limits: Limits
) -> _Shortage | None:
    load = device_load([*loads, wanted], costs, rules)
    if load <= limits.most_load:
        return None
    before = device_load(loads, costs, rules)
    numbers = {"load": before, "load_with": load, "most_load": limits.most_load}
    message = (
        f"{before:.0%} of the device is taken (P90), {load:.0%} with this stream; {limits.most_load:.0%} is allowed"
    )
    return _Shortage("time", message, numbers)


def block_s(costs: CostModel, load: Load, rows: int) -> float:
    """P90 of the time from the beginning of a block to its frames, in launches that `rows` streams share."""
    return chain_s(costs, load.shape, load.steps, rows)


def device_load(loads: Sequence[Load], costs: CostModel, rules: Rules) -> float:
    """Share of a device's time that these streams need, at P90; or the longest chain of a block over its period.

    Rows are shared by all streams of a shape, in launches of equal size: that is what a busy device comes to.
    """
    busy = longest = 0.0
    for shape in {load.shape for load in loads}:
        rows = _rows(loads, shape, rules)
        pass_s, decode_s = (costs.predict(kind, shape, rows, 0.9) for kind in ("forward", "decode"))
        for load in loads:
            if load.shape == shape:
                one_s = (load.steps + rules.commit_passes) * pass_s + decode_s
                busy += one_s / rows / load.period_s
                longest = max(longest, one_s / load.period_s)
    return max(busy, longest)


def _rows(loads: Sequence[Load], shape: str, rules: Rules) -> int:
    """Rows of a launch when the streams of a shape are divided evenly over as few launches as possible."""
    count = sum(load.shape == shape for load in loads)
    return ceil(count / ceil(count / rules.max_rows))


def _retry_s(now_s: float, loads: Sequence[Load], limits: Limits) -> float:
    ends_s = [load.ends_s - now_s for load in loads if load.ends_s is not None]
    return max(min(ends_s), 0.1) if ends_s else limits.retry_s


def _phase(earliest_s: float, latest_s: float, loads: Sequence[Load], period_s: float) -> float:
    """The moment of [earliest_s, latest_s] that is farthest, modulo the period, from the deadlines of equal streams."""
    phases = sorted((load.due_s - earliest_s) % period_s for load in loads if abs(load.period_s - period_s) < 1e-9)
    if not phases:
        return latest_s
    window_s = min(latest_s - earliest_s, period_s)
    around = [phases[-1] - period_s, *phases, phases[0] + period_s]
    # The distance to the nearest deadline is greatest in the middle of a gap or at an end of the window.
    places = [0.0, window_s, *((a + b) / 2 for a, b in pairwise(around))]
    return earliest_s + max(
        (place for place in places if 0 <= place <= window_s),
        key=lambda place: min(abs(place - phase) for phase in around),
    )
