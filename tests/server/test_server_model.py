"""The server with the real runtime and a real (tiny) model: pixels, restarts, the command, the client."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgen import StreamPipeline
from streamgen_infer import protocol as p
from streamgen_infer.cli import main
from streamgen_infer.client import Viewer, watch
from streamgen_infer.runtime import Runtime
from streamgen_infer.serve.command import build_runtime
from streamgen_infer.serve.options import Options
from tests.server.harness import Running, Talk, serving, wait_for
from tests.tiny_model import near, save_tiny_model

PROMPT, NEXT = "a red star", "two blue rings"
SIDE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def engine(model: Path) -> Runtime:
    return Runtime(StreamPipeline.from_pretrained(model, dtype="fp32"), admission=False, max_streams=4)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(lambda: engine(model), tmp_path_factory.mktemp("work")) as running:
        yield running


def alone(model: Path, seed: int, switch_block: int | None, frames: int) -> np.ndarray:
    """The same video by StreamPipeline, without any server."""
    stream = StreamPipeline.from_pretrained(model, dtype="fp32").stream(PROMPT, seed=seed, steps=2)
    if switch_block is not None:
        stream.prompt(NEXT, "recache", at_block=switch_block)
    return np.concatenate([next(stream).frames for _ in range(-(-frames // 12))])[:frames]


def pixels(talk: Talk) -> np.ndarray:
    return np.stack([np.frombuffer(payload, np.uint8).reshape(SIDE, SIDE, 3) for _, payload in talk.frames])


def test_what_is_served_is_what_the_pipeline_makes(running: Running, model: Path) -> None:
    with Talk(running) as talk:
        talk.start(prompt=PROMPT, seed=5, steps=2, drop="stall")
        talk.until_frame(14)
        queued = talk.ask({"type": "session.interaction", "interaction": {"event": {"prompt": NEXT}}})
        talk.until_frame(12 * (queued.block + 2) - 1)
        assert talk.numbers() == list(range(12 * (queued.block + 2)))
        assert near(pixels(talk), alone(model, 5, queued.block, len(talk.frames)))
        versions = [header.prompt_version for header, _ in talk.frames]
        assert versions == [int(number >= 12 * queued.block) for number in talk.numbers()]


def test_unknown_words_are_the_clients_mistake(running: Running) -> None:
    with Talk(running) as talk:
        talk.start(prompt=PROMPT)
        error = talk.ask({"type": "session.interaction", "interaction": {"event": {"prompt": "zzz qqq"}}})
        assert isinstance(error, p.Error) and error.code == "bad_request"
        talk.until_frame(20)


def test_a_word_that_is_left_out_is_named_to_the_viewer(running: Running) -> None:
    with Talk(running) as talk:
        started = talk.start(prompt=f"{PROMPT} zzz", steps=3)
        assert any("zzz" in warning for warning in started.warnings)
        assert any("2 or 4 steps, not 3" in warning for warning in started.warnings)
        queued = talk.ask({"type": "session.interaction", "interaction": {"event": {"prompt": f"{NEXT} qqq"}}})
        (warning,) = queued.warnings
        assert "qqq" in warning and "zzz" not in warning


def test_a_prompt_at_the_playhead_replaces_what_was_not_shown(running: Running, model: Path) -> None:
    with Talk(running) as talk:
        talk.start(prompt=PROMPT, seed=2, steps=2, streaming_buffer_seconds=5.0, drop="stall", queue_seconds=8.0)
        talk.until_frame(50)
        talk.send({"type": "session.playback", "position_seconds": 0.5, "received_frame": talk.frames[-1][0].frame})
        change = {"event": {"prompt": NEXT}, "apply_at": "playhead"}
        queued = talk.ask({"type": "session.interaction", "interaction": change})
        applied = talk.until(p.InteractionApplied)
        assert (applied.epoch, applied.block) == (1, queued.block)
        while talk.frames[-1][0].epoch == 0:
            talk.next()
        first = talk.frames[-1][0]
        assert first.frame == 12 * queued.block < 50
        while talk.frames[-1][0].frame < first.frame + 11:
            talk.next()
        shown = {header.frame: payload for header, payload in talk.frames}  # later epochs replace earlier ones
        expected = alone(model, 2, queued.block, first.frame + 12)
        for number, image in enumerate(expected):
            assert near(np.frombuffer(shown[number], np.uint8), image.reshape(-1)), number


def test_uploaded_state_goes_on_and_a_broken_one_is_refused(running: Running, model: Path, tmp_path: Path) -> None:
    stream = StreamPipeline.from_pretrained(model, dtype="fp32").stream(PROMPT, seed=8, steps=2)
    next(stream)
    stream.save_state(tmp_path / "state")
    body = (tmp_path / "state").read_bytes()

    def upload(data: bytes) -> str:
        import json

        request = urllib.request.Request(running.http + "/v1/branches", data, method="POST")
        with urllib.request.urlopen(request) as answer:
            return str(json.loads(answer.read())["branch"])

    with Talk(running) as talk:
        talk.send({"type": "session.start", "branch": upload(body), "steps": 2, "format": "rgb"})
        talk.until_frame(23)
        assert talk.numbers()[0] == 12
        assert near(pixels(talk)[:12], alone(model, 8, None, 24)[12:])
    with pytest.raises(urllib.error.HTTPError, match="400"):
        upload(body[:-100])
    broken = body.replace(b'"position": 1', b'"position":"x"') if b'"position": 1' in body else None
    broken = broken or body.replace(b'\\"position\\": 1', b'\\"position\\":[]')
    assert broken != body and len(broken) == len(body)
    with Talk(running) as talk:
        talk.send({"type": "session.start", "branch": upload(broken), "format": "rgb"})
        assert talk.closed() in (4400, 1011)
    assert running.server.ready is None
    with Talk(running) as talk:
        talk.start(prompt=PROMPT)
        talk.until_frame(3)


def test_the_document_example(running: Running, repository: Path) -> None:
    """The 15 lines of docs/protocol.md run as they stand, against this server."""
    text = (repository / "docs" / "protocol.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    assert len(example.strip().splitlines()) <= 17
    code = example.replace("ws://127.0.0.1:8765", running.url).replace("== 160", "== 60").replace("== 40", "== 6")
    exec(compile(code, "docs/protocol.md", "exec"), {"__name__": "example", "print": lambda *values: None})


def test_watch_without_asyncio(running: Running) -> None:
    frames = list(watch(running.url, seconds=1.5, prompt=PROMPT, format="rgb"))
    assert [frame.header.frame for frame in frames] == list(range(24))
    assert frames[0].rgb().shape == (SIDE, SIDE, 3)


def test_drain_and_restart_continue_bit_by_bit(model: Path, tmp_path: Path) -> None:
    """SIGTERM's path: the client is told, knocks until the next server is there, and misses no frame."""

    async def view(first: Running, ready: Any, numbers: list[int], shown: list[bytes]) -> Viewer:
        viewer = Viewer(first.url, prompt=PROMPT, seed=4, steps=2, format="rgb", drop="stall", playback=True)
        async with viewer:
            async for frame in viewer.frames():
                numbers.append(frame.header.frame)
                shown.append(frame.payload)
                if frame.header.frame == 18:
                    ready.set()
                if frame.header.frame >= 70:
                    break
        return viewer

    import threading

    port = free_port()
    ready, numbers, shown = threading.Event(), list[int](), list[bytes]()
    results: list[Viewer] = []
    with serving(lambda: engine(model), tmp_path, save_dir=tmp_path / "saved", retry_s=1.0, port=port) as first:
        thread = threading.Thread(target=lambda: results.append(asyncio.run(view(first, ready, numbers, shown))))
        thread.start()
        assert ready.wait(20)
        first.call(first.server.drain())
        assert list((tmp_path / "saved").glob("*.safetensors"))
    with serving(lambda: engine(model), tmp_path, save_dir=tmp_path / "saved", port=port) as second:
        thread.join(30)
        assert not thread.is_alive()
        wait_for(lambda: not second.server.sessions)
    assert results[0].resumed == 1
    codes = [message.code for message in results[0].messages if isinstance(message, p.Error)]
    assert "draining" in codes
    assert numbers == list(range(71))
    assert b"".join(shown) == alone(model, 4, None, 71).tobytes()
    assert not list((tmp_path / "saved").iterdir()), "a session that is over leaves nothing"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def command(model: Path, port: int, saved: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`streamgen serve` as a process of its own, ready."""
    arguments = ["serve", "--port", str(port), "--model", str(model), "--dtype", "fp32", "--threads", "1"]
    arguments += ["--no-admission", "--max-streams", "1", "--save-dir", str(saved), "--save-every", "0.5", "--log-json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "streamgen", *arguments], env=environment, cwd=saved.parent)
    try:

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        wait_for(ready, 120)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_weights_in_bytes(model: Path, name: str) -> None:
    """The command's own runtime; its viewers get what such a pipeline streams."""
    runtime = build_runtime(Options(model=str(model), dtype="fp32", weights_dtype=name, admission=False))
    assert runtime.pipe.weights_dtype == name
    alike, plain = (StreamPipeline.from_pretrained(model, dtype="fp32", weights_dtype=w) for w in (name, None))
    served, wanted, other = (next(pipe.stream(PROMPT, seed=3)).frames for pipe in (runtime.pipe, alike, plain))
    assert np.array_equal(served, wanted) and not np.array_equal(served, other)


def test_weights_that_there_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--weights-dtype", "int4"]) == 2
    assert "--weights-dtype 'int4' does not exist; there are: int8, fp8" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_restarted_it_goes_on_bit_by_bit(model: Path, tmp_path: Path) -> None:
    """kill -9 of the real command, with a prompt accepted just before: the viewer sees one video without a seam."""
    saved, port = tmp_path / "saved", free_port()

    async def scenario() -> tuple[Viewer, list[int], bytes, int]:
        numbers, shown = list[int](), list[bytes]()
        processes = [command(model, port, saved)]
        process = await asyncio.to_thread(processes[0].__enter__)
        start: dict[str, Any] = {"prompt": PROMPT, "seed": 6, "steps": 2, "format": "rgb", "drop": "stall"}
        viewer = Viewer(f"http://127.0.0.1:{port}", retry_s=90, **start)
        block = 0
        async with viewer:
            async for frame in viewer.frames():
                numbers.append(frame.header.frame)
                shown.append(frame.payload)
                if frame.header.frame == 40:
                    answer = await viewer.prompt(NEXT)
                    assert isinstance(answer, p.InteractionQueued)
                    block = answer.block
                    await asyncio.to_thread(wait_for, lambda: list(saved.glob("*.safetensors")))
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    processes.append(command(model, port, saved))
                    process = await asyncio.to_thread(processes[1].__enter__)
                if block and frame.header.frame >= 12 * block + 20:
                    break
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        for one in processes:
            one.__exit__(None, None, None)
        return viewer, numbers, b"".join(shown), block

    viewer, numbers, shown, block = asyncio.run(scenario())
    assert viewer.resumed == 1
    assert numbers == list(range(numbers[-1] + 1))
    assert shown == alone(model, 6, block, len(numbers)).tobytes()
