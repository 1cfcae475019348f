"""A session by itself: any order of commands leads to a legal state and an answer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen_infer import protocol as p
from streamgen_infer.requests import StreamEvent
from streamgen_infer.serve.metrics import ServeMetrics
from streamgen_infer.serve.session import Session
from streamgen_infer.serve.session_state import LIVE, OVER, TRANSITIONS, Lifecycle
from streamgen_infer.serve.viewer_queue import QueuedFrame
from tests.server.fake_runtime import FakeRuntime


def new_session(folder: Path, **fields: Any) -> Session:
    start = p.Start(type="session.start", prompt="a red star", **fields)
    return Session(
        start,
        owner="ann",
        folder=folder,
        metrics=ServeMetrics(),
        keep_branch=lambda session, tree: "b1",
        keep_clip=lambda session, path: path.unlink(),
    )


def config() -> p.VideoConfig:
    return p.VideoConfig(
        width=16,
        height=16,
        fps=16,
        seed=0,
        block_frames=12,
        model="fake",
        trained_steps=(4, 2),
        drop="oldest",
        queue_seconds=2,
        mime="image/jpeg",
    )


def drain(session: Session) -> list[Any]:
    items = []
    while (item := session.next_item()) is not None:
        items.append(item)
    return items


async def settle() -> None:
    """What the runtime posted is taken."""
    for _ in range(3):
        await asyncio.sleep(0)


def names(items: list[Any]) -> list[str]:
    return [item.type for item in items if isinstance(item, p.Message)]  # type: ignore[attr-defined]


def test_a_step_that_the_table_does_not_name_is_our_bug() -> None:
    life = Lifecycle()
    for state in ("queued", "warming", "playing", "paused", "playing", "draining", "closed"):
        assert life.go(state)
    assert not life.go("closed")
    with pytest.raises(AssertionError, match="from closed to playing"):
        life.go("playing")
    assert all(not TRANSITIONS[state] for state in OVER)


COMMANDS = st.one_of(
    st.sampled_from(
        [
            {"type": "session.pause"},
            {"type": "session.play"},
            {"type": "session.branch"},
            {"type": "session.ping"},
            {"type": "session.stop"},
            {"type": "session.start", "prompt": "again"},
            {"type": "session.resume", "resume_token": "x"},
            {"type": "session.record", "action": "start", "format": "gif"},
            {"type": "session.record", "action": "stop"},
            {"type": "session.steps", "steps": 2},
            {"type": "session.steps", "steps": 3},
            {"type": "session.steps", "steps": None},
            {"type": "session.interaction", "interaction": {"event": {"prompt": "unknown"}}},
            {"type": "session.interaction", "interaction": {"event": {"prompt": "b"}, "at_seconds": 3}},
            {"type": "session.interaction", "interaction": {"event": {"prompt": "c"}, "apply_at": "playhead"}},
        ]
    ),
    st.builds(lambda s: {"type": "session.seek", "position_seconds": s}, st.floats(0, 20)),
    st.builds(lambda s: {"type": "session.playback", "position_seconds": s}, st.floats(0, 20)),
    st.sampled_from(["make", "take", "leave", "come", "end"]),
)


@settings(max_examples=120)
@given(st.lists(COMMANDS, max_size=14), st.sampled_from(("oldest", "newest", "stall")))
def test_any_order_of_commands_has_answers_and_legal_states(
    tmp_path_factory: pytest.TempPathFactory, acts: list[Any], drop: p.Drop
) -> None:
    asyncio.run(play(tmp_path_factory.getbasetemp(), acts, drop))


async def play(folder: Path, acts: list[Any], drop: p.Drop) -> None:
    runtime = FakeRuntime(make_every_s=None)
    session = new_session(folder, drop=drop, max_seconds=6)
    await session.open(runtime)
    session.attach("one", config())
    heard: list[Any] = []
    asked: dict[str, str] = {}
    for number, act in enumerate(acts):
        if act == "make":
            runtime.make()
        elif act == "take":
            heard += drain(session)
        elif act == "leave":
            session.detach("one")
        elif act == "come" and session.life.state in LIVE:
            session.attach("one", config(), p.Resume(type="session.resume", resume_token="x"))
        elif act == "end" and session.given is not None:
            runtime.make(8)
        elif isinstance(act, dict):
            message = p.parse_client(p.dump(act if act["type"] == "session.playback" else {**act, "id": f"m{number}"}))
            if act["type"] != "session.playback":
                asked[f"m{number}"] = act["type"]
            await session.handle(message)
        await settle()
    heard += drain(session)
    for item in (one for one in heard if isinstance(one, p.Message)):
        assert p.parse_server(item.model_dump_json()) == item, "what is said is part of the protocol"
    answers = [getattr(item, "id", None) for item in heard if isinstance(item, p.Message)]
    for name, kind in asked.items():
        first = next(item for item in heard if getattr(item, "id", None) == name)
        assert isinstance(first, p.Received | p.InteractionQueued | p.Error | p.Pong), (kind, first)
        assert answers.count(name) <= 2
    versions = [item.version for item in heard if isinstance(item, p.Received | p.InteractionQueued)]
    assert versions == list(range(1, len(versions) + 1))
    assert session.life.state in TRANSITIONS
    await session.close()
    drain(session)
    assert session.life.state in OVER and not runtime.streams
    await session.handle(p.Pause(type="session.pause", id="late"))
    (late,) = drain(session)
    assert (late.code, late.id) == ("illegal_state", "late")


def test_received_then_applied_with_the_first_block_that_obeys(tmp_path: Path) -> None:
    async def scenario() -> None:
        runtime = FakeRuntime(make_every_s=None)
        session = new_session(tmp_path)
        await session.open(runtime)
        session.attach("one", config())
        runtime.make(2)
        await settle()
        assert names(drain(session))[:2] == ["video.start", "session.state"]
        ask = {"type": "session.interaction", "id": "p", "interaction": {"event": {"prompt": "b"}, "event_id": "e"}}
        await session.handle(p.parse_client(p.dump(ask)))
        await session.handle(p.Steps(type="session.steps", id="s", steps=2))
        assert names(drain(session)) == ["session.interaction.queued", "session.received"]
        runtime.make()
        await settle()
        told = drain(session)
        assert names(told) == ["session.interaction.applied", "session.applied", "video.chunk_metadata"]
        assert [(item.version, item.block) for item in told[:2]] == [(1, 2), (2, 2)]
        assert told[2].started_event_ids == ("e",)
        frames = [item for item in told if isinstance(item, QueuedFrame)]
        assert [item.frame for item in frames] == list(range(24, 36))
        assert {item.info.prompt_version for item in frames} == {1}

    asyncio.run(scenario())


def test_pause_holds_frames_that_are_made_already(tmp_path: Path) -> None:
    async def scenario() -> None:
        runtime = FakeRuntime(make_every_s=None)
        session = new_session(tmp_path)
        await session.open(runtime)
        session.attach("one", config())
        runtime.make()
        await settle()
        await session.handle(p.Pause(type="session.pause"))
        told = drain(session)
        assert not any(isinstance(item, QueuedFrame) for item in told)
        assert session.life.state == "paused" and runtime.opened[0].paused
        await session.handle(p.Play(type="session.play"))
        assert sum(isinstance(item, QueuedFrame) for item in drain(session)) == 12

    asyncio.run(scenario())


def test_stall_stops_the_stream_and_a_pause_of_the_viewer_outlives_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        runtime = FakeRuntime(make_every_s=None)
        session = new_session(tmp_path, drop="stall", queue_seconds=1.0)
        await session.open(runtime)
        session.attach("one", config())
        runtime.make(9)
        await settle()
        stream = runtime.opened[0]
        assert stream.paused and session.queue.dropped_frames == 0
        await session.handle(p.Pause(type="session.pause"))
        await session.handle(p.Play(type="session.play"))
        assert stream.paused, "the queue is still full"
        assert [item.frame for item in drain(session) if isinstance(item, QueuedFrame)] == list(range(108))
        assert not stream.paused

    asyncio.run(scenario())


def test_a_viewer_who_is_away_stops_the_stream_whatever_the_policy(tmp_path: Path) -> None:
    async def scenario() -> None:
        runtime = FakeRuntime(make_every_s=None)
        session = new_session(tmp_path, drop="oldest", queue_seconds=1.0)
        await session.open(runtime)
        session.attach("one", config())
        session.detach("one")
        for _ in range(9):
            runtime.make()
            await settle()
        made = runtime.opened[0].position
        assert made == 2 and runtime.opened[0].paused and session.queue.dropped_frames == 0
        session.attach("two", config(), p.Resume(type="session.resume", resume_token="x", last_frame=-1))
        assert [item.frame for item in drain(session) if isinstance(item, QueuedFrame)] == list(range(24))
        assert not runtime.opened[0].paused

    asyncio.run(scenario())


def test_a_stream_that_fails_says_so_and_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        runtime = FakeRuntime(make_every_s=None)
        session = new_session(tmp_path)
        await session.open(runtime)
        session.attach("one", config())
        session.take_event(StreamEvent(kind="failed", block=0, message="RuntimeError: nan"))
        told = drain(session)
        assert names(told)[-2:] == ["session.state", "error"]
        assert (told[-1].code, told[-1].fatal) == ("internal", True)
        assert session.life.state == "failed"
        await session.close()
        assert not runtime.streams

    asyncio.run(scenario())
