"""The grid's reads against the mask rule, frame by frame, and its edges against themselves."""

import sys
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen import grid, visibility
from streamgen.geometry import VideoGeometry
from streamgen.grid import CLEAN, Cell, Grid, Read, held, needs, producer, reads, same_level, together
from streamgen.visibility import Layout, Place, visible


def geometry(block_frames: int = 3, first: int | None = None) -> VideoGeometry:
    return VideoGeometry(height=16, width=16, latent_channels=1, block_frames=block_frames, first_block_frames=first)


def test_the_same_visibilities_as_attention() -> None:
    assert grid.VISIBILITIES == visibility.VISIBILITIES


def test_no_torch(run_python: Callable[..., CompletedProcess[str]]) -> None:
    modules = "streamgen.grid, streamgen.launches, streamgen.schedules, streamgen.initiation"
    done = run_python("-c", f"import {modules}; import sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0, (done.stderr, sys.path)


BLOCKS, STEPS = 7, 3
SHAPES = [(3, None, None, 0), (3, None, 9, 3), (3, 1, 11, 2), (2, None, 7, 1), (1, None, 5, 2), (3, 2, 12, 4)]
CASES = [("clean", 1), ("same_level", 1), ("latest", 1), ("lagged", 1), ("lagged", 2), ("lagged", 3), ("joint", 1)]


def seen_frames(g: Grid, cell: Cell) -> dict[bool, set[int]]:
    """Clean copy? -> the frames that `visibility.visible` shows to the block of a cell, in a clip that ends with it."""
    joint = g.visibility == "joint" and cell.kind == "step"
    newest = cell.block + cell.step if joint else cell.block
    last = min(newest, BLOCKS - 1)
    first = max(0, newest - STEPS + 1) if joint else cell.block
    layout = Layout(
        block_frames=tuple(g.geometry.block_size(b) for b in range(last + 1)),
        copies=(False,) if g.visibility in ("same_level", "latest") else (True, False),
        window_starts=tuple(range(first + 1)) if joint else (),
        lag_blocks=g.lag_blocks,
        window_frames=g.window_frames,
        sink_frames=g.sink_frames,
    )
    if cell.kind == "commit":
        layout = Layout(
            block_frames=layout.block_frames,
            copies=(True,),
            window_frames=g.window_frames,
            sink_frames=g.sink_frames,
        )
    place = layout.place()
    row = next(
        i
        for i in range(len(place.frame))
        if int(place.block[i]) == cell.block and bool(place.clean[i]) is (cell.kind == "commit")
    )
    query = Place(*(field[row : row + 1] for field in place))
    mask = visible(query, place, g.window_frames, g.sink_frames, layout.lag)
    return {c: set(place.frame[mask & (place.clean == c)].tolist()) for c in (True, False)}


def read_frames(found: tuple[Read, ...]) -> dict[bool, set[int]]:
    return {
        c: {frame for read in found if (read.level == CLEAN) is c for frame in range(read.start, read.stop)}
        for c in (True, False)
    }


@pytest.mark.parametrize(("block", "first", "window", "sink"), SHAPES, ids=str)
@pytest.mark.parametrize(("visibility", "lag"), CASES, ids=str)
def test_reads_equal_the_mask(
    visibility: grid.Visibility, lag: int, block: int, first: int | None, window: int | None, sink: int
) -> None:
    if visibility == "joint" and window is not None:
        window += STEPS * block
    g = Grid(
        geometry=geometry(block, first),
        steps=((STEPS,) * BLOCKS,),
        visibility=visibility,
        lag_blocks=lag,
        window_frames=window,
        sink_frames=sink,
    )
    for cell in g.cells():
        if cell.kind not in ("step", "commit"):
            assert reads(g, cell) == ()
            continue
        everything = dict.fromkeys(range(cell.block), cell.step)
        found = read_frames(reads(g, cell, everything))
        own = {
            frame
            for one in together(g, cell)
            for frame in range(g.geometry.block_start(one.block), g.geometry.block_start(one.block + 1))
        }
        is_clean = cell.kind == "commit"
        assert not found[is_clean] & own
        found[is_clean] |= own
        assert found == seen_frames(g, cell), cell
        levels = {read.level for read in reads(g, cell, everything)} - {CLEAN}
        assert levels <= {cell.step}


def test_a_clean_sink_is_read_clean_and_the_rest_at_the_own_level() -> None:
    """Frame by frame what `visible` says of a sink alone when all is clean, and of the rest when nothing is."""
    shape = {"geometry": geometry(3), "steps": ((STEPS,) * BLOCKS,), "window_frames": 11, "sink_frames": 4}
    mixed, clean, level = (
        Grid(visibility="same_level", clean_sink=True, **shape),
        Grid(visibility="clean", **shape),
        Grid(visibility="same_level", **shape),
    )
    for block in range(BLOCKS):
        for step in range(STEPS):
            cell = Cell(0, block, step)
            found, sink = read_frames(reads(mixed, cell)), set(range(4))
            assert found[True] == seen_frames(clean, cell)[True] & sink
            own = set(range(3 * block, 3 * block + 3))
            assert found[False] == seen_frames(level, cell)[False] - own - sink
    assert [mixed.commits(block) for block in range(4)] == [True, True, False, False]
    # frame 3 is sink, frames 4 and 5 of the same block are not
    assert reads(mixed, Cell(0, 2, 1))[1:] == (Read(1, CLEAN, 3, 4), Read(1, 1, 4, 6))


def test_latest_reads_what_there_is() -> None:
    g = Grid(geometry=geometry(1), steps=((4,) * 5,), visibility="latest", window_frames=3)
    assert reads(g, Cell(0, 3, 0), {0: 3, 1: 2, 2: 0}) == (Read(1, 2, 1, 2), Read(2, 0, 2, 3))
    assert reads(g, Cell(0, 3, 0), {1: CLEAN}) == (Read(1, CLEAN, 1, 2),)
    assert [need.cell for need in needs(g, Cell(0, 3, 0))] == [Cell(0, 2, 0)]
    assert [need.cell for need in needs(g, Cell(0, 3, 2))] == [Cell(0, 3, 1)]


def test_joint_cells_belong_together() -> None:
    g = Grid(geometry=geometry(1), steps=((3,) * 4,), visibility="joint")
    assert together(g, Cell(0, 0, 0)) == (Cell(0, 0, 0),)
    assert together(g, Cell(0, 1, 1)) == (Cell(0, 0, 2), Cell(0, 1, 1), Cell(0, 2, 0))
    assert together(g, Cell(0, 3, 2)) == (Cell(0, 3, 2),)
    assert together(g, Cell(0, 1, kind="commit")) == (Cell(0, 1, kind="commit"),)
    assert reads(g, Cell(0, 3, 1)) == (Read(0, CLEAN, 0, 1), Read(1, CLEAN, 1, 2))


def test_blocks_of_different_step_counts_meet_at_their_noise_level() -> None:
    from streamgen.flow import step_sigmas

    for mine in range(1, 7):
        for other in range(1, 7):
            here, there = step_sigmas(mine, 5.0), step_sigmas(other, 5.0)
            for step in range(mine):
                found = same_level(step, mine, other)
                noisier = [level for level in there if level >= here[step] - 1e-12]
                assert there[found] == min(noisier)
    g = Grid(geometry=geometry(1), steps=((4, 2, 4),), visibility="same_level")
    assert [reads(g, Cell(0, 1, step))[0].level for step in (0, 1)] == [0, 2]
    assert [reads(g, Cell(0, 2, step))[1].level for step in range(4)] == [0, 0, 1, 1]


def test_kinds_and_their_order() -> None:
    g = Grid(
        geometry=geometry(1), steps=((2, 1),), encodes=True, recaches=frozenset({1}), window_frames=4, sink_frames=1
    )
    assert [(c.block, c.kind, c.step) for c in g.cells()] == [
        *[(0, "encode", 0), (0, "step", 0), (0, "step", 1), (0, "decode", 0), (0, "commit", 0)],
        *[(1, "encode", 0), (1, "recache", 0), (1, "step", 0), (1, "decode", 0), (1, "commit", 0)],
    ]
    chain = {c: {need.cell for need in needs(g, c)} for c in g.cells()}
    recache = Cell(0, 1, kind="recache")
    assert chain[Cell(0, 0)] == {Cell(0, 0, kind="encode")}
    assert chain[Cell(0, 1)] == {Cell(0, 1, kind="encode"), recache, Cell(0, 0, kind="commit")}
    assert chain[recache] == {Cell(0, 0, kind="commit")}
    assert chain[Cell(0, 1, kind="decode")] == {Cell(0, 1), Cell(0, 0, kind="decode")}
    assert held(g, 1) == (Read(0, CLEAN, 0, 1),) and reads(g, recache) == held(g, 1)  # the sink is protected


def test_a_recache_of_a_rolling_window_leaves_the_blocks_in_progress() -> None:
    """Block 4 enters a window with 2 and 3: blocks 0 and 1 are finished, and a prompt for 4 writes these anew."""
    g = Grid(geometry=geometry(1), steps=((3,) * 6,), visibility="joint", recaches=frozenset({1, 4}))
    recache = Cell(0, 4, kind="recache")
    assert held(g, 4) == (Read(0, CLEAN, 0, 1), Read(1, CLEAN, 1, 2))
    assert {need.cell for need in needs(g, recache)} == {Cell(0, block, kind="commit") for block in (0, 1)}
    assert recache in {need.cell for need in needs(g, Cell(0, 4, 0))}
    assert [c for c in g.cells() if c.kind == "recache"] == [recache]  # before block 1 nothing is finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visibility": "noisy"}, "visibility='noisy': must be one of clean"),
        ({"steps": ()}, "must be at least one stream"),
        ({"steps": ((3, 0),)}, "at least one step"),
        ({"lag_blocks": 0}, "lag_blocks=0: must be at least 1"),
        ({"visibility": "joint", "steps": ((3, 2),)}, r"not \[2, 3\] at once"),
        ({"clean_sink": True}, "clean_sink belongs to visibility same_level, not to clean"),
        ({"visibility": "latest", "recaches": frozenset({1})}, "no clean window that a recache"),
        ({"window_frames": 5, "sink_frames": 3}, "window_frames=5: must be at least 6"),
        ({"visibility": "joint", "window_frames": 8, "sink_frames": 0}, "must be at least 9"),
    ],
)
def test_grids_that_are_none(changes: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"geometry": geometry(3), "steps": ((3, 3),)}
    with pytest.raises(ValueError, match=message):
        Grid(**{**values, **changes})  # type: ignore[arg-type]


@given(
    visibility=st.sampled_from(grid.VISIBILITIES),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    frames=st.integers(1, 3),
    spare=st.integers(0, 5),
    sink=st.integers(0, 4),
    lag=st.integers(1, 3),
)
def test_edges_go_back_and_every_version_read_is_made(
    visibility: grid.Visibility, counts: list[int], frames: int, spare: int, sink: int, lag: int
) -> None:
    if visibility == "joint":
        counts = [counts[0]] * len(counts)
    g = Grid(
        geometry=geometry(frames),
        steps=(tuple(counts),),
        visibility=visibility,
        window_frames=sink + frames * max(counts) + spare,
        sink_frames=sink,
        lag_blocks=lag,
        clean_sink=visibility == "same_level",
    )
    cells = list(g.cells())
    waiting = {c: {need.cell for one in together(g, c) for need in needs(g, one)} for c in cells}
    done: set[Cell] = set()
    while len(done) < len(cells):  # a topological order exists
        ready = [c for c in cells if c not in done and waiting[c] <= done]
        assert ready, set(cells) - done
        done.update(ready)
    for c in cells:
        for read in reads(g, c, dict.fromkeys(range(c.block), 0)):
            assert producer(0, read) in done and read.block < c.block
            assert (
                g.geometry.block_start(read.block) <= read.start < read.stop <= g.geometry.block_start(read.block + 1)
            )
