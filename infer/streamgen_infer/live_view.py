"""What a person sees while a stream is made: a live line on a terminal, a short line now and then elsewhere.

Everything goes to stderr, so that stdout may carry the video itself.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType

REFRESH_S = 0.1
PLAIN_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a stream stands after a block."""

    frames: int
    media_s: float
    """Seconds of video made."""
    block_start_s: float
    """Where the block just made begins."""
    total_s: float
    """Seconds of video asked for; may be inf."""
    fps: float | None
    slack_s: float
    prompt: str
    cache: tuple[int, int]
    """Latent frames held, and capacity."""
    block_ms: float
    misses: int

    def figures(self) -> str:
        total = "" if math.isinf(self.total_s) else f" of {self.total_s:.4g}"
        speed = "" if self.fps is None else f"  {self.fps:.0f} fps"
        late = f"  {self.misses} late" if self.misses else ""
        held, capacity = self.cache
        return (
            f"{self.media_s:.1f}{total} s  {self.frames} frames{speed}  block {self.block_ms:.0f} ms  "
            f"slack {self.slack_s:+.1f} s{late}  cache {held}/{capacity}"
        )


class View(Protocol):
    def note(self, line: str) -> None:
        """A line that stays."""

    def progress(self, line: str, done: int, of: int) -> None:
        """Some steps of so many are done, before there are frames."""

    def update(self, status: Status) -> None: ...

    def close(self) -> None: ...


class Quiet:
    """Nothing but warnings."""

    def note(self, line: str) -> None:
        return

    def progress(self, line: str, done: int, of: int) -> None:
        return

    def update(self, status: Status) -> None:
        return

    def close(self) -> None:
        return


class Plain:
    """For a log or a pipe: a line at each new prompt and every ten seconds."""

    def __init__(self) -> None:
        self._prompt: str | None = None
        self._last_s = time.monotonic()

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def progress(self, line: str, done: int, of: int) -> None:
        if done in (1, of):
            self.note(f"{line} ({done} of {of})")

    def update(self, status: Status) -> None:
        if status.prompt != self._prompt:
            self._prompt = status.prompt
            self.note(f"from {status.block_start_s:.4g} s: {one_line(status.prompt)}")
        if time.monotonic() - self._last_s >= PLAIN_EVERY_S:
            self._last_s = time.monotonic()
            self.note(status.figures())

    def close(self) -> None:
        return


class Live:
    """For a terminal: a bar, the figures and the prompt, redrawn in place from this thread."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = Console(stderr=True, highlight=False, markup=False)
        self._live = RichLive(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._last_s = 0.0

    def note(self, line: str) -> None:
        self._console.print(line)

    def progress(self, line: str, done: int, of: int) -> None:
        """A bar in place, without hiding the cursor: a signal may end the process at once."""
        width = min(24, self._console.width // 3)
        full = width * done // of
        text = f"[{'#' * full}{'-' * (width - full)}] {done} of {of}  {one_line(line)}"[: self._console.width - 1]
        self._console.print(text.ljust(self._console.width - 1), end="\n" if done == of else "\r", soft_wrap=True)

    def update(self, status: Status) -> None:
        if time.monotonic() - self._last_s >= REFRESH_S:
            self._last_s = time.monotonic()
            self._live.start()  # not before: it hides the cursor, and a signal while loading ends the process at once
            self._live.update(self._drawn(status), refresh=True)

    def _drawn(self, status: Status) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        endless = math.isinf(status.total_s)
        bar = ProgressBar(
            total=None if endless else status.total_s,
            completed=status.media_s,
            width=min(72, self._console.width),
            pulse=endless,
        )
        rows = Table.grid()
        for row in (bar, Text(status.figures()), Text(one_line(status.prompt), style="italic")):
            rows.add_row(row)
        rows.columns[0].no_wrap = True
        return rows

    def close(self) -> None:
        self._live.stop()


def open_view(quiet: bool) -> View:
    if quiet:
        return Quiet()
    return Live() if sys.stderr.isatty() else Plain()


def one_line(text: str, most: int = 200) -> str:
    """Text of any origin for one line of a terminal: no control characters, not too long."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."


def warn(line: str) -> None:
    """A warning to the user: one line on stderr."""
    print(f"streamgen: warning: {one_line(line, 500)}", file=sys.stderr, flush=True)
