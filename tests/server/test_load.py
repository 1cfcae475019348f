"""`streamgen load`: how it counts and times frames, and a churn of viewers against a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from streamgen.errors import UserError
from streamgen_infer.errors import Failure
from streamgen_infer.serve import churn, load
from streamgen_infer.serve.load_viewer import FrameCount, Screen, Seen
from streamgen_infer.serve.session_state import OVER
from tests.server.fake_runtime import FakeRuntime
from tests.server.fuzzed import HEADER
from tests.server.harness import LOCKED, Talk, serving

ONE = replace(HEADER, epoch=0, dropped=0)


def counted(*frames: tuple[int, int, int]) -> tuple[int, int]:
    """(epoch, number, dropped) of each frame -> lost, repeated."""
    count, seen = FrameCount(), Seen()
    for epoch, number, dropped in frames:
        count.add(replace(ONE, epoch=epoch, frame=number, dropped=dropped), seen)
    return seen.lost_frames, seen.repeated_frames


def test_lost_and_repeated_frames_are_seen() -> None:
    assert counted((0, 7, 0), (0, 8, 0), (0, 9, 0)) == (0, 0)
    assert counted((0, 0, 0), (0, 4, 3)) == (0, 0), "the server said that it left three out"
    assert counted((0, 0, 0), (0, 4, 1)) == (2, 0)
    assert counted((0, 5, 0), (0, 5, 0), (0, 6, 0)) == (0, 1)
    assert counted((0, 9, 0), (1, 4, 0), (1, 5, 0)) == (0, 0), "a seek"
    assert counted((0, 9, 0), (1, 12, 0)) == (2, 0), "an epoch begins within what was reached"
    assert counted((1, 9, 0), (0, 10, 0)) == (0, 1), "what a seek made void"


def test_a_screen_shows_frames_in_time_and_waits_for_late_ones() -> None:
    screen = Screen()
    assert screen.position_s(3.0) == 0.0
    assert screen.add(0.0, 10.0) == 10.0
    assert screen.add(0.5, 10.1) == 10.5, "early: when its time comes"
    assert screen.position_s(10.25) == 0.25
    assert screen.position_s(11.5) == 0.5, "the clock stands at the newest frame"
    assert screen.add(1.0, 12.0) == 12.0
    assert screen.position_s(12.0) == 1.0


def test_the_slope_of_memory() -> None:
    samples = [churn.Sample(float(s), 100 + s / 36, 0, 0) for s in range(0, 400, 10)]
    assert churn.slope_mb_per_hour(samples) == pytest.approx(100)
    settling = [churn.Sample(float(s), 100.0 if s >= 100 else float(s), 0, 0) for s in range(0, 400, 10)]
    assert churn.slope_mb_per_hour(settling) == 0
    assert churn.slope_mb_per_hour(samples[:2]) is None


def test_churn_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """Viewers that watch, stop, are killed, are cut and come back: every frame once, every session closed."""
    runtime = FakeRuntime(max_streams=100, make_every_s=0.15)
    options = load.Options(
        url="", sessions=12, per_second=8.0, seconds=2.0, churn_s=3.5, json=tmp_path / "load.json", token="secret-a"
    )
    quotas = replace(LOCKED, quotas={"secret-a": replace(LOCKED.quotas["secret-a"], sessions=100)})
    with (
        serving(lambda: runtime, tmp_path, resume_s=0.4, tokens=quotas) as running,
        Talk(running, token="secret-a") as own,
    ):
        own.start()  # somebody else's session is not counted as left
        assert load.run(replace(options, url=running.url)) == 0
        values = json.loads((tmp_path / "load.json").read_text())
        assert len([one for one in running.server.sessions.values() if one.life.state not in OVER]) == 1
        with pytest.raises(UserError, match="answers 401"):
            load.run(replace(options, url=running.url, token=None, overwrite=True))
    assert set(values["fates"]) == {"watches", "stops", "killed", "cut"}
    assert values["resumes"] >= 1 and values["served"] == values["sessions"] == sum(values["fates"].values())
    names = ("lost_frames", "repeated_frames", "sessions_left_open", "streams_left_open", "dropped_frames")
    assert [values[name] for name in names] == [0] * 5 and values["failed"] == []
    assert values["server_memory_mb"]["first"] > 10 and len(values["server_memory_samples"]) >= 4
    assert values["prompt_to_screen_s"]["p50"] >= values["control_latency_s"]["p50"] > 0
    assert values["ttff_s"]["p95"] >= values["ttff_s"]["p50"] > 0


def test_churn_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that keeps the sessions of viewers who are gone is told on, by a failure after the report."""
    monkeypatch.setattr(churn, "FORGET_S", 0.1)
    monkeypatch.setattr(churn, "FATES", ("killed",))
    options = load.Options(url="", per_second=8.0, seconds=1.5, churn_s=1.0, json=tmp_path / "load.json")
    with (
        serving(lambda: FakeRuntime(make_every_s=0.1), tmp_path, resume_s=60.0) as running,
        pytest.raises(Failure, match="sessions_left_open"),
    ):
        load.run(replace(options, url=running.url))
    assert json.loads((tmp_path / "load.json").read_text())["sessions_left_open"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"churn_s": 0.5}, "--churn is 0.5"),
        ({"wait_s": 601}, "--wait is 601"),
        ({"apply_at": "now"}, "--apply-at 'now' does not exist; there are: next_block, playhead"),
    ],
)
def test_load_refuses(options: dict[str, float | str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load.check(load.Options(url="ws://x", **options))  # type: ignore[arg-type]


def test_churn_without_a_server() -> None:
    with pytest.raises(Failure, match="no server answers"):
        load.run(load.Options(url="ws://127.0.0.1:9", churn_s=1.0))
