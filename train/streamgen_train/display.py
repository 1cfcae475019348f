"""What a run shows while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Progress on stderr: a bar when it is a terminal, else one line per log row."""

    def __init__(self, total: int, done: int, name: str) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(name, total=total, completed=done, numbers="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def row(self, done: int, total: int, numbers: Mapping[str, float]) -> None:
        losses = [f"{key} {value:.4g}" for key, value in numbers.items() if key.rsplit("/")[-1] == "loss"]
        speed = [f"{numbers['clips_per_s']:.4g} clips/s"]
        if "mfu" in numbers:
            speed += [f"{numbers['tokens_per_s']:.4g} tokens/s", f"MFU {numbers['mfu']:.1%}"]
        short = "  ".join([*losses, *speed])
        self._progress.update(self._task, completed=done, numbers=short)
        if not self._live:
            text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            left = timedelta(seconds=round(numbers["step_s"] * (total - done)))
            self.say(f"step {done}/{total}  {text}  left {left}")

    def say(self, line: str) -> None:
        """One line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
