"""The media clock of a stream: due times, the bounded lead, viewers' reports, pauses, late blocks and odd clocks."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen_infer.pacing import DEAD_BAND_S, DRIFT, MediaClock


def clock(lead_s: float = 3.0, origin_s: float = 100.0) -> MediaClock:
    """The first frame is due at 100 s; blocks are of 1 s."""
    return MediaClock(origin_s=origin_s, lead_s=lead_s)


def make(one: MediaClock, blocks: int, now_s: float) -> MediaClock:
    """Deliver the next blocks."""
    for _ in range(blocks):
        one.delivered(one.made_s, 1.0, now_s)
    return one


def test_frames_are_due_by_their_media_time() -> None:
    assert [clock().due_s(media_s) for media_s in (0, 0.5, 7)] == [100, 100.5, 107]


def test_the_lead_is_bounded_by_the_viewer() -> None:
    one = clock()
    # 3 s of lead: blocks 0, 1 and 2 at once; block 3 would make it 4 s until the viewer has seen one
    assert [one.not_before_s(block, 1.0) for block in range(5)] == [-inf, -inf, -inf, 101, 102]


def test_two_blocks_are_allowed_however_short_the_lead() -> None:
    one = clock(lead_s=0.1)
    assert [one.not_before_s(block, 1.0) for block in range(4)] == [-inf, -inf, 101, 102]


def test_the_playhead_goes_no_further_than_what_was_delivered() -> None:
    one = make(clock(), 2, 99.0)
    assert [one.playhead_s(now_s) for now_s in (99.5, 101.5, 105)] == [0, 1.5, 2]


def test_slack_is_what_is_left_and_a_late_block_moves_all_later_ones() -> None:
    one = clock()
    assert one.delivered(0.0, 1.0, 99.25) == 0.75
    assert one.due_s(1.0) == 101
    assert one.delivered(1.0, 1.0, 101.5) == -0.5
    assert (one.due_s(2.0), one.stalls, one.stalled_s) == (102.5, 1, 0.5)
    assert one.delivered(2.0, 1.0, 102.4) == pytest.approx(0.1)  # on time again: no burst to catch up
    assert one.not_before_s(5.0, 1.0) == 103.5


def test_a_pause_stops_all_and_what_comes_meanwhile_is_not_late() -> None:
    one = make(clock(), 2, 99.0)
    one.pause(100.5)
    one.pause(103.0)  # twice is once
    assert one.paused and one.due_s(2.0) == inf and one.not_before_s(4.0, 1.0) == inf
    assert one.playhead_s(250.0) == 0.5
    assert one.delivered(2.0, 1.0, 300.0) == 1.5 and one.stalls == 0
    one.resume(400.5)
    one.resume(500.0)
    assert not one.paused and one.due_s(3.0) == 403
    assert one.playhead_s(401.0) == 1.0


def test_the_first_report_sets_the_clock() -> None:
    one = clock()
    one.report(0.0, 98.0)  # nothing was delivered: nothing can be shown
    assert one.due_s(0.0) == 100
    make(one, 1, 98.5)
    one.report(0.0, 98.5)  # the viewer began as soon as there was something
    assert one.due_s(1.0) == 99.5


def test_a_viewer_who_falls_behind_moves_the_clock_and_holds_the_making() -> None:
    one = make(clock(), 3, 99.0)
    one.report(0.0, 100.0)
    one.report(0.5, 101.0)  # half as fast
    assert one.due_s(3.0) == 103.5 and one.not_before_s(3.0, 1.0) == 101.5
    for second in range(100):
        one.report(0.5, 102.0 + second)  # stands still: then nothing is made, however long
        assert one.not_before_s(3.0, 1.0) > 102.0 + second
    assert one.playhead_s(201.0) == 0.5


def test_small_differences_are_jitter() -> None:
    one = make(clock(), 3, 99.0)
    one.report(0.0, 100.0)
    one.report(1.0 - DEAD_BAND_S / 2, 101.0)
    one.report(2.0 + DEAD_BAND_S / 2, 102.0)
    assert one.due_s(3.0) == 103


def test_a_viewer_who_claims_to_be_ahead_gains_one_percent() -> None:
    one = make(clock(), 3, 99.0)
    one.report(0.0, 100.0)
    one.report(2.9, 101.0)
    assert one.due_s(3.0) == pytest.approx(103 - DRIFT)
    one.report(1e9, 102.0)  # not delivered: not believed
    assert one.due_s(3.0) == pytest.approx(103 - 2 * DRIFT)


def test_stale_and_senseless_reports_change_nothing() -> None:
    one = make(clock(), 3, 99.0)
    one.report(0.0, 100.0)
    one.report(1.0, 101.0)
    for media_s in (0.2, -1.0):
        one.report(media_s, 101.5)
    one.pause(101.5)
    one.report(1.5, 140.0)
    one.resume(141.5)
    assert one.due_s(3.0) == 143


def test_a_clock_that_is_set_back_takes_the_due_times_with_it() -> None:
    one = make(clock(), 2, 99.0)
    assert one.playhead_s(101.0) == 1.0
    assert one.playhead_s(51.0) == 1.0  # 50 s back
    assert one.due_s(2.0) == 52 and one.playhead_s(51.5) == 1.5
    one.pause(51.5)
    assert one.delivered(2.0, 1.0, 11.5) == 0.5  # again, within a pause
    one.resume(12.5)
    assert one.due_s(3.0) == 14
    one.pause(13.0)
    one.resume(3.0)  # the pause lasted no time
    assert one.due_s(3.0) == 4


def test_a_clock_that_leaps_ahead_costs_one_stall_and_no_burst() -> None:
    one = make(clock(), 2, 99.0)
    assert one.delivered(2.0, 1.0, 4000.0) == -3898 and one.stalls == 1
    assert one.due_s(3.0) == 4001 and one.not_before_s(5.0, 1.0) == 4001


def test_turning_makes_another_time_due() -> None:
    one = make(clock(), 3, 99.0)
    one.report(0.0, 100.0)
    one.turn(1.0, 101.5, 0.5)
    assert (one.due_s(1.0), one.made_s, one.playhead_s(101.5)) == (102, 1.0, 1.0)
    one.report(1.0, 101.6)  # of before the turn, or of nothing new
    assert one.due_s(1.0) == 102
    assert one.delivered(1.0, 1.0, 101.75) == 0.25


@given(
    st.lists(
        st.tuples(st.sampled_from(["wait", "make", "report", "pause", "resume", "back"]), st.floats(0, 3)), max_size=60
    )
)
def test_whatever_happens_the_lead_holds(steps: list[tuple[str, float]]) -> None:
    one, now_s = clock(), 100.0
    for what, amount in steps:
        if what == "wait":
            now_s += amount
        elif what == "back":
            now_s -= amount
            one.playhead_s(now_s)  # in the engine somebody asks all the time
        elif what == "make":
            one.playhead_s(now_s)
            if now_s >= one.not_before_s(one.made_s, 1.0):
                one.delivered(one.made_s, 1.0, now_s)
        elif what == "report":
            one.report(amount, now_s)
        elif what == "pause":
            one.pause(now_s)
        else:
            one.resume(now_s)
        assert one.made_s - one.playhead_s(now_s) <= one.lead_s + 1e-9
        assert 0 <= one.playhead_s(now_s) <= one.made_s
