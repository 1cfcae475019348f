"""Every schedule keeps every rule, broken launches are named, and periods are those that arithmetic gives."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.grid import CLEAN, Cell, Grid, Visibility, needs, reads, together
from streamgen.initiation import figures, interval
from streamgen.launches import RULES, Launch, held_frames, last_uses, peak_frames, read_counts, trace, violation
from streamgen.schedules import SCHEDULES, Costs, Machine, Timed, by_step, layer_ranges, timeline

FLAT = Costs(passes=(1.0, 1.0))  # cells that share a launch are free
LINEAR = Costs(passes=(1.0,))  # a launch costs as much as its cells apart


def geometry(block_frames: int = 1, first: int | None = None) -> VideoGeometry:
    return VideoGeometry(height=16, width=16, latent_channels=1, block_frames=block_frames, first_block_frames=first)


def grid(
    visibility: Visibility = "clean", *, n: int = 4, blocks: int = 48, streams: int = 1, layers: int = 4, **more: object
) -> Grid:
    values = {"geometry": geometry(), "window_frames": 8, "sink_frames": 1, "decodes": False, **more}
    return Grid(steps=((n,) * blocks,) * streams, visibility=visibility, layers=layers, **values)  # type: ignore[arg-type]


def launches(timed: list[Timed]) -> list[Launch]:
    return [one.launch for one in timed]


# The arithmetic of facts: unit is one full-depth pass, 4 steps, no codec.


@pytest.mark.parametrize(
    ("name", "visibility", "devices", "streams", "costs", "fill", "period", "control"),
    [
        ("serial", "clean", 1, 1, FLAT, 4, 5, (4, 9)),
        ("stream_batch", "same_level", 1, 1, FLAT, 4, 1, (4, 5)),  # memory-bound
        ("stream_batch", "same_level", 1, 1, Costs(passes=(2.0, 2.0)), 8, 2, (8, 10)),
        ("stream_batch", "same_level", 1, 1, Costs(passes=(4.0, 4.0)), 16, 4, (16, 20)),
        ("layer_ring", "same_level", 4, 1, Costs(passes=(1.3, 1.3)), 5.2, 0.325, (5.2, 5.525)),
        ("layer_ring", "same_level", 4, 1, Costs(passes=(4.0, 4.0)), 16, 1, (16, 17)),
        ("step_chain", "same_level", 4, 1, FLAT, 4, 1, (4, 5)),
        ("step_chain", "latest", 4, 1, FLAT, 4, 1, (4, 5)),
        # clean: n + 1/G, whatever is split over the devices; several streams fill them
        ("layer_ring", "clean", 1, 1, FLAT, 4, 5, (4, 9)),
        ("layer_ring", "clean", 2, 1, FLAT, 4, 4.5, (4, 8.5)),
        ("layer_ring", "clean", 4, 1, FLAT, 4, 4.25, (4, 8.25)),
        ("interleaved", "clean", 4, 1, FLAT, 4, 1 / 0.2353, (4, 8.25)),
        ("interleaved", "clean", 4, 2, FLAT, 4, 2 / 0.4444, (4, 8.5)),
        ("interleaved", "clean", 4, 4, FLAT, 4, 4 / 0.8, (4, 9)),
        ("step_chain", "clean", 5, 5, FLAT, 4, 5 / 1.0, (4, 9)),
        ("rolling", "joint", 1, 1, FLAT, 4, 2, (7, 9)),  # the window, and the commit between two of them
        ("rolling", "joint", 1, 1, LINEAR, 10, 5, (19, 24)),
    ],
)
def test_periods(
    name: str,
    visibility: Visibility,
    devices: int,
    streams: int,
    costs: Costs,
    fill: float,
    period: float,
    control: tuple[float, float],
) -> None:
    g, machine = grid(visibility, streams=streams, blocks=48 if streams == 1 else 24), Machine(devices=devices)
    timed = timeline(name, g, machine, costs)
    found, bound = figures(timed, g, devices), interval(name, g, machine, costs)
    assert found.fill == pytest.approx(fill)
    assert found.period == pytest.approx(period, rel=1e-3)
    assert found.control == pytest.approx(control, rel=1e-3)
    assert bound.period <= found.period * (1 + 1e-9)
    if streams != 2:  # two streams meet at the same device now and then
        assert bound.period == pytest.approx(found.period)


def test_recurrence_by_visibility() -> None:
    """What a block waits for of the ones before it: n + 1/G clean, 1/d of that at lag d, one layer group, one pass."""
    one = Machine(devices=4)
    expected = {"clean": 4.25, "same_level": 0.25, "latest": 1.0}
    for visibility, time in expected.items():
        assert interval("layer_ring", grid(visibility), one, FLAT).recurrence == time  # type: ignore[arg-type]
    for lag in (1, 2, 3, 5):
        lagged = grid("lagged", lag_blocks=lag, window_frames=12)
        assert interval("layer_ring", lagged, one, FLAT).recurrence == pytest.approx(4.25 / lag)
    assert interval("step_chain", grid("same_level"), one, FLAT).recurrence == 1
    joint = interval("rolling", grid("joint"), Machine(), LINEAR)
    assert (joint.recurrence, joint.resource) == (5, (5,))


def test_a_window_that_ends_before_the_finished_blocks_waits_for_none() -> None:
    """Lag 5 in a window of five blocks after the sink: all that is read is noisy, and the ring fills."""
    g, machine = grid("lagged", lag_blocks=5, window_frames=6, blocks=60), Machine(devices=4)
    assert figures(timeline("layer_ring", g, machine, FLAT), g, 4).period == pytest.approx(0.25)
    wider = replace(g, window_frames=7)
    assert figures(timeline("layer_ring", wider, machine, FLAT), wider, 4).period == pytest.approx(0.85, rel=0.1)


def test_the_limit_is_named() -> None:
    chain = grid("same_level", decodes=True)
    slow_codec = Costs(decode=2.5)
    assert interval("step_chain", chain, Machine(devices=5), slow_codec).limit == "resource: the work of device 4"
    assert "4 devices, equally busy" in interval("step_chain", chain, Machine(devices=5), FLAT).limit
    assert "committed" in interval("layer_ring", grid("clean"), Machine(devices=4), FLAT).limit
    lagged = interval("layer_ring", grid("lagged", lag_blocks=2), Machine(devices=4), FLAT)
    assert "commit of the one 2 before it" in lagged.limit
    spread = interval("interleaved", replace(chain, visibility="clean"), Machine(devices=4), Costs(decode=30.0))
    assert spread.limit == "resource: the work of device 3" and spread.recurrence == 30


def test_unequal_devices_and_sending() -> None:
    ranges = layer_ranges(30, Machine(devices=3, speeds=(1.0, 1.0, 4.0)))
    assert ranges == ((0, 5), (5, 10), (10, 30))
    assert layer_ranges(3, Machine(devices=3, speeds=(100.0, 1.0, 1.0))) == ((0, 1), (1, 2), (2, 3))
    g = grid("same_level", layers=6)
    fast = Machine(devices=3, speeds=(1.0, 1.0, 4.0))
    assert interval("layer_ring", g, fast, FLAT).period == pytest.approx(1 / 6)
    assert interval("layer_ring", g, Machine(devices=3), FLAT).period == pytest.approx(1 / 3)
    late = Costs(passes=(1.0, 1.0), send=0.5)
    found = figures(timeline("step_chain", g, Machine(devices=4), late), g, 4)
    assert (found.fill, found.period, found.latency) == (5.5, 1, 5.5)  # sending costs latency, not frames


def test_buffers_are_bounded() -> None:
    """Where the codec is slow, steps do not run ahead of it: at most depth + 1 blocks are not on the screen."""
    g = grid("same_level", blocks=30, decodes=True)
    timed = timeline("step_chain", g, Machine(devices=5), Costs(decode=9.0))
    begun = {c.block: one.start for one in timed for c in one.launch.cells if (c.kind, c.step) == ("step", 0)}
    shown = {c.block: one.stop for one in timed for c in one.launch.cells if c.kind == "decode"}
    ahead = [sum(shown[b] > begun[block] for b in range(block + 1)) for block in begun]
    assert max(ahead) == 4 + 1
    assert figures(timed, g, 5).period == 9


def test_ragged_blocks() -> None:
    """Early blocks of more steps (diagonal distillation): each at the stage of its noise level."""
    g = Grid(geometry=geometry(), steps=((4, 4, *[2] * 22),), visibility="same_level", decodes=False, layers=1)
    assert [by_step(g, Machine(devices=4), Cell(0, 5, step))[0][0] for step in range(2)] == [0, 2]
    timed = timeline("step_chain", g, Machine(devices=4), FLAT)
    assert violation(g, launches(timed), devices=4) is None
    assert figures(timed, g, 4).period == 1


# Rules.


@st.composite
def settings_of_all(draw: st.DrawFn) -> tuple[str, Grid, Machine, Costs]:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    visibility = draw(st.sampled_from(SCHEDULES[name].visibilities))
    blocks, streams = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    most = draw(st.integers(1, 4))
    counts = st.just(most) if visibility == "joint" else st.integers(1, most)
    steps = tuple(tuple(draw(counts) for _ in range(blocks)) for _ in range(streams))
    frames, sink = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    g = Grid(
        geometry=geometry(frames, draw(st.integers(1, frames))),
        steps=steps,
        visibility=visibility,
        window_frames=sink + frames * most + draw(st.integers(0, 4)),
        sink_frames=sink,
        lag_blocks=draw(st.integers(1, 3)),
        clean_sink=visibility == "same_level" and draw(st.booleans()),
        commit_latest=draw(st.booleans()),
        layers=draw(st.integers(1, 5)),
        decodes=draw(st.booleans()),
        encodes=draw(st.booleans()),
        recaches=frozenset({1, 3})
        if visibility in ("clean", "lagged", "joint") and draw(st.booleans())
        else frozenset(),
    )
    devices = draw(st.integers(1, SCHEDULES[name].devices(g)[0]))
    speeds = tuple(draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(devices))
    cost = st.sampled_from([0.0, 0.3, 1.7])
    costs = Costs(passes=(1.0, 1.25, 2.0), decode=draw(cost), encode=draw(cost), send=draw(cost))
    return name, g, Machine(devices=devices, speeds=speeds), costs


@given(settings_of_all())
@settings(max_examples=60)
def test_every_schedule_keeps_every_rule(case: tuple[str, Grid, Machine, Costs]) -> None:
    name, g, machine, costs = case
    timed = timeline(name, g, machine, costs)
    done = launches(timed)
    peaks = peak_frames(g, done)
    assert violation(g, done, devices=machine.devices, most_frames=peaks) is None
    for device in range(machine.devices):
        mine = [one for one in timed if one.launch.device == device]
        assert all(a.stop <= b.start for a, b in pairwise(mine)), "one launch at a time"
    check_times(g, timed, costs.send)
    if g.visibility != "latest":  # the edges decide what is read, not the order
        assert trace(g, done) == {cell: reads(g, cell) for cell in g.cells()}
    held = {device for device, frames in peaks.items() if frames}
    for device in held:
        broken = violation(g, done, devices=machine.devices, most_frames={**peaks, device: peaks[device] - 1})
        assert broken is not None and broken.rule == "memory" and f"device {device} holds" in broken.message


def check_times(g: Grid, timed: list[Timed], send: float) -> None:
    """Nothing begins before what it needs has ended, and has come from where that was made."""
    made = {(cell, layer): one for one in timed for cell in one.launch.cells for layer in range(*one.launch.layers)}
    for one in timed:
        first, stop = one.launch.layers
        for cell in one.launch.cells:
            before = [(cell, first - 1)] if first else []
            for need in needs(g, cell):
                if need.whole and first == 0:
                    before.append((need.cell, g.layers - 1))
                elif not need.whole:
                    before.append((need.cell, stop - 1))
            for key in before:
                way = send if made[key].launch.device != one.launch.device else 0.0
                assert one.start >= made[key].stop + way - 1e-9, (cell, key)


@given(settings_of_all(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_two_launches_in_the_wrong_order_are_named(case: tuple[str, Grid, Machine, Costs], random: object) -> None:
    name, g, machine, costs = case
    done = launches(timeline(name, g, machine, costs))
    pairs = list(combinations(range(len(done)), 2))[:200]
    for a, b in random.sample(pairs, min(len(pairs), 5)):  # type: ignore[attr-defined]
        swapped = [*done]
        swapped[a], swapped[b] = done[b], done[a]
        broken = violation(g, swapped, devices=machine.devices)
        if set(done[a].cells) & set(done[b].cells) or depends(g, done[b], done[a]):
            assert broken is not None and broken.rule in ("chain", "order", "read", "layers", "twice")
            assert broken.launch is not None and a <= broken.launch <= b
    missing = done[: len(done) // 2]
    broken = violation(g, missing, devices=machine.devices)
    assert broken is not None and broken.rule == "unfinished"
    assert violation(g, missing, devices=machine.devices, whole=False) is None


def depends(g: Grid, later: Launch, earlier: Launch) -> bool:
    return any(
        need.cell in earlier.cells
        and (need.whole or (earlier.layers[0] < later.layers[1] and later.layers[0] < earlier.layers[1]))
        for cell in later.cells
        for need in needs(g, cell)
    )


SMALL = Grid(geometry=geometry(2, 1), steps=((2, 2, 2), (2, 2, 2)), window_frames=6, layers=2)
ALL = (0, 2)
A0, A1, AC, AD = Cell(0, 0, 0), Cell(0, 0, 1), Cell(0, 0, kind="commit"), Cell(0, 0, kind="decode")
B0, B1, BD = Cell(0, 1, 0), Cell(0, 1, 1), Cell(0, 1, kind="decode")
JOINT = replace(SMALL, visibility="joint", steps=((2, 2, 2),), geometry=geometry(2), layers=1)


@pytest.mark.parametrize(
    ("cells", "rule", "message"),
    [
        ([(7, ALL, A0)], "device", "device 7 does not exist; there are 2"),
        ([(0, (0, 3), A0)], "device", "layers 0 to 3 of a model with 2"),
        ([(0, ALL, Cell(0, 9))], "cell", "step 0 of block 9 of stream 0 is not in the grid"),
        ([(0, ALL, A0, A0)], "cell", "the same cell twice"),
        ([(0, ALL)], "cell", "no cell"),
        ([(0, ALL, A0), (0, ALL, A1), (0, ALL, AC), (0, ALL, B0, Cell(1, 0))], "shape", "cells of 2 and of 1 latent"),
        ([(0, ALL, A0), (0, ALL, A1), (0, ALL, AC, AD)], "shape", "codec cells share a launch"),
        ([(0, ALL, A0), (0, ALL, A1), (0, (0, 1), AD)], "layers", "codec's work is not split"),
        ([(0, ALL, A0), (0, ALL, A0)], "twice", "launch 1: step 0 of block 0 of stream 0 has passed layer 0 before"),
        ([(0, ALL, A0), (0, ALL, A1), (0, ALL, AD), (1, ALL, AD)], "twice", "decode of block 0"),
        ([(0, (1, 2), A0)], "layers", "is at layer 0, not at 1"),
        ([(0, ALL, A1)], "chain", "step 1 of block 0 of stream 0 before step 0 of block 0"),
        ([(0, ALL, A0, A1)], "chain", "step 1 of block 0 of stream 0 before step 0"),
        ([(0, (0, 1), A0), (0, (0, 1), A1)], "chain", "launch 1"),
        ([(0, ALL, A0), (0, ALL, A1), (0, ALL, B0)], "read", "launch 2: step 0 of block 1 of stream 0 before commit"),
        ([(0, ALL, A0), (0, ALL, A1), (0, (0, 1), AC), (0, ALL, B0)], "read", "launch 3"),
        (
            [(0, ALL, c) for c in (A0, A1, AC, B0, B1, BD)],
            "order",
            "decode of block 1 of stream 0 before decode of block 0",
        ),
        ([(0, ALL, A0)], "unfinished", "cells are left"),
    ],
)
def test_the_first_broken_rule_is_named(cells: list[tuple], rule: str, message: str) -> None:  # type: ignore[type-arg]
    broken = violation(SMALL, [Launch(device, layers, tuple(c)) for device, layers, *c in cells], devices=2)
    assert broken is not None and broken.rule == rule and message in broken.message
    assert rule in RULES and (rule == "unfinished" or broken.launch == len(cells) - 1)


def test_padding_and_joint_windows() -> None:
    mixed = [Launch(0, ALL, (c,)) for c in (A0, A1, AC)] + [Launch(0, ALL, (B0, Cell(1, 0)))]
    assert violation(SMALL, mixed, devices=1, padded=True, whole=False) is None
    first = Launch(0, (0, 1), (A0,))
    broken = violation(JOINT, [first, Launch(0, (0, 1), (A1,))], devices=1)
    assert broken == (
        "joint",
        1,
        "launch 1: step 1 of block 0 of stream 0 without step 0 of block 1 of stream 0, which it sees",
    )
    assert violation(JOINT, [first, Launch(0, (0, 1), (A1, B0))], devices=1, whole=False) is None


# What does not fit.


@pytest.mark.parametrize(
    ("name", "g", "devices", "message"),
    [
        ("diagonal", grid(), 1, "'diagonal' does not exist; there are: serial, stream_batch"),
        ("stream_batch", grid("clean"), 1, "cannot run visibility clean; it runs: same_level, latest, lagged"),
        ("rolling", grid("same_level"), 1, "cannot run visibility same_level; it runs: joint"),
        ("serial", grid(), 2, "cannot use 2 devices: it keeps a stream on one device, and there are 1 streams"),
        ("step_chain", grid("same_level"), 5, "cannot use 5 devices: a block has 4 passes; use at most 4"),
        ("step_chain", grid("same_level", decodes=True), 6, "4 passes, and the codec may have a device; use at most 5"),
        ("step_chain", grid("clean"), 6, "a block has 5 passes; use at most 5"),
        ("layer_ring", grid("same_level"), 5, "the model has 4 layers; use at most 4"),
        ("interleaved", grid(streams=9), 5, "the model has 4 layers"),
    ],
)
def test_more_stages_than_there_is_to_split(name: str, g: Grid, devices: int, message: str) -> None:
    for call in (timeline, interval):
        with pytest.raises(UserError, match=message):
            call(name, g, Machine(devices=devices), FLAT)  # type: ignore[operator]


def test_costs() -> None:
    curve = Costs(passes=(1.0, 1.5, 2.5))
    assert [curve.rows(count) for count in (1, 2, 3, 4, 6)] == [1, 1.5, 2.5, 3.5, 5.5]
    assert curve.row(2) == 0.75 and curve.row(6) == 0.75 and LINEAR.rows(7) == 7 and FLAT.rows(7) == 1
    for wrong in ({"passes": ()}, {"passes": (2.0, 1.0)}, {"passes": (0.0,)}, {"decode": -1.0}):
        with pytest.raises(ValueError, match="must be passes above 0"):
            Costs(**wrong)  # type: ignore[arg-type]
    for speeds in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match="2 devices with the speeds"):
            Machine(devices=2, speeds=speeds)


# Bytes.


def test_what_is_held() -> None:
    """A clean window is held once, whatever the steps; a window at its own level once for every step."""
    window = {"window_frames": 6, "sink_frames": 2, "layers": 3}
    assert peak_frames(*run("serial", "clean", 1, **window)) == {0: 3 * 6}
    assert peak_frames(*run("stream_batch", "same_level", 1, **window)) == {0: 3 * 6 * 4}
    assert peak_frames(*run("step_chain", "same_level", 4, **window)) == dict.fromkeys(range(4), 3 * 6)
    ring = peak_frames(*run("layer_ring", "same_level", 3, **window))
    assert ring == dict.fromkeys(range(3), 6 * 4)
    # each device of a clean chain needs the whole window, sent from where the commits are
    chain = peak_frames(*run("step_chain", "clean", 5, **window))
    assert set(chain) == set(range(5)) and min(chain.values()) >= 3 * 6


def run(name: str, visibility: Visibility, devices: int, **more: object) -> tuple[Grid, list[Launch]]:
    g = grid(visibility, blocks=24, **more)  # type: ignore[arg-type]
    return g, launches(timeline(name, g, Machine(devices=devices), FLAT))


def test_last_uses_against_a_search() -> None:
    g, done = run("stream_batch", "lagged", 1, lag_blocks=2, window_frames=5)
    last, counts = last_uses(g, done), read_counts(g)
    assert counts[0, 3, CLEAN] > 0 and (0, 3, 1) in counts
    for version, count in counts.items():
        readers = {
            cell: index
            for index, launch in enumerate(done)
            for cell in launch.cells
            if (version[1], version[2]) in {(r.block, r.level) for r in reads(g, cell)}
        }
        assert len(readers) == count and max(readers.values()) == last[version]
    for index, holding in enumerate(held_frames(g, done)):  # blocks of one frame: a frame is a version
        born = {
            (c.block, c.step if c.kind == "step" else CLEAN): i
            for i, lo in reversed(list(enumerate(done)))
            for c in lo.cells
        }
        alive = [key for key, i in born.items() if i <= index <= last[0, *key]]
        assert holding == {0: g.layers * len(alive)}


def test_latest_is_recorded_with_the_run() -> None:
    """The same cells in another order see other versions: serial ones finished blocks, a stream batch equal steps."""
    for name, levels in (("serial", {3}), ("stream_batch", {0, 1, 2, 3})):
        g, done = run(name, "latest", 1)
        seen = trace(g, done)
        assert {reads_of[-1].level for cell, reads_of in seen.items() if cell.block > 4} == levels
        batch = {cell: reads_of for cell, reads_of in seen.items() if name == "stream_batch" and cell.block > 8}
        assert all(found[-1].level == cell.step for cell, found in batch.items())
        assert sum(read_counts(g, done).values()) == sum(len({r.block for r in found}) for found in seen.values())
    assert together(g, Cell(0, 3, 1)) == (Cell(0, 3, 1),)
