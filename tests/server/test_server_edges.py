"""What goes wrong between viewers, the event loop and the disk: each test was a defect once."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from streamgen_infer import protocol as p
from streamgen_infer.serve import saving
from streamgen_infer.serve.connection import Connection
from streamgen_infer.serve.frame_encoders import FragmentedMp4
from streamgen_infer.serve.limits import check_origin
from streamgen_infer.serve.receipts import Receipts
from streamgen_infer.serve.viewer_queue import BlockInfo
from tests.server.fake_runtime import FakeRuntime
from tests.server.harness import START, Talk, get, serving, wait_for


def info(block: int, version: int, *, epoch: int = 0, steps: int = 4) -> BlockInfo:
    return BlockInfo(
        epoch=epoch,
        block=block,
        first_frame=12 * block,
        frames=12,
        steps=steps,
        prompt_version=version,
        flags=0,
        slack_s=0.1,
    )


def test_a_prompt_for_later_is_not_applied_by_a_newer_one_for_now() -> None:
    receipts = Receipts()
    later = receipts.accept("session.interaction", "a", event_id="later", prompt_version=1, from_block=80)
    now = receipts.accept("session.interaction", "b", event_id="now", prompt_version=2, from_block=5)
    receipts.waiting += [later, now]
    assert [getattr(one, "id", None) for one in receipts.block(info(5, 2), 0.0)] == ["b"]
    assert receipts.block(info(79, 2), 0.0) == []
    assert [getattr(one, "id", None) for one in receipts.block(info(80, 1), 0.0)] == ["a"]


def test_steps_that_were_asked_for_again_are_answered(tmp_path: Path) -> None:
    runtime = FakeRuntime(make_every_s=None)
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as talk:
        talk.start()
        for count in (2, 4, 2):
            assert isinstance(talk.ask({"type": "session.steps", "steps": count}), p.Received)
        runtime.make()
        assert [talk.until(p.Applied).version for _ in range(3)] == [1, 2, 3]
        (session,) = running.server.sessions.values()
        assert not session.receipts.waiting


def test_commands_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgen_infer.serve.commands.MAX_WAITING", 5)
    runtime = FakeRuntime(make_every_s=None)
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as talk:
        talk.start()
        answers = [talk.ask({"type": "session.seek", "position_seconds": 0}) for _ in range(8)]
        assert [type(answer) for answer in answers] == [p.Received] * 5 + [p.Error] * 3
        assert answers[-1].code == "rate"


def test_prompts_are_journaled_only_where_there_is_a_journal(tmp_path: Path) -> None:
    runtime = FakeRuntime(make_every_s=None)
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as talk:
        talk.start()
        for _ in range(5):
            talk.ask({"type": "session.interaction", "interaction": {"event": {"prompt": "a blue ring"}}})
        (session,) = running.server.sessions.values()
        assert session.journal == []


@pytest.mark.parametrize(("origin", "host"), [("http://[", "127.0.0.1"), ("http://a", "[::1"), (None, "[")])
def test_an_origin_that_is_no_address_is_refused_in_words(origin: str | None, host: str) -> None:
    with pytest.raises(p.Refusal) as refused:
        check_origin(origin, host, bound_to="127.0.0.1", allowed=())
    assert refused.value.code == "forbidden_origin"


def test_a_session_that_is_ended_while_it_opens_leaves_no_stream(tmp_path: Path) -> None:
    runtime = FakeRuntime(make_every_s=None)
    opening, go_on = threading.Event(), threading.Event()
    really = runtime.open

    def slow(*given: Any, **named: Any) -> Any:
        opening.set()
        assert go_on.wait(10)
        return really(*given, **named)

    runtime.open = slow  # type: ignore[method-assign]
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as talk:
        talk.send(START)
        assert opening.wait(10)
        (name,) = running.server.sessions
        assert get(f"{running.http}/v1/sessions/{name}", "DELETE")[0] == 200
        go_on.set()
        assert talk.closed() != 1000
        assert talk.said[-1].code == "illegal_state"
        wait_for(lambda: runtime.opened)
        assert not runtime.streams and not running.server.sessions


def test_pause_holds_the_rest_of_a_video_that_is_made_already(tmp_path: Path) -> None:
    runtime = FakeRuntime(make_every_s=None)
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as talk:
        talk.start(max_seconds=1.5, window_seconds=0.25)
        talk.send({"type": "session.playback", "position_seconds": 0, "received_frame": 0})
        runtime.make(2)
        (session,) = running.server.sessions.values()
        talk.until_frame(0)
        wait_for(lambda: session.ended and not session.done)
        assert isinstance(talk.ask({"type": "session.pause"}), p.Received)
        assert isinstance(talk.ask({"type": "session.play"}), p.Received)


def test_one_broken_file_keeps_no_server_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "ab.safetensors").write_bytes(b"")

    async def breaks(*_: Any) -> Any:
        raise AttributeError("'list' object has no attribute 'get'")

    monkeypatch.setattr(saving, "restore", breaks)
    with serving(FakeRuntime, tmp_path, save_dir=folder) as running, Talk(running) as talk:
        talk.start()


def test_the_watch_goes_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []

    async def breaks(session: Any, folder: Path) -> None:
        saved.append(session.id)
        raise RuntimeError("no space left")

    folder = tmp_path / "saved"
    folder.mkdir()
    monkeypatch.setattr(saving, "save", breaks)
    with serving(FakeRuntime, tmp_path, save_dir=folder, save_every_s=0.01) as running, Talk(running) as talk:
        talk.start()
        wait_for(lambda: len(saved) > 2)


def test_prompts_of_the_start_are_there_before_the_first_block(tmp_path: Path) -> None:
    runtime = FakeRuntime(make_every_s=0.0005)
    timeline = [{"at_seconds": 0.75 * n, "prompt": f"prompt {n}"} for n in range(1, 30)]
    with serving(lambda: runtime, tmp_path) as running, Talk(running) as talk:
        talk.start(timeline=timeline, drop="stall", queue_seconds=10)
        assert all(talk.until_frame(12 * n).prompt_version == n for n in range(5))


def visible(folder: Path) -> dict[str, bytes]:
    """What a kill would leave: the whole files, not the one being written under a hidden name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def saved(session: Any, folder: Path) -> bool:
    return not session.dirty and any(folder.glob("[!.]*.safetensors"))


def test_a_prompt_that_was_journaled_is_there_before_the_first_block_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    first = FakeRuntime(make_every_s=None)
    with serving(lambda: first, tmp_path, save_dir=folder) as running, Talk(running) as talk:
        talk.start()
        (session,) = running.server.sessions.values()
        wait_for(lambda: saved(session, folder))
        monkey = {"type": "session.interaction", "interaction": {"event": {"prompt": "a blue ring"}}}
        assert talk.ask(monkey).block == 0
        kept = visible(folder)
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    second = FakeRuntime(make_every_s=0.0005)
    with serving(lambda: second, tmp_path, save_dir=folder) as running:
        wait_for(lambda: second.opened)
        assert len(running.server.sessions) == 1
        assert [one[2] for one in second.opened[0].changes] == ["a red star", "a blue ring"]


def test_a_journal_that_does_not_fit_leaves_no_stream_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    first = FakeRuntime(make_every_s=None)
    with serving(lambda: first, tmp_path, save_dir=folder) as running, Talk(running) as talk:
        talk.start()
        (session,) = running.server.sessions.values()
        wait_for(lambda: saved(session, folder))
        kept = visible(folder)
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    entry = {"prompt": "unknown", "transition": "cut", "media_s": 0.0, "blend_blocks": 4}
    monkeypatch.setattr(saving, "_journal", lambda path, number: [entry])
    second = FakeRuntime(make_every_s=None)
    with serving(lambda: second, tmp_path, save_dir=folder) as running:
        assert second.opened and not second.streams and not running.server.sessions


def test_an_encoder_is_not_closed_under_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    encoder = FragmentedMp4(64, 64, 16.0)
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()
    write, finish = encoder.mp4.write, encoder.mp4.finish

    def slow(*given: Any, **named: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        write(*given, **named)
        order.append("write")

    def last() -> None:
        order.append("finish")
        finish()

    monkeypatch.setattr(encoder.mp4, "write", slow)
    monkeypatch.setattr(encoder.mp4, "finish", last)
    frame = threading.Thread(target=encoder.encode, args=(np.zeros((64, 64, 3), np.uint8),))
    frame.start()
    assert begun.wait(10)
    end = threading.Thread(target=encoder.close)
    end.start()
    end.join(0.1)
    go_on.set()
    frame.join()
    end.join()
    assert order == ["write", "finish"]


def test_a_connection_lost_at_the_very_end_loses_no_frame(tmp_path: Path) -> None:
    """All was sent, and the stream is over, but it did not arrive: a resume brings the rest, and the end once more."""
    with serving(lambda: FakeRuntime(max_streams=1), tmp_path, resume_s=1.0) as running:
        with Talk(running) as talk:
            token = talk.start(max_seconds=2).resume_token
            talk.until_frame(9)
            (session,) = running.server.sessions.values()
            wait_for(lambda: session.life.state == "closed" and session.connection is None)
            talk.cut()
        assert not running.server.engine.streams, "only the frames are kept"
        for last, expected in ((9, list(range(10, 36))), (34, [35]), (35, [])):
            with Talk(running) as again:
                again.send({"type": "session.resume", "resume_token": token, "last_frame": last})
                assert again.until(p.VideoStart).lost_frames == 0
                assert again.until(p.Done).frames >= 36
                assert again.numbers() == expected and again.closed() == 1000
        wait_for(lambda: not running.server.sessions)


def test_a_session_that_waited_long_for_its_place_is_not_given_up(tmp_path: Path) -> None:
    """Longer than a lost viewer would be awaited."""
    with serving(lambda: FakeRuntime(max_streams=1), tmp_path, resume_s=0.3) as running, Talk(running) as first:
        first.start()
        with Talk(running) as second:
            second.send({**START, "wait_seconds": 30, "format": "rgb"})
            wait_for(lambda: len(running.server.line) == 1)
            (waiting,) = [one for one in running.server.sessions.values() if one.life.state == "queued"]
            waiting.left_s -= 60
            first.ask({"type": "session.stop"})
            second.until_frame(20)


def test_memory_of_ended_sessions_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    monkeypatch.setattr("streamgen_infer.server.GIVE_BACK_S", 0.0)
    monkeypatch.setattr("streamgen_infer.server.give_back", asked.set)
    with serving(FakeRuntime, tmp_path) as running:
        with Talk(running) as talk:
            talk.start()
            assert not asked.wait(0.4), "while nothing has ended"
            talk.ask({"type": "session.stop"})
        assert asked.wait(10)


def test_what_is_over_leaves_no_circles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, cut, ended by the client: memory is free at once and waits for no garbage collector."""
    living: weakref.WeakSet[Connection] = weakref.WeakSet()
    init = Connection.__init__

    def remembered(self: Connection, *given: Any) -> None:
        init(self, *given)
        living.add(self)

    monkeypatch.setattr(Connection, "__init__", remembered)
    held: list[weakref.ref[Any]] = []

    class Refusing(FakeRuntime):
        def open(self, request: Any, **calls: Any) -> Any:
            cache = set[int]()  # what a runtime has made by the time it refuses
            held.append(weakref.ref(cache))
            return super().open(request, **calls)

    runtime = Refusing(make_every_s=0.01, max_streams=1)
    with serving(lambda: runtime, tmp_path, resume_s=0.0) as running:
        gc.collect()
        gc.disable()
        try:
            with Talk(running) as first:
                first.start()
                with Talk(running) as refused:
                    refused.send({"type": "session.start", "prompt": "a red star"})
                    assert refused.until(p.Error).code == "overload"
                wait_for(lambda: len(living) == 1)
            wait_for(lambda: not living and not runtime.streams)
            with Talk(running) as last:
                last.start()
                last.send({"type": "session.stop"})
                last.until(p.Done)
            wait_for(lambda: not living)
            assert len(held) == 3 and not any(ref() for ref in held)
        finally:
            gc.enable()
