"""What the device runs next: a pure function of (now, streams, measured costs). No torch, no clock, no threads.

The engine calls `choose` under a real clock, the simulator under a virtual one. One device runs one launch at a time:

    forward   denoising and commit passes of several streams, at any steps, when their shapes are equal
    recache   the window under a new prompt; its shape is another one, so it runs with its like only
    decode    finished latents to frames; `preview` is the same through the cheaper codec

Order: least slack first (slack: time that may pass before a cell must start to hold its deadline at P90). A cell whose
deadline is lost waits only when it would cost another stream its deadline. Whoever has waited `Rules.max_wait_s` goes
first, longest wait first, so nobody starves: a stream that could run is in a launch after at most
`max_wait_s + N x (longest launch)` with N streams on the device, however late it or anybody else is.

By this the schedule follows the load by itself: nothing is switched. A viewer who is alone gets launches of one row,
one after another (`serial`, the shortest way to a frame and to a new prompt); with more viewers their cells share
launches (`interleaved` on one device), as far as the measured curve gains by it. Both run under clean visibility, so
viewers may come and go at any cell. `schedule_choice` is for what cannot be decided from cell to cell: how many devices
make one stream, and how many of its blocks are in progress, which a prompt then has to wait for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
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
    commit_passes: int = 1
    """Of a block, after its steps; 0 where the keys and values of the last step stay."""


_Cell = tuple[float, float, int, Kind, float, StreamView]
"""Something that could be launched now, as plain numbers that sort by urgency:

latest start, latest end (when this pass must have ended so that the rest still meets the deadline, P90), order of the
stream, kind, since when it waits, its stream."""


def choose(now_s: float, streams: Sequence[StreamView], costs: CostModel, rules: Rules) -> Launch | Wait:
    """The next launch of a device that is free now, or how long there is none. Needs a cost for each kind and shape."""
    cells, wake_s = _cells(now_s, streams, costs, rules)
    if not cells:
        return Wait(wake_s if wake_s < inf else None)
    rows = cells
    if len(cells) > 1:
        cells.sort()
        rows = _rows(now_s, _seed(now_s, cells, costs, rules), cells, costs, rules)
    kind, shape, count = rows[0][3], rows[0][5].shape, len(rows)
    p50_s, p90_s, factor = costs.curve(kind, shape, count)
    steps: dict[str, int] = {}
    flags: dict[str, int] = {}
    if kind == "forward":
        views = [cell[5] for cell in rows]
        beginning = [view for view in views if view.passes_left is None and view.ready == "step"]
        if beginning:
            steps = _step_counts(now_s, beginning, streams, costs, rules)
            flags = {view.id: FEWER_STEPS for view in beginning if steps[view.id] < view.trained_steps[0]}
    elif kind != "recache":
        end_s = now_s + p50_s[count - 1] * factor
        for _, latest_end_s, _, _, _, view in rows:
            bits = PREVIEW_CODEC if kind == "preview" else 0
            bits |= REPEATED if end_s > latest_end_s else 0
            if bits:
                flags[view.id] = bits
    ids = tuple([cell[5].id for cell in rows])
    return Launch(kind=kind, streams=ids, steps=steps, flags=flags, predicted_s=p90_s[count - 1] * factor)


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
    decodes: dict[str, float] = {}
    cells: list[_Cell] = []
    ready: list[tuple[int, StreamView]] = []
    rows: dict[str, int] = {}
    wake_s = inf
    for order, view in enumerate(streams):
        _, shape, stage, _, _, _, served_s, left, not_before_s, decode_due_s, preview = view
        if left is None and now_s < not_before_s and stage is not None and not_before_s < wake_s:
            wake_s = not_before_s
        if decode_due_s is not None:
            kind: Kind = "decode"
            if (cost_s := decodes.get(shape, -1.0)) < 0:
                cost_s = decodes[shape] = costs.predict("decode", shape, 1, 0.9)
            if preview and decode_due_s - cost_s < now_s:
                kind, cost_s = "preview", costs.predict("preview", shape, 1, 0.9)
            cells.append((decode_due_s - cost_s, decode_due_s, order, kind, served_s, view))
        elif left is None and now_s < not_before_s and stage != "commit":
            continue  # most streams, most of the time: the viewer has enough
        if _ready(view, now_s):
            ready.append((order, view))
            rows[shape] = rows.get(shape, 0) + 1
    plans: dict[tuple[str, str | None, int | tuple[int, ...]], tuple[Kind, float, float]] = {}
    for order, view in ready:
        _, shape, stage, due_at_s, _, trained_steps, served_s, left, not_before_s, _, _ = view
        key = shape, stage, trained_steps if left is None or stage == "commit" else left
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = _plan(view, costs, min(rows[shape], rules.max_rows))
        kind, cost_s, rest_s = plan
        # A block that begins waits since it may.
        since_s = not_before_s if left is None and not_before_s > served_s and stage != "commit" else served_s
        end_s = due_at_s - rest_s
        cells.append((end_s - cost_s, end_s, order, kind, since_s, view))
    return cells, wake_s


def _plan(view: StreamView, costs: CostModel, rows: int) -> tuple[Kind, float, float]:
    """Of a forward pass: its kind, its P90 alone, and the P90 of what remains after it until the frames are there.

    A block whose step count is open needs the fewest."""
    stage, left = view.ready, view.passes_left
    passes = min(view.trained_steps) if left is None or stage == "commit" else left
    kind: Kind = "recache" if stage == "recache" else "forward"
    rest_s = chain_s(costs, view.shape, passes - (stage == "step"), rows)
    return kind, costs.predict(kind, view.shape, 1, 0.9), rest_s


def chain_s(costs: CostModel, shape: str, passes: int, rows: int) -> float:
    """P90 of the time of `passes` forward passes and a decode, one after another, each shared by `rows` streams.

    Times are taken as independent, so the distances from median to P90 add as squares.
    """
    key = shape, passes, rows
    known_s = costs.derived.get(key)
    if known_s is None:
        pass_p50, pass_p90, _ = costs.curve("forward", shape, rows)
        decode_p50, decode_p90, _ = costs.curve("decode", shape, rows)
        pass_s, decode_s = pass_p50[rows - 1], decode_p50[rows - 1]
        pass_gap_s, decode_gap_s = pass_p90[rows - 1] - pass_s, decode_p90[rows - 1] - decode_s
        known_s = passes * pass_s + decode_s + sqrt(passes * pass_gap_s**2 + decode_gap_s**2)
        costs.derived[key] = known_s
    return costs.factor * known_s


def _seed(now_s: float, cells: Sequence[_Cell], costs: CostModel, rules: Rules) -> _Cell:
    """The cell that must run now; `cells` are sorted."""
    if now_s - min([cell[4] for cell in cells]) > rules.max_wait_s:
        return min(cells, key=lambda cell: (cell[4], cell[2]))
    first = cells[0]
    if first[0] >= now_s:
        return first
    # Its deadline is lost: the picture stands still already. It goes first while nobody else loses his by that.
    at = bisect_left(cells, (now_s,))
    if at == len(cells):
        return first
    urgent = cells[at]
    end_s = now_s + costs.predict(first[3], first[5].shape, 1, 0.9)
    return first if urgent[0] >= end_s else urgent


def _rows(now_s: float, seed: _Cell, cells: Sequence[_Cell], costs: CostModel, rules: Rules) -> list[_Cell]:
    """The launch's rows: as many as give the most rows per second without costing anybody a deadline that still holds.

    All counts are tried, not one more at a time: on a GPU the curve has plateaus. Rows that gain nothing stay out, for
    the others would wait for them.
    """
    kind, shape = seed[3], seed[5].shape
    peers = [cell for cell in cells if cell[3] == kind and cell[5].shape == shape and cell is not seed]
    if not peers:
        return [seed]
    if seed[0] >= now_s and peers[0][0] < now_s:  # those whose deadline is lost come last
        held = bisect_left(peers, (now_s,))
        peers = peers[held:] + peers[:held]
    peers = [seed, *peers][: rules.max_rows]
    p50_s, p90_s, factor = costs.curve(kind, shape, len(peers))
    # What a launch of one row would break already is no reason to keep others out.
    alone_s = now_s + factor * p90_s[0]
    bound_s = _earliest_outside(cells[bisect_left(cells, (alone_s,)) :], peers)
    # Of the rows behind the first `count`, the earliest that is not broken already.
    others = [inf] * (len(peers) + 1)
    for at in range(len(peers) - 1, 0, -1):
        start_s = peers[at][0]
        others[at] = start_s if alone_s <= start_s < others[at + 1] else others[at + 1]
    best, best_rate, inside_s = 1, 1 / p50_s[0], bound_s
    for count, (_, latest_end_s, *_) in enumerate(peers, 1):
        if alone_s <= latest_end_s < inside_s:
            inside_s = latest_end_s
        end_s = now_s + factor * p90_s[count - 1]
        if end_s > inside_s:  # with more rows it ends no sooner
            break
        if end_s <= others[count] and count / p50_s[count - 1] > best_rate * WORTHWHILE:
            best, best_rate = count, count / p50_s[count - 1]
    return peers[:best]


def _earliest_outside(cells: Sequence[_Cell], peers: Sequence[_Cell]) -> float:
    """The latest start of the first of `cells` that is none of `peers`; inf if there is none."""
    for cell in cells:
        if not any(cell is peer for peer in peers):
            return cell[0]
    return inf


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
    demand = _Demand(now_s, streams, costs, rules, max([view.due_at_s for view in beginning]))
    for view in beginning:
        if view.id in counts:
            continue
        options = sorted((n for n in view.trained_steps if n <= view.trained_steps[0]), reverse=True)
        room_s = view.due_at_s - now_s
        counts[view.id] = next((n for n in options if demand.finish_s(view, n) <= room_s), options[-1])
    return counts


class _Demand:
    """Time that the device needs for all that is due by some moment, `latest_s` at most."""

    def __init__(
        self, now_s: float, streams: Sequence[StreamView], costs: CostModel, rules: Rules, latest_s: float
    ) -> None:
        self.costs = costs
        counts: dict[str, int] = {}
        for view in streams:
            counts[view[1]] = counts.get(view[1], 0) + (view[2] is not None)
        self.shapes: dict[str, tuple[int, float, float, float, float]] = {}
        """Rows of a launch, P50 and P90 of a pass, a row's share of a pass and of a decode."""
        for shape, count in counts.items():
            rows = min(max(1, count), rules.max_rows)
            p50_s, p90_s, factor = costs.curve("forward", shape, rows)
            pass_s, late_s = p50_s[rows - 1] * factor, p90_s[rows - 1] * factor
            decode_s = costs.predict("decode", shape, rows)
            self.shapes[shape] = rows, pass_s, late_s, pass_s / rows, decode_s / rows
        works: list[tuple[float, float, float]] = []
        for view in streams:
            _, shape, ready, due_at_s, period_s, trained_steps, _, left, _, decode_due_s, _ = view
            if decode_due_s is not None and decode_due_s <= latest_s:
                works.append((decode_due_s, self.shapes[shape][4], 0.0))
            if due_at_s > latest_s or ready is None:
                continue
            _, _, _, pass_s, decode_s = self.shapes[shape]
            usual = trained_steps[0]
            if left is None or ready == "commit":
                left = usual
            extra_s = pass_s if ready == "commit" else 0.0
            if ready == "recache":
                extra_s = costs.predict("recache", shape, 1, 0.5)
            rate = ((usual + rules.commit_passes) * pass_s + decode_s) / period_s
            works.append((due_at_s, left * pass_s + extra_s + decode_s, rate))
        works.sort()
        self.dues_s = [due_s for due_s, _, _ in works]
        self.fixed_s = list(accumulate([work_s - rate * due_s for due_s, work_s, rate in works], initial=0.0))
        self.rates = list(accumulate([rate for _, _, rate in works], initial=0.0))

    def finish_s(self, view: StreamView, steps: int) -> float:
        """P90 of the time until the block of `view`, which begins now, is decoded after so many steps."""
        rows, median_s, late_s, pass_s, _ = self.shapes[view.shape]
        due = bisect_right(self.dues_s, view.due_at_s)
        work_s = self.fixed_s[due] + self.rates[due] * view.due_at_s - (view.trained_steps[0] - steps) * pass_s
        work_s += sqrt(max(work_s, 0.0) / median_s) * (late_s - median_s)
        return max(work_s, chain_s(self.costs, view.shape, steps, rows))
