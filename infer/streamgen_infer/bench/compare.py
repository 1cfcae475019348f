"""`streamgen bench compare OLD.json NEW.json`: which figures got worse, by ratios, and by more than a threshold.

A figure of the new file over the same one of the old, where lower is better; the other way round where higher is. What
decides is the processor time of a block over that of the bound measured beside it: waiting for other programs does not
count, though the caches that they take away do. Times, and ratios of them, are shown, and decide only with --times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgen.errors import UserError

REGRESSION = 1
"""Exit code: something got worse by more than the threshold."""
RATIOS = (
    "cpu_ratio_to_bound",
    "together_over_one_by_one",
    "bytes_per_block",
    "cache_bytes",
    "peak_rss_mb",
)
"""Figures that depend little on what else the machine does; lower is better."""
TIMES = (
    "ratio_to_bound",
    "host_share",
    "block_ms",
    "block_cpu_ms",
    "text_ms",
    "commit_ms",
    "decode_ms",
    "ttff_s",
    "one_by_one_s",
    "together_s",
)
RATES = ("real_time", "tokens_per_s", "flops_per_s", "gain")
"""Depend on it, and higher is better."""
ADDITIVE = {"host_share": 0.05}
"""Shares near zero: worse only if they grow by this much as well."""
KEY = ("suite", "dtype", "threads", "steps", "tokens_per_block", "visible_tokens", "weights", "device")
"""What two results must have in common to be the same measurement, as far as both say."""


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one measurement in both files."""

    where: str
    name: str
    old: float
    new: float
    worse: float
    """How many times worse the new one is; below 1 it is better."""
    decides: bool

    def regressed(self, threshold: float) -> bool:
        """Worse by more than the threshold, in a figure that decides."""
        grown = self.new - self.old > ADDITIVE.get(self.name, -math.inf)
        return self.decides and self.worse > 1 + threshold and grown


def run(files: Sequence[Path], *, threshold: float, times: bool, force: bool) -> int:
    """The command; returns the exit code: 0, or REGRESSION."""
    if len(files) != 2:
        raise UserError(f"bench compare takes two files, OLD.json and NEW.json; {len(files)} were given")
    if not 0 < threshold <= 10:
        raise UserError(f"--threshold is {threshold:g}; it must be above 0 and at most 10 (0.05: 5 % worse)")
    old, new = (_load(file) for file in files)
    lines = compare(old, new, times=times, force=force)
    _print(lines, threshold)
    worse = [line for line in lines if line.regressed(threshold)]
    for line in worse:
        print(f"regression: {line.where} {line.name}: {line.old:.4g} -> {line.new:.4g}, {line.worse:.3f} x as bad")
    decided = sum(line.decides for line in lines)
    if not worse:
        print(f"no regression beyond {100 * threshold:g} % in {decided} figures that depend little on the load")
    for file, values in zip(files, (old, new), strict=True):
        load, cores = values.get("load"), values.get("environment", {}).get("cores")
        if load is not None and cores is not None and load > cores:
            print(f"note: {file} was measured under load {load:.1f} on {cores} cores, where ratios scatter by 10 %")
    return REGRESSION if worse else 0


def compare(old: Mapping[str, Any], new: Mapping[str, Any], *, times: bool, force: bool) -> list[Line]:
    """Every figure that both files have. UserError for files that measured different things, unless forced."""
    if not force:
        _check_machines(old, new)
    before, after = (_by_key(values) for values in (old, new))
    if not force and before.keys() != after.keys():
        only = sorted(_named(key) for key in before.keys() ^ after.keys())
        raise UserError(f"the files measured different things: {'; '.join(only)} is in one of them; or take --force")
    shared = [key for key in before if key in after]
    if not shared:
        raise UserError("the files have no suite and dtype in common: there is nothing to compare")
    if not force:
        for key in shared:
            _check_settings(key, before[key], after[key])
    return [line for key in shared for line in _lines(_named(key), before[key], after[key], times)]


def _load(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON file: {error}") from error
    if not isinstance(values, dict) or values.get("command") != "bench" or not values.get("results"):
        raise UserError(f"{file} is no file of `streamgen bench --json` with results")
    return values


def _cpu(values: Mapping[str, Any]) -> str | None:
    found: str | None = values.get("environment", values).get("cpu")
    return found


def _check_machines(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = _cpu(old), _cpu(new)
    if before != after:
        raise UserError(f"measured on different CPUs, {before} and {after}: measure both on one, or take --force")


def _by_key(values: Mapping[str, Any]) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    return {(one["suite"], one["dtype"], one["threads"]): one for one in values["results"]}


def _named(key: tuple[str, str, int]) -> str:
    return f"{key[0]} {key[1]} {key[2]} thread{'s' if key[2] > 1 else ''}"


def _check_settings(key: tuple[str, str, int], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in KEY:
        if name in old and name in new and old[name] != new[name]:
            raise UserError(
                f"{_named(key)}: {name} is {old[name]!r} in one file and {new[name]!r} in the other: these are "
                "different measurements; or take --force"
            )


def _lines(where: str, old: Mapping[str, Any], new: Mapping[str, Any], times: bool) -> Iterator[Line]:
    for name in (*RATIOS, *TIMES, *RATES):
        before, after = old.get(name), new.get(name)
        if not isinstance(before, int | float) or not isinstance(after, int | float):
            continue
        better = name in RATES
        top, bottom = (before, after) if better else (after, before)
        if top == bottom == 0:
            continue
        worse = top / bottom if bottom > 0 else math.inf
        yield Line(where, name, float(before), float(after), worse, times or name in RATIOS)


def _print(lines: Sequence[Line], threshold: float) -> None:
    width = max(len(line.name) for line in lines) if lines else 0
    last = ""
    for line in lines:
        if line.where != last:
            print(line.where)
            last = line.where
        note = "  REGRESSION" if line.regressed(threshold) else ("" if line.decides else "  (depends on the load)")
        print(f"  {line.name:{width}}  {line.old:>12.4g}  {line.new:>12.4g}  x {line.worse:.3f}{note}")
