"""What `streamgen plan simulate` does: options and files to a scenario, its run, and what it says about it."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer.cost_model import CostModel
from streamgen_infer.errors import Failure
from streamgen_infer.report import check_report, write_report
from streamgen_infer.simulate.parallel import simulate_parts
from streamgen_infer.simulate.report import Tally
from streamgen_infer.simulate.scenario import Scenario, Viewers, check, lines, load_scenario, plain

MOST_PROCESSES = 1024
LINE = re.compile(r"\s*([0-9.]+)\s*\+\s*([0-9.]+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The options as given; None: not given."""

    scenario: Path | None = None
    costs: Path | None = None
    forward: str | None = None
    decode: str | None = None
    devices: int | None = None
    viewers: float | None = None
    stay: float | None = None
    steps: str | None = None
    block: float | None = None
    seconds: float | None = None
    noise: float | None = None
    slow_viewers: float | None = None
    failures: float | None = None
    slowdowns: float | None = None
    deaths: float | None = None
    seed: int | None = None
    processes: int = 1


def run(given: Given, *, json: Path | None, plot: Path | None, overwrite: bool) -> int:
    """The command; returns the exit code."""
    if not 1 <= given.processes <= MOST_PROCESSES:
        raise UserError(f"--processes is {given.processes}; it must be 1 to {MOST_PROCESSES}")
    scenario = scenario_of(given)
    costs = costs_of(given, scenario)
    if given.scenario is None and given.costs is not None:
        scenario = _of_the_only_shape(scenario, costs, given.costs)
    check_costs(scenario, costs)
    for path, option in ((json, "--json"), (plot, "--plot")):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    if json is not None:
        check_report(json, "--json", overwrite=overwrite)
    if plot is not None and (plot.suffix != ".png" or (plot.exists() and not overwrite)):
        raise UserError(f"--plot {plot}: give a new file that ends in .png, or add --overwrite")
    started_s = time.perf_counter()
    tally = simulate_parts(scenario, costs, given.processes)
    values = tally.values()
    took_s = time.perf_counter() - started_s
    print(summary(values))
    minutes = values["stream_minutes"]
    print(
        f"simulated {minutes:.0f} stream-minutes in {took_s:.1f} s ({minutes / took_s:.0f} a second)", file=sys.stderr
    )
    if json is not None:
        head = {"command": "plan simulate", "version": __version__}
        played = {"seed": scenario.seed, "processes": given.processes}
        write_report(json, {**head, **played, "scenario": plain(scenario), "costs": costs.values(), **values})
    if plot is not None:
        _write(plot, picture(tally))
    return 0


# From options to a scenario.


def scenario_of(given: Given) -> Scenario:
    """The file's scenario, or the default one, with the options over it. UserError for what makes no sense."""
    scenario = Scenario(viewers=(Viewers(per_minute=10),), seconds=3600)
    if given.scenario is not None:
        scenario = load_scenario(given.scenario)
    steps = None if given.steps is None else _steps(given.steps)
    changes: dict[str, Any] = {
        "per_minute": given.viewers,
        "mean_s": given.stay,
        "trained_steps": steps,
        "block_s": given.block,
        "slow_share": given.slow_viewers,
    }
    found = {name: value for name, value in changes.items() if value is not None}
    viewers = tuple(replace(one, **found) for one in scenario.viewers)
    changes = {
        "failures": given.failures,
        "slowdowns_per_hour": given.slowdowns,
        "deaths_per_hour": given.deaths,
    }
    faults = replace(scenario.faults, **{name: value for name, value in changes.items() if value is not None})
    changes = {"devices": given.devices, "seconds": given.seconds, "noise": given.noise, "seed": given.seed}
    found = {name: value for name, value in changes.items() if value is not None}
    scenario = replace(scenario, viewers=viewers, faults=faults, **found)
    check(scenario)
    return scenario


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--steps {text!r}; give step counts with commas between, the usual one first: 4,2,1") from None


def costs_of(given: Given, scenario: Scenario) -> CostModel:
    """From the file, or straight lines for every shape of the scenario."""
    shapes = sorted({one.shape for one in scenario.viewers})
    if (given.costs is None) == (given.forward is None):
        raise UserError("costs are missing: give --costs FILE, or --forward MS+MS and --decode MS+MS (and not both)")
    if given.costs is not None:
        return CostModel.load(given.costs)
    costs = CostModel()
    forward, decode = _line("--forward", given.forward), _line("--decode", given.decode)
    for shape in shapes:
        costs.merge(lines(shape, forward=forward, decode=decode))
    return costs


def check_costs(scenario: Scenario, costs: CostModel) -> None:
    """UserError if a cost that the scenario needs is not known."""
    for one in scenario.viewers:
        needed = ["forward", "decode", *(["recache"] * bool(one.prompts_per_minute)), *(["preview"] * one.preview)]
        missing = [kind for kind in needed if not costs.known(kind, one.shape)]
        if missing:
            raise UserError(f"no cost of {missing[0]!r} for the shape {one.shape!r}; known: {', '.join(costs.names())}")


def _of_the_only_shape(scenario: Scenario, costs: CostModel, path: Path) -> Scenario:
    """The default viewers watch what the file has measured, if that is one thing."""
    shapes = costs.shapes()
    if len(shapes) != 1:
        raise UserError(f"{path} has costs of {len(shapes)} shapes; say which viewers watch which in a --scenario file")
    return replace(scenario, viewers=tuple(replace(one, shape=shapes[0]) for one in scenario.viewers))


def _line(option: str, text: str | None) -> tuple[float, float]:
    match = LINE.fullmatch(text or "")
    try:
        fixed_ms, row_ms = (float(part) for part in match.groups()) if match else (0.0, 0.0)
    except ValueError:
        fixed_ms = row_ms = 0.0
    if fixed_ms + row_ms <= 0:
        raise UserError(f"{option} {text!r}; give milliseconds of a launch and of each row, as 20+4")
    return fixed_ms / 1000, row_ms / 1000


# What is said about a run.


def summary(values: Mapping[str, Any]) -> str:
    """A few lines for people."""
    streams = values["streams"]
    refused = ", ".join(f"{count} for {reason}" for reason, count in streams["refused"].items()) or "none"
    rows = [f"{rows:.1f} rows per {kind}" for kind, rows in values["rows_per_launch"].items()]
    busy = values["utilisation"]
    lines = [f"streams      {streams['offered']} came, {streams['admitted']} admitted; refused: {refused}"]
    if values["blocks"]:
        miss, playout, first = values["miss_rate_per_stream"], values["continuous_playout_ratio"], values["first_frame"]
        lines += [
            f"blocks       {values['blocks']}, late {values['late_blocks']} ({values['miss_rate']:.3%}); "
            f"per stream: P99 {miss['p99']:.2%}, worst {miss['max']:.2%}",
            f"first frame  P50 {first['p50_s']:.3f} s, P95 {first['p95_s']:.3f} s, P99 {first['p99_s']:.3f} s",
            f"jitter       P99 {values['jitter']['p99_s'] * 1000:.0f} ms, worst {values['jitter']['max_s']:.3f} s",
            f"playout      mean {playout['mean']:.2%} continuous, worst {playout['min']:.2%}; "
            f"{values['smooth_streams']:.1%} of streams at 99 % or more",
            f"degraded     {', '.join(f'{name} {count}' for name, count in values['degraded'].items())}",
        ]
    lines += [f"devices      {min(busy):.1%} to {max(busy):.1%} busy; {', '.join(rows) or 'no launches'}"]
    return "\n".join(lines)


def picture(tally: Tally) -> bytes:
    """Distributions, devices and refusals, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (times, misses), (devices, refusals) = figure.subplots(2, 2)
    for name, histogram in (
        ("first frame", tally.first_frame),
        ("slack when ready", tally.slack),
        ("jitter", tally.jitter),
    ):
        times.plot(*histogram.shares(), label=name)
    times.set(xlabel="seconds", ylabel="share at most so long", ylim=(0, 1.02))
    times.legend(fontsize=8)
    rates = sorted(100 * rate for rate in tally.miss_rates)
    misses.plot([100 * (i + 1) / len(rates) for i in range(len(rates))], rates, drawstyle="steps-pre")
    misses.axhline(1, color="grey", linewidth=0.8)
    misses.set(xlabel="% of streams", ylabel="% of blocks late, at most")
    busy = tally.values()["utilisation"]
    devices.bar([str(device) for device in range(len(busy))], [100 * share for share in busy])
    devices.set(xlabel="device", ylabel="% of its time busy", ylim=(0, 100))
    answers = {"admitted": tally.admitted, **dict(sorted(tally.refused.items()))}
    refusals.barh(list(answers), list(answers.values()))
    refusals.set(xlabel="streams that came")
    for axes in (times, misses):
        axes.grid(alpha=0.3)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror} (errno {error.errno})") from error
    finally:
        temporary.unlink(missing_ok=True)
