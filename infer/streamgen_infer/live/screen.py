"""The face of `streamgen live`: pictures as half blocks, a line of figures and the line being typed; or plain lines.

Everything goes to stderr, so that stdout may carry the video itself.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from typing import Protocol, TextIO

import numpy as np

from streamgen_infer.live.lines import Editor
from streamgen_infer.live_view import PLAIN_EVERY_S, one_line

REFRESH_S = 0.08
ROWS_BELOW = 4  # of the terminal, under the picture
COLOR_BITS = 5  # per channel; fewer colours are fewer bytes to the terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a live stream stands."""

    state: str
    media_s: float
    rate: float | None
    """Frames per second shown."""
    slack_s: float | None = None
    steps: int | None = None
    late: int = 0
    received: int = 0
    """Newest prompt version that was received ..."""
    shown: int = 0
    """... and the one on the screen."""
    prompt: str = ""

    def figures(self) -> str:
        """One line."""
        parts = [f"{self.state} {self.media_s:.1f} s"]
        if self.rate is not None:
            parts.append(f"{self.rate:.0f} fps")
        if self.slack_s is not None:
            parts.append(f"slack {self.slack_s:+.2f} s")
        if self.steps is not None:
            parts.append(f"{self.steps} steps")
        if self.late:
            parts.append(f"{self.late} late")
        parts.append(f"prompt {self.shown}" + (f", {self.received} received" if self.received > self.shown else ""))
        return "  ".join(parts)


class Face(Protocol):
    def note(self, line: str) -> None:
        """A line that stays."""

    def show(self, frame_HWC: np.ndarray | None, standing: Standing, editor: Editor) -> None: ...

    def close(self) -> None: ...


class PlainFace:
    """For a log or a pipe: what happens, and the figures every ten seconds."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._last_s = time.monotonic()

    def note(self, line: str) -> None:
        if not self.quiet:
            print(one_line(line, 500), file=sys.stderr, flush=True)

    def show(self, frame_HWC: np.ndarray | None, standing: Standing, editor: Editor) -> None:
        if time.monotonic() - self._last_s >= PLAIN_EVERY_S:
            self._last_s = time.monotonic()
            self.note(standing.figures())

    def close(self) -> None:
        return


class ScreenFace:
    """For a terminal: redrawn in place from the thread that calls, the terminal's own cursor in the line being typed.

    Written as escape sequences: rich takes 40 ms for such a picture, which is more than a frame lasts.
    """

    def __init__(self, file: TextIO, colors: str | None) -> None:
        """colors: "truecolor", "256", or None for no picture."""
        self.file, self.colors = file, colors
        self._drawn_s = -REFRESH_S
        self._rows = 0
        """Rows of the last drawing above the cursor's."""

    def note(self, line: str) -> None:
        self._put(f"{self._top()}\x1b[J{one_line(line, 500)}\n")
        self._rows, self._drawn_s = 0, -REFRESH_S

    def show(self, frame_HWC: np.ndarray | None, standing: Standing, editor: Editor) -> None:
        if time.monotonic() - self._drawn_s < REFRESH_S:
            return
        self._drawn_s = time.monotonic()
        columns, rows = shutil.get_terminal_size()
        lines = []
        if frame_HWC is not None and self.colors is not None:
            lines = half_blocks(frame_HWC, rows - ROWS_BELOW, columns, self.colors)
        lines += [f"\x1b[2m{standing.figures()[: columns - 1]}\x1b[0m", one_line(standing.prompt)[: columns - 1]]
        start = max(0, editor.cursor - columns + 4)
        typed = f"> {editor.text[start : start + columns - 4]}"
        column = 3 + editor.cursor - start
        body = "".join(f"{line}\x1b[K\n" for line in lines)
        self._put(f"{self._top()}{body}{typed}\x1b[J\x1b[{column}G")
        self._rows = len(lines)

    def close(self) -> None:
        self._put(f"{self._top()}\x1b[J")
        self._rows = 0

    def _top(self) -> str:
        return f"\x1b[{self._rows}A\r" if self._rows else "\r"

    def _put(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


def half_blocks(frame_HWC: np.ndarray, most_rows: int, most_columns: int, colors: str) -> list[str]:
    """A picture, uint8 [H, W, 3], as lines of upper half blocks, two pixels in each; shrunk to fit, never enlarged."""
    pixels = shrunk(frame_HWC, 2 * max(1, most_rows), max(1, most_columns))
    if colors == "truecolor":
        rough = pixels >> (8 - COLOR_BITS) << (8 - COLOR_BITS)
        codes = np.char.add("2;", np.char.mod("%d", rough[..., 0]))
        for channel in (1, 2):
            codes = np.char.add(np.char.add(codes, ";"), np.char.mod("%d", rough[..., channel]))
    else:  # the 6 x 6 x 6 cube
        cube = (pixels.astype(np.int64) * 5 + 127) // 255
        codes = np.char.mod("5;%d", 16 + cube @ np.array([36, 6, 1]))
    lines = []
    for upper, lower in zip(codes[::2].tolist(), codes[1::2].tolist(), strict=True):
        parts, before = [], ("", "")
        for cell in zip(upper, lower, strict=True):
            parts.append("▀" if cell == before else f"\x1b[38;{cell[0]};48;{cell[1]}m▀")
            before = cell
        lines.append("".join(parts) + "\x1b[0m")
    return lines


def shrunk(frame_HWC: np.ndarray, most_height: int, most_width: int) -> np.ndarray:
    """The frame made to fit, by means over areas; an even number of rows. What fits already stays as it is."""
    from PIL import Image

    height, width, _ = frame_HWC.shape
    share = min(1.0, most_height / height, most_width / width)
    rows, columns = max(2, round(height * share) // 2 * 2), max(1, int(width * share))
    return np.asarray(Image.fromarray(frame_HWC).resize((columns, rows), Image.Resampling.BOX))
