"""Where streams are placed, and from which saved state a lost one goes on: plain values."""

from __future__ import annotations

from streamgen_infer.requests import Refused, RuntimeStats
from streamgen_infer.serve.placement import ClockOffset, ReplicaView, SavedPoint, Trail, candidates, refusal, total


def replica(name: str, streams: int = 0, **more: bool) -> ReplicaView:
    return ReplicaView(name=name, streams=streams, **more)


def point(position: int, changes: int = 0) -> SavedPoint:
    return SavedPoint(position=position, first_frame=12 * position, changes=changes, packed=b"%d" % position)


def test_the_least_loaded_is_asked_first_and_equals_in_their_order() -> None:
    assert candidates([replica("a", 2), replica("b", 1), replica("c", 1), replica("d")]) == ["d", "b", "c", "a"]


def test_a_draining_replica_takes_no_new_stream_and_a_moving_one_at_the_last() -> None:
    replicas = [replica("a", 0, draining=True), replica("b", 5), replica("c", 0, alive=False)]
    assert candidates(replicas) == ["b"]
    assert candidates(replicas, moving=True) == ["b", "a"]


def test_a_viewer_is_told_the_refusal_that_ends_first() -> None:
    long = Refused("memory", "no room", retry_after_s=9.0, numbers={"free": 1.0})
    short = Refused("streams", "all taken", retry_after_s=2.0, numbers={"streams": 8.0})
    told = refusal([long, short])
    assert (told.resource, told.retry_after_s) == ("streams", 2.0)
    assert told.numbers == {"streams": 8.0, "replicas": 2.0}
    assert "all taken" in str(told) and "2 replicas" in str(told)
    assert refusal([]).resource == "replicas"


def test_counters_are_summed() -> None:
    summed = total(
        [
            RuntimeStats(streams=1, busy_s=0.5, refused={"memory": 1}),
            RuntimeStats(streams=2, busy_s=0.25, refused={"memory": 2, "streams": 1}),
        ]
    )
    assert (summed.streams, summed.busy_s, summed.refused) == (3, 0.75, {"memory": 3, "streams": 1})


def test_a_clock_offset_is_that_of_the_quickest_reading() -> None:
    offset = ClockOffset()
    for there_s, took_s in ((5.0, 0.3), (6.0, 0.01), (7.0, 0.2)):
        offset.heard(there_s, there_s + 100.0 + took_s)
    assert abs(offset.offset_s - 100.01) < 1e-9
    for there_s in range(100):  # the other clock is slower: old readings are forgotten
        offset.heard(there_s, there_s + 101.0)
    assert offset.offset_s == 101.0


def test_a_state_is_taken_once_its_frames_have_come() -> None:
    trail = Trail()
    assert trail.best(0) is None
    trail.add(point(1), next_frame=12)
    trail.add(point(3), next_frame=24)  # taken when two more blocks were under way
    assert trail.best(24) == point(1)
    assert trail.best(36) == point(3)
    trail.add(point(4), next_frame=48)
    assert trail.best(36) == point(3)


def test_old_states_thin_out_within_their_bytes_and_the_best_stays() -> None:
    trail = Trail(budget_bytes=400)
    for position in range(1, 41):
        one = SavedPoint(position=position, first_frame=12 * position, changes=0, packed=bytes(100))
        trail.add(one, next_frame=12 * position)
        assert trail.best(12 * position) == one
    kept = [trail.best(12 * position) for position in range(1, 41)]
    positions = sorted({one.position for one in kept if one is not None})
    assert len(positions) <= 4 and positions[-1] == 40
    big = SavedPoint(position=41, first_frame=492, changes=0, packed=bytes(1000))
    trail.add(big, next_frame=492)
    assert trail.best(492) == big and trail.best(480) is None


def test_a_state_of_a_past_that_was_given_up_is_not_taken() -> None:
    trail = Trail()
    trail.add(point(2), next_frame=24)
    trail.changed(5)
    assert trail.best(60) == point(2), "the change lies after it: the prompts are carried beside it"
    trail.add(point(6, changes=0), next_frame=72)
    assert trail.best(72) == point(2), "it lacks a change that lies before it"
    trail.add(point(6, changes=2), next_frame=72)
    assert trail.best(72) == point(2), "it has a change that nobody was told of"
    trail.add(point(6, changes=1), next_frame=72)
    assert trail.best(72) == point(6, changes=1)
    trail.forget_unanswered()  # its replica died before it answered
    trail.changed(4)
    assert trail.best(72) == point(2), "the others lie after this change and lack it"
