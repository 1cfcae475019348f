"""What a person sees of an evaluation: a progress bar while it runs, tables when it is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamgen.worlds.grammar import ATTRIBUTES

Values = Mapping[str, Any]
COLUMNS = (*ATTRIBUTES, "presence", "obeys")
SHOWN_SEGMENTS = 8
_HEADS = [{"background": "backgr."}.get(column, column) for column in COLUMNS]


class Bar:
    """A progress bar on a terminal, one line elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task(what, total=total)
        self._what, self._total = what, total

    def __enter__(self) -> Bar:
        if not sys.stderr.isatty():
            print(f"{self._what}: {self._total} ...", file=sys.stderr, flush=True)
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)


def show(values: Values) -> None:
    """Print the fields of a report (as they are in its JSON file: None for what is not known)."""
    several = values.get("by_steps", [values])
    codec = values["codec"]
    steps = ", ".join(_steps(one) for one in several)
    print(f"\n{values['model']}: {values['n']} held-out captions, {steps}{numbers(values)}")
    print(aligned([["%", *_HEADS, ""], *(row for one in several for row in _adherence_rows(one, len(several) > 1))]))
    print(f"codec alone: obeys {_share(codec, 'adherence', 'obeys')}, {codec['psnr_db']:.2f} dB PSNR")
    for one in several:
        print(f"\n{_steps(one)}" if len(several) > 1 else "")
        print("\n".join(_words(one["by_word"])))
        if one["switch"]["n"]:
            print("\n" + aligned([_SWITCH_HEADS, *map(_switch_row, one["switches"])]) + "\n")
        print("\n".join(_lines(one)))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as columns, the first one to the left and the others to the right; widths are as they need be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        [row[0].ljust(widths[0]), *(word.rjust(w) for word, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def steps_text(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _steps(values: Values) -> str:
    return steps_text(values["steps"]) + ("" if values["trained"] else " (not trained for)")


def numbers(values: Values) -> str:
    """', bf16, keys and values int8, weights int8': of one-byte modes only what is in use."""
    dtype = values["dtype"]
    kept = (("keys and values", values.get("cache_dtype", dtype)), ("weights", values.get("weights_dtype", dtype)))
    return ", ".join(["", dtype, *(f"{what} {name}" for what, name in kept if name != dtype)])


def _adherence_rows(values: Values, several: bool) -> Iterator[list[str]]:
    """Of the clips, and of some segments of the long streams."""

    def row(name: str, shares: Values, interval: Sequence[float | None]) -> list[str]:
        return [name, *(_percent(shares[column]) for column in COLUMNS), _between(interval)]

    steps = f", {steps_text(values['steps'])}" if several else ""
    yield row(
        f"first 5 s{steps}", {**values["adherence"], "presence": values["presence"]}, values["intervals"]["obeys"]
    )
    segments = values["by_segment"]
    if len(segments) > 1:
        places = {round(i * (len(segments) - 1) / (SHOWN_SEGMENTS - 1)) for i in range(SHOWN_SEGMENTS)}
        for one in (segments[place] for place in sorted(places)):
            yield row(f"  from {one['start_s']:g} s (n {one['n']})", one, one["intervals"]["obeys"])


def _words(by_word: Values) -> Iterator[str]:
    """One line per attribute: how often it is right where the caption has this word, and of how many."""
    yield "right by word, % (clips)"
    for attribute, words in by_word.items():
        yield f"  {attribute:<11}" + ", ".join(f"{w} {100 * v['right']:.0f} ({v['n']})" for w, v in words.items())


_SWITCH_HEADS = ["after a switch", "obeys %", "", "within 1 s %", "", "ever", "their median", "median of all"]


def _switch_row(one: Values) -> list[str]:
    return [
        one["transition"],
        _percent(one["obeys"]),
        _between(one["intervals"]["obeys"]),
        _percent(one["within_1s"]),
        _between(one["intervals"]["within_1s"]),
        f"{one['reached']} of {one['n']}",
        _seconds(one["median_latency_s"]),
        _seconds(one["median_latency_all_s"]),
    ]


def _lines(values: Values) -> list[str]:
    lines = []
    if values["nulls"] is not None:
        null = values["nulls"]
        lines.append(
            f"worth nothing: obeys {_percent(null['shuffled'])} % against shuffled captions, "
            f"{_percent(null['background_only'])} % with backgrounds alone"
        )
    drift = values["drift"]
    if drift is not None:
        ratio = "-" if drift["ratio"] is None else f"{drift['ratio']:.2f} {_between_plain(drift['low'], drift['high'])}"
        lines.append(f"drift: obeys from {drift['last_start_s']:g} s over obeys from the start, {ratio}")
    motion = values["motion"]
    real = motion["reference"]
    lines.append(
        f"motion (rendered video): speed {_number(motion['speed'])} ({_number(real['speed'])}) sides/s, "
        f"moving {_percent(motion['moving'])} ({_percent(real['moving'])}) %, "
        f"jerk {_number(motion['jerk'])} ({_number(real['jerk'])}) sides/s^3"
    )
    stream = values["stream"]
    if stream is not None:
        parts = (f"{name.upper()} {stream[name]:.2f} ({stream['ceiling'][name]:.2f})" for name in ("t", "f", "d"))
        lines.append(f"STREAM (rendered video), {stream['features']}: {', '.join(parts)}")
    for name, found in values.get("over_seeds", {}).items():
        if name in ("obeys", "obeys_at_end", "drift") and found["mean"] is not None:
            error = "-" if found["error"] is None else f"{found['error']:.3f}"
            lines.append(f"over {len(values['per_seed'])} seeds: {name} {found['mean']:.3f}, standard error {error}")
    speed = f"one stream alone {_number(values['stream_fps'])}, in batches {_number(values['fps'])}"
    return [*lines, f"frames per second: {speed}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _share(values: Values, group: str, name: str) -> str:
    return f"{_percent(values[group][name])} % {_between(values['intervals'][name])}"


def _between(interval: Sequence[float | None]) -> str:
    low, high = interval
    return "" if low is None or high is None else f"[{100 * low:.0f}, {100 * high:.0f}]"


def _between_plain(low: float | None, high: float | None) -> str:
    return f"[{_number(low)}, {'inf' if high is None else _number(high)}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"
