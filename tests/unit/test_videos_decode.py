"""Frames of video files: the right ones, to the bit, after a change of frame rate, cropped, resized, turned upright."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from streamgen.pixels import to_uint8
from streamgen_train.videos.buckets import Bucket
from streamgen_train.videos.decode import BrokenClip, Facts, Place, probe, read_window
from tests.tiny_videos import HEIGHT, WIDTH, damage, flicker, picture, save_video, tags_and_frames

NTSC = Fraction(24000, 1001)
LOSSY = {"mpeg4": ("mpeg4", "yuv420p"), "h264": ("libx264", "yuv420p"), "vp9": ("libvpx-vp9", "yuv420p")}


def place_of(path: Path) -> Place:
    return Place(path.name, path, None, path.stat().st_size, path.stat().st_mtime_ns)


def window(path: Path, frames: int, *, fps: float = 16, start: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Any:
    place = place_of(path)
    return read_window(place, probe(place), fps=fps, start_frame=start, bucket=Bucket(*size, frames))


def nearest(times: list[Fraction], fps: float, count: int) -> list[int]:
    """By search over all frames: the one nearest in time, the earlier of two."""
    rate = Fraction(fps).limit_denominator(1001)
    return [min(range(len(times)), key=lambda j: (abs(times[j] - i / rate), j)) for i in range(count)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("source", "fps"), [(16, 16), (24, 16), (30, 16), (12, 24), (NTSC, 16), (NTSC, 23.976), (16, 10)]
)
def test_resampling_takes_the_nearest_frame(tmp_path: Path, source: int | Fraction, fps: float, suffix: str) -> None:
    path = save_video(tmp_path / f"clip{suffix}", 30, tag=9, fps=source)
    facts = probe(place_of(path))
    count = facts.frames_at(fps)
    length_s = 30 / Fraction(source)
    assert abs(count - float(length_s) * fps) <= 1.0 * max(1, fps / float(source))
    ticks = 12288 if suffix == ".mp4" else 1000  # what the containers round times to
    times = [round(j / Fraction(source) * ticks) * Fraction(1, ticks) for j in range(30)]
    times = times if suffix == ".mkv" else [j / Fraction(source) for j in range(30)]
    expected = [(9, j) for j in nearest(times, fps, count)]
    assert tags_and_frames(window(path, count, fps=fps)) == expected
    for start in (1, 7, count - 3):
        assert tags_and_frames(window(path, 3, fps=fps, start=start)) == expected[start : start + 3]


def test_known_indices(tmp_path: Path) -> None:
    """24 to 16: two of three frames, of a tie the earlier. 12 to 24: each twice."""
    shown = [frame for _, frame in tags_and_frames(window(save_video(tmp_path / "a.mp4", 24, fps=24), 8))]
    assert shown == [0, 1, 3, 4, 6, 7, 9, 10]
    shown = [frame for _, frame in tags_and_frames(window(save_video(tmp_path / "b.mp4", 6, fps=12), 8, fps=24))]
    assert shown == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("frames", "source", "fps", "count"), [(48, 24, 16, 32), (47, 24, 16, 32), (46, 24, 16, 31), (1, 16, 16, 1)]
)
def test_frames_at(tmp_path: Path, frames: int, source: int, fps: float, count: int) -> None:
    for suffix in (".mp4", ".mkv"):
        facts = probe(place_of(save_video(tmp_path / f"clip{suffix}", frames, fps=source)))
        assert facts.frames_at(fps) == count


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "h264"),
        ("a.mov", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.webm", "vp9"),
        ("a.mkv", "h264"),
        ("a.m4v", "mpeg4"),
    ],
)
def test_entering_in_the_middle_gives_the_same_frames(tmp_path: Path, name: str, codec: str) -> None:
    codec_name, pixels = LOSSY[codec]
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "vp9" else {"bf": "2"}
    how: dict[str, Any] = {"codec": codec_name, "pixels": pixels, "options": options, "paint": flicker}
    path = save_video(tmp_path / name, 50, keyframe_every=12, **how)
    whole = window(path, 50)
    steps = (whole[1:] - whole[:-1]).abs().amax((1, 2, 3))
    assert float(steps.min()) > 0.2  # so that a wrong frame would show
    for start in (1, 11, 12, 13, 30, 45):
        assert torch.equal(window(path, 5, start=start), whole[start : start + 5])


def test_uneven_times(tmp_path: Path) -> None:
    """A frame is shown from half way before its time to half way after it, however long that is."""
    times = [0, 1, 2, 10, 11, 20]
    path = save_video(tmp_path / "clip.mkv", 6, times=times)
    facts = probe(place_of(path))
    assert facts.last_s == 1.25
    shown = [frame for _, frame in tags_and_frames(window(path, 20))]
    exact = [Fraction(round(t * 1000 / 16), 1000) for t in times]
    assert shown == nearest(exact, 16, 20) and shown[5:8] == [2, 2, 3]


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    path = save_video(tmp_path / "clip.mkv", 12, times=list(range(40, 52)))
    assert probe(place_of(path)).frames_at(16) == 12
    assert [f for _, f in tags_and_frames(window(path, 4, start=6))] == [6, 7, 8, 9]


# Sizes.


def test_the_middle_is_kept(tmp_path: Path) -> None:
    path = save_video(tmp_path / "clip.mp4", 2, tag=3)
    for height, width in ((16, 32), (16, 20), (16, 15)):
        left = (32 - width) // 2
        kept = to_uint8(window(path, 2, size=(height, width))).numpy()
        assert np.array_equal(kept, [picture(3, f)[:, left : left + width] for f in range(2)])
    wide = to_uint8(window(save_video(tmp_path / "tall.mp4", 1, size=(32, 16)), 1, size=(10, 16))).numpy()
    assert np.array_equal(wide, [picture(0, 0, 32, 16)[11:21]])


def test_values_and_type(tmp_path: Path) -> None:
    video = window(save_video(tmp_path / "clip.mp4", 2, tag=255), 2)
    assert video.dtype == torch.float32 and video.shape == (2, 3, 16, 32)
    assert float(video[0, 0].min()) == 1.0 and float(video[0, 1].max()) == -1.0


def test_resizing(tmp_path: Path) -> None:
    path = save_video(tmp_path / "clip.mp4", 1, size=(32, 64))
    small = window(path, 1, size=(8, 8))[0]
    source = torch.from_numpy(picture(0, 0, 32, 64)[:, 16:48].copy()).movedim(-1, 0)[None].float()
    expected = F.interpolate(source, (8, 8), mode="bilinear", antialias=True)[0] / 127.5 - 1
    assert torch.equal(small, expected)
    blocks = source.unflatten(-1, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))[0] / 127.5 - 1
    assert torch.allclose(small[:, 1:-1, 1:-1], blocks[:, 1:-1, 1:-1], atol=1e-5)  # an average, no pick


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, -1), (180, 2)])
def test_a_phone_held_upright(tmp_path: Path, degrees: int, turns: int) -> None:
    path = save_video(tmp_path / "clip.mp4", 1, setup=lambda stream: stream.set_display_rotation(degrees))
    facts = probe(place_of(path))
    upright = np.rot90(picture(0, 0), turns)
    assert (facts.height, facts.width) == upright.shape[:2]
    shown = to_uint8(window(path, 1, size=(upright.shape[0], upright.shape[1]))).numpy()
    assert np.array_equal(shown[0], upright)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    def narrow(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(1, 2)

    path = save_video(tmp_path / "clip.mkv", 1, setup=narrow)
    facts = probe(place_of(path))
    assert (facts.height, facts.width) == (16, 16)
    shown = window(path, 1, size=(16, 16))[0]
    source = torch.from_numpy(picture(0, 0)).movedim(-1, 0)[None].float()
    assert torch.equal(shown, F.interpolate(source, (16, 16), mode="bilinear", antialias=True)[0] / 127.5 - 1)


# Broken ones.


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    good = save_video(tmp_path / "good.mp4", 20).read_bytes()
    files = {"empty": b"", "text": b"this is no video " * 50, "half": good[: len(good) // 2]}
    for name, data in files.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(data)
        with pytest.raises(BrokenClip, match="cannot be decoded"):
            probe(place_of(path))
    sound_only(tmp_path / "sound.mp4")
    with pytest.raises(BrokenClip, match="holds no video"):
        probe(place_of(tmp_path / "sound.mp4"))
    with pytest.raises(BrokenClip, match="No such file"):
        probe(Place("gone.mp4", tmp_path / "gone.mp4", None, 0, 0))


def test_a_file_whose_end_is_missing(tmp_path: Path) -> None:
    """The header is whole and promises more."""
    path = save_video(tmp_path / "clip.mp4", 40)
    with av.open(str(path)) as source, av.open(str(tmp_path / "cut.mp4"), "w", options={"movflags": "faststart"}) as to:
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                to.mux(packet)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(cut.read_bytes()[: -cut.stat().st_size // 3])
    with pytest.raises(BrokenClip, match="cut short"):
        probe(place_of(cut))


def test_a_damaged_middle_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = save_video(tmp_path / "clip.mp4", 20)
    damage(path)
    place = place_of(path)
    facts = probe(place)
    with pytest.raises(BrokenClip, match="cannot be decoded"):
        read_window(place, facts, fps=16, start_frame=0, bucket=Bucket(16, 32, 20))
    assert len(read_window(place, facts, fps=16, start_frame=0, bucket=Bucket(16, 32, 4))) == 4


def test_a_clip_that_ends_before_what_was_promised(tmp_path: Path) -> None:
    path = save_video(tmp_path / "clip.mp4", 10)
    promised = Facts(HEIGHT, WIDTH, probe(place_of(path)).start_pts, 1.0, 1 / 16)
    with pytest.raises(BrokenClip, match=r"ends 0\.562 s after its first frame; 1 s were promised"):
        read_window(place_of(path), promised, fps=16, start_frame=0, bucket=Bucket(HEIGHT, WIDTH, 12))
