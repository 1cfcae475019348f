"""Which schedule a stream gets: by room, by wish, by what the model was trained for."""

import pytest

from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.grid import Grid
from streamgen.schedules import Costs, Machine
from streamgen_infer.schedule_choice import Choice, Pace, choose_schedule

GEOMETRY = VideoGeometry(height=16, width=16, latent_channels=1, block_frames=1)
BOTH = ("clean", "same_level")
BATCHING = Costs(passes=(1.0, 1.1, 1.2, 1.3), decode=0.5)
"""Four cells in a launch cost little more than one."""
FULL_PRICE = Costs(passes=(1.0, 2.0), decode=0.5)


def choose(
    listed: tuple[str, ...] = BOTH,
    *,
    streams: int = 1,
    devices: int = 1,
    costs: Costs = BATCHING,
    block: float = 6.0,
    control: float = 0.0,
    window: int = 9,
) -> Choice:
    grid = Grid(geometry=GEOMETRY, steps=((4,),) * streams, window_frames=window, sink_frames=1, layers=8)
    machine = Machine(devices=devices, most_rows=4)
    return choose_schedule(listed, grid, machine, costs, Pace(block=block, control=control))


def test_with_room_it_is_serial_and_when_throughput_is_short_a_stream_batch() -> None:
    low, full = choose(streams=1), choose(streams=3)
    # 4 x 1 + 0.5 of 6; three streams in shared launches would be 3 (4 x 1.2 / 3 + 0.5) = 6.3
    assert low == Choice("serial", "same_level", True, 6, pytest.approx(4.5))
    # 3 (4 x 1.3 / 4 + 0.5) = 5.4
    assert full == Choice("stream_batch", "same_level", True, 24, pytest.approx(5.4))


def test_same_level_saves_the_commit_and_so_comes_before_clean() -> None:
    assert choose().visibility == "same_level" and choose().busy == pytest.approx(4.5)
    assert choose(("clean",)).visibility == "clean" and choose(("clean",)).busy == pytest.approx(5.5)


def test_streams_share_launches_before_a_prompt_has_to_wait() -> None:
    # two clean streams one after another take 11; in shared launches 2 (5 x 1.1 / 2 + 0.5)
    chosen = choose(("clean",), streams=2, block=7)
    assert chosen == Choice("interleaved", "clean", True, 7, pytest.approx(6.5))


def test_who_does_not_mind_the_delay_costs_the_device_least() -> None:
    assert choose(control=23).schedule == "serial"
    assert choose(control=24).schedule == "stream_batch"


def test_without_a_gain_from_batching_deeper_schedules_are_no_way_out() -> None:
    chosen = choose(("clean", "latest"), streams=3, costs=FULL_PRICE)
    assert not chosen.holds and chosen.control == 6  # equal cost: the one that obeys sooner


def test_a_model_of_clean_visibility_never_gets_a_stream_batch() -> None:
    for streams in (1, 3, 30):
        assert choose(("clean",), streams=streams, control=1e9).schedule in ("serial", "interleaved")


def test_one_stream_on_several_devices() -> None:
    # too fast for one device: a chain of four and the codec's own begins a block with every pass
    chosen = choose(devices=5, block=1.0, costs=FULL_PRICE)
    assert (chosen.schedule, chosen.visibility, chosen.holds) == ("step_chain", "same_level", True)
    clean = choose(("clean",), devices=5, block=1.0, costs=FULL_PRICE)
    assert not clean.holds  # it waits for its own commit, whatever the number of devices


def test_joint_needs_a_window_that_holds_it() -> None:
    assert choose(("joint",)).schedule == "rolling"
    assert choose(("joint", "clean"), window=4).visibility == "clean"
    with pytest.raises(UserError, match=r"no schedule runs 1 streams on 1 devices .* trained for, joint; there are"):
        choose(("joint",), window=4)
    with pytest.raises(UserError, match="on 5 devices"):
        choose(("joint",), devices=5)
