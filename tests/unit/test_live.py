"""`streamgen live`: lines and keys as pure functions, playback by a clock, and the command on a tiny real model."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen_infer.cli import main
from streamgen_infer.live.lines import Editor, Line, Manner, parse_line
from streamgen_infer.live.playback import Playback
from streamgen_infer.live.screen import PlainFace, ScreenFace, Standing, half_blocks, shrunk
from streamgen_infer.requests import MadeBlock
from tests.command_line import RING, STAR, mp4_frames, y4m_frames
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


# Lines and keys.


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (STAR, Line(command="prompt", text=STAR)),
        (f" 2.5 = {RING} ", Line(command="prompt", text=RING, at_s=2.5)),
        ("/pause", Line(command="pause")),
        ("3=/play", Line(command="play", at_s=3)),
        ("/SEEK 4.5", Line(command="seek", number=4.5)),
        ("/back 2", Line(command="back", number=2)),
        ("/steps auto", Line(command="steps")),
        ("/steps 2", Line(command="steps", number=2)),
        ("/blend", Line(command="blend", number=4)),
        ("/blend 6", Line(command="blend", number=6)),
        ("a=b", Line(command="prompt", text="a=b")),
    ],
)
def test_lines(typed: str, line: Line) -> None:
    assert parse_line(typed) == line


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("", "nothing to show"),
        ("3=", "nothing to show"),
        ("/sing", "/sing does not exist"),
        ("/pause 3", "takes nothing"),
        ("/seek", "a number of at least 0"),
        ("/seek -1", "a number of at least 0"),
        ("/seek nan", "a number of at least 0"),
        ("/steps 1.5", "a whole number from 1"),
        ("/blend 65", "from 1 to 64"),
    ],
)
def test_lines_that_are_none(typed: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_line(typed)


def test_a_transition_holds_for_the_next_prompts() -> None:
    manner = Manner()
    assert not manner.obey(parse_line("/pause"))
    assert manner.obey(parse_line("/blend 6")) and manner == Manner("blend", 6)
    assert manner.obey(parse_line("/cut")) and manner == Manner("cut", 6)


def test_keys_make_lines() -> None:
    editor = Editor()
    assert editor.feed(b"a red stxar\x1b[D\x1b[D\x7f\r") == ["a red star"]
    assert editor.feed("été\n".encode()) == ["été"]
    assert editor.feed("é".encode()[:1]) == [] and editor.feed("é".encode()[1:] + b"\x1b") == []
    assert editor.feed(b"[") == [] and editor.feed(b"A\n") == ["été"]  # an arrow in three pieces: the line before
    assert editor.feed(b"one two three\x17\x17four\x01>\x05<\n") == [">one four<"]
    assert editor.feed(b"gone\x15\x1b[A\x1b[A\x1b[B\n") == [">one four<"]
    assert editor.feed(b"draft\x1b[A\x1b[B!\x1b[3~\x1b[5~\n\n") == ["draft!", ""]
    assert editor.text == "" and editor.cursor == 0


@pytest.mark.parametrize("piece", [1, 2, 3])
def test_keys_may_come_in_pieces(piece: int) -> None:
    data = "ü\x1b[Dö\x1b[3~\x1b[C猫\x01\x1bOCx\r\n".encode()
    whole, pieces = Editor(), Editor()
    wanted = whole.feed(data)
    found = [line for at in range(0, len(data), piece) for line in pieces.feed(data[at : at + piece])]
    assert found == wanted and wanted[0] == "öx猫"


# Playback.


def block(index: int, *, epoch: int = 0, first: int | None = None, frames: int = 4) -> MadeBlock:
    first = 4 * index if first is None else first
    pictures = np.full((frames, 2, 2, 3), 10 * epoch + index, np.uint8)
    pictures[:, 0, 0, 0] = np.arange(first, first + frames)
    return MadeBlock(
        epoch=epoch,
        index=index,
        frames=pictures,
        first_frame=first,
        media_s=first / 8,
        due_at_s=0.0,
        ready_at_s=0.0,
        steps=2,
        prompt_version=0,
    )


def taken(playback: Playback, now_s: float) -> list[tuple[int, int]]:
    """(number, epoch) of all that is due now."""
    found = []
    while (frame := playback.take(now_s)) is not None:
        assert frame.frame_HWC[0, 0, 0] == frame.number
        found.append((frame.number, frame.block.epoch))
    return found


def test_frames_come_at_their_time_and_none_is_skipped() -> None:
    playback = Playback(fps=8)
    assert taken(playback, 100.0) == [] and playback.next_due_s() == np.inf
    playback.add(block(0))
    assert taken(playback, 100.0) == [(0, 0)] and playback.next_due_s() == 100.125
    assert taken(playback, 100.1) == []
    assert taken(playback, 100.25) == [(1, 0), (2, 0)]  # a little late: the clock stays
    assert taken(playback, 100.375) == [(3, 0)]
    assert taken(playback, 103.0) == []  # a stall
    playback.add(block(1))
    assert taken(playback, 103.0) == [(4, 0)] and playback.next_due_s() == 103.125
    playback.paused = True
    assert taken(playback, 110.0) == []
    playback.paused = False
    assert taken(playback, 110.0) == [(5, 0)]


def test_a_newer_epoch_replaces_what_was_not_shown() -> None:
    playback = Playback(fps=8)
    playback.add(block(0))
    playback.add(block(1))
    taken(playback, 0.0)
    playback.add(block(1, epoch=1))
    playback.add(block(1))  # of the older epoch, and too late
    assert [(w.number, w.block.epoch) for w in playback.waiting] == [
        *((n, 0) for n in (1, 2, 3)),
        *((n, 1) for n in range(4, 8)),
    ]
    playback.turn(2, 2)
    playback.add(block(2, epoch=1))
    assert not playback.waiting and playback.position == 2
    playback.add(block(0, epoch=2, first=2, frames=2))
    assert taken(playback, 50.0)[0] == (2, 2)


# The screen.


def test_half_blocks_hold_two_pixels_each() -> None:
    picture = np.zeros((4, 3, 3), np.uint8)
    picture[0, 0], picture[1, 0], picture[3, 2] = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    lines = half_blocks(picture, 10, 10, "truecolor")
    assert [line.count("▀") for line in lines] == [3, 3]
    assert lines[0].startswith("\x1b[38;2;248;0;0;48;2;0;0;248m▀\x1b[38;2;0;0;0;48;2;0;0;0m▀▀")
    assert lines[1].endswith("48;2;248;248;248m▀\x1b[0m")
    assert half_blocks(picture, 10, 10, "256")[0].startswith("\x1b[38;5;196;48;5;21m▀")


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(64, 64, 20, 80), (48, 83, 11, 30), (5, 7, 1, 1)])
def test_pictures_are_shrunk_to_fit(height: int, width: int, rows: int, columns: int) -> None:
    picture = np.full((height, width, 3), 77, np.uint8)
    small = shrunk(picture, 2 * rows, columns)
    assert small.shape[0] % 2 == 0 and small.shape[0] <= 2 * rows and small.shape[1] <= columns
    assert (small == 77).all() and small.dtype == np.uint8


def test_the_screen_keeps_notes_and_shows_what_is_typed() -> None:
    file = io.StringIO()
    face = ScreenFace(file, "truecolor")
    editor = Editor()
    editor.feed(b"a blue ri")
    standing = Standing(state="playing", media_s=3.25, rate=15.9, slack_s=-0.2, steps=4, late=1, received=2, shown=1)
    face.show(np.zeros((4, 4, 3), np.uint8), standing, editor)
    face.note("prompt 2 \x1b[31mreceived")
    face.close()
    text = file.getvalue()
    assert "playing 3.2 s  16 fps  slack -0.20 s  4 steps  1 late  prompt 1, 2 received" in text
    assert "> a blue ri\x1b[J\x1b[12G" in text  # the cursor stands behind the last letter
    assert "\x1b[4A\r\x1b[Jprompt 2 [31mreceived\n" in text  # over the picture's two rows and two lines
    assert "\x1b[31m" not in text


# The command.


def run_live(model: str, *arguments: str, lines: str = "", monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["live", "--model", model, "--dtype", "fp32", "--fps", "96", *arguments])


def test_the_file_holds_what_the_library_makes(
    model: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 4 * 12 / 96
    assert (
        run_live(model, STAR, "--seed", "3", "--seconds", str(seconds), "--out", "a.y4m", monkeypatch=monkeypatch) == 0
    )
    stream = StreamPipeline.from_pretrained(model, dtype="fp32").stream(STAR, seed=3, max_blocks=4)
    frames = np.concatenate([made.frames for made in stream])
    assert len(y4m_frames("a.y4m")) == 48
    captured = capsys.readouterr()
    assert "48 frames, 0.5 s" in captured.out and "a.y4m" in captured.out
    assert len(frames) == 48
    assert (
        run_live(model, STAR, "--seed", "3", "--seconds", str(seconds), "--out", "pngs", monkeypatch=monkeypatch) == 0
    )
    from PIL import Image

    found = np.stack([np.asarray(Image.open(f"pngs/{index:06d}.png")) for index in range(48)])
    assert np.array_equal(found, frames)


def test_the_cache_is_the_models_own(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_tiny_model(in_tmp_path / "m") / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "positions": "window"}))
    assert run_live("./m", STAR, "--seconds", "0.625", "--out", "pngs", monkeypatch=monkeypatch) == 0
    from PIL import Image

    found = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("pngs").iterdir())])
    pipe = StreamPipeline.from_pretrained("./m", dtype="fp32")
    own, other = (
        np.concatenate([made.frames for made in pipe.stream(STAR, cache=cache, max_blocks=5)])
        for cache in ("window", "relative")
    )
    assert np.array_equal(found, own) and not np.array_equal(own, other)


def test_lines_of_a_pipe_change_the_stream(
    model: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"{STAR}\n0.5={RING}\n/sing\na llama\n1=/quit\n"
    assert run_live(model, "--out", "frames", "--transition", "cut", lines=lines, monkeypatch=monkeypatch) == 0
    err = capsys.readouterr().err
    assert "prompt 1 received: " + RING in err and "prompt 1 holds from 0.5 s" in err
    assert "/sing does not exist" in err and "no word that this model knows" in err
    from PIL import Image

    found = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("frames").iterdir())])
    assert len(found) >= 96
    stream = StreamPipeline.from_pretrained(model, dtype="fp32").stream(STAR, max_blocks=-(-len(found) // 12))
    stream.prompt(RING, "cut", at_block=4)
    assert np.array_equal(found, np.concatenate([made.frames for made in stream])[: len(found)])


def test_back_pause_and_play(
    model: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"{STAR}\n0.6=/back 0.25\n1=/quit\n"
    assert run_live(model, "--out", "frames", lines=lines, monkeypatch=monkeypatch) == 0
    from PIL import Image

    found = np.stack([np.asarray(Image.open(path)) for path in sorted(Path("frames").iterdir())])
    first = StreamPipeline.from_pretrained(model, dtype="fp32").stream(STAR, max_blocks=20)
    made = np.concatenate([block.frames for block in first])
    turn = next(n for n in range(len(found)) if not np.array_equal(found[n], made[n]))
    assert turn >= 57
    again = next(n for n in range(turn) if np.array_equal(made[n], found[turn]))
    assert again == turn - 24  # a quarter of a second before
    assert np.array_equal(found[turn:], made[again : again + len(found) - turn])
    assert "s again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--seconds", "0"], "must be above 0"),
        (["--transition", "fade"], "does not exist; there are: cut"),
        (["--out", "x.avi"], "cannot write .avi"),
        (["--out", "nowhere/x.mp4"], "does not exist"),
        (["--fps", "0"], "--fps is 0.0; it must be 1"),
        ([" "], "the prompt is empty"),
        (["--cache", "x"], "does not exist"),
        (["--device", "x"], "does not exist"),
    ],
)
def test_mistakes_are_said_before_anything_loads(
    arguments: list[str], why: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["live", *arguments]) == 2
    err = capsys.readouterr().err
    assert why in err and len(err.splitlines()) == 1


def test_an_unknown_first_prompt_is_a_mistake(
    model: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_live(model, "llama", "--out", "a.mp4", monkeypatch=monkeypatch) == 2
    assert "no word that this model knows" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_no_lines_and_no_prompt_end_at_once(
    model: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_live(model, "--out", "a.mp4", monkeypatch=monkeypatch) == 0
    assert "there is no frame yet" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_shown(model: str, in_tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamgen", "live", STAR, "--model", model, "--dtype", "fp32", "--out", "a.mp4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(path.stat().st_size > 3000 for path in Path().glob("a.part.mp4")))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "frames" in err and "a.mp4" in err
    assert mp4_frames("a.mp4") >= 12


@pytest.mark.slow
def test_stdout_carries_the_video_alone(model: str, in_tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamgen", "live", STAR, "--model", model, "--dtype", "fp32", "--out", "-"]
    done = subprocess.run([*command, "--fps", "96", "--seconds", "0.25"], input=b"", capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"YUV4MPEG2 ") and done.stdout.count(b"FRAME\n") == 24
    assert b"24 frames" in done.stderr


@pytest.mark.slow
def test_a_terminal_shows_pictures_and_takes_keys(model: str, in_tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamgen", "live", STAR, "--model", model, "--dtype", "fp32"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    leader, follower = pty.openpty()
    seen = bytearray()
    with subprocess.Popen(command, stdin=follower, stderr=follower, env=environment, stdout=subprocess.PIPE) as process:
        os.close(follower)
        reader = threading.Thread(target=drain, args=(leader, seen), daemon=True)
        reader.start()
        wait_for(lambda: "▀".encode() in seen and b"playing" in seen)
        os.write(leader, b"two blue rinks\x7f\x7fgs rising over a navy background")
        wait_for(lambda: b"> two blue rings rising over a navy background" in seen)
        os.write(leader, b"\r")
        wait_for(lambda: b"prompt 1 holds from" in seen)
        os.write(leader, b"/pause\r")
        wait_for(lambda: b"paused" in seen)
        os.write(leader, b"/quit\r")
        assert process.wait(60) == 0
    assert b"prompt 1 received: two blue rings" in seen


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it did not come"
        time.sleep(0.02)


def drain(file: int, into: bytearray) -> None:
    try:
        while data := os.read(file, 65536):
            into.extend(data)
    except OSError:  # the other end is closed
        return


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    face = PlainFace(quiet=True)
    face.note("a line")
    assert capsys.readouterr().err == ""
