"""A viewer's queue: bounded, in order, and honest about what it left out."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen_infer.protocol import Drop
from streamgen_infer.serve.viewer_queue import REPLAY_SECONDS, BlockInfo, QueuedFrame, ViewerQueue

PIXELS = np.zeros((2, 2, 3), np.uint8)


def block(first: int, frames: int = 4, epoch: int = 0) -> list[QueuedFrame]:
    info = BlockInfo(
        epoch=epoch, block=first // 4, first_frame=first, frames=frames, steps=4, prompt_version=0, flags=0, slack_s=0.0
    )
    numbers = range(first, first + frames)
    return [QueuedFrame(info=info, frame=n, media_s=n / 8, due_at_s=0.0, rgb_HWC=PIXELS) for n in numbers]


def queue(drop: Drop = "oldest", limit: int = 8, window: int | None = None) -> ViewerQueue:
    return ViewerQueue(fps=8, limit_frames=limit, drop=drop, window_frames=window)


def taken(queue: ViewerQueue) -> list[QueuedFrame]:
    items = []
    while item := queue.take():
        items.append(item)
    return items


def told(items: list[QueuedFrame]) -> list[tuple[int, int]]:
    return [(item.frame, item.dropped) for item in items]


def test_oldest_stays_live() -> None:
    q = queue("oldest")
    assert [q.put(block(first)) for first in (0, 4, 8)] == [0, 0, 4]
    assert told(taken(q)) == [(4, 4), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0), (10, 0), (11, 0)]
    assert q.dropped_frames == 4


def test_newest_leaves_out_what_comes_and_tells_later() -> None:
    q = queue("newest")
    assert [q.put(block(first)) for first in (0, 4, 8)] == [0, 0, 4]
    assert [item.frame for item in taken(q)] == list(range(8))
    q.put(block(12))
    assert told(taken(q)) == [(12, 4), (13, 0), (14, 0), (15, 0)]


def test_stall_loses_nothing_and_says_that_it_is_full() -> None:
    q = queue("stall")
    for first in (0, 4, 8):
        q.put(block(first))
    assert q.full and q.dropped_frames == 0
    assert [q.take().frame for _ in range(8)] == list(range(8))  # type: ignore[union-attr]
    assert q.half_empty


def test_a_new_epoch_replaces_what_waits_from_its_first_frame_on() -> None:
    q = queue(limit=100)
    for first in (0, 4, 8):
        q.put(block(first))
    q.take()
    q.put(block(4, epoch=1))
    assert [item.key for item in taken(q)] == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6), (1, 7)]


def test_the_window_holds_back_until_the_viewer_confirms() -> None:
    q = queue(limit=100, window=3)
    q.put(block(0, 12))
    assert len(taken(q)) == 12, "a viewer that never confirms is not held"
    q.confirm(11)
    q.put(block(12, 12))
    assert [item.frame for item in taken(q)] == [12, 13, 14]
    q.confirm(13)
    assert [item.frame for item in taken(q)] == [15, 16]


def test_a_viewer_that_was_away_too_long_is_told_what_is_lost() -> None:
    q = queue(limit=1000)
    q.put(block(0, 120))
    taken(q)
    assert q.rewind(0, 9) == 120 - int(REPLAY_SECONDS * 8) - 10
    assert taken(q)[0].frame == 120 - int(REPLAY_SECONDS * 8)


@settings(max_examples=200)
@given(
    st.sampled_from(("oldest", "newest", "stall")),
    st.integers(4, 12),
    st.lists(st.tuples(st.sampled_from(("put", "take", "confirm", "lose")), st.integers(0, 9)), max_size=40),
)
def test_every_frame_comes_once_or_is_counted_as_dropped(drop: Drop, limit: int, acts: list[tuple[str, int]]) -> None:
    """Whatever is put, sent, confirmed and lost on the way: the viewer's numbers go up, gaps are named."""
    q, first, seen = queue(drop, limit), 0, list[int]()
    arrived: list[int] = []  # what came through of what was sent
    for act, number in acts:
        if act == "put" and not (drop == "stall" and q.full):
            q.put(block(first))
            first += 4
        elif act == "take":
            for _ in range(number):
                if item := q.take():
                    assert item.frame == (seen[-1] if seen else -1) + 1 + item.dropped
                    seen.append(item.frame)
            arrived = list(seen)
        elif act == "confirm" and seen:
            q.confirm(seen[-1])
        elif act == "lose" and seen:
            kept = max(0, len(seen) - number)
            confirmed = {item.frame for item in q.sent}
            while kept < len(seen) and seen[kept] not in confirmed:
                kept += 1  # a confirmed frame has arrived
            del seen[kept:]
            assert q.rewind(0, seen[-1] if seen else -1) == 0
        assert len(q.waiting) <= limit + 4 + len(arrived)
        assert drop != "stall" or q.dropped_frames == 0
    assert seen == sorted(set(seen))
