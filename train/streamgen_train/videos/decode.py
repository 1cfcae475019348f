"""One window of one clip, by PyAV: brought to a frame rate by time stamps, cropped and resized to a bucket.

Frame i of a clip at `fps` is the source frame whose time, counted from the first one, is nearest to i / fps (of two
equally near ones the earlier). Times are exact fractions: the same file gives the same frames everywhere.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamgen_train.videos.buckets import Bucket

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


class BrokenClip(Exception):
    """This clip cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a clip are."""

    name: str
    """Path below the source; of a member of a tar, TAR/MEMBER."""
    file: Path
    """The video, or the tar that holds it."""
    offset: int | None
    """Of the first byte in the tar; None for a file of its own."""
    size_bytes: int
    changed_ns: int
    """When the file was written last."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a clip is, as it is shown: turned upright, with square pixels."""

    height: int
    width: int
    start_pts: int
    """Time stamp of the first frame, in ticks of the stream."""
    last_s: float
    """Time of the last frame, from the first."""
    frame_s: float
    """How long a frame is shown."""

    def frames_at(self, fps: float) -> int:
        """Frames at another rate: as many as have a source frame within half its duration."""
        return math.floor((self.last_s + self.frame_s / 2) * float(_rate(fps)) + 1e-6) + 1


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def probe(place: Place) -> Facts:
    """Open a clip, decode its first frame and find its last; BrokenClip if that is not possible."""
    with _opened(place) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None or first.pts is None or stream.time_base is None:
            raise BrokenClip("cannot be decoded: it has no frame with a time")
        tick = stream.time_base
        last = _last_pts(container, stream)
        rate = stream.guessed_rate or stream.average_rate
        frame_s = float(1 / rate) if rate else float(first.duration * tick)
        aspect = stream.sample_aspect_ratio or 1  # of one pixel
        height, width = first.height, round(first.width * aspect)
        if first.rotation % 180:
            height, width = width, height
        return Facts(height, width, first.pts, float((last - first.pts) * tick), frame_s)


def _last_pts(container: InputContainer, stream: VideoStream) -> int:
    """Time stamp of the last frame, from the packets behind the last keyframe."""
    container.seek(2**40, stream=stream)  # past any end: stops at the last keyframe
    last = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BrokenClip("cut short: its last packet is not whole")
        time = packet.dts if packet.pts is None else packet.pts
        if time is not None:
            last = time if last is None else max(last, time)
    if last is None:
        raise BrokenClip("cut short: its header promises more than there is")
    return last


def read_window(place: Place, facts: Facts, *, fps: float, start_frame: int, bucket: Bucket) -> Tensor:
    """Frames [start_frame, start_frame + bucket.frames) of a clip at `fps`: float32 [T, 3, H, W] in [-1, 1].

    The middle of each frame is kept, in the shape of the bucket. BrokenClip if the clip does not give all of them.
    """
    times = [i / _rate(fps) for i in range(start_frame, start_frame + bucket.frames)]
    if start_frame > 0:
        try:
            return torch.stack(_read(place, facts, times, bucket, seek=True))
        except BrokenClip:  # not every container can be entered in the middle: what counts is reading from the start
            pass
    return torch.stack(_read(place, facts, times, bucket, seek=False))


def _read(place: Place, facts: Facts, times: list[Fraction], bucket: Bucket, seek: bool) -> list[Tensor]:
    """The pictures nearest to `times`."""
    with _opened(place) as (container, stream):
        tick = stream.time_base
        assert tick is not None
        if seek:
            # Containers look for keyframes by decoding time, which runs ahead: one second covers any reordering.
            container.seek(max(facts.start_pts, facts.start_pts + int((times[0] - 1) / tick)), stream=stream)
        frames = _timed(container, stream, tick, facts.start_pts)
        now, frame = next(frames, (None, None))
        if now is None or frame is None or now > times[0]:
            raise BrokenClip(f"cannot be decoded: no frame at {float(times[0]):.3g} s")
        following = next(frames, None)
        shown: VideoFrame | None = None
        pictures: list[Tensor] = []
        for time in times:
            while following is not None and abs(following[0] - time) < abs(now - time):
                now, frame = following
                following = next(frames, None)
            if following is None and time - now > 0.5001 * facts.frame_s:
                raise BrokenClip(f"ends {float(now):.3g} s after its first frame; {facts.last_s:.3g} s were promised")
            if frame is not shown and frame.is_corrupt:
                raise BrokenClip(f"cannot be decoded: the frame at {float(now):.3g} s is damaged")
            pictures.append(pictures[-1] if frame is shown else _fit(frame, facts, bucket))
            shown = frame
        return pictures


def _timed(
    container: InputContainer, stream: VideoStream, tick: Fraction, start_pts: int
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Frames with their times, in seconds from the first one."""
    for frame in container.decode(stream):
        if frame.pts is None:
            raise BrokenClip("cannot be decoded: a frame without a time")
        yield (frame.pts - start_pts) * tick, frame


def _fit(frame: VideoFrame, facts: Facts, bucket: Bucket) -> Tensor:
    """The middle of a frame: float32 [3, H, W] in [-1, 1]."""
    picture = frame.to_ndarray(format="rgb24")
    if frame.rotation:
        picture = np.rot90(picture, frame.rotation // 90)  # both count anticlockwise
    rows, columns = picture.shape[:2]
    height = min(facts.height, facts.width * bucket.height / bucket.width)
    width = min(facts.width, facts.height * bucket.width / bucket.height)
    kept_rows, kept_columns = round(height * rows / facts.height), round(width * columns / facts.width)
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    kept = np.ascontiguousarray(picture[top : top + kept_rows, left : left + kept_columns])
    values = torch.from_numpy(kept).movedim(-1, 0).float()
    if (kept_rows, kept_columns) != (bucket.height, bucket.width):
        size = (bucket.height, bucket.width)
        values = F.interpolate(values[None], size, mode="bilinear", antialias=True)[0].clamp_(0, 255)
    return values / 127.5 - 1


@contextmanager
def _opened(place: Place) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container of a clip and its video; whatever fails inside is a BrokenClip."""
    import av

    try:
        with av.open(_source(place), "r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise BrokenClip("cannot be decoded: it holds no video")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # clips are read side by side instead
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise BrokenClip(f"cannot be decoded: {error.strerror or type(error).__name__}") from error
    except UnicodeError as error:  # FFmpeg takes names in UTF-8 only
        raise BrokenClip(f"cannot be opened: its name is not UTF-8 ({error})") from error


def _source(place: Place) -> str | io.BytesIO:
    if place.offset is None:
        return str(place.file.absolute())  # FFmpeg takes a relative name with a colon for a protocol
    with open(place.file, "rb") as file:
        file.seek(place.offset)
        data = file.read(place.size_bytes)
    if len(data) < place.size_bytes:
        raise BrokenClip(f"cut short: {place.file.name} ends inside it")
    return io.BytesIO(data)
