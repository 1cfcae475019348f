"""Which schedule a new stream gets: a pure function of the model's card, the costs, the load, and the viewer's wish.

At the pace of the screen a prompt shows as many blocks later as are in progress at once, so a serial stream obeys
soonest; deeper schedules (a stream batch, a chain, a ring) delay it and cost the devices less. While there is room the
wish decides, and when throughput is short the device's time does. Memory is not looked at: that is admission's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from streamgen.errors import UserError
from streamgen.grid import VISIBILITIES, Grid, Visibility
from streamgen.initiation import interval
from streamgen.schedules import SCHEDULES, Costs, Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What must be kept, in the unit of the costs."""

    block: float
    """Time on screen of a block."""
    most_load: float = 1.0
    """The share of a device's time that may be planned."""
    control: float = 0.0
    """From a new prompt to the block that shows it, as long as the viewer accepts; 0: as short as there is room for."""


class Choice(NamedTuple):
    """A schedule, and how it would do."""

    schedule: str
    visibility: Visibility
    holds: bool
    """All streams keep their pace."""
    control: float
    """From a new prompt to the first block that shows it, at least; a block more at most."""
    busy: float
    """Time of the busiest device for one block of every stream."""


def choose_schedule(listed: Sequence[str], grid: Grid, machine: Machine, costs: Costs, pace: Pace) -> Choice:
    """The schedule and the visibility for streams of one model.

    listed: the visibilities of the model's card. grid: its streams with all their steps, the new one included: their
    number is the load; its visibility is of no matter. Of what keeps every stream's pace, and obeys within the wanted
    time, the one that costs the devices least; if nothing obeys so soon, what obeys soonest; if nothing keeps the pace,
    what comes nearest to it. Equal ones: the earlier in the table. UserError if nothing can run a listed visibility.
    """
    found = list(_choices(listed, grid, machine, costs, pace))
    if not found:
        raise UserError(
            f"no schedule runs {grid.streams} streams on {machine.devices} devices under the visibilities that the "
            f"model was trained for, {', '.join(listed)}; there are: {', '.join(VISIBILITIES)}"
        )
    holding = [one for one in found if one.holds]
    if not holding:
        return min(found, key=lambda one: (one.busy, one.control))
    soon = [one for one in holding if one.control <= pace.control]
    if soon:
        return min(soon, key=lambda one: (one.busy, one.control))
    return min(holding, key=lambda one: (one.control, one.busy))


def _choices(listed: Sequence[str], grid: Grid, machine: Machine, costs: Costs, pace: Pace) -> Iterator[Choice]:
    """All that the model may be streamed with on this machine."""
    lasting = grid.sink_frames + 1  # blocks, the last of them beyond the sink
    steps = tuple((blocks[-1],) * lasting for blocks in grid.steps)
    for name, row in SCHEDULES.items():
        for visibility in (one for one in row.visibilities if one in listed):
            try:
                fitting = replace(grid, visibility=visibility, steps=steps)
            except ValueError:
                continue  # a window that does not hold all that a joint visibility denoises together
            if machine.devices > row.devices(fitting)[0]:
                continue
            bounds = interval(name, fitting, machine, costs)
            yield Choice(
                schedule=name,
                visibility=visibility,
                holds=bounds.period <= pace.most_load * pace.block,
                control=row.depth(fitting, machine) * pace.block,
                busy=max(bounds.resource),
            )
