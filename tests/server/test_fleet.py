"""Several replicas behind one engine, with the real runtime and a real (tiny) model in this process: no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgen.errors import UserError
from streamgen_infer.requests import MadeBlock, Refused, StreamRequest
from streamgen_infer.serve.fleet import Fleet
from streamgen_infer.serve.options import Options, check
from streamgen_infer.serve.replica import Handed, Replica
from tests.server.fleet_harness import NEXT, PROMPT, Neighbours, Watcher, alone, place_of
from tests.server.harness import wait_for
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


class Fleets:
    """Makes them, and closes them at the end."""

    def __init__(self, model: Path) -> None:
        self.model, self.made = model, list[Fleet]()

    def __call__(self, replicas: int = 2, *, dead_after_s: float = 10.0, **more: Any) -> tuple[Fleet, Neighbours]:
        near = Neighbours(self.model, **{"state_every_s": 0.02, **more})
        fleet = Fleet(near, replicas, dead_after_s=dead_after_s, recover_s=10.0, settle_s=0.0)
        self.made.append(fleet)
        fleet.start()
        return fleet, near


@pytest.fixture
def fleets(model: Path) -> Iterator[Fleets]:
    fleets = Fleets(model)
    yield fleets
    for fleet in fleets.made:
        fleet.close()


def nearly_equal(shown: np.ndarray, expected: np.ndarray) -> None:
    """Two streams of a replica share a forward: sums in another order, so that a pixel may be rounded the other way."""
    assert np.abs(shown.astype(int) - expected).max() <= 1


def test_streams_spread_and_show_what_the_pipeline_makes(fleets: Fleets, model: Path) -> None:
    fleet, _ = fleets()
    lasting = [Watcher(fleet, seed=seed, max_seconds=3000.0) for seed in range(4)]
    assert sorted(place_of(one) for one in lasting) == ["r0", "r0", "r1", "r1"]
    for one in lasting:
        one.stream.close()
    watchers = [Watcher(fleet, seed=seed, max_seconds=3.0) for seed in range(4)]
    for seed, watcher in enumerate(watchers):
        watcher.until_ended()
        assert [event.kind for event in watcher.events if event.kind != "applied"] == ["ended"]
        assert watcher.numbers() == list(range(48))
        nearly_equal(watcher.pixels(), alone(model, seed, 48))
    assert fleet.stats().admitted == 8
    assert fleet.pipe.scheduler.trained_steps == (2, 4)


def test_a_drained_replicas_stream_goes_on_without_a_seam(fleets: Fleets, model: Path) -> None:
    fleet, _ = fleets()
    moving = Watcher(fleet, seed=3)
    moving.until(24)
    assert place_of(moving) == "r0"
    assert fleet.drain("r0", replace=False)
    assert place_of(moving) == "r1"
    assert [one.name for one in fleet.replicas()] == ["r1"]
    end = moving.shown + 60
    moving.until(end)
    numbers = moving.numbers()
    assert numbers == list(range(len(numbers))), "no frame is lost, none comes twice"
    np.testing.assert_array_equal(moving.pixels()[:end], alone(model, 3, end))
    assert {block.epoch for block in moving.blocks} == {0}


def test_a_replacement_comes_before_the_drained_one_goes(fleets: Fleets) -> None:
    fleet, near = fleets(1, max_streams=1)
    watcher = Watcher(fleet, seed=1)
    watcher.until(12)
    assert fleet.drain("r0")
    assert place_of(watcher) == "r1"
    assert near.handles["r0"].calls[-1] == "close"
    watcher.until(watcher.shown + 24)
    assert watcher.numbers() == list(range(watcher.shown))
    with pytest.raises(UserError, match="no replica 'r0'; there are: r1"):
        fleet.drain("r0")


def test_all_replicas_are_replaced_while_their_streams_go_on(fleets: Fleets, model: Path) -> None:
    fleet, _ = fleets()
    watchers = [Watcher(fleet, seed=seed) for seed in range(2)]
    for watcher in watchers:
        watcher.until(12)
    fleet.renew()
    assert [one.name for one in fleet.replicas()] == ["r2", "r3"]
    for seed, watcher in enumerate(watchers):
        watcher.until(watcher.shown + 12)
        numbers = watcher.numbers()
        assert numbers == list(range(len(numbers)))
        nearly_equal(watcher.pixels()[: len(numbers)], alone(model, seed, len(numbers)))


def test_a_stream_that_nobody_else_admits_stays_on_the_draining_replica(fleets: Fleets) -> None:
    fleet, _ = fleets(2, max_streams=1)
    watchers = [Watcher(fleet, seed=seed) for seed in range(2)]
    with pytest.raises(Refused, match="2 replicas") as refused:
        Watcher(fleet)
    assert refused.value.resource == "streams"
    assert not fleet.drain("r0", replace=False, within_s=0.3)
    assert place_of(watchers[0]) == "r0"
    watchers[0].until(watchers[0].shown + 24)
    assert watchers[0].numbers() == list(range(watchers[0].shown))


def test_a_killed_replicas_stream_goes_on_bit_by_bit(fleets: Fleets, model: Path) -> None:
    fleet, near = fleets()
    watcher = Watcher(fleet, seed=6)
    watcher.until(24)
    receipt = watcher.stream.prompt(NEXT)
    watcher.until(12 * receipt.block + 40)
    near.handles["r0"].crash()
    wait_for(lambda: {one.name for one in fleet.replicas()} == {"r1", "r2"}), "another was started"
    assert place_of(watcher) == "r1"
    end = watcher.shown + 60
    watcher.until(end)
    numbers = watcher.numbers()
    assert numbers == list(range(len(numbers)))
    np.testing.assert_array_equal(watcher.pixels()[:end], alone(model, 6, end, {receipt.block: NEXT}))
    assert fleet.failure is None


def test_without_any_saved_state_it_is_made_again_from_its_beginning(fleets: Fleets, model: Path) -> None:
    fleet, near = fleets(state_every_s=1e6)
    watcher = Watcher(fleet, seed=7)
    watcher.until(24)
    receipt = watcher.stream.prompt(NEXT)
    watcher.until(12 * receipt.block + 12)
    near.handles["r0"].crash()
    end = watcher.shown + 36
    watcher.until(end)
    assert watcher.numbers() == list(range(len(watcher.numbers())))
    np.testing.assert_array_equal(watcher.pixels()[:end], alone(model, 7, end, {receipt.block: NEXT}))


def test_a_silent_replica_is_dead_too(fleets: Fleets, model: Path) -> None:
    fleet, near = fleets(dead_after_s=1.0)
    watcher = Watcher(fleet, seed=8)
    watcher.until(24)
    near.handles["r0"].hung = True
    wait_for(lambda: watcher.stream.place is not None and watcher.stream.place.replica == "r1")
    end = watcher.shown + 24
    watcher.until(end)
    assert watcher.numbers() == list(range(len(watcher.numbers())))
    np.testing.assert_array_equal(watcher.pixels()[:end], alone(model, 8, end))


def test_a_prompt_at_the_playhead_survives_the_replica_that_took_it(fleets: Fleets, model: Path) -> None:
    fleet, near = fleets()
    watcher = Watcher(fleet, seed=2, fps=1.0, lead_s=60.0)  # so slow that what is made is not seen yet
    watcher.until(48)
    watcher.stream.playhead(13.0)
    receipt = watcher.stream.prompt(NEXT, apply_at="playhead")
    near.handles["r0"].crash()
    assert receipt.block == 2
    watcher.until(48)
    wait_for(lambda: watcher.blocks[-1].epoch == 1 and watcher.shown >= 60)
    again = [block for block in watcher.blocks if block.epoch == 1]
    assert again[0].first_frame == 24
    np.testing.assert_array_equal(watcher.pixels()[:60], alone(model, 2, 60, {2: NEXT}))


def test_a_seek_back_is_answered_on_a_replica_that_has_just_got_the_stream(fleets: Fleets, model: Path) -> None:
    fleet, near = fleets()
    watcher = Watcher(fleet, seed=9)
    watcher.until(36)
    near.handles["r0"].crash()
    receipt = watcher.stream.seek(0.5)
    assert receipt.block == 0 and receipt.media_s == 0.5
    before = len(watcher.blocks)
    wait_for(lambda: any(block.first_frame == 8 and block.epoch for block in watcher.blocks))
    wait_for(lambda: watcher.shown >= 60 and len(watcher.blocks) > before)
    np.testing.assert_array_equal(watcher.pixels()[:60], alone(model, 9, 60))


def test_a_viewer_goes_back_to_what_the_replica_before_made(fleets: Fleets, model: Path) -> None:
    fleet, _ = fleets()
    watcher = Watcher(fleet, seed=11)
    watcher.until(30)
    receipt = watcher.stream.prompt(NEXT)
    watcher.until(12 * receipt.block + 24)
    assert fleet.drain("r0", replace=False)
    back = 12 * receipt.block - 4
    watcher.until(watcher.shown + 12)
    there = watcher.stream.seek(back / 16)
    assert (there.block, there.media_s, there.version) == (receipt.block - 1, back / 16, 0)
    wait_for(lambda: watcher.blocks[-1].epoch == 1)
    first = next(block for block in watcher.blocks if block.epoch == 1)
    assert first.first_frame == back
    end = back + 40
    wait_for(lambda: watcher.blocks[-1].epoch == 1 and watcher.shown >= end)
    np.testing.assert_array_equal(watcher.pixels()[:end], alone(model, 11, end, {receipt.block: NEXT}))


def test_a_saved_state_has_no_frame_that_was_not_given_out(fleets: Fleets, model: Path) -> None:
    fleet, _ = fleets()
    watcher = Watcher(fleet, seed=5)
    for _ in range(5):
        state = watcher.stream.state_dict()
        assert state["shown_frames"] <= watcher.shown
    watcher.stream.close()
    with pytest.raises(UserError, match="closed"):
        watcher.stream.prompt(NEXT)
    again = Watcher(fleet, saved=state)
    again.until(state["shown_frames"] + 24)
    assert again.numbers()[0] == state["shown_frames"]
    end = again.shown
    np.testing.assert_array_equal(
        again.pixels()[: end - state["shown_frames"]], alone(model, 5, end)[state["shown_frames"] :]
    )


def test_a_viewer_that_raises_ends_its_own_stream_alone(fleets: Fleets) -> None:
    fleet, _ = fleets(1)
    other = Watcher(fleet)

    def on_block(block: MadeBlock) -> None:
        raise ZeroDivisionError

    broken = fleet.open(StreamRequest(prompt=PROMPT, steps=2), on_block=on_block, on_event=lambda event: None)
    wait_for(lambda: broken.closed)
    other.until(other.shown + 36)
    wait_for(lambda: fleet.replicas()[0].streams == 1)


def test_no_replica_can_be_started_any_more(fleets: Fleets) -> None:
    fleet, near = fleets(1)
    watcher = Watcher(fleet)
    watcher.until(12)
    near.model = Path("/nowhere")
    near.handles["r0"].crash()
    wait_for(lambda: fleet.failure is not None)
    assert "no replica can be started" in str(fleet.failure)
    wait_for(lambda: any(event.kind == "failed" for event in watcher.events))
    with pytest.raises(UserError, match="closed"):
        watcher.stream.pause()
    with pytest.raises(Refused, match="no replica"):
        Watcher(fleet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "--engine 'spark' does not exist; there are: local, ray"),
        ({"replicas": 2}, "--replicas 2 has no effect with --engine local: add --engine ray"),
        ({"engine": "ray", "replicas": 0}, "--replicas is 0; it must be 1 to 256"),
        ({"engine": "ray"}, "needs ray, which is not installed: pip install 'streamgen[ray]'"),
        ({"engine": "ray", "device": "cuda:1"}, "with --engine ray say cuda"),
    ],
)
def test_the_command_refuses(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = None if "not installed" in message else "here"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    with pytest.raises(UserError) as refused:
        check(Options(**options))
    assert message in str(refused.value)


def test_nobody_takes_frames_and_streams_wait(fleets: Fleets) -> None:
    fleet, near = fleets(1, outbox_bytes=200_000)
    replica = near.handles["r0"].replica
    take, held = replica.take, list[int]()
    replica.take = lambda wait_s: take(wait_s) if held else _nothing(replica)  # type: ignore[method-assign]
    watcher = Watcher(fleet, seed=1)
    entry = wait_for(lambda: next(iter(replica._entries.values()), None))
    wait_for(lambda: entry.held)
    assert replica._waiting_bytes <= 200_000 + 2 * 12 * 32 * 32 * 3
    held.append(1)
    watcher.until(96)
    assert watcher.numbers() == list(range(watcher.shown))


def _nothing(replica: Replica) -> Handed:
    return Handed(items=[], now_s=0.0, stats=replica.runtime.stats())
