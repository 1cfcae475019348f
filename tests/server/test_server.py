"""The server over real sockets, with a runtime that makes numbers instead of pictures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamgen_infer import protocol as p
from tests.server.fake_runtime import FakeRuntime, picture
from tests.server.harness import Running, Talk, get, serving, wait_for


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "web").mkdir()
    (folder / "web" / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "secret.txt").write_text("secret")
    with serving(lambda: FakeRuntime(max_streams=1000), folder, web=folder / "web", messages_burst=1000.0) as running:
        yield running


def test_a_golden_transcript(tmp_path: Path) -> None:
    """Everything that is said in a short session, in its order, but the numbers of the clock."""
    with serving(lambda: FakeRuntime(make_every_s=None), tmp_path) as running, Talk(running) as talk:
        runtime = running.server.engine
        talk.start(seed=7, id="begin", max_seconds=3.0)
        runtime.make()
        talk.until_frame(11)
        talk.send(
            {
                "type": "session.interaction",
                "id": "switch",
                "interaction": {"event": {"prompt": "b"}, "event_id": "e", "transition": "cut"},
            }
        )
        talk.until(p.InteractionQueued)
        runtime.make(2)
        talk.until_frame(35)
        for message in ("session.pause", "session.play"):
            talk.ask({"type": message})
            talk.until(p.Applied)
        runtime.make(5)
        assert talk.closed() == 1000
    said = [json.loads(message.model_dump_json(exclude_none=True)) for message in talk.said]
    for message in said:
        for name in ("request_id", "resume_token"):
            if name in message:
                message[name] = "..."
        for name in ("slack_seconds",):
            if name in message:
                assert 0.4 < message.pop(name) <= 0.5
    if os.environ.get("STREAMGEN_WRITE_GOLDEN"):
        (Path(__file__).parent / "golden_transcript.json").write_text(json.dumps(said, indent=1) + "\n")
    golden = json.loads((Path(__file__).parent / "golden_transcript.json").read_text())
    assert said == golden
    assert talk.numbers() == list(range(48))
    for header, payload in talk.frames:
        version = int(header.frame >= 12)
        assert (header.prompt_version, header.media_s) == (version, header.frame / 16)
        assert payload == picture(header.frame, 7, version).tobytes()
        assert (header.width, header.height, header.encoding, header.steps) == (16, 16, 4, 4)


@pytest.mark.parametrize(("format", "mime"), [("jpeg", "image/jpeg"), ("webp", "image/webp"), ("m4s", "video/mp4")])
def test_every_encoding_shows_the_picture(running: Running, format: p.Format, mime: str) -> None:

    import av
    import numpy as np
    from PIL import Image

    with Talk(running) as talk:
        start = talk.start(format=format, seed=200, max_seconds=1.5)
        assert start.config.mime.startswith(mime)
        talk.closed()
    media = [(header, payload) for header, payload in talk.frames if header.kind == p.MEDIA]
    assert [header.frame for header, _ in media] == list(range(24))
    if format == "m4s":
        assert talk.frames[0][0].kind == p.INIT
        assert b"avcC" in talk.frames[0][1]
        assert all(payload[4:8] == b"moof" for _, payload in media), "one whole fragment per frame, none held back"
        container = av.open(io.BytesIO(b"".join(payload for _, payload in talk.frames)))
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    else:
        shown = [np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")) for _, payload in media]
    assert len(shown) == 24
    for number, image in enumerate(shown):
        assert np.abs(image.astype(int) - picture(number, 200, 0)).max() < 12


def test_viewers_never_see_each_others_frames(running: Running) -> None:
    talks = [Talk(running) for _ in range(4)]
    for seed, talk in enumerate(talks):
        talk.start(seed=50 + seed)
    for seed, talk in enumerate(talks):
        talk.until_frame(30)
        assert all(payload[1] == 50 + seed for _, payload in talk.frames)
        talk.cut()


def test_resume_loses_and_repeats_no_frame(running: Running) -> None:
    with Talk(running) as first:
        start = first.start(seed=3, drop="stall")
        first.until_frame(20)
        first.cut()
    last = first.frames[-1][0]
    wait_for(lambda: running.server.sessions[start.request_id].connection is None)
    with Talk(running) as second:
        again = {"resume_token": start.resume_token, "last_frame": last.frame, "epoch": last.epoch}
        second.send({"type": "session.resume", **again})
        resumed = second.until(p.VideoStart)
        assert (resumed.request_id, resumed.next_frame, resumed.lost_frames) == (start.request_id, last.frame + 1, 0)
        second.until_frame(last.frame + 60)
    assert first.numbers() + second.numbers() == list(range(second.numbers()[-1] + 1))


def test_a_resume_takes_the_session_from_the_connection_that_has_it(running: Running) -> None:
    with Talk(running) as first, Talk(running) as second:
        start = first.start()
        first.until_frame(2)
        second.send({"type": "session.resume", "resume_token": start.resume_token, "last_frame": 2})
        second.until_frame(3)
        assert first.closed() == p.CLOSE_CODES["replaced"]
        assert first.said[-1].code == "replaced"
        assert second.numbers()[0] == 3


def test_seek_and_branch(running: Running) -> None:
    with Talk(running) as talk:
        talk.start(seed=9)
        talk.until_frame(40)
        talk.send({"type": "session.seek", "position_seconds": 0.75, "id": "back"})
        applied = talk.until(p.Applied, id="back")
        assert (applied.epoch, applied.block) == (1, 1)
        while talk.frames[-1][0].epoch == 0:
            talk.next()
        assert talk.frames[-1][0].frame == 12
        talk.send({"type": "session.branch", "id": "twin"})
        branch = talk.until(p.Applied, id="twin").branch
        with Talk(running) as twin:
            twin.send({"type": "session.start", "branch": branch, "format": "rgb"})
            header = twin.until_frame(0)
            assert header.frame >= 12
            assert twin.frames[0][1] == picture(header.frame, 9, 0).tobytes()


def test_a_recording_holds_what_was_shown(running: Running) -> None:

    import av

    with Talk(running) as talk:
        start = talk.start(max_seconds=30)
        talk.ask({"type": "session.record", "action": "start", "format": "mp4"})
        talk.until_frame(60)
        talk.send({"type": "session.record", "action": "stop", "id": "stop"})
        url = talk.until(p.Applied, id="stop").url
        status, _, body = get(running.http + url)
        assert status == 200
        frames = sum(1 for _ in av.open(io.BytesIO(body)).decode(video=0))
        assert 40 <= frames <= talk.frames[-1][0].frame + 1
        assert get(f"{running.http}/v1/sessions/{start.request_id}/recordings/..%2f..%2fsecret.txt")[0] == 404


def test_a_slow_reader_costs_its_own_frames_and_nobody_elses(tmp_path: Path) -> None:
    """One viewer reads nothing at all: its queue stays bounded, the other one gets every frame."""
    with (
        serving(lambda: FakeRuntime(side=128, make_every_s=0.005), tmp_path) as running,
        Talk(running, max_queue=1) as slow,
        Talk(running) as quick,
    ):
        held = slow.start(queue_seconds=1.0).request_id
        quick.start(seed=1, drop="stall")
        quick.until_frame(1500)
        queue = running.server.sessions[held].queue
        assert queue.dropped_frames > 100
        assert len(queue.waiting) <= 16
        assert queue.bytes_held <= (16 + 160) * 128 * 128 * 3
        assert quick.numbers() == list(range(quick.numbers()[-1] + 1))
        slow.until_frame(max(item.frame for item in queue.waiting))
        gaps = [header for header, _ in slow.frames if header.dropped]
        assert gaps, "it is told what it missed"
        numbers = slow.numbers()
        for before, (header, _) in zip([-1, *numbers], slow.frames, strict=False):
            assert header.frame == before + 1 + header.dropped


def test_the_window_keeps_old_frames_out_of_the_network(running: Running) -> None:
    with Talk(running) as talk:
        start = talk.start(window_seconds=0.5, drop="stall")
        talk.until_frame(3)
        talk.send({"type": "session.playback", "position_seconds": 0.1, "received_frame": 3})
        session = running.server.sessions[start.request_id]
        wait_for(lambda: session.queue._confirms)
        highest = max(item.frame for item in session.queue.sent)
        assert session.queue.open is (highest - 3 < 8)
        talk.send({"type": "session.playback", "position_seconds": 0.1, "received_frame": highest})
        sent = highest + 1 + 8
        wait_for(lambda: session.frames_sent == sent)
        talk.ask({"type": "session.ping"})
        assert session.frames_sent == sent
