"""What the server refuses and how; its REST routes; the two commands."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from streamgen.errors import UserError
from streamgen_infer import protocol as p
from tests.server.fake_runtime import FakeRuntime
from tests.server.harness import LOCKED, START, Running, Talk, get, refused, serving, wait_for


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "web").mkdir()
    (folder / "web" / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "secret.txt").write_text("secret")
    with serving(lambda: FakeRuntime(max_streams=1000), folder, web=folder / "web", messages_burst=1000.0) as running:
        yield running


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("{", "bad_message"),
        (b"\x00\x01", "bad_message"),
        ({"type": "session.ping"}, "illegal_state"),
        ({"type": "session.start"}, "bad_message"),
        ({**START, "prompt": "unknown"}, "bad_request"),
        ({**START, "branch": "b0"}, "unknown_session"),
        ({**START, "timeline": [{"at_seconds": 2, "prompt": "unknown"}]}, "bad_request"),
        ({"type": "session.resume", "resume_token": "no"}, "unknown_session"),
        (json.dumps({**START, "prompt": "x" * 140_000}), "too_large"),
    ],
)
def test_first_messages_that_are_refused(running: Running, first: Any, code: str) -> None:
    opened = len(running.server.engine.opened)
    assert refused(running, first) == (code, p.CLOSE_CODES[code])  # type: ignore[index]
    assert all(stream.closed for stream in running.server.engine.opened[opened:])


def test_a_message_beyond_the_sockets_limit_ends_the_connection(running: Running) -> None:
    with Talk(running) as talk:
        talk.send("x" * 300_000)
        assert talk.closed() == 1009


def test_without_the_subprotocol(running: Running) -> None:
    assert refused(running, START, subprotocols=None) == ("bad_request", 4400)


def test_other_sites_and_other_names(running: Running) -> None:
    assert refused(running, START, headers={"Origin": "https://evil.example"}) == ("forbidden_origin", 4403)
    with Talk(running, headers={"Origin": running.http}) as talk:
        talk.start()
    assert get(running.http + "/v1/sessions", Origin="https://evil.example")[0] == 403
    assert get(running.http + "/v1/sessions", Host="evil.example")[0] == 403, "DNS rebinding"


def test_tokens_and_quotas(tmp_path: Path) -> None:
    with serving(FakeRuntime, tmp_path, tokens=LOCKED) as running:
        assert refused(running, START) == ("unauthorized", 4401)
        assert refused(running, START, token="secret-x") == ("unauthorized", 4401)
        browser = [p.SUBPROTOCOL, p.TOKEN_SUBPROTOCOL + "secret-b"]
        with Talk(running, token="secret-a") as one, Talk(running, token="secret-a") as two:
            start = one.start()
            two.start()
            assert refused(running, START, token="secret-a") == ("quota", 4429)
            with Talk(running, subprotocols=browser) as other:
                mine = other.start().request_id
                again = {"type": "session.resume", "resume_token": start.resume_token}
                assert refused(running, again, token="secret-b") == ("unknown_session", 4404)
                assert get(running.http + "/v1/sessions")[0] == 401
                assert get(running.http + "/metrics")[0] == 401
                status, _, body = get(running.http + "/v1/sessions", Authorization="Bearer secret-b")
                assert status == 200 and [one["id"] for one in json.loads(body)] == [mine]
                stolen = f"{running.http}/v1/sessions/{start.request_id}"
                assert get(stolen, "DELETE", Authorization="Bearer secret-b")[0] == 404
                assert get(f"{running.http}/v1/sessions/{mine}", "DELETE", Authorization="Bearer secret-b")[0] == 200
                assert other.closed() == 1000


def test_a_full_machine_says_when_to_come_back(tmp_path: Path) -> None:
    with serving(lambda: FakeRuntime(max_streams=1), tmp_path) as running, Talk(running) as first:
        first.start()
        first.until_frame(0)
        with Talk(running) as second:
            second.send(START)
            assert second.closed() == 1013
        error = second.said[-1]
        assert (error.code, error.retry_after_seconds, error.numbers) == ("overload", 2.0, {"streams": 8.0})
        text = get(running.http + "/metrics")[2].decode()
        assert 'streamgen_refusals_total{reason="streams"} 1.0' in text
        assert 'streamgen_sessions{state="playing"} 1.0' in text


def test_too_many_messages(tmp_path: Path) -> None:
    with serving(FakeRuntime, tmp_path, messages_per_s=0.001, messages_burst=5.0) as running, Talk(running) as talk:
        talk.start()
        with suppress(ConnectionClosed):  # the server may end it before the last of them
            for _ in range(40):
                talk.send({"type": "session.ping"})
        assert talk.closed() == p.CLOSE_CODES["rate"]
        pongs = [item for item in talk.said if isinstance(item, p.Pong)]
        errors = [item for item in talk.said if isinstance(item, p.Error)]
        assert len(pongs) == 4
        assert {item.code for item in errors} == {"rate"} and errors[-1].fatal


def test_silence_and_old_age(tmp_path: Path) -> None:
    quiet = {"idle_s": 0.5, "start_s": 0.3, "session_s": 1.0}
    with serving(lambda: FakeRuntime(make_every_s=None), tmp_path, **quiet) as running:
        assert refused(running) == ("idle", 4408)
        assert refused(running, START) == ("idle", 4408)
        with Talk(running) as talk:
            talk.start()
            with pytest.raises(ConnectionClosed):
                while True:
                    talk.send({"type": "session.ping"})
                    talk.until(p.Pong)
                    time.sleep(0.06)
            assert talk.closed() == p.CLOSE_CODES["time_limit"]
            assert talk.said[-1].code == "time_limit"
        wait_for(lambda: not running.server.sessions)
        assert not running.server.engine.streams


def test_a_session_whose_viewer_never_returns_is_given_up(tmp_path: Path) -> None:
    with serving(FakeRuntime, tmp_path, resume_s=0.2) as running:
        with Talk(running) as talk:
            talk.start()
        wait_for(lambda: not running.server.sessions)
        assert not running.server.engine.streams


# REST and the page.


def test_rest(running: Running) -> None:
    assert get(running.http + "/healthz")[0] == 200
    assert get(running.http + "/readyz")[0] == 200
    status, headers, body = get(running.http + "/")
    assert (status, b"page" in body) == (200, True)
    assert "default-src 'self'" in headers["content-security-policy"]
    assert json.loads(get(running.http + "/v1/limits")[2])["trained_steps"] == [4, 2]
    assert "/v1/sessions" in json.loads(get(running.http + "/openapi.json")[2])["paths"]
    assert get(running.http + "/v1/sessions/none")[0] == 404


@pytest.mark.parametrize(
    "path", ["/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//secret.txt", "/....//secret.txt", "/%00"]
)
def test_the_page_is_all_that_is_served(running: Running, path: str) -> None:
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := raw.recv(65536):
            answer += data
    assert re.match(rb"HTTP/1.1 40[04]", answer), answer[:80]
    assert b"secret" not in answer.split(b"\r\n\r\n", 1)[1]


def test_not_ready_until_the_engine_is(tmp_path: Path) -> None:
    with serving(FakeRuntime, tmp_path) as running:
        server = running.server
        engine, server.engine = server.engine, None
        status, _, body = get(running.http + "/readyz")
        assert status == 503 and b"warming up" in body
        assert refused(running, START) == ("not_ready", 1013)
        server.engine = engine
        assert get(running.http + "/readyz")[0] == 200


def test_fuzzed_talk_never_breaks_the_server(running: Running) -> None:
    """2000 messages that are nearly right, over 40 connections: each is answered by type, then a new viewer plays."""
    random.seed(5)
    positions: list[Any] = [0, 1e9, -1, 0.5, "x", None]
    messages = [{"type": "session.seek", "position_seconds": position} for position in positions]
    for name in ("pause", "play", "branch", "ping", "steps", "record"):
        messages.append({"type": f"session.{name}"})
    for action in ("start", "stop", "halt"):
        messages.append({"type": "session.record", "action": action})
    for prompt in ("b", "unknown", ""):
        messages.append({"type": "session.interaction", "interaction": {"event": {"prompt": prompt}}})
    messages += [{"type": "session.steps", "steps": steps} for steps in (2, 99)]
    words = [json.dumps(message) for message in messages] + ["{", "null", '"', "\x00", "[[["]
    sent = 0
    for round in range(40):
        with Talk(running) as talk:
            if round % 4:
                talk.start()
            try:
                for _ in range(50):
                    word = random.choice(words)
                    if random.random() < 0.3:
                        at = random.randrange(len(word))
                        word = word[:at] + chr(random.randrange(32, 1000)) + word[at + 1 :]
                    talk.send(word.encode() if random.random() < 0.02 else word)
                    sent += 1
            except ConnectionClosed:
                pass
            talk.cut()
        assert all(isinstance(one, p.Message) for one in talk.said)
    assert sent > 500
    with Talk(running) as talk:
        talk.start()
        talk.until_frame(20)
    assert running.server.ready is None


def test_uploaded_states(running: Running) -> None:
    url = running.http + "/v1/branches"
    assert get(url, "POST", b"x" * 100)[0] == 400
    assert get(url, "POST", b"\x00", Content_Encoding="gzip")[0] == 400, "a bomb is not unpacked"
    huge_header = (2**62).to_bytes(8, "little") + b"{}"
    assert get(url, "POST", huge_header)[0] == 400
    assert get(url, "POST", b"x" * (64 * 2**20 + 1))[0] == 413
    assert get(url + "/none")[0] == 404


def test_load_reports_what_viewers_saw(running: Running, tmp_path: Path) -> None:
    """The command against a server: all served, all frames, prompts applied; a full server is counted, not hidden."""
    from streamgen_infer.serve import load

    (tmp_path / "prompts").write_text("# two scenes\n0=a red star\n1.5=two blue rings\n")
    options = {"timeline": tmp_path / "prompts", "per_second": 50.0, "seconds": 30.0, "json": tmp_path / "load.json"}
    assert load.run(load.Options(url=running.url, sessions=3, **options)) == 0  # type: ignore[arg-type]
    values = json.loads((tmp_path / "load.json").read_text())
    assert (values["served"], values["refused"], values["failed"]) == (3, {}, [])
    assert values["frames"] + values["dropped_frames"] == 3 * 480
    assert 0 < values["ttff_s"]["p50"] <= values["ttff_s"]["p99"] <= values["ttff_s"]["max"]
    assert values["control_latency_s"]["max"] > 0
    with serving(lambda: FakeRuntime(max_streams=1, make_every_s=0.2), tmp_path) as small:
        load.run(load.Options(url=small.url, sessions=3, overwrite=True, **{**options, "seconds": 2.0}))  # type: ignore[arg-type]
    values = json.loads((tmp_path / "load.json").read_text())
    assert (values["served"], values["refused"]) == (1, {"overload": 2})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "127.0.0.1"}, "no address of a server"),
        ({"url": "ws://x", "sessions": 0}, "--sessions is 0"),
        ({"url": "ws://x", "format": "png"}, "--format 'png'"),
    ],
)
def test_load_refuses(options: Any, words: str) -> None:
    from streamgen_infer.serve import load

    with pytest.raises(UserError, match=words):
        load.check(load.Options(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "opens the server to other machines"),
        ({"host": "example.org"}, "opens the server to other machines"),
        ({"token": "short"}, "a token has 8 to 128"),
        ({"port": 70000}, "--port is 70000"),
        ({"origins": ("example.org",)}, "--origin 'example.org'"),
        ({"token_file": Path("/none")}, "not readable"),
        ({"dtype": "fp8"}, "--dtype 'fp8'"),
        ({"weights_dtype": "int4"}, "--weights-dtype 'int4' does not exist; there are: int8, fp8"),
    ],
)
def test_serve_refuses_before_anything_is_loaded(options: Any, words: str) -> None:
    from streamgen_infer.serve.options import Options, check

    with pytest.raises(UserError, match=words):
        check(Options(**options))


def test_open_to_others_only_with_a_token(tmp_path: Path) -> None:
    from streamgen_infer.serve.options import Options, check

    (tmp_path / "tokens").write_text("# who may\nann secret-of-ann 3\nbob secret-of-bob\n")
    tokens = check(Options(host="0.0.0.0", token_file=tmp_path / "tokens", max_sessions=7))
    assert [(quota.owner, quota.sessions) for quota in tokens.quotas.values()] == [("ann", 3), ("bob", 7)]
    assert not check(Options(host="::1")).quotas
