"""What `streamgen bench --device cuda` prints: kernels beside their roofs, then blocks beside what was aimed at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def lines(values: dict[str, Any]) -> Iterator[str]:
    """The tables."""
    yield f"{values['environment']['device']}; torch {values['environment']['torch']}; {values['took_s']:.0f} s in all"
    good = len(values["checks"]) - len([row for row in values["checks"] if not row["ok"]])
    yield f"kernels and attention backends that equal their reference: {good} of {len(values['checks'])}"
    for line in values["failed_checks"]:
        yield f"  WRONG, and not measured: {line}"
    if values["kernels"]:
        yield ""
        yield from columns(
            ("kernel", "ms", "rate", "of its roof"),
            [(one["name"], f"{one['ms']:.3f}", _rate(one), f"{one['share_of_roof']:.0%}") for one in values["kernels"]],
        )
    if values["attention_ms"]:
        found = ", ".join(f"{name} {ms:.2f}" for name, ms in values["attention_ms"].items())
        yield f"one layer's self-attention over the longest window, ms: {found}"
    yield ""
    yield from columns(
        (
            "setting",
            "ms/block",
            "target",
            "FPS",
            "TTFF s",
            "x bound",
            "denoise",
            "decode",
            "commit",
            "launch",
            "cache GB",
        ),
        [_result_row(one) for one in values["results"]],
    )
    for one in values["results"]:
        if one["recording_problem"]:
            yield f"{one['setting']}: without graphs: {one['recording_problem']}"
    if values["results"]:
        first = values["results"][0]
        yield (
            f"a block: {first['frames_per_block']} frames, {first['steps']} steps, commit, decoding, on the host; "
            f"operations: {first['ops']}, attention: {first['attention']}; bound: bare products and attention alone"
        )


def _rate(one: dict[str, Any]) -> str:
    scale, unit = (1e9, "GB/s") if one["unit"] == "bytes/s" else (1e12, "TFLOP/s")
    return f"{one['rate'] / scale:.0f} {unit}"


def _result_row(one: dict[str, Any]) -> tuple[str, ...]:
    target = "" if one["target_ms"] is None else f"{one['target_ms']:.0f}"
    numbers = (f"{one[name]:.1f}" for name in ("decode_ms", "commit_ms", "launched_ms"))
    steps = "+".join(f"{ms:.1f}" for ms in one["denoise_ms"])
    return (
        one["setting"],
        f"{one['block_ms']:.1f}",
        target,
        f"{one['fps']:.1f}",
        f"{one['ttff_s']:.3f}",
        f"{one['ratio_to_bound']:.2f}",
        steps,
        *numbers,
        f"{one['cache_bytes'] / 1e9:.2f}",
    )


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells)
