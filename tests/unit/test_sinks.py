"""Sinks: what is written is read back, at any moment, and nothing of the user's is replaced unasked."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from streamgen.errors import UserError
from streamgen_infer import sinks
from streamgen_infer.encoders import ENCODERS, Video
from streamgen_infer.sinks import Output, Sink, WriteError, check_output

RunPython = Callable[..., subprocess.CompletedProcess[str]]
VIDEO = Video(height=32, width=48, fps=16)


def block(index: int, frames: int = 12, height: int = 32, width: int = 48) -> np.ndarray:
    """Smooth frames that differ from each other, so that order and colour can be checked after lossy coding."""
    y, x = np.mgrid[0:height, 0:width]
    pictures = []
    for frame in range(index * frames, (index + 1) * frames):
        red = 60 + 3 * (frame % 48) + 0 * x
        pictures.append(np.stack([red, 100 + y, 200 - x], -1))
    return np.stack(pictures).astype(np.uint8)


def output(path: Path, overwrite: bool = False) -> Output:
    return Output(path=path, suffix=path.suffix, overwrite=overwrite)


def decoded(path: Path | io.BytesIO) -> np.ndarray:
    with av.open(path if isinstance(path, io.BytesIO) else str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("suffix", "tolerance"), [(".mp4", 6), (".webm", 8), (".gif", 14), (".y4m", 3)], ids=lambda v: str(v)
)
def test_round_trip(in_tmp_path: Path, suffix: str, tolerance: int) -> None:
    blocks = [block(index) for index in range(3)]
    sink = Sink(output(Path(f"out{suffix}")), VIDEO)
    for frames in blocks:
        sink.write(frames)
        assert not Path(f"out{suffix}").exists()
    assert sink.close() == Path(f"out{suffix}")
    assert [entry.name for entry in Path().iterdir()] == [f"out{suffix}"]

    want, found = np.concatenate(blocks), decoded(Path(f"out{suffix}"))
    assert found.shape == want.shape
    assert np.abs(found.astype(int) - want).mean() < tolerance
    assert np.abs(found.astype(int).mean((1, 2)) - want.mean((1, 2))).max() < tolerance


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".y4m"])
@pytest.mark.parametrize("fps", [16, 24000 / 1001, 7.5])
def test_time_runs_evenly(in_tmp_path: Path, suffix: str, fps: float) -> None:
    sink = Sink(output(Path(f"out{suffix}")), Video(height=32, width=48, fps=fps))
    for index in range(3):
        sink.write(block(index))
    sink.close()
    shown = times(Path(f"out{suffix}"))
    assert shown == pytest.approx([index / fps for index in range(36)], abs=2e-3)


def test_gif_time_does_not_drift(in_tmp_path: Path) -> None:
    sink = Sink(output(Path("out.gif")), VIDEO)
    for index in range(4):
        sink.write(block(index))
    sink.close()
    with Image.open("out.gif") as gif:
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0
    assert sum(durations) == 3000 and set(durations) == {60, 70}


@pytest.mark.parametrize("suffix", sorted(ENCODERS))
@pytest.mark.parametrize("scale", [1, 3])
def test_odd_sizes(in_tmp_path: Path, suffix: str, scale: int) -> None:
    sink = Sink(output(Path(f"out{suffix}")), Video(height=33, width=47, fps=16), scale)
    sink.write(block(0, height=33, width=47))
    sink.close()
    found = decoded(Path(f"out{suffix}"))
    even = suffix in (".mp4", ".webm")
    sides = [side * scale + (side * scale % 2 if even else 0) for side in (33, 47)]
    assert found.shape == (12, *sides, 3)
    want = block(0, height=33, width=47).repeat(scale, 1).repeat(scale, 2)
    assert np.abs(found[:, : 33 * scale, : 47 * scale].astype(int) - want).mean() < 14


def test_pngs(in_tmp_path: Path) -> None:
    sink = Sink(output(Path("frames")), VIDEO)
    sink.write(block(0))
    sink.write(block(1)[:5])
    assert sink.close() == Path("frames")
    names = sorted(entry.name for entry in Path("frames").iterdir())
    assert names == [f"{index:06d}.png" for index in range(17)]
    with Image.open("frames/000013.png") as image:
        assert np.array_equal(np.asarray(image), block(1)[1])


# Interrupted files.


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".y4m"])
def test_the_part_plays_after_every_block(in_tmp_path: Path, suffix: str) -> None:
    """What kill -9 leaves behind: nothing more than write() has returned from."""
    sink = Sink(output(Path(f"out{suffix}")), VIDEO)
    for index in range(3):
        sink.write(block(index))
        on_disk = io.BytesIO(Path(f"out.part{suffix}").read_bytes())
        assert len(decoded(on_disk)) == 12 * (index + 1)


def test_a_truncated_mp4_plays_up_to_its_last_whole_block(in_tmp_path: Path) -> None:
    sink, ends = Sink(output(Path("out.mp4")), VIDEO), []
    for index in range(4):
        sink.write(block(index))
        ends.append(Path("out.part.mp4").stat().st_size)
    sink.close()
    data = Path("out.mp4").read_bytes()
    for whole in (1, 2, 3):
        for cut in (ends[whole - 1], ends[whole - 1] + 7, ends[whole - 1] + 60):
            assert len(decoded(io.BytesIO(data[:cut]))) == 12 * whole, cut


def test_a_webm_part_lacks_at_most_its_last_block(in_tmp_path: Path) -> None:
    sink = Sink(output(Path("out.webm")), VIDEO)
    for index in range(4):
        sink.write(block(index))
    on_disk = io.BytesIO(Path("out.part.webm").read_bytes())
    assert len(decoded(on_disk)) >= 36


def test_nothing_written_leaves_nothing(in_tmp_path: Path) -> None:
    assert Sink(output(Path("out.mp4")), VIDEO).close() is None
    assert not list(Path().iterdir())


def test_older_parts_are_left_alone(in_tmp_path: Path) -> None:
    Path("out.part.mp4").write_bytes(b"of a killed run")
    Path("frames.part").mkdir()
    for path in (Path("out.mp4"), Path("frames")):
        sink = Sink(output(path), VIDEO)
        sink.write(block(0))
        sink.close()
    assert Path("out.part.mp4").read_bytes() == b"of a killed run"
    names = sorted(entry.name for entry in Path().iterdir())
    assert names == ["frames", "frames.part", "out.mp4", "out.part.mp4"]


def test_a_target_that_appears_meanwhile_is_kept(in_tmp_path: Path) -> None:
    sink = Sink(output(Path("out.mp4")), VIDEO)
    sink.write(block(0))
    Path("out.mp4").write_bytes(b"somebody's")
    assert sink.close() == Path("out.part.mp4")
    assert Path("out.mp4").read_bytes() == b"somebody's"
    assert len(decoded(Path("out.part.mp4"))) == 12


# Write errors.

FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from streamgen_infer.encoders import Video
from streamgen_infer.sinks import Output, Sink, WriteError
noise = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), dtype=np.uint8)
path = Path(sys.argv[1])
sink = Sink(Output(path=path, suffix=path.suffix, overwrite=False), Video(height=32, width=48, fps=16))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    while True:
        sink.write(noise)
except WriteError as error:
    print(sink.frames, error)
assert sink.close() is None
"""


@pytest.mark.parametrize("suffix", sorted(ENCODERS))
def test_a_full_disk_is_one_line_and_loses_nothing(run_python: RunPython, tmp_path: Path, suffix: str) -> None:
    done = run_python("-c", FULL, f"out{suffix}")
    assert done.returncode == 0 and done.stderr == "", done
    frames, _, message = done.stdout.strip().partition(" ")
    assert "out.part" in message and "File too large (errno 27)" in message and f"{frames} frames are kept" in message
    if suffix != ".webm":  # whose clusters come late
        assert len(decoded(tmp_path / f"out.part{suffix}")) == int(frames) > 0


def test_write_error_names_file_and_reason(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sinks, "_new_part", refuse)
    with pytest.raises(WriteError, match=r"cannot write out.mp4: Permission denied \(errno 13\)$"):
        Sink(output(Path("out.mp4")), VIDEO).write(block(0))


# What is refused before anything is loaded.


def refused(out: str | None, match: str, fps: float | None = None, overwrite: bool = False) -> None:
    with pytest.raises(UserError, match=match):
        check_output(out, fps=fps, overwrite=overwrite)


def test_refused_outputs(in_tmp_path: Path) -> None:
    Path("full").mkdir()
    Path("full/000000.png").write_bytes(b"x")
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("old.mp4").write_bytes(b"mine")
    Path("folder.mp4").mkdir()
    refused("", "--out is empty")
    refused("a.avi", r"cannot write .avi files; choose .mp4, .webm, .gif, .y4m, a folder or -")
    refused("no/where/a.mp4", "the folder no/where does not exist")
    refused("old.mp4", "exists; choose another name or add --overwrite")
    refused("folder.mp4", "is a folder")
    refused("file", "is a file without suffix")
    refused("full", "holds 1 frames; choose another folder or add --overwrite")
    refused("other", "holds other things than frames", overwrite=True)
    refused("a.gif", "a GIF plays at most 50", fps=60)
    refused("a" * 300 + ".mp4", "File name too long")
    refused("file/a.mp4", "does not exist")
    assert sorted(entry.name for entry in Path().iterdir()) == ["file", "folder.mp4", "full", "old.mp4", "other"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(in_tmp_path: Path) -> None:
    Path("locked").mkdir(mode=0o500)
    refused("locked/a.mp4", "cannot write to the folder locked: Permission denied")


def test_a_place_that_no_one_can_write_to() -> None:
    refused("/proc/a.mp4", "cannot write to the folder /proc")


def test_missing_ffmpeg(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    refused("a.mp4", r"\.mp4 needs PyAV \(ffmpeg\), which does not load .*or write .gif, .y4m or a folder")
    assert check_output("a.gif", fps=16, overwrite=False).suffix == ".gif"


def test_accepted_outputs(in_tmp_path: Path) -> None:
    assert check_output(None, fps=None, overwrite=False).path == Path("stream.mp4")
    Path("stream.mp4").write_bytes(b"mine")
    assert check_output(None, fps=None, overwrite=False).path == Path("stream-2.mp4")
    Path("empty.mp4").touch()
    Path("empty").mkdir()
    for name in ("empty.mp4", "empty", "new.MP4", "new"):
        assert check_output(name, fps=None, overwrite=False).path == Path(name)


@pytest.mark.parametrize("name", ["old.mp4", "frames"])
def test_overwrite_replaces_at_the_end(in_tmp_path: Path, name: str) -> None:
    if name == "frames":
        Path(name).mkdir()
        for index in range(30):
            (Path(name) / f"{index:06d}.png").write_bytes(b"old")
    else:
        Path(name).write_bytes(b"old")
    sink = Sink(check_output(name, fps=16, overwrite=True), VIDEO)
    sink.write(block(0))
    old = Path(name) / "000000.png" if name == "frames" else Path(name)
    assert old.read_bytes() == b"old"
    assert sink.close() == Path(name)
    count = len(list(Path(name).iterdir())) if name == "frames" else len(decoded(Path(name)))
    assert count == 12
    assert [entry.name for entry in Path().iterdir()] == [name]
