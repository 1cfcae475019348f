"""What `streamgen plan simulate` plays: viewers, devices, faults; and its form as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from math import ceil
from pathlib import Path
from typing import Any, get_type_hints

from streamgen.errors import UserError
from streamgen_infer.admission import Limits
from streamgen_infer.cost_model import CostModel
from streamgen_infer.scheduler import Rules

MOST_DEVICES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewers:
    """People who watch one kind of stream."""

    per_minute: float
    """Arrivals, over all devices (Poisson)."""
    mean_s: float = 300.0
    """How long they stay (exponential)."""
    shape: str = "stream"
    block_s: float = 0.75
    trained_steps: tuple[int, ...] = (4,)
    bytes: int = 0
    lead_s: float = 1.5
    start_s: float = 1.0
    preview: bool = False
    prompts_per_minute: float = 0.0
    """Changes of prompt by re-cache, of one viewer."""
    slow_share: float = 0.0
    slow_rate: float = 0.7
    """A slow viewer plays at this rate and reports it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong; rates are for one device (Poisson)."""

    failures: float = 0.0
    """Share of launches that take their time and change nothing."""
    slowdowns_per_hour: float = 0.0
    slowdown_factor: float = 2.0
    slowdown_s: float = 10.0
    deaths_per_hour: float = 0.0
    rebuild_s: float = 10.0
    """From a death until the device works again, detection included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is simulated."""

    viewers: tuple[Viewers, ...]
    seconds: float
    devices: int = 1
    memory_bytes: int = 2**62
    """Of one device, for streams."""
    noise: float = 0.05
    """Standard deviation of the logarithm of a launch's time."""
    factors: tuple[float, ...] = ()
    """In place of `noise`: measured times of launches over predicted ones, drawn at random."""
    faults: Faults = field(default_factory=Faults)
    rules: Rules = field(default_factory=Rules)
    limits: Limits = field(default_factory=Limits)
    seed: int = 0


def lines(shape: str, *, forward: tuple[float, float], decode: tuple[float, float], rows: int = 64) -> CostModel:
    """Costs that are straight lines: (seconds of a launch, seconds of each row)."""
    costs = CostModel()
    for kind, (fixed_s, row_s) in (("forward", forward), ("recache", forward), ("decode", decode)):
        for count in {1, ceil(rows / 2), rows}:
            costs.give(kind, shape, count, fixed_s + row_s * count)
    return costs


# From and to JSON.


def load_scenario(path: Path) -> Scenario:
    """A JSON file with the fields of `Scenario`. UserError naming the first thing that is wrong with it."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--scenario {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--scenario {path}: not JSON ({error})") from error
    scenario = _record(Scenario, values, str(path))
    assert isinstance(scenario, Scenario)
    return scenario


def _record(kind: type, values: Any, where: str) -> Any:
    """A dataclass from JSON; unknown and missing fields are mistakes."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be an object with fields of {kind.__name__}")
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; there are: {', '.join(sorted(hints))}")
    nested = {"faults": Faults, "rules": Rules, "limits": Limits}
    made: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{where}: {name}"
        if name in nested:
            made[name] = _record(nested[name], value, place)
        elif name == "viewers" and isinstance(value, list):
            made[name] = tuple(_record(Viewers, one, f"{place}[{i}]") for i, one in enumerate(value))
        elif name in ("trained_steps", "factors") and isinstance(value, list):
            made[name] = tuple(value)
        elif hints[name] in (int, float, bool, str) and not _fits(value, hints[name]):
            raise UserError(f"{place} is {value!r}; it must be of type {hints[name].__name__}")
        else:
            made[name] = value
    try:
        return kind(**made)
    except TypeError as error:
        raise UserError(f"{where}: {str(error).partition(' ')[2]}") from error


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def plain(value: Any) -> Any:
    """Dataclasses as what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return [plain(one) for one in value] if isinstance(value, tuple) else value


def check(scenario: Scenario) -> None:
    """UserError for numbers that cannot be simulated."""
    ranges: list[tuple[str, float, float, float]] = [
        ("devices", scenario.devices, 1, MOST_DEVICES),
        ("seconds", scenario.seconds, 1, 1e9),
        ("noise", scenario.noise, 0, 2),
        ("seed", scenario.seed, 0, 2**63),
        ("memory_bytes", scenario.memory_bytes, 0, 2**62),
        ("rules.max_rows", scenario.rules.max_rows, 1, 4096),
        ("rules.max_wait_s", scenario.rules.max_wait_s, 0, 1e6),
        ("limits.most_load", scenario.limits.most_load, 0, 100),
        ("faults.slowdown_factor", scenario.faults.slowdown_factor, 0.01, 1e4),
    ]
    ranges += [
        (f"faults.{name}", getattr(scenario.faults, name), 0, most)
        for name, most in (("failures", 1), ("slowdowns_per_hour", 3600), ("deaths_per_hour", 3600))
    ]
    ranges += [(f"faults.{name}", getattr(scenario.faults, name), 0.001, 1e6) for name in ("slowdown_s", "rebuild_s")]
    for index, one in enumerate(scenario.viewers):
        place = f"viewers[{index}]."
        ranges += [(f"{place}{name}", getattr(one, name), 1e-3, 1e6) for name in ("mean_s", "block_s", "start_s")]
        ranges += [(f"{place}{name}", getattr(one, name), 0, 1e6) for name in ("per_minute", "lead_s", "bytes")]
        ranges += [(f"{place}slow_share", one.slow_share, 0, 1), (f"{place}slow_rate", one.slow_rate, 0.01, 1)]
        if not one.trained_steps or not all(isinstance(n, int) and 1 <= n <= 1000 for n in one.trained_steps):
            raise UserError(f"{place}trained_steps is {one.trained_steps}; it must be one or more counts of 1 to 1000")
    for name, value, least, most in ranges:
        if not (math.isfinite(value) and least <= value <= most):
            raise UserError(f"{name} is {value:g}; it must be {least:g} to {most:g}")
    if not all(isinstance(one, int | float) and 1e-6 <= one <= 1e6 for one in scenario.factors):
        raise UserError("factors must be numbers of 1e-06 to 1e+06")
    if not scenario.viewers:
        raise UserError("viewers is empty; the scenario needs at least one kind of them")
