"""Clients that wait for a place on a full machine: in order, told where they stand, gone when they go."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.serve.options import Options, check
from streamgen_infer.serve.waiting_line import Turn, WaitingLine
from tests.server.fake_runtime import FakeRuntime
from tests.server.harness import START, Running, Talk, get, refused, serving, wait_for

WAIT = {"wait_seconds": 30, "format": "rgb"}


def line_of(running: Running) -> int:
    return len(running.server.line)


def in_line(running: Running, place: int, **fields: Any) -> Talk:
    """A client that waits at this place."""
    talk = Talk(running)
    talk.send({**START, **WAIT, **fields})
    assert talk.until(p.SessionState, state="queued").place == place
    return talk


def test_who_waits_is_told_the_place_and_admitted_in_order(tmp_path: Path) -> None:
    with serving(lambda: FakeRuntime(max_streams=1), tmp_path) as running, Talk(running) as first:
        first.start()
        with in_line(running, 1) as second, in_line(running, 2) as third:
            assert "all streams are taken" in second.said[-1].message
            assert 'streamgen_sessions{state="queued"} 2.0' in get(running.http + "/metrics")[2].decode()
            assert isinstance(second.ask({"type": "session.ping"}), p.Pong)
            assert second.ask({"type": "session.pause"}).code == "illegal_state"
            first.ask({"type": "session.stop"})
            assert second.until(p.VideoStart).next_frame == 0
            assert third.until(p.SessionState).place == 1
            second.until_frame(13)
            assert not any(isinstance(one, p.VideoStart) for one in third.said)
            second.cut()
            running.call(running.server.end(next(iter(running.server.sessions.values()))))
            third.until(p.VideoStart)
            third.until_frame(13)
            assert third.numbers() == list(range(third.numbers()[-1] + 1))
        assert "streamgen_queue_wait_seconds_count 2.0" in get(running.http + "/metrics")[2].decode()


def test_a_free_machine_lets_nobody_wait(tmp_path: Path) -> None:
    with serving(FakeRuntime, tmp_path) as running, Talk(running) as talk:
        started = talk.start(wait_seconds=30)
        assert started.state in ("warming", "playing") and talk.said == [started]


def test_nobody_overtakes(tmp_path: Path) -> None:
    """While somebody waits, who does not want to is refused, even if there is a place this moment."""
    runtime = FakeRuntime(max_streams=1)
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as first:
        first.start()
        with in_line(running, 1) as second:
            assert refused(running, START) == ("overload", 1013)
            first.ask({"type": "session.stop"})
            second.until(p.VideoStart)
        assert len(runtime.opened) == 2


def test_a_wait_ends_in_time_and_the_line_is_bounded(tmp_path: Path) -> None:
    with serving(lambda: FakeRuntime(max_streams=1), tmp_path, waiting=1) as running, Talk(running) as first:
        first.start()
        with in_line(running, 1, wait_seconds=1.2) as second:
            with Talk(running) as third:
                third.send({**START, **WAIT})
                assert third.closed() == 1013
            assert "no more may" in third.said[-1].message and third.said[-1].retry_after_seconds == 5.0
            assert second.closed() == 1013
            error = second.said[-1]
            assert error.code == "overload" and "no place was free in time: all streams" in error.message
        wait_for(lambda: len(running.server.sessions) == 1)
        assert line_of(running) == 0


@pytest.mark.parametrize("how", ["cut", "stop", "delete", "garbage"])
def test_who_goes_leaves_the_line(tmp_path: Path, how: str) -> None:
    runtime = FakeRuntime(max_streams=1)
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as first:
        first.start()
        with in_line(running, 1) as second, in_line(running, 2) as third:
            if how == "cut":
                second.cut()
            elif how == "stop":
                assert isinstance(second.ask({"type": "session.stop"}), p.Received)
                assert second.until(p.Done).stopped and second.closed() == 1000
            elif how == "delete":
                (name,) = [one.id for one in list(running.server.sessions.values())[1:2]]
                assert get(f"{running.http}/v1/sessions/{name}", "DELETE")[0] == 200
                assert second.closed() == 4409 and "ended while it waited" in second.said[-1].message
            else:
                for _ in range(11):
                    second.send("{")
                assert second.closed() == 4400
            assert third.until(p.SessionState).place == 1
            assert len(running.server.sessions) == 2 and line_of(running) == 1
            first.ask({"type": "session.stop"})
            third.until(p.VideoStart)
        assert len(runtime.opened) == 2, "none was opened for the one that went"


def test_a_draining_server_sends_the_line_away(tmp_path: Path) -> None:
    with serving(lambda: FakeRuntime(max_streams=1), tmp_path) as running, Talk(running) as first:
        first.start()
        with in_line(running, 1) as second:
            running.call(running.server.drain())
            assert second.closed() == 1012 and second.said[-1].code == "draining"


def test_what_no_end_of_others_can_help_is_refused_at_once(tmp_path: Path) -> None:
    with serving(lambda: FakeRuntime(max_streams=0), tmp_path) as running:
        assert refused(running, {**START, "wait_seconds": 600}) == ("overload", 1013)


def test_who_waits_is_a_session_of_its_own_and_mistakes_do_not_wait(tmp_path: Path) -> None:
    with serving(lambda: FakeRuntime(max_streams=1), tmp_path) as running, Talk(running) as first:
        first.start()
        first.until_frame(0)
        with Talk(running) as talk:
            talk.send({**START, "wait_seconds": 601})
            assert talk.closed() == 4400 and "wait_seconds" in talk.said[-1].message
        with in_line(running, 1):
            sessions = json.loads(get(running.http + "/v1/sessions")[2])
            assert sorted(one["state"] for one in sessions) == ["playing", "queued"]


def test_the_line_by_itself() -> None:
    """Only the first may try, again after each poke; a turn that leaves makes the next one first."""

    async def scenario() -> None:
        line, order = WaitingLine(8), list[str]()
        turns = {name: Turn(60.0) for name in "abc"}

        async def wait(name: str) -> None:
            await line.wait(turns[name], "full", tried=name == "a")
            order.append(name)
            if name == "a":
                await line.wait(turns[name], "full", tried=True)
                order.append("a again")
            line.leave(turns[name])

        tasks = [asyncio.create_task(wait(name)) for name in "abc"]
        await asyncio.sleep(0.05)
        assert order == [] and [turn.place for turn in turns.values()] == [1, 2, 3]
        turns["b"].leave()
        await asyncio.sleep(0.05)
        assert isinstance(tasks[1].exception(), p.Refusal)
        line.leave(turns["b"])
        assert turns["c"].place == 2
        for expected in (["a"], ["a", "a again", "c"]):
            line.poke()
            await asyncio.sleep(0.1)
            assert order == expected
        assert len(line) == 0

    asyncio.run(scenario())


def test_the_option_is_checked() -> None:
    with pytest.raises(UserError, match="--max-waiting is -1"):
        check(Options(max_waiting=-1))
