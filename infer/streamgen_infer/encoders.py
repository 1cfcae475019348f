"""One block of frames -> bytes in a file: MP4, WebM, GIF, Y4M, or a folder of PNGs.

Frames are uint8 RGB [frames, height, width, 3]. Encoders know nothing of names and places, see sinks.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """The shape of what is written."""

    height: int
    width: int
    fps: float

    @property
    def rate(self) -> Fraction:
        return Fraction(self.fps).limit_denominator(1001)


class Encoder(Protocol):
    def write(self, frames_rgb_u8: np.ndarray) -> None: ...

    def finish(self) -> None: ...


class Mp4:
    """H.264 in a fragmented MP4 (ISO 14496-12, 8.8): the header, then for each block one fragment with its keyframe.

    A muxer writes a fragment when it meets the next one's first packet, too late for a kill. So each block goes through
    a muxer of its own, whose header is dropped and whose fragment is put at its place in time.
    """

    FLAGS = "frag_custom+empty_moov+default_base_moof"

    def __init__(self, file: IO[bytes], video: Video) -> None:
        import av

        self.file, self.fragments, self.frames = file, 0, 0
        header = io.BytesIO()
        self.container: Any = av.open(header, "w", format="mp4", options={"movflags": self.FLAGS})
        options = {"preset": "veryfast", "tune": "zerolatency", "crf": "16", "forced-idr": "1"}
        self.stream = _add_stream(self.container, "libx264", video, options)
        self.container.start_encoding()
        file.write(header.getvalue())
        self.ticks = int(1 / (video.rate * self.stream.time_base))  # of a frame

    def write(self, frames_rgb_u8: np.ndarray, *, keyframe: bool = True) -> None:
        """Without `keyframe` a player cannot begin here."""
        start, packets = self.frames, []
        for index, frame in enumerate(_even(frames_rgb_u8)):
            first = keyframe and index == 0
            packets += self.stream.encode(_av_frame(frame, self.frames, self.stream, keyframe=first))
            self.frames += 1
        self._fragment(start, packets)

    def finish(self) -> None:
        rest = self.stream.encode()
        assert not rest, f"the encoder kept {len(rest)} packets, tune=zerolatency keeps none"

    def _fragment(self, start: int, packets: list[Any]) -> None:
        import av

        self.fragments += 1
        memory = io.BytesIO()
        options = {"movflags": self.FLAGS + "+skip_trailer", "fragment_index": str(self.fragments)}
        with av.open(memory, "w", format="mp4", options=options) as muxer:
            target = muxer.add_stream_from_template(self.stream)
            for packet in packets:
                packet.stream = target
                muxer.mux(packet)
        written = memory.getvalue()
        data = bytearray(written[written.index(b"moof") - 4 :])
        time = data.index(b"tfdt") + 8  # version 1: 8 bytes of flags and name, then 64 bits of decode time
        data[time : time + 8] = (start * self.ticks).to_bytes(8, "big")
        self.file.write(data)


class WebM:
    """VP9; clusters of half a second: a killed file may lack its last block."""

    def __init__(self, file: IO[bytes], video: Video) -> None:
        import av

        options = {"cluster_time_limit": "500", "flush_packets": "1"}
        self.container: Any = av.open(file, "w", format="webm", options=options)
        codec = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "crf": "20", "b": "0"}
        self.stream = _add_stream(self.container, "libvpx-vp9", video, codec)
        self.frames = 0

    def write(self, frames_rgb_u8: np.ndarray) -> None:
        for index, frame in enumerate(_even(frames_rgb_u8)):
            self.container.mux(self.stream.encode(_av_frame(frame, self.frames, self.stream, keyframe=index == 0)))
            self.frames += 1

    def finish(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()


class Gif:
    """One palette of 256 colours for each block; time is rounded to 1/100 s without drift."""

    def __init__(self, file: IO[bytes], video: Video) -> None:
        self.file, self.video, self.frames = file, video, 0
        size = video.width.to_bytes(2, "little") + video.height.to_bytes(2, "little")
        loop = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"  # for ever
        file.write(b"GIF89a" + size + b"\x70\x00\x00" + loop)

    def write(self, frames_rgb_u8: np.ndarray) -> None:
        from PIL import Image
        from PIL.GifImagePlugin import getdata

        height, width = self.video.height, self.video.width
        tall = Image.fromarray(frames_rgb_u8.reshape(-1, width, 3))
        tall = tall.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        for index in range(len(frames_rgb_u8)):
            frame = tall.crop((0, index * height, width, (index + 1) * height))
            now, after = (round(100 * (self.frames + i) / self.video.fps) for i in (0, 1))
            self.file.write(b"".join(getdata(frame, duration=10 * (after - now), include_color_table=True)))
            self.frames += 1

    def finish(self) -> None:
        self.file.write(b";")


class Y4m:
    """Raw video with a header for each frame; 4:4:4, so that any size works and no colour is averaged away."""

    def __init__(self, file: IO[bytes], video: Video) -> None:
        import numpy as np

        self.file = file
        red, green, blue = 0.299, 0.587, 0.114  # ITU-R BT.601, studio range
        rows = np.array([[red, green, blue], [-red, -green, 1 - blue], [1 - red, -green, -blue]])
        rows *= np.array([219, 112 / (1 - blue), 112 / (1 - red)])[:, None] / 255
        self.matrix, self.offset = rows.astype(np.float32), np.array([16.5, 128.5, 128.5], np.float32)[:, None]
        rate = video.rate
        head = f"YUV4MPEG2 W{video.width} H{video.height} F{rate.numerator}:{rate.denominator} Ip A1:1 C444\n"
        file.write(head.encode())

    def write(self, frames_rgb_u8: np.ndarray) -> None:
        for frame in frames_rgb_u8:
            planes = self.matrix @ frame.reshape(-1, 3).T + self.offset
            self.file.write(b"FRAME\n" + planes.astype("uint8").tobytes())

    def finish(self) -> None:
        return


class Pngs:
    """000000.png, 000001.png, ... in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.frames = folder, 0

    def write(self, frames_rgb_u8: np.ndarray) -> None:
        from PIL import Image

        for frame in frames_rgb_u8:
            Image.fromarray(frame).save(self.folder / f"{self.frames:06d}.png", compress_level=1)
            self.frames += 1

    def finish(self) -> None:
        return


ENCODERS: dict[str, Callable[[IO[bytes], Video], Encoder]] = {
    ".mp4": Mp4,
    ".webm": WebM,
    ".gif": Gif,
    ".y4m": Y4m,
}


def _add_stream(container: Any, codec: str, video: Video, options: dict[str, str]) -> Any:
    stream = container.add_stream(codec, rate=video.rate, options=options)
    stream.width, stream.height = (side + side % 2 for side in (video.width, video.height))
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.gop_size = 10**6  # keyframes where blocks begin, nowhere else
    context.thread_count = 1 if video.width * video.height <= 640 * 360 else 0
    context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 6, 6, 6  # BT.601
    return stream


def _av_frame(frame_rgb_u8: np.ndarray, index: int, stream: Any, *, keyframe: bool) -> Any:
    import av
    from av.video.frame import PictureType

    frame = av.VideoFrame.from_ndarray(frame_rgb_u8, format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
    frame.pts, frame.time_base = index, 1 / stream.codec_context.rate
    if keyframe:
        frame.pict_type = PictureType.I
    return frame


def _even(frames_rgb_u8: np.ndarray) -> np.ndarray:
    """4:2:0 needs even sides: the last row and column are repeated where they are odd."""
    import numpy as np

    height, width = frames_rgb_u8.shape[1:3]
    return np.pad(frames_rgb_u8, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
