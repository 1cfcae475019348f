"""What the device runs next: a pure function of (now, streams, measured costs). No torch, no clock, no threads.

The engine calls `choose` under a real clock, the simulator under a virtual one. One device runs one launch at a time:

    forward   denoising and commit passes of several streams, at any steps, when their shapes are equal
    recache   the window under a new prompt; its shape is another one, so it runs with its like only
    decode    finished latents to frames; `preview` is the same through the cheaper codec

Order: least slack first (slack: time that may pass before a cell must start to hold its deadline at P90). A cell whose
deadline is lost waits only when it would cost another stream its deadline. Whoever has waited `Rules.max_wait_s` goes
first, longest wait first, so nobody starves: a stream that could run is in a launch after at most
`max_wait_s + N x (longest launch)` with N streams on the device, however late it or anybody else is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf, sqrt
from typing import Literal, NamedTuple

from streamgen_infer.cost_model import CostModel
from streamgen_infer.requests import FEWER_STEPS, PREVIEW_CODEC, REPEATED

WORTHWHILE = 1.01
"""More rows must give so many times as many rows per second."""

Kind = Literal["forward", "recache", "decode", "preview"]


class StreamView(NamedTuple):
    """What the scheduler knows of a stream. A tuple, because thousands are made every second."""

    id: str
    shape: str
    """Name of all that must be equal for cells to share a launch (tokens, window, model)."""
    ready: Literal["recache", "step", "commit"] | None
    """The pass that could run now; None: nothing to run (ended, paused, or in a launch)."""
    due_at_s: float
    """Deadline of the first frame of the block that this pass works for; with `commit` that is the block after."""
    period_s: float
    """Time on screen of a block."""
    trained_steps: tuple[int, ...]
    """Step counts to choose from: the first is the usual one, smaller ones are for lack of time. One: it is fixed."""
    last_served_s: float
    """End of the stream's last launch (or of a pause), or when it came."""
    passes_left: int | None = None
    """Denoising passes that the block still needs; None: it has not begun, its step count is still open."""
    not_before_s: float = -inf
    """A block that has not begun waits until then (the lead over the viewer is bounded)."""
    decode_due_s: float | None = None
    """Deadline of a finished block that waits for the codec; None: none waits. There is one at most: the last pass of
    the next block waits for it."""
    preview: bool = False
    """There is a preview codec for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Run this now."""

    kind: Kind
    streams: tuple[str, ...]
    steps: Mapping[str, int] = field(default_factory=dict)
    """Step counts of the blocks that begin with this launch."""
    flags: Mapping[str, int] = field(default_factory=dict)
    """What is done to the stream's block for lack of time (bits of `requests`); streams without any are left out."""
    predicted_s: float
    """P90 of the time that it takes."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can run before `until_s`; None: not before something changes."""

    until_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What does not change from call to call."""

    max_rows: int = 16
    """Most streams in one launch."""
    max_wait_s: float = 2.0
    """Who has waited so long goes first."""


class _Cell(NamedTuple):
    """Something that could be launched now."""

    latest_start_s: float
    latest_end_s: float
    """When this pass must have ended so that the rest still meets the deadline (P90)."""
    order: int
    kind: Kind
    since_s: float
    view: StreamView


def choose(now_s: float, streams: Sequence[StreamView], costs: CostModel, rules: Rules) -> Launch | Wait:
    """The next launch of a device that is free now, or how long there is none. Needs a cost for each kind and shape."""
    cells, wake_s = _cells(now_s, streams, costs, rules)
    if not cells:
        return Wait(wake_s if wake_s < inf else None)
    cells.sort()
    seed = _seed(now_s, cells, costs, rules)
    rows = _rows(now_s, seed, cells, costs, rules)
    kind, count = seed.kind, len(rows)
    steps: dict[str, int] = {}
    flags: dict[str, int] = {}
    if kind == "forward":
        beginning = [cell.view for cell in rows if cell.view.ready == "step" and cell.view.passes_left is None]
        if beginning:
            steps = _step_counts(now_s, beginning, streams, costs, rules)
            flags = {view.id: FEWER_STEPS for view in beginning if steps[view.id] < view.trained_steps[0]}
    elif kind != "recache":
        end_s = now_s + costs.predict(kind, seed.view.shape, count, 0.5)
        for cell in rows:
            bits = PREVIEW_CODEC if kind == "preview" else 0
            bits |= REPEATED if end_s > cell.latest_end_s else 0
            if bits:
                flags[cell.view.id] = bits
    predicted_s = costs.predict(kind, seed.view.shape, count, 0.9)
    return Launch(
        kind=kind, streams=tuple(cell.view.id for cell in rows), steps=steps, flags=flags, predicted_s=predicted_s
    )


def _ready(view: StreamView, now_s: float) -> bool:
    """Whether the forward pass may run now."""
    ready, left = view.ready, view.passes_left
    if ready is None:
        return False
    if ready == "commit":
        return True
    if left is None and now_s < view.not_before_s:
        return False
    if view.decode_due_s is None or ready == "recache":
        return True
    # One block waits for the codec at most, so its latents are bounded: the pass that would finish a second one waits.
    return left != 1 if left is not None else 1 not in view.trained_steps


def _cells(now_s: float, streams: Sequence[StreamView], costs: CostModel, rules: Rules) -> tuple[list[_Cell], float]:
    """All that could be launched now, and when the next waiting block may begin (inf: none)."""
    ready = [_ready(view, now_s) for view in streams]
    rows = _rows_by_shape(streams, ready, rules)
    plans: dict[tuple[str, str, int | None], tuple[Kind, float, float]] = {}
    decodes: dict[str, float] = {}
    cells: list[_Cell] = []
    wake_s = inf
    for order, view in enumerate(streams):
        due_s, left, stage = view.decode_due_s, view.passes_left, view.ready
        if due_s is not None:
            kind: Kind = "decode"
            if (cost := decodes.get(view.shape)) is None:
                cost = decodes[view.shape] = costs.predict("decode", view.shape, 1, 0.9)
            cost_s = cost
            if view.preview and due_s - cost_s < now_s:
                kind, cost_s = "preview", costs.predict("preview", view.shape, 1, 0.9)
            cells.append(_Cell(due_s - cost_s, due_s, order, kind, view.last_served_s, view))
        if not ready[order]:
            if stage is not None and left is None and view.not_before_s > now_s:
                wake_s = min(wake_s, view.not_before_s)
            continue
        assert stage is not None
        open_steps = left is None or stage == "commit"
        key = view.shape, stage, min(view.trained_steps) if open_steps else left
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = _plan(view, costs, rows[view.shape])
        kind, cost_s, rest_s = plan
        waits = left is None and stage != "commit" and view.not_before_s > view.last_served_s
        since_s = view.not_before_s if waits else view.last_served_s
        end_s = view.due_at_s - rest_s
        cells.append(_Cell(end_s - cost_s, end_s, order, kind, since_s, view))
    return cells, wake_s


def _plan(view: StreamView, costs: CostModel, rows: int) -> tuple[Kind, float, float]:
    """Of a forward pass: its kind, its P90 alone, and the P90 of what remains after it until the frames are there.

    A block whose step count is open needs the fewest."""
    stage, left = view.ready, view.passes_left
    passes = min(view.trained_steps) if left is None or stage == "commit" else left
    kind: Kind = "recache" if stage == "recache" else "forward"
    rest_s = chain_s(costs, view.shape, passes - (stage == "step"), rows)
    return kind, costs.predict(kind, view.shape, 1, 0.9), rest_s


def _rows_by_shape(streams: Sequence[StreamView], ready: Sequence[bool], rules: Rules) -> dict[str, int]:
    """How many rows a launch of each shape will likely have."""
    rows: dict[str, int] = {}
    for view, is_ready in zip(streams, ready, strict=True):
        rows[view.shape] = rows.get(view.shape, 0) + is_ready
    return {shape: min(max(1, count), rules.max_rows) for shape, count in rows.items()}


def chain_s(costs: CostModel, shape: str, passes: int, rows: int) -> float:
    """P90 of the time of `passes` forward passes and a decode, one after another, each shared by `rows` streams.

    Times are taken as independent, so the distances from median to P90 add as squares.
    """
    pass_p50, pass_p90, factor = costs.curve("forward", shape, rows)
    decode_p50, decode_p90, _ = costs.curve("decode", shape, rows)
    pass_s, decode_s = pass_p50[rows - 1], decode_p50[rows - 1]
    pass_gap_s, decode_gap_s = pass_p90[rows - 1] - pass_s, decode_p90[rows - 1] - decode_s
    return factor * (passes * pass_s + decode_s + sqrt(passes * pass_gap_s**2 + decode_gap_s**2))


def _seed(now_s: float, cells: Sequence[_Cell], costs: CostModel, rules: Rules) -> _Cell:
    """The cell that must run now; `cells` are sorted by their latest start."""
    longest = min(cells, key=lambda cell: (cell.since_s, cell.order))
    if now_s - longest.since_s > rules.max_wait_s:
        return longest
    first = cells[0]
    if first.latest_start_s >= now_s:
        return first
    # Its deadline is lost: the picture stands still already. It goes first while nobody else loses his by that.
    urgent = next((cell for cell in cells if cell.latest_start_s >= now_s), None)
    end_s = now_s + costs.predict(first.kind, first.view.shape, 1, 0.9)
    return first if urgent is None or urgent.latest_start_s >= end_s else urgent


def _rows(now_s: float, seed: _Cell, cells: Sequence[_Cell], costs: CostModel, rules: Rules) -> list[_Cell]:
    """The launch's rows: as many as give the most rows per second without costing anybody a deadline that still holds.

    All counts are tried, not one more at a time: on a GPU the curve has plateaus. Rows that gain nothing stay out, for
    the others would wait for them.
    """
    kind, shape = seed.kind, seed.view.shape
    peers = [cell for cell in cells if cell.kind == kind and cell.view.shape == shape and cell is not seed]
    if seed.latest_start_s >= now_s:
        peers.sort(key=lambda cell: (cell.latest_start_s < now_s, cell))
    peers = [seed, *peers][: rules.max_rows]
    if len(peers) == 1:
        return peers
    p50_s, p90_s, factor = costs.curve(kind, shape, len(peers))
    alone_s = now_s + factor * p90_s[0]
    chosen = {id(cell) for cell in peers}
    # What a launch of one row would break already is no reason to keep others out.
    bound_s = min((c.latest_start_s for c in cells if id(c) not in chosen and c.latest_start_s >= alone_s), default=inf)
    outside = list(accumulate(reversed([c.latest_start_s if c.latest_start_s >= alone_s else inf for c in peers]), min))
    best, best_rate, inside_s = 1, 1 / p50_s[0], inf
    for count, cell in enumerate(peers, 1):
        if cell.latest_end_s >= alone_s:
            inside_s = cell.latest_end_s if cell.latest_end_s < inside_s else inside_s
        others_s = outside[len(peers) - count - 1] if count < len(peers) else inf
        end_s = now_s + factor * p90_s[count - 1]
        if end_s > bound_s or end_s > inside_s or end_s > others_s:
            continue
        rate = count / p50_s[count - 1]
        if rate > best_rate * WORTHWHILE:
            best, best_rate = count, rate
    return peers[:best]


def _step_counts(
    now_s: float, beginning: Sequence[StreamView], streams: Sequence[StreamView], costs: CostModel, rules: Rules
) -> dict[str, int]:
    """For each block that begins the most steps with which its deadline holds at P90; the fewest if none does.

    The device is the processor of the demand criterion of earliest-deadline-first (Baruah et al. 1990): what is due
    by a deadline, of all streams, must fit before it. A row costs its share of a full launch; the blocks after a
    stream's current one count in proportion to the time between.
    """
    counts = {view.id: view.trained_steps[0] for view in beginning if len(view.trained_steps) == 1}
    if len(counts) == len(beginning):
        return counts
    demand = _Demand(now_s, streams, costs, rules)
    for view in beginning:
        if view.id in counts:
            continue
        options = sorted((n for n in view.trained_steps if n <= view.trained_steps[0]), reverse=True)
        room_s = view.due_at_s - now_s
        counts[view.id] = next((n for n in options if demand.finish_s(view, n) <= room_s), options[-1])
    return counts


class _Demand:
    """Time that the device needs for all that is due by some moment."""

    def __init__(self, now_s: float, streams: Sequence[StreamView], costs: CostModel, rules: Rules) -> None:
        self.costs = costs
        self.rows = _rows_by_shape(streams, [view.ready is not None for view in streams], rules)
        shares: dict[str, tuple[float, float]] = {}
        for shape, rows in self.rows.items():
            pass_s, decode_s = (costs.predict(kind, shape, rows, 0.5) / rows for kind in ("forward", "decode"))
            shares[shape] = pass_s, decode_s
        self.shares = shares
        works: list[tuple[float, float, float]] = []
        for view in streams:
            pass_s, decode_s = shares[view.shape]
            if view.decode_due_s is not None:
                works.append((view.decode_due_s, decode_s, 0.0))
            if view.ready is None:
                continue
            usual = view.trained_steps[0]
            left = usual if view.passes_left is None or view.ready == "commit" else view.passes_left
            extra_s = pass_s if view.ready == "commit" else 0.0
            if view.ready == "recache":
                extra_s = costs.predict("recache", view.shape, 1, 0.5)
            rate = ((usual + 1) * pass_s + decode_s) / view.period_s
            works.append((view.due_at_s, left * pass_s + extra_s + decode_s, rate))
        works.sort()
        self.dues_s = [due_s for due_s, _, _ in works]
        self.fixed_s = list(accumulate((work_s - rate * due_s for due_s, work_s, rate in works), initial=0.0))
        self.rates = list(accumulate((rate for _, _, rate in works), initial=0.0))

    def finish_s(self, view: StreamView, steps: int) -> float:
        """P90 of the time until the block of `view`, which begins now, is decoded after so many steps."""
        pass_s, _ = self.shares[view.shape]
        rows = self.rows[view.shape]
        due = bisect_right(self.dues_s, view.due_at_s)
        work_s = self.fixed_s[due] + self.rates[due] * view.due_at_s - (view.trained_steps[0] - steps) * pass_s
        median_s = self.costs.predict("forward", view.shape, rows, 0.5)
        gap_s = self.costs.predict("forward", view.shape, rows, 0.9) - median_s
        work_s += sqrt(max(work_s, 0.0) / median_s) * gap_s
        return max(work_s, chain_s(self.costs, view.shape, steps, rows))
