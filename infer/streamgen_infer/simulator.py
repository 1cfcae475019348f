"""Many viewers, many hours, no device: the real scheduler, admission and media clocks under a virtual clock.

Only three things are made up here: how long a launch takes (the given costs times log-normal noise, times a slow-down),
when viewers come and go (Poisson), and what breaks (launches that fail, devices that slow down or die). All of it
comes from one seed, so a run can be had again exactly. Costs are learned by each device as it runs, as in the engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from streamgen_infer.admission import Admitted, Memory, admit
from streamgen_infer.cost_model import CostModel
from streamgen_infer.pacing import MediaClock
from streamgen_infer.scheduler import Launch, StreamView, Wait, choose
from streamgen_infer.simulate.report import Tally
from streamgen_infer.simulate.scenario import Scenario, Viewers
from streamgen_infer.simulate.state import Device, SimulatedStream, load_of

REPORT_S = 0.5
"""A slow viewer says so often what it shows."""


class Broken(Exception):
    """An invariant of serving does not hold: a bug in the scheduler or in here."""


@dataclass(slots=True)
class Watch:
    """What tests look at."""

    launch: Callable[[float, int, Sequence[StreamView], Launch], None] | None = None
    """(now, device, views, launch) at each launch's beginning."""
    delivered: Callable[[float, str, int, float], None] | None = None
    """(now, stream, block, slack_s)"""
    ended: Callable[[float, str, int], None] | None = None
    """(now, stream, blocks delivered)"""


def simulate(scenario: Scenario, costs: CostModel, *, watch: Watch | None = None) -> Tally:
    """Run a scenario on devices of the given costs -> what was measured. Broken if an invariant does not hold.

    `costs` knows "forward", "decode", and if there is a use for it "recache" and "preview", of every shape.
    """
    run = _Run(scenario, costs, watch or Watch())
    run.start()
    run.loop()
    run.finish()
    return run.tally


class _Run:
    """The events of one simulation."""

    def __init__(self, scenario: Scenario, costs: CostModel, watch: Watch) -> None:
        self.scenario, self.truth, self.watch = scenario, costs, watch
        self.now_s = 0.0
        self.count = 0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.random = np.random.default_rng([scenario.seed, 0])
        values = costs.values()
        self.devices = [
            Device(index, CostModel.from_values(values), np.random.default_rng([scenario.seed, 1 + index]))
            for index in range(scenario.devices)
        ]
        self.tally = Tally(devices=scenario.devices, seconds=scenario.seconds)
        self.ended = 0

    def at(self, when_s: float, handler: Callable[..., None], *arguments: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (when_s, self.count, handler, arguments))

    def start(self) -> None:
        faults = self.scenario.faults
        for kind in self.scenario.viewers:
            self.later(60 / kind.per_minute if kind.per_minute else inf, self.arrive, kind)
        for device in self.devices:
            if faults.slowdowns_per_hour:
                self.later(3600 / faults.slowdowns_per_hour, self.slow_down, device)
            if faults.deaths_per_hour:
                self.later(3600 / faults.deaths_per_hour, self.die, device)

    def later(self, mean_s: float, handler: Callable[..., None], *arguments: Any) -> None:
        """At a random time whose mean is `mean_s`."""
        if mean_s < inf:
            self.at(self.now_s + float(self.random.exponential(mean_s)), handler, *arguments)

    def loop(self) -> None:
        end_s = self.scenario.seconds
        while self.events and self.events[0][0] <= end_s:
            self.now_s, _, handler, arguments = heapq.heappop(self.events)
            handler(*arguments)
        self.now_s = end_s

    def finish(self) -> None:
        for device in self.devices:
            if device.launch is not None:
                self.tally.busy_s[device.index] += self.now_s - device.began_s
            for stream in list(device.order):
                self.end(device, stream)
        if self.ended != self.tally.admitted:
            raise Broken(f"{self.tally.admitted} streams were admitted, {self.ended} have ended")

    # Viewers come, go, and report.

    def arrive(self, kind: Viewers) -> None:
        self.later(60 / kind.per_minute, self.arrive, kind)
        stays_s = float(self.random.exponential(kind.mean_s))
        slow = bool(self.random.random() < kind.slow_share)
        self.tally.offered += 1
        stream = SimulatedStream(
            f"s{self.tally.offered}",
            kind,
            MediaClock(origin_s=self.now_s + kind.start_s, lead_s=kind.lead_s),
            self.now_s,
            self.now_s + stays_s,
            slow,
            served_s=self.now_s,
        )
        refusal = self.place(stream, [device for device in self.devices if device.alive], arrives=True)
        if refusal:
            self.tally.refused[refusal] = self.tally.refused.get(refusal, 0) + 1
            return
        self.tally.admitted += 1
        self.at(stream.ends_s, self.leave, stream)
        if slow:
            self.at(self.now_s + REPORT_S, self.report, stream)
        if kind.prompts_per_minute:
            self.later(60 / kind.prompts_per_minute, self.prompt, stream)

    def place(self, stream: SimulatedStream, devices: Sequence[Device], *, arrives: bool) -> str | None:
        """Admit a stream that is on no device to the emptiest device that has room; what is short if none has."""
        scenario, kind = self.scenario, stream.viewers
        refusal = "no device"
        for device in sorted(devices, key=lambda device: (len(device.order), device.index)):
            answer = admit(
                self.now_s,
                device.loads(),
                load_of(stream),
                device.costs,
                Memory(total_bytes=scenario.memory_bytes),
                start_s=kind.start_s,
                rules=scenario.rules,
                limits=scenario.limits,
            )
            if isinstance(answer, Admitted):
                if arrives:
                    stream.clock.origin_s = answer.due_s
                device.add(stream)
                held = sum(other.viewers.bytes for other in device.order)
                if held > scenario.memory_bytes:
                    raise Broken(f"device {device.index} holds {held} bytes of {scenario.memory_bytes}")
                self.tally.most_bytes[device.index] = max(self.tally.most_bytes[device.index], held)
                self.dispatch(device)
                return None
            refusal = answer.resource
        return refusal

    def leave(self, stream: SimulatedStream) -> None:
        device = self.where(stream)
        if device is None:
            return
        if device.launch is not None and stream.id in device.launch.streams:
            stream.gone = True
        else:
            self.end(device, stream)

    def where(self, stream: SimulatedStream) -> Device | None:
        return next((device for device in self.devices if stream.id in device.streams), None)

    def end(self, device: Device, stream: SimulatedStream) -> None:
        device.remove(stream)
        self.ended += 1
        self.tally.stream(
            watched_s=self.now_s - stream.came_s,
            blocks=stream.delivered,
            late=stream.late,
            stalled_s=stream.clock.stalled_s,
        )
        if self.watch.ended:
            self.watch.ended(self.now_s, stream.id, stream.delivered)

    def prompt(self, stream: SimulatedStream) -> None:
        device = self.where(stream)
        if device is None:
            return
        stream.prompt = True
        self.later(60 / stream.viewers.prompts_per_minute, self.prompt, stream)
        busy = device.launch is not None and stream.id in device.launch.streams
        if stream.stage == "step" and stream.passes_left is None and not busy:
            self.begin_block(stream)
            device.views[stream.slot] = stream.view()

    def begin_block(self, stream: SimulatedStream) -> None:
        stream.stage = "recache" if stream.prompt and stream.block else "step"
        stream.prompt = False
        stream.passes_left = None

    def report(self, stream: SimulatedStream) -> None:
        device = self.where(stream)
        if device is None:
            return
        if self.now_s > stream.clock.origin_s:
            ahead_s = stream.position_s + stream.viewers.slow_rate * REPORT_S
            stream.position_s = min(ahead_s, stream.clock.made_s)
            stream.clock.report(stream.position_s, self.now_s)
            device.views[stream.slot] = stream.view()
        self.at(self.now_s + REPORT_S, self.report, stream)

    # Devices work, fail, slow down and die.

    def dispatch(self, device: Device) -> None:
        """Start what the scheduler chooses, if the device is free."""
        if device.launch is not None or not device.alive or not device.views:
            return
        now_s = self.now_s
        decision = choose(now_s, device.views, device.costs, self.scenario.rules)
        device.lives += 1
        if isinstance(decision, Wait):
            if decision.until_s is not None:
                self.at(max(decision.until_s, now_s), self.wake, device, device.lives)
            return
        self.check_waits(device, decision)
        if self.watch.launch:
            self.watch.launch(now_s, device.index, device.views, decision)
        rows = len(decision.streams)
        shape = device.streams[decision.streams[0]].viewers.shape
        time_factor, lot = device.noise(self.scenario.noise, self.scenario.factors)
        took_s = self.truth.predict(decision.kind, shape, rows, 0.5) * time_factor * device.factor
        device.launch, device.began_s = decision, now_s
        failed = lot < self.scenario.faults.failures
        self.at(now_s + took_s, self.done, device, device.lives, shape, failed)

    def check_waits(self, device: Device, launch: Launch) -> None:
        """Nobody starves: who has waited `max_wait_s` is in one of the next launches, of as many as there are streams.

        Their number is the most that the device has held: those that were before it may have gone since."""
        longest_s = self.now_s - self.scenario.rules.max_wait_s
        if device.served_s >= longest_s:
            return
        device.served_s = min([view.last_served_s for view in device.views])
        for stream, view in zip(device.order, device.views, strict=True):
            if view.last_served_s >= longest_s:
                continue
            if view.id in launch.streams:
                stream.passed_over = 0
            elif view.not_before_s < longest_s or view.passes_left is not None or view.ready == "commit":
                stream.passed_over += 1
                if stream.passed_over > device.most_streams:
                    raise Broken(f"{stream.id}: passed over by {stream.passed_over} launches after the longest wait")

    def wake(self, device: Device, life: int) -> None:
        if life == device.lives:
            self.dispatch(device)

    def done(self, device: Device, life: int, shape: str, failed: bool) -> None:
        """A launch has ended."""
        launch, now_s = device.launch, self.now_s
        if life != device.lives or launch is None:
            return
        device.launch = None
        took_s = now_s - device.began_s
        self.tally.launch(device.index, launch.kind, len(launch.streams), took_s, failed)
        if not failed:
            device.costs.observe(launch.kind, shape, len(launch.streams), took_s)
        decodes = launch.kind in ("decode", "preview")
        for id in launch.streams:
            stream = device.streams[id]
            if stream.gone:
                self.end(device, stream)
                continue
            stream.served_s, stream.passed_over = now_s, 0
            if not failed:
                if decodes:
                    self.deliver(stream, launch.flags.get(id, 0))
                else:
                    self.advance(stream, launch)
            device.views[stream.slot] = stream.view()
        self.dispatch(device)

    def advance(self, stream: SimulatedStream, launch: Launch) -> None:
        """One pass of a stream has succeeded."""
        if stream.stage == "recache":
            stream.stage = "step"
        elif stream.stage == "step":
            if stream.passes_left is None:
                stream.passes_left = launch.steps[stream.id]
                self.tally.begun(stream.passes_left, launch.flags.get(stream.id, 0))
            stream.passes_left -= 1
            if stream.passes_left == 0:
                stream.stage = "commit"
                if stream.undecoded is not None:
                    raise Broken(f"{stream.id}: block {stream.block} finished before {stream.undecoded} was decoded")
                if stream.block >= stream.delivered:  # made again after a death, it may be on screen already
                    stream.undecoded = stream.block
                if self.scenario.rules.commit_passes == 0:
                    self.next_block(stream)
        else:
            self.next_block(stream)

    def next_block(self, stream: SimulatedStream) -> None:
        stream.block += 1
        self.begin_block(stream)

    def deliver(self, stream: SimulatedStream, flags: int) -> None:
        """A block's frames are ready."""
        block, stream.undecoded = stream.undecoded, None
        if block != stream.delivered:
            raise Broken(f"{stream.id}: block {block} came where {stream.delivered} was due")
        stream.delivered += 1
        block_s = stream.viewers.block_s
        slack_s = stream.clock.delivered(block * block_s, block_s, self.now_s)
        stream.late += slack_s < 0
        shown_s = self.now_s + max(slack_s, 0.0)
        apart_s = None if stream.shown_s is None or stream.slow else shown_s - stream.shown_s
        stream.shown_s = shown_s
        first_s = self.now_s - stream.came_s if block == 0 else None
        self.tally.block(slack_s, flags, block_s, apart_s, first_s)
        if self.watch.delivered:
            self.watch.delivered(self.now_s, stream.id, block, slack_s)

    def slow_down(self, device: Device) -> None:
        faults = self.scenario.faults
        device.factor = faults.slowdown_factor
        self.at(self.now_s + faults.slowdown_s, self.speed_up, device)

    def speed_up(self, device: Device) -> None:
        device.factor = 1.0
        self.later(3600 / self.scenario.faults.slowdowns_per_hour, self.slow_down, device)

    def die(self, device: Device) -> None:
        """The device loses all that was not committed; its streams go elsewhere or wait until it is back."""
        faults = self.scenario.faults
        self.tally.deaths += 1
        if device.launch is not None:
            self.tally.busy_s[device.index] += self.now_s - device.began_s
        device.launch, device.alive = None, False
        device.lives += 1
        self.tally.dead_s[device.index] += min(faults.rebuild_s, self.scenario.seconds - self.now_s)
        others = [other for other in self.devices if other.alive]
        for stream in list(device.order):
            if stream.gone:
                self.end(device, stream)
                continue
            self.restore(stream)
            device.views[stream.slot] = stream.view()
            if others:
                device.remove(stream)
                if self.place(stream, others, arrives=False):
                    device.add(stream)
        self.at(self.now_s + faults.rebuild_s, self.rebuilt, device)

    def restore(self, stream: SimulatedStream) -> None:
        """As it stood after its last commit; the cache is computed again from the kept latents."""
        if stream.undecoded == stream.block:
            stream.undecoded = None  # finished but not committed: made again, and the same to the bit
        stream.prompt = stream.prompt or (stream.block > 0 and self.truth.known("recache", stream.viewers.shape))
        self.begin_block(stream)

    def rebuilt(self, device: Device) -> None:
        device.alive = True
        self.later(3600 / self.scenario.faults.deaths_per_hour, self.die, device)
        self.dispatch(device)
