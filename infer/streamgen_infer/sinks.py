"""Where frames go: MP4, WebM, GIF, Y4M, a folder of PNGs, or Y4M on stdout.

A file grows under a name of its own beside the target (demo.mp4 as demo.part.mp4) and takes the target's name when it
is closed, so a target is whole or absent. The part is playable at any moment up to its last whole block, also after
kill -9: MP4 is written in fragments, one for each block, every byte of it handed to the system at once.
Every sink takes one block at a time: uint8 RGB [frames, height, width, 3].
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from streamgen.errors import UserError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".mp4", ".webm", ".gif", ".y4m")
STDOUT = "-"
GIF_MAX_FPS = 50  # viewers slow a shorter delay than 2/100 s down to 1/10 s
MAX_SIDE = 8192
PNG_NAME = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where to write, checked: `suffix` is one of SUFFIXES, "" for a folder of PNGs, "-" for stdout."""

    path: Path
    suffix: str
    overwrite: bool

    @property
    def name(self) -> str:
        return "stdout" if self.suffix == STDOUT else str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """The shape of what is written."""

    height: int
    width: int
    fps: float

    @property
    def rate(self) -> Fraction:
        return Fraction(self.fps).limit_denominator(1001)


# Before anything is loaded.


def check_output(out: str | None, *, fps: float | None, overwrite: bool) -> Output:
    """What `--out` means; UserError for what cannot be written. None: the first free one of stream.mp4, stream-2.mp4 ..."""
    if out == "":
        raise UserError("--out is empty: name a file, a folder or - for stdout")
    if out == STDOUT:
        if sys.stdout.isatty():
            raise UserError("--out - writes raw video to stdout, and stdout is a terminal: add | ffplay - or > video.y4m")
        return Output(path=Path(STDOUT), suffix=STDOUT, overwrite=overwrite)
    try:
        path = _free_name() if out is None else Path(out)
        suffix = path.suffix.lower()
        _check_path(path, suffix, fps, overwrite)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    return Output(path=path, suffix=suffix, overwrite=overwrite)


def _free_name() -> Path:
    names = (Path(f"stream{'' if number == 1 else f'-{number}'}.mp4") for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def _check_path(path: Path, suffix: str, fps: float | None, overwrite: bool) -> None:
    if suffix and suffix not in SUFFIXES:
        raise UserError(f"--out {path}: cannot write {suffix} files; choose {', '.join(SUFFIXES)}, a folder or -")
    if suffix == ".gif" and fps is not None and fps > GIF_MAX_FPS:
        raise UserError(f"--out {path}: a GIF plays at most {GIF_MAX_FPS} frames per second; take .mp4 or a lower --fps")
    check_place(path, "--out")
    if suffix:
        if path.is_dir():
            raise UserError(f"--out {path} is a folder; give another name")
        if path.exists() and path.stat().st_size and not overwrite:
            raise UserError(f"--out {path} exists; choose another name or add --overwrite")
    else:
        _check_folder(path, overwrite)
    if suffix in (".mp4", ".webm"):
        _check_encoder(suffix)


def check_place(path: Path, option: str) -> None:
    """UserError unless a file can be made beside `path`."""
    parent = path.parent
    if not parent.is_dir():
        raise UserError(f"{option} {path}: the folder {parent} does not exist; make it first (mkdir -p {parent})")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot write to the folder {parent}: {error.strerror}") from error


def _check_folder(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--out {path} is a file without suffix; give a folder, or a file that ends in {SUFFIXES[0]}")
    names = [entry.name for entry in path.iterdir()]
    foreign = [name for name in names if not PNG_NAME.fullmatch(name)]
    if foreign:
        raise UserError(f"--out {path} holds other things than frames ({foreign[0]}); choose a new or an empty folder")
    if names and not overwrite:
        raise UserError(f"--out {path} holds {len(names)} frames; choose another folder or add --overwrite")


def _check_encoder(suffix: str) -> None:
    encoder = {".mp4": "libx264", ".webm": "libvpx-vp9"}[suffix]
    other = "or write .gif, .y4m or a folder of PNGs, which do not need it"
    try:
        import av
    except ImportError as error:
        raise UserError(f"{suffix} files need PyAV (ffmpeg), and it does not load ({error}): pip install av, {other}") from error
    try:
        av.Codec(encoder, "w")
    except av.error.FFmpegError as error:
        raise UserError(f"this PyAV has no {encoder}, which {suffix} files need: pip install --upgrade av, {other}") from error


# Encoders: one block of frames -> bytes in a file.


class Encoder(Protocol):
    def write(self, frames_rgb_u8: np.ndarray) -> None: ...

    def finish(self) -> None: ...


class _Mp4:
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

    def write(self, frames_rgb_u8: np.ndarray) -> None:
        start, packets = self.frames, []
        for index, frame in enumerate(_even(frames_rgb_u8)):
            packets += self.stream.encode(_av_frame(frame, self.frames, self.stream, keyframe=index == 0))
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
        data = memory.getvalue()
        data = bytearray(data[data.index(b"moof") - 4 :])
        time = data.index(b"tfdt") + 8  # version 1: 8 bytes of flags and name, then 64 bits of decode time
        data[time : time + 8] = (start * self.ticks).to_bytes(8, "big")
        self.file.write(data)


class _WebM:
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


class _Gif:
    """One palette of 256 colours for each block; time is rounded to 1/100 s without drift."""

    def __init__(self, file: IO[bytes], video: Video) -> None:
        self.file, self.video, self.frames = file, video, 0
        size = video.width.to_bytes(2, "little") + video.height.to_bytes(2, "little")
        file.write(b"GIF89a" + size + b"\x70\x00\x00" + b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # loops for ever

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


class _Y4m:
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


class _Pngs:
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
    ".mp4": _Mp4,
    ".webm": _WebM,
    ".gif": _Gif,
    ".y4m": _Y4m,
    STDOUT: _Y4m,
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


# Sinks.


class WriteError(OSError):
    """The output could not be written; what was written before is kept."""


class Sink:
    """Takes blocks of frames, `scale` times enlarged; the first one opens the part, `close` gives it its name."""

    def __init__(self, output: Output, video: Video, scale: int = 1) -> None:
        self.output, self.scale = output, scale
        self.video = Video(height=video.height * scale, width=video.width * scale, fps=video.fps)
        if max(self.video.height, self.video.width) > MAX_SIDE:
            raise UserError(f"--scale {scale} makes frames of {self.video.width}x{self.video.height}; at most {MAX_SIDE}")
        self.frames = 0
        self.part: Path | None = None
        self._file: IO[bytes] | None = None
        self._encoder: Encoder | None = None

    def write(self, frames_rgb_u8: np.ndarray) -> None:
        """Add one block; it is in the file when this returns. WriteError names the file and the reason."""
        try:
            if self._encoder is None:
                self._encoder = self._open()
            self._encoder.write(frames_rgb_u8.repeat(self.scale, 1).repeat(self.scale, 2))
            if self._file is not None:
                self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._lost(error) from error
        self.frames += len(frames_rgb_u8)

    def close(self) -> Path | None:
        """End the file and give it its name; returns where it is, None when it has none (no frame, or stdout)."""
        if self._encoder is None:
            return None
        encoder, self._encoder = self._encoder, None
        try:
            encoder.finish()
            if self._file is sys.stdout.buffer:
                self._file.flush()
            elif self._file is not None:
                self._file.close()
            return None if self.part is None else self._take_name(self.part)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._lost(error) from error

    def _open(self) -> Encoder:
        if self.output.suffix == STDOUT:
            self._file = sys.stdout.buffer
        elif self.output.suffix:
            self.part, self._file = _new_part(self.output.path)
        else:
            self.part = _new_part_folder(self.output.path)
            return _Pngs(self.part)
        return ENCODERS[self.output.suffix](self._file, self.video)

    def _take_name(self, part: Path) -> Path:
        target = self.output.path
        taken = any(target.iterdir()) if target.is_dir() else target.exists() and target.stat().st_size > 0
        if taken and not self.output.overwrite:  # made by somebody else meanwhile
            return part
        if target.is_dir():
            _remove_frames(target)
        part.replace(target)
        return target

    def _lost(self, error: OSError) -> WriteError:
        self._encoder = None
        if self._file is not None:
            with suppress(OSError):  # the same failure again, for the bytes still in the buffer
                self._file.close()
        kept = f"; {self.frames} frames are kept in {self.part}" if self.part is not None and self.frames else ""
        reason = f"{error.strerror or error} (errno {error.errno})"
        return WriteError(error.errno, f"cannot write {self.part or self.output.name}: {reason}{kept}")


def _new_part(target: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside the target: an older part, or another program's, is left alone."""
    number = 1
    while True:
        part = target.with_name(f"{target.stem}.part{'' if number == 1 else number}{target.suffix}")
        with suppress(FileExistsError):
            return part, part.open("xb")
        number += 1


def _new_part_folder(target: Path) -> Path:
    number = 1
    while True:
        part = target.with_name(f"{target.name}.part{'' if number == 1 else number}")
        with suppress(FileExistsError):
            part.mkdir()
            return part
        number += 1


def _remove_frames(folder: Path) -> None:
    """Make way for a new folder: `check_output` saw nothing but frames in it."""
    aside = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    folder.rename(aside)
    shutil.rmtree(aside)
