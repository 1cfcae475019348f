"""Fuzzed talk and broken connections, a few here; many with STREAMGEN_FUZZ=100000 and STREAMGEN_CYCLES=10000.

STREAMGEN_FUZZ=100000 STREAMGEN_CYCLES=10000 python -m pytest -s tests/server/test_soak.py
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from streamgen import StreamPipeline
from streamgen_infer import protocol as p
from streamgen_infer.machine import rss_mb
from streamgen_infer.runtime import Runtime
from streamgen_infer.serve.connection import Connection
from streamgen_infer.serve.session import Session
from streamgen_infer.serve.viewer_queue import QueuedFrame
from tests.server.broken_viewers import WAYS, Client
from tests.server.fake_runtime import FakeRuntime
from tests.server.fuzzed import frames, messages
from tests.server.harness import START, Running, Talk, serving, wait_for
from tests.server.wireless import Wire, application
from tests.tiny_model import save_tiny_model

FUZZ = int(os.environ.get("STREAMGEN_FUZZ", "300"))
CYCLES = int(os.environ.get("STREAMGEN_CYCLES", "45"))
TALK = 40
"""Messages of one conversation, at most."""
ROUND = 300
"""Examples that hypothesis remembers together: it keeps what it has seen, which is no leak of the server."""
GROWTH_MB = 24
"""Of the process, over the second half of a long run; pytest, hypothesis and the allocator have some of it."""
KINDS = (Session, Connection, QueuedFrame)


def held() -> dict[str, int]:
    """Objects of the server that are alive."""
    gc.collect()
    return dict(Counter(type(one).__name__ for one in gc.get_objects() if type(one) in KINDS))


def grown(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """Of what there is more. Less is no fault: other tests of this process may have left what goes only now."""
    return {name: count - before.get(name, 0) for name, count in now.items() if count > before.get(name, 0)}


def rounds(count: int, per_example: int) -> range:
    return range(-(-count // (ROUND * per_example)))


class Memory:
    """Resident memory after each part of a run: its growth over the second half is what is judged."""

    def __init__(self) -> None:
        self.mb: list[float] = []

    def look(self) -> None:
        gc.collect()
        self.mb.append(rss_mb() or 0.0)

    @property
    def growth_mb(self) -> float:
        return self.mb[-1] - self.mb[len(self.mb) // 2]


class Errors(logging.Handler):
    """What was logged as an error: a server that only looks unharmed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")


@pytest.fixture
def errors() -> Iterator[list[str]]:
    handler, loggers = Errors(), [logging.getLogger(name) for name in ("streamgen.serve", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.lines
    for logger in loggers:
        logger.removeHandler(handler)


def tell(what: str, count: int, since_s: float, memory: Memory) -> None:
    print(
        f"\n{what}: {count} in {time.monotonic() - since_s:.0f} s, memory {memory.mb[0]:.0f} -> {memory.mb[-1]:.0f} MB"
    )


# Texts and bytes by themselves.


def test_any_text_is_a_message_or_a_typed_refusal_and_any_bytes_a_frame() -> None:
    memory, since_s, seen = Memory(), time.monotonic(), Counter[str]()

    def check(text: str, wire: bytes) -> None:
        for parse in (p.parse_client, p.parse_server):
            try:
                seen[parse(text).type] += 1
            except p.Refusal as refusal:
                assert refusal.code in ("bad_message", "too_large") and str(refusal)
                assert p.parse_server(p.error_of(refusal).model_dump_json()).code == refusal.code
                seen[refusal.code] += 1
        try:
            header, payload = p.unpack_frame(wire)
        except p.Refusal as refusal:
            assert refusal.code == "bad_message"
            seen["no frame"] += 1
        else:
            assert header.byte_length == len(payload)
            seen["frame"] += 1

    for number in rounds(FUZZ, 1):
        run = settings(max_examples=ROUND, suppress_health_check=list(HealthCheck))(given(messages(), frames())(check))
        seed(number)(run)()
        memory.look()
    assert seen["frame"] and seen["no frame"] and seen["bad_message"] and seen["session.seek"]
    assert memory.growth_mb < GROWTH_MB
    tell("texts and frames", len(rounds(FUZZ, 1)) * ROUND, since_s, memory)


# Talk with a server.


def test_fuzzed_talk_is_answered_by_type_and_leaves_nothing(tmp_path: Path, errors: list[str]) -> None:
    """Every message that is one has its answer, every other one its error; then nothing is left of any of them."""
    memory, since_s, sent = Memory(), time.monotonic(), Counter[str]()
    held_before, threads = held(), threading.active_count()
    with asyncio.Runner() as runner:
        fuzz_a_server(runner, tmp_path, sent, memory)
    assert memory.growth_mb < GROWTH_MB
    assert threading.active_count() <= threads + 2
    assert not grown(held_before, held()) and not errors
    assert sent["answered"] and sent["refused"] and sent["ended"]
    tell(f"messages {dict(sent)}", sent["messages"], since_s, memory)


def fuzz_a_server(runner: asyncio.Runner, folder: Path, sent: Counter[str], memory: Memory) -> None:
    runtime = FakeRuntime(max_streams=1000, make_every_s=None)
    stack = application(runtime, folder, messages_per_s=1e9, messages_burst=1e9, resume_s=0.0)
    server, app = runner.run(stack.__aenter__())
    tasks_before = len(asyncio.all_tasks(runner.get_loop()))

    def conversation(talk: list[str], acts: list[int]) -> None:
        runner.run(speak(app, runtime, talk, acts, sent))

    talks = given(st.lists(messages(), min_size=TALK // 2, max_size=TALK), st.lists(st.integers(0, 3)))
    number = 0
    while sent["messages"] < FUZZ:
        run = settings(max_examples=ROUND // 10, suppress_health_check=list(HealthCheck))(talks(conversation))
        seed(number)(run)()
        runner.run(forgotten(server))
        runtime.opened.clear()
        number += 1
        memory.look()
    runner.run(few_tasks(tasks_before + 1))  # and the one that counts
    assert not server.sessions and not server.connections and not runtime.streams
    assert len(server.branches) <= server.settings.branches
    assert server.ready is None
    runner.run(stack.__aexit__(None, None, None))


async def speak(app: Any, runtime: FakeRuntime, talk: list[str], acts: list[int], sent: Counter[str]) -> None:
    """One conversation; a connection that the server ends for its strikes is followed by another."""
    waiting, turns = list(talk), list(acts)
    while waiting:
        wire = Wire(app)
        await wire.send(json.dumps({**START, "format": "rgb"}))
        await wire.until(p.VideoStart)
        expected, refused = list[str](), 0
        while waiting and not wire.over and wire.close_code is None:
            text = waiting.pop()
            try:
                message = p.parse_client(text)
                if name := getattr(message, "id", None):
                    expected.append(name)
            except p.Refusal:
                refused += 1
            await wire.send(text)
            sent["messages"] += 1
            if turns and turns.pop() == 0:
                runtime.make()
        for _ in range(3):
            await asyncio.sleep(0)
        if wire.close_code is None:
            await wire.send({"type": "session.ping", "id": "the-last"})
            while not (
                wire.over or wire.close_code or any(getattr(one, "id", None) == "the-last" for one in wire.said)
            ):
                await asyncio.sleep(0)
        errors = [one for one in wire.said if isinstance(one, p.Error)]
        assert all(one.code in p.CLOSE_CODES for one in errors)
        assert "internal" not in [one.code for one in errors]
        if wire.close_code is None:
            answers = Counter(getattr(one, "id", None) for one in wire.said)
            assert all(answers[name] for name in expected), (expected, wire.said)
            assert sum(one.id is None for one in errors) >= refused
        sent["answered"] += len(expected)
        sent["refused"] += len(errors)
        sent["ended"] += wire.close_code is not None
        await wire.cut()


async def forgotten(server: Any) -> None:
    """Until sessions without a viewer are given up."""
    server._poke.set()
    until_s = time.monotonic() + 20
    while server.sessions or server.connections:
        assert time.monotonic() < until_s, server.sessions
        await asyncio.sleep(0.005)


async def few_tasks(most: int) -> None:
    """Until what the server does now and then (giving memory back) is done."""
    until_s = time.monotonic() + 20
    while len(asyncio.all_tasks()) > most:
        assert time.monotonic() < until_s, asyncio.all_tasks()
        await asyncio.sleep(0.005)


# Connections that break.


def test_broken_connections_leave_nothing(tmp_path: Path, errors: list[str]) -> None:
    """Mid-handshake, mid-message, mid-stream, closed or cut, resumed or not: sockets, tasks and sessions go."""
    with serving(
        lambda: FakeRuntime(max_streams=4000, make_every_s=0.02), tmp_path, resume_s=0.1, start_s=5.0
    ) as running:
        cycles(running, CYCLES, "fake runtime")
    assert not errors


def test_broken_connections_leave_nothing_of_real_streams(tmp_path: Path, errors: list[str]) -> None:
    """The same with a runtime and a (tiny) model: streams of viewers who are gone free their place and their memory."""
    model = save_tiny_model(tmp_path / "model")

    def engine() -> Runtime:
        return Runtime(StreamPipeline.from_pretrained(model, dtype="fp32"), admission=False)

    with serving(engine, tmp_path, resume_s=0.1, start_s=5.0) as running:
        cycles(running, max(len(WAYS) * 2, CYCLES // 10), "real runtime")
        wait_for(lambda: running.server.engine.stats().bytes_held == 0)
    assert not errors


def cycles(running: Running, count: int, what: str) -> None:
    client, memory, since_s = Client(running.port), Memory(), time.monotonic()
    server, base = running.server, dict[str, int]()

    def settle() -> dict[str, int]:
        wait_for(lambda: not server.sessions and not server.connections)
        wait_for(lambda: server.engine.stats().streams == 0)
        getattr(server.engine, "opened", []).clear()  # the fake runtime's own memory
        memory.look()
        return {
            "tasks": running.call(count_tasks()),
            "threads": threading.active_count(),
            "sockets": len(os.listdir("/proc/self/fd")),
            **held(),
        }

    done, parts = 0, 10 if count >= 1000 else 3
    for part in range(parts):
        for _ in range(count // parts):
            WAYS[done % len(WAYS)](client)
            done += 1
        if part == 0:
            base.update(settle())  # the pools of threads are full, the modules loaded
            base["threads"] += 8  # of the event loop's own
        wait_for(lambda: not grown(base, settle()))  # a task of the last connection may be about to end
    assert memory.growth_mb < GROWTH_MB
    with Talk(running) as talk:
        talk.start()
        talk.until_frame(13)
    tell(f"connections, {what}", done, since_s, memory)


async def count_tasks() -> int:
    return len([task for task in asyncio.all_tasks() if not task.done()])
