"""What `streamgen bench` shows: a table, and with --png every stage under the machine's roofs and a block's parts."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen_infer import machine
from streamgen_infer.errors import Failure
from streamgen_infer.sinks import check_place

COLOURS = {"text": "C4", "denoise": "C0", "commit": "C1", "decode": "C2", "encode": "C3", "host": "grey"}


def check_picture(path: Path, overwrite: bool) -> None:
    """UserError unless a picture can be drawn and written there."""
    check_place(path, "--png")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--png needs matplotlib, which is not installed: pip install 'streamgen[eval]'")
    if path.exists() and not overwrite:
        raise UserError(f"--png {path} exists; choose another name or add --overwrite")


def write_picture(path: Path, results: Sequence[Mapping[str, Any]], cpu: str) -> None:
    """Write the PNG of what `measure` found; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(picture(results, cpu))
        temporary.replace(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror} (errno {error.errno})") from error
    finally:
        temporary.unlink(missing_ok=True)


def picture(results: Sequence[Mapping[str, Any]], cpu: str) -> bytes:
    """A row for each result: the roofline on the left, shares of a block's time on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{cpu}, threads: {results[0]['threads']}", fontsize=10)
    for (roofline, shares), one in zip(figure.subplots(len(results), 2, squeeze=False), results, strict=True):
        _roofline(roofline, one)
        _shares(shares, one)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def _roofline(axes: Any, one: Mapping[str, Any]) -> None:
    stages, roof = one["stages"], one["roofs"]
    at = [stage["flops_per_byte"] for stage in stages.values()]
    ridge = roof["flops_per_s"] / roof["bytes_per_s"]
    x = sorted({min(*at, ridge) / 2, *at, ridge, max(*at, ridge) * 2})
    axes.plot(x, [min(roof["flops_per_s"], intensity * roof["bytes_per_s"]) / 1e9 for intensity in x], color="black")
    axes.annotate(f"matrix product {roof['flops_per_s'] / 1e9:.0f} GFLOP/s", (ridge, roof["flops_per_s"] / 1e9))
    for name, stage in stages.items():
        label = f"{name}: {stage['bytes'] / 1e6:.1f} MB, {stage['share_of_roof']:.0%} of its roof"
        axes.plot(stage["flops_per_byte"], stage["flops_per_s"] / 1e9, "o", color=COLOURS[name], label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte, each operand moved once",
        ylabel="GFLOP per second of processor time",
    )
    axes.set_title(f"{one['suite']} {one['dtype']}; copy {roof['bytes_per_s'] / 1e9:.1f} GB/s", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _shares(axes: Any, one: Mapping[str, Any]) -> None:
    """Of the block: its stages side by side; below them the bound and the host's part, which lies within the stages."""
    left = 0.0
    parts = [("denoise", ms) for ms in one["denoise_ms"]] + [("commit", one["commit_ms"])]
    parts += [("decode", one["decode_ms"])] if one["codec_included"] else []
    for name, ms in parts:
        axes.barh("block", ms, left=left, color=COLOURS[name], edgecolor="white")
        left += ms
    axes.barh("bare bound", one["bound_ms"], color="lightgrey")
    axes.barh("host, at most", one["host_share"] * one["block_ms"], color=COLOURS["host"])
    axes.invert_yaxis()
    axes.set(xlabel="ms")
    axes.set_title(f"block {one['block_ms']:.1f} ms = {one['ratio_to_bound']:.2f} x the bound", fontsize=9)


def print_results(results: Sequence[Mapping[str, Any]]) -> None:
    """The table, and under it the stages of each result."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not results:
        console.print("nothing was measured")
        return
    title = f"time per block, threads: {results[0]['threads']}, {machine.cpu_name()}"
    table = Table(title=title, box=box.SIMPLE)
    for column in ("suite", "dtype", "block ms", "bound ms", "ratio", "CPU ratio", "x real time", "weights"):
        table.add_column(column, justify="left" if column in ("suite", "dtype", "weights") else "right")
    for one in results:
        speed = "-" if one["real_time"] is None else f"{one['real_time']:.1f}"
        figures = (f"{one[name]:.2f}" for name in ("block_ms", "bound_ms", "ratio_to_bound", "cpu_ratio_to_bound"))
        table.add_row(one["suite"], one["dtype"], *figures, speed, one["weights"])
    console.print(table)
    for one in results:
        steps = " ".join(f"{ms:.1f}" for ms in one["denoise_ms"])
        rest = f"commit {one['commit_ms']:.1f}, decode {one['decode_ms']:.1f}; a new prompt's text {one['text_ms']:.1f}"
        console.print(f"{one['suite']} {one['dtype']}, ms: denoise {steps}, {rest}", soft_wrap=True)
        share = ", ".join(f"{name} {stage['share_of_roof']:.0%}" for name, stage in one["stages"].items())
        grown, host = one["steady_state"], f"host overhead at most {one['host_share']:.1%}"
        left = f"{grown['tensors']} tensors and {grown['bytes']} bytes more after {grown['blocks']} blocks"
        console.print(f"  of their roofs: {share}; {host}; {left}", soft_wrap=True)
    console.print("bound: the matrix products, attention and convolutions of the same shapes alone, in the same run")
    console.print("CPU ratio: of processor time, in which waiting for other programs does not count")
