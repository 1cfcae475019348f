"""Where frames go: MP4, WebM, GIF, Y4M, a folder of PNGs, or Y4M on stdout.

A file grows under a name of its own beside the target (demo.mp4 as demo.part.mp4) and takes the target's name when it
is closed, so a target is whole or absent. The part is playable at any moment up to its last whole block, also after
kill -9: MP4 is written in fragments, one for each block, every byte of it handed to the system at once.
Every sink takes one block at a time: uint8 RGB [frames, height, width, 3].
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from streamgen.errors import UserError
from streamgen_infer.encoders import ENCODERS, Encoder, Pngs, Video
from streamgen_infer.errors import Failure

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = tuple(ENCODERS)
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


# Before anything is loaded.


def check_output(out: str | None, *, fps: float | None, overwrite: bool) -> Output:
    """What `--out` means; UserError for what cannot be written. None: a new stream.mp4 or stream-2.mp4 ..."""
    if out == "":
        raise UserError("--out is empty: name a file, a folder or - for stdout")
    if out == STDOUT:
        if sys.stdout.isatty():
            raise UserError("--out - writes raw video to stdout, which is a terminal: add | ffplay - or > video.y4m")
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
        raise UserError(f"--out {path}: a GIF plays at most {GIF_MAX_FPS} frames per second; take .mp4 or less")
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
        raise UserError(
            f"{suffix} needs PyAV (ffmpeg), which does not load ({error}): pip install av, {other}"
        ) from error
    try:
        av.Codec(encoder, "w")
    except av.error.FFmpegError as error:
        raise UserError(f"{suffix} needs {encoder}, which this PyAV lacks: upgrade av, {other}") from error


# Sinks.


class WriteError(Failure):
    """The output could not be written; what was written before is kept."""


class Sink:
    """Takes blocks of frames, `scale` times enlarged; the first one opens the part, `close` gives it its name."""

    def __init__(self, output: Output, video: Video, scale: int = 1) -> None:
        self.output, self.scale = output, scale
        self.video = Video(height=video.height * scale, width=video.width * scale, fps=video.fps)
        if max(self.video.height, self.video.width) > MAX_SIDE:
            raise UserError(f"--scale {scale} gives {self.video.width}x{self.video.height}; at most {MAX_SIDE} a side")
        self.frames = 0
        self.part: Path | None = None
        self._file: IO[bytes] | None = None
        self._encoder: Encoder | None = None
        self._whole_bytes = 0

    def write(self, frames_rgb_u8: np.ndarray) -> None:
        """Add one block; it is in the file when this returns. WriteError names the file and the reason."""
        try:
            if self._encoder is None:
                self._encoder = self._open()
            self._encoder.write(frames_rgb_u8.repeat(self.scale, 1).repeat(self.scale, 2))
            if self._file is not None:
                self._file.flush()
                self._whole_bytes = 0 if self.part is None else self._file.tell()
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
        except OSError as error:
            raise self._lost(error) from error

    def _open(self) -> Encoder:
        if self.output.suffix == STDOUT:
            self._file = sys.stdout.buffer
        elif self.output.suffix:
            self.part, self._file = _new_part(self.output.path)
        else:
            self.part = _new_part_folder(self.output.path)
            return Pngs(self.part)
        return ENCODERS[".y4m" if self.output.suffix == STDOUT else self.output.suffix](self._file, self.video)

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
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains again when it flushes at its end
            return WriteError("the reader of stdout went away")
        if self._file is not None:
            with suppress(OSError):  # the same failure again, for the bytes still in the buffer
                self._file.close()
            if self.part is not None:
                os.truncate(self.part, self._whole_bytes)  # the block that did not fit
        kept = ""
        if self.part is not None and self.frames:
            kept = f"; {self.frames} frames are kept in {self.part}"
        elif self._file is not None and self.part is not None:
            self.part.unlink()
        reason = f"{error.strerror or error} (errno {error.errno})"
        return WriteError(f"cannot write {self.output.name}: {reason}{kept}")


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
