"""`streamgen stream` on a tiny real model: what is written, reported, saved and resumed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from streamgen import __version__
from streamgen.cache import POLICIES
from streamgen.pipeline import DTYPES, StreamPipeline
from streamgen.timeline import TRANSITIONS
from streamgen_infer import stream_options
from streamgen_infer.report import StreamFigures, Thinned
from tests import command_line
from tests.command_line import RING, STAR, mp4_frames, one_line, y4m_frames
from tests.tiny_model import save_tiny_model

CONTRACT = (
    *("frames", "fps", "load_s", "ttff_s", "block_ms", "deadline_misses", "peak_rss_mb", "model", "steps"),
    *("schedule", "cache", "device", "dtype", "threads", "seed", "version"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def stream(in_tmp_path: Path, model: str) -> Callable[..., int]:
    return command_line.stream_command(model)


def test_stream_and_report(stream: Callable[..., int], capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert stream(STAR, "--switch", f"1.5={RING}", "--seed", "7", "--report", "r.json", seconds="4", out="a.mp4") == 0
    captured = capsys.readouterr()
    assert "a.mp4: 64 frames, 4 s at 16 fps" in captured.out and "frames per second" in captured.out
    assert "0 of 6 blocks missed their deadline" in captured.out or "of 6 blocks missed" in captured.out
    assert captured.err.splitlines() == [f"loading {model} ...", f"from 0 s: {STAR}", f"from 1.5 s: {RING}"]
    assert mp4_frames("a.mp4") == 64

    report = json.loads(Path("r.json").read_text())
    assert set(CONTRACT) <= report.keys()
    assert (report["frames"], report["blocks"], report["steps"], report["seed"]) == (64, 6, 2, 7)
    assert (report["schedule"], report["cache"], report["device"], report["dtype"]) == (
        "serial",
        "relative",
        "cpu",
        "fp32",
    )
    assert (report["model"], report["version"], report["threads"]) == (model, __version__, 1)
    assert report["interrupted"] is False and report["command"] == "stream"
    assert (
        set(report["block_ms"]) == {"p50", "p95", "p99", "max"}
        and report["block_ms"]["max"] >= report["block_ms"]["p50"]
    )
    assert report["ttff_s"] > 0 and report["load_s"] > 0 and 100 < report["peak_rss_mb"] < 5000
    assert report["process_start_to_first_frame_s"] > report["ttff_s"]
    assert [entry["block"] for entry in report["switches"]] == [2]
    assert [index for index, _ in report["rss_by_block"]] == list(range(6))


def test_frames_are_those_of_the_library(stream: Callable[..., int], model: str) -> None:
    assert stream(STAR, "--switch", f"0.7={RING}", "--transition", "cut", "--seed", "3", seconds="2", out="frames") == 0
    from PIL import Image

    found = np.stack([np.asarray(Image.open(f"frames/{index:06d}.png")) for index in range(32)])
    library = StreamPipeline.from_pretrained(model, dtype="fp32").stream(STAR, seed=3, max_blocks=3)
    library.prompt(RING, "cut", at_block=1)
    assert np.array_equal(found, np.concatenate([block.frames for block in library])[:32])


@pytest.mark.parametrize("seconds", ["0.01", "0.5", "0.75", "1.3"])
def test_length_is_exact(stream: Callable[..., int], seconds: str) -> None:
    assert stream(STAR, "-q", seconds=seconds) == 0
    assert len(y4m_frames("out.y4m")) == max(1, round(16 * float(seconds)))


def test_fps_and_scale(stream: Callable[..., int]) -> None:
    assert stream(STAR, "--fps", "24", "--scale", "2", "--report", "r.json", out="a.mp4") == 0
    with av.open("a.mp4") as container:
        video = container.streams.video[0]
        assert (video.average_rate, video.width, video.height) == (24, 64, 64)
    report = json.loads(Path("r.json").read_text())
    assert (report["frames"], report["media_fps"]) == (24, 24)


def test_quiet_and_default_name(stream: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert stream(STAR, "-q", out=None) == stream(STAR, "-q", out=None) == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(entry.name for entry in Path().iterdir()) == ["stream-2.mp4", "stream.mp4"]


def test_warnings_are_lines(stream: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert stream("a red star zorp", "--steps", "3", "-q") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("streamgen: warning: ") for line in lines)
    assert "trained for 2 or 4 steps, not 3" in lines[0] and "'zorp'" in lines[1]


def test_two_prompts_in_one_block(stream: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert stream(STAR, "--switch", f"1={RING}", "--switch", f"1.1={STAR}", "-q", seconds="3") == 0
    assert "two prompts fall on the block at 1.5 s" in one_line(capsys)


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("cache", POLICIES)
def test_every_transition_and_cache(stream: Callable[..., int], transition: str, cache: str) -> None:
    assert stream(STAR, "--switch", f"1={RING}", "--transition", transition, "--cache", cache, "-q", seconds="3") == 0
    assert len(y4m_frames("out.y4m")) == 48


def test_realtime_is_no_faster_than_the_video(stream: Callable[..., int]) -> None:
    started_s = time.monotonic()
    assert stream(STAR, "--realtime", "-q", seconds="2.25") == 0
    assert time.monotonic() - started_s >= 0.75  # three blocks, one of them ahead of the clock


@pytest.mark.parametrize("first_s", ["1.5", "1.3", "0.1"], ids=["whole blocks", "left over", "within a block"])
def test_resume_equals_never_having_stopped(stream: Callable[..., int], first_s: str) -> None:
    rest_s = str(4 - float(first_s))
    assert stream(STAR, "-q", "--switch", f"2={RING}", seconds="4", out="whole.y4m") == 0
    assert stream(STAR, "-q", "--save-state", "s", seconds=first_s, out="one.y4m") == 0
    switch = f"{2 - float(first_s)}={RING}"
    assert stream("-q", "--resume", "s", "--save-state", "s", "--switch", switch, seconds=rest_s, out="two.y4m") == 0
    assert y4m_frames("one.y4m") + y4m_frames("two.y4m") == y4m_frames("whole.y4m")
    assert stream("-q", "--resume", "s", RING, seconds="1", out="three.y4m") == 0
    assert len(y4m_frames("three.y4m")) == 16


def test_reports_replace_reports_only(stream: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        stream(STAR, "-q", "--report", "r.json", out="1.gif")
        == stream(STAR, "-q", "--report", "r.json", out="2.gif")
        == 0
    )
    Path("r.json").write_text('{"my": "data"}')
    assert stream(STAR, "-q", "--report", "r.json", out="3.gif") == 2
    assert "is no report of streamgen" in one_line(capsys)
    assert Path("r.json").read_text() == '{"my": "data"}'


def test_stdout_carries_nothing_but_video(run_python: Callable[..., Any], model: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "streamgen", "stream", STAR, "--model", model, "--seconds", "1", "--out", "-"]
    done = subprocess.run(program, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"YUV4MPEG2 W32 H32 F16:1 ")
    assert len(done.stdout.split(b"FRAME\n")) == 17
    assert b"stdout: 16 frames" in done.stderr
    assert not list(tmp_path.iterdir())


def test_choices_are_those_of_the_library() -> None:
    assert stream_options.TRANSITIONS == TRANSITIONS
    assert sorted(stream_options.CACHES) == sorted(POLICIES)
    assert ("auto", *DTYPES) == stream_options.DTYPES


def test_existing_files_are_kept(stream: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("out.y4m", "state"):
        Path(name).write_bytes(b"mine")
    assert stream(STAR) == 2
    assert "exists; choose another name or add --overwrite" in one_line(capsys)
    assert stream(STAR, "--save-state", "state", out="other.y4m") == 2
    assert "--save-state state exists" in one_line(capsys)
    assert Path("out.y4m").read_bytes() == Path("state").read_bytes() == b"mine"
    assert stream(STAR, "-q", "--overwrite", "--save-state", "state") == 0
    assert len(y4m_frames("out.y4m")) == 16


def test_resume_refuses_what_does_not_fit(
    stream: Callable[..., int], model: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stream(STAR, "-q", "--seed", "5", "--save-state", "s") == 0
    other = save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    Path("foreign").write_text("no state")
    for arguments, message in (
        (["--resume", "s", "--seed", "6"], "--seed 6: the saved stream goes on with 5"),
        (["--resume", "s", "--steps", "4"], "--steps 4: the saved stream goes on with 2"),
        (["--resume", "s", "--cache", "window"], "--cache window: the saved stream goes on with relative"),
        (["--resume", "s", "--model", str(other)], "belongs to another model"),
        (["--resume", "s", "--dtype", "bf16"], "dtype"),
        (["--resume", "foreign"], "foreign is missing, truncated or not"),
        (["--resume", f"{model}/text/diffusion_pytorch_model.safetensors"], "something else"),
    ):
        assert stream(*arguments, out="more.y4m") == 2
        assert message in one_line(capsys)
    assert not Path("more.y4m").exists()


# Figures.


def test_figures_count_misses_and_medians() -> None:
    figures = StreamFigures(fps=16, accepted_s=10.0)
    now = 10.5
    for block in range(2020):
        late = 1.0 if block in (5, 9) else 0.0  # a block lasts 0.75 s: only these two come after their time
        figures.block(12, now - (0.25 if block < 1000 else 0.5), now + late)
        now += 0.75
    report = figures.report()
    assert (report["ttff_s"], report["deadline_misses"], report["blocks"]) == (0.5, 2, 2020)
    assert report["block_ms_near"] == {"20": 250.0, "2000": 500.0}
    assert report["block_ms"]["max"] == 1250.0 and report["block_ms"]["p50"] == 500.0
    assert len(report["rss_by_block"]) <= 128
    assert figures.slack_s(now - 0.75 + 0.25) == pytest.approx(0.5)


def test_thinned_keeps_an_even_sample() -> None:
    series = Thinned(most=100)
    for value in range(1000):
        series.add(float(value))
    assert series.values == [(value, float(value)) for value in range(0, 1000, 16)]


@pytest.mark.parametrize(("schedule", "visibility"), [("stream_batch", "same_level"), ("rolling", "joint")])
def test_other_schedules_are_refused_forced_saved_and_resumed(
    stream: Callable[..., int], capsys: pytest.CaptureFixture[str], schedule: str, visibility: str
) -> None:
    """The tiny model's card lists clean visibility alone."""
    assert stream(STAR, "--schedule", schedule, out="a.y4m") == 2
    message = one_line(capsys)
    assert f"schedule {schedule} needs" in message and "lists clean" in message and "--force" in message
    forced = ("--schedule", schedule, "--force", "-q")
    assert stream(STAR, *forced, seconds="6", out="whole.y4m") == 0
    assert stream(STAR, *forced, "--save-state", "s", seconds="3", out="one.y4m") == 0
    assert f"trained for visibility clean, not {visibility}" in capsys.readouterr().err
    assert stream("--resume", "s", "--report", "r.json", "-q", seconds="3", out="two.y4m") == 0
    assert y4m_frames("one.y4m") + y4m_frames("two.y4m") == y4m_frames("whole.y4m")
    report = json.loads(Path("r.json").read_text())
    assert (report["schedule"], report["visibility"]) == (schedule, visibility)
    other = "rolling" if schedule == "stream_batch" else "stream_batch"
    assert stream("--resume", "s", "--schedule", other, out="three.y4m") == 2
    assert f"has visibility {visibility}" in capsys.readouterr().err
