"""Video files as small as they go, in which every pixel says which clip and which frame it belongs to."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor

from streamgen.pixels import to_uint8

LOSSLESS = {"codec": "libx264rgb", "pixels": "rgb24", "options": {"crf": "0", "preset": "ultrafast", "bf": "2"}}
HEIGHT, WIDTH = 16, 32


def picture(tag: int, frame: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [height, width, 3]: red is the clip, green the frame, blue grows to the right and down."""
    made = np.empty((height, width, 3), np.uint8)
    made[..., 0], made[..., 1] = tag, frame
    made[..., 2] = 4 * np.arange(width)[None] + np.arange(height)[:, None]
    return made


def flicker(tag: int, frame: int, height: int, width: int) -> np.ndarray:
    """Frames so different that no codec takes one for another."""
    return np.full((height, width, 3), 40 + 67 * frame % 170, np.uint8)


def save_video(
    path: Path,
    frames: int,
    *,
    tag: int = 0,
    fps: int | Fraction = 16,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    codec: str = "libx264rgb",
    pixels: str = "rgb24",
    options: Mapping[str, str] = LOSSLESS["options"],  # type: ignore[assignment]
    keyframe_every: int = 5,
    times: list[int] | None = None,
    paint: Callable[..., np.ndarray] = picture,
    setup: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """A file of `picture`s; by default to the bit. `times` are the time stamps of the frames, in ticks of 1/fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=dict(options))
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size, pixels, keyframe_every
        stream.codec_context.time_base = 1 / Fraction(fps)
        setup(stream)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(paint(tag, number, *size), "rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def tags_and_frames(video: Tensor) -> list[tuple[int, int]]:
    """(clip, frame) that each frame of [T, 3, H, W] in [-1, 1] came from; asserts that it came from one."""
    read = []
    for frame in to_uint8(video).numpy():
        assert len(np.unique(frame[..., 0])) == len(np.unique(frame[..., 1])) == 1
        read.append((int(frame[0, 0, 0]), int(frame[0, 0, 1])))
    return read


def save_folder(folder: Path, lengths: Mapping[str, int], **how: Any) -> Path:
    """NAME.mp4 and NAME.txt for each name -> frames; clip i has the tag 10 * i."""
    for number, (name, frames) in enumerate(lengths.items()):
        save_video(folder / f"{name}.mp4", frames, tag=10 * number, **how)
        (folder / f"{name}.txt").write_text(f"caption of {name}\n")
    return folder


def pack(folder: Path, tar: Path, captions: str = ".txt") -> Path:
    """The files of a folder as a webdataset shard."""
    with tarfile.open(tar, "w") as file:
        for path in sorted(folder.iterdir()):
            name, data = path.name, path.read_bytes()
            if path.suffix == ".txt" and captions == ".json":
                name, data = f"{path.stem}.json", json.dumps({"caption": data.decode(), "id": 7}).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return tar


def damage(path: Path) -> None:
    """Spoil the pictures in the middle of an .mp4; its header stays whole."""
    data = bytearray(path.read_bytes())
    start, stop = data.index(b"mdat"), data.index(b"moov")
    middle = range(start + (stop - start) // 2, start + (stop - start) * 7 // 8)
    for at in middle:
        data[at] = 0x55
    path.write_bytes(data)
