"""A timeline as a chart: rows are devices, columns are time. In a terminal, and as a PNG."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.text import Text

from streamgen.errors import UserError
from streamgen.grid import CODEC, Cell, Grid
from streamgen.initiation import Figures, Interval
from streamgen.schedules import Timed

COLORS = ("cyan", "green", "yellow", "magenta", "blue", "red")
"""Of the blocks, in turn."""
MOST_COLUMNS = 400
TIGHT = 2
"""Characters of the shortest pass beside its label."""


def label(cell: Cell, streams: int) -> str:
    """A0: block A at step 0; Ac, Ad, Ae, Ar: its commit, decoding, encoding, recache. 1A0: of stream 1."""
    block = ""
    rest = cell.block
    while True:
        block = chr(ord("A") + rest % 26) + block
        rest = rest // 26 - 1
        if rest < 0:
            break
    return (str(cell.stream) if streams > 1 else "") + block + (str(cell.step) if cell.kind == "step" else cell.kind[0])


def lines(timed: Sequence[Timed], grid: Grid, devices: int, columns: int) -> list[tuple[str, Text]]:
    """(device or nothing, a line of the chart) with at most so many columns; cells that share a launch are stacked."""
    passes = [stop - start for launch, start, stop in timed if launch.cells[0].kind not in CODEC]
    widest = max(len(label(cell, grid.streams)) for one in timed for cell in one.launch.cells)
    scale = (widest + TIGHT) / min(passes)
    found: list[tuple[str, Text]] = []
    for device in range(devices):
        mine = [one for one in timed if one.launch.device == device]
        rows = [Text() for _ in range(max((len(one.launch.cells) for one in mine), default=1))]
        for launch, start, stop in mine:
            first, last = round(start * scale), max(round(stop * scale), round(start * scale) + 1)
            if last > columns:
                break
            for row, cell in zip(rows, launch.cells, strict=False):
                row.append(" " * (first - len(row)))
                text = label(cell, grid.streams)[: last - first]
                style = f"black on {COLORS[cell.block % len(COLORS)]}"
                row.append(text + "-" * (last - first - len(text) - 1), style)
        found += [(f"device {device}" if i == 0 else "", row) for i, row in enumerate(rows)]
    return found


def show(title: str, timed: Sequence[Timed], grid: Grid, devices: int) -> None:
    """Print the chart."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(title)
    columns = console.width - 12 if console.is_terminal else MOST_COLUMNS
    for head, row in lines(timed, grid, devices, columns):
        console.print(Text(f"{head:11}").append_text(row), no_wrap=True, overflow="crop")
    kinds = [
        kind for kind in ("commit", "decode", "encode") if any(c.kind == kind for o in timed for c in o.launch.cells)
    ]
    extra = "".join(f", A{kind[0]} its {kind}" for kind in kinds)
    console.print(f"A0: block A at step 0{extra}; time from left to right, one below the other: one launch\n")


def show_figures(found: Figures, bounds: Interval, peaks: Mapping[int, int], unit: str) -> None:
    """Print what a timeline does when it is full, beside its bounds."""
    low, high = found.control
    console = Console(highlight=False, soft_wrap=True)
    work = Counter(f"{time:.4g}" for time in bounds.resource)
    resource = ", ".join(f"{time} ({count} devices)" if count > 1 else time for time, count in work.items())
    blocks = "1 block" if found.in_flight == 1 else f"{found.in_flight} blocks"
    used = ", ".join(f"{share:.0%}" for share in found.utilisation)
    for name, value in (
        ("period", f"{found.period:.4g} {unit} between blocks of a stream; bound {bounds.period:.4g}"),
        ("limit", bounds.limit),
        ("bounds", f"resource {resource}; recurrence {bounds.recurrence:.4g} ({bounds.reason})"),
        ("first block", f"clean after {found.fill:.4g} {unit}"),
        ("control", f"{low:.4g} to {high:.4g} {unit} from a new prompt to a clean block that shows it"),
        ("in flight", f"{blocks} of a stream: what a prompt waits for, at the pace of the screen"),
        ("used", used),
        ("cache", ", ".join(f"{peak}" for _, peak in sorted(peaks.items())) + " frame-layers of keys and values"),
    ):
        console.print(f"{name:12}{value}")


def check_matplotlib() -> None:
    """UserError without it."""
    if find_spec("matplotlib") is None:
        raise UserError("--png needs matplotlib, which is not installed: pip install 'streamgen[eval]'")


def draw(path: Path, title: str, timed: Sequence[Timed], grid: Grid, devices: int, caption: str) -> None:
    """Write the chart as a PNG; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [max([1, *(len(o.launch.cells) for o in timed if o.launch.device == d)]) for d in range(devices)]
    end = max(one.stop for one in timed)
    figure = Figure(figsize=(14, 1.5 + 0.32 * sum(rows) + 0.1 * devices), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bottoms = [sum(rows[:device]) + 0.4 * device for device in range(devices)]
    for launch, start, stop in timed:
        for row, cell in enumerate(launch.cells):
            low = bottoms[launch.device] + row
            color = f"C{cell.block % 10}"
            alpha = 0.45 if cell.kind == "step" else 0.8
            axes.barh(low + 0.47, stop - start, 0.94, start, color=color, alpha=alpha, edgecolor="black", linewidth=0.5)
            if (stop - start) / end > 0.008:
                middle = ((start + stop) / 2, low + 0.5)
                axes.annotate(label(cell, grid.streams), middle, ha="center", va="center", fontsize=7)
    axes.set_yticks([low + rows[device] / 2 for device, low in enumerate(bottoms)])
    axes.set_yticklabels([f"device {device}" for device in range(devices)])
    axes.set(xlim=(0, end), xlabel=caption, title=title)
    axes.invert_yaxis()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
