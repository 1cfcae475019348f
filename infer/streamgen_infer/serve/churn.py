"""`streamgen load --churn`: for a long time viewers come, change prompts, leave, break off and come back.

What must hold afterwards: no frame was lost or came twice, no session is left, and the server's memory has no slope.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from streamgen.errors import UserError
from streamgen_infer.errors import Failure
from streamgen_infer.serve.load_viewer import Fate, Seen, Switch, Visit, visit

FATES: tuple[Fate, ...] = ("watches", "watches", "stops", "killed", "cut")
TRANSITIONS = ("cut", "recache", "blend")
SAMPLES, LEAST_SAMPLE_S = 720, 0.5
FORGET_S = 60.0
"""A server gives up a viewer who is gone after `--resume-within`, 30 s by default."""
SETTLED = 0.25
"""Memory is judged after so much of the run: pools and buffers are full then."""
OVER = ("closed", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who comes, and for how long."""

    url: str
    token: str | None
    seconds: float
    per_second: float
    most: int
    """At once; who would be one more is not sent."""
    longest_s: float
    """Of video, for one viewer."""
    patience_s: float
    """For the last ones, when the time is over."""
    seed: int
    start: Mapping[str, Any]
    prompts: tuple[str, ...]
    apply_at: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What `/metrics` said."""

    at_s: float
    memory_mb: float
    sessions: int
    streams: int


@dataclass(slots=True)
class Churned:
    """What a run left behind, beside what its viewers saw."""

    fates: Counter[str] = field(default_factory=Counter)
    not_sent: int = 0
    samples: list[Sample] = field(default_factory=list)
    sessions_left: int = 0
    streams_left: int = 0

    def values(self) -> dict[str, Any]:
        """For the report."""
        memory = [one.memory_mb for one in self.samples]
        return {
            "fates": dict(self.fates),
            "not_sent": self.not_sent,
            "sessions_left_open": self.sessions_left,
            "streams_left_open": self.streams_left,
            "server_memory_mb": {"first": memory[0], "last": memory[-1], "max": max(memory)},
            "server_memory_slope_mb_per_hour": slope_mb_per_hour(self.samples),
            "server_memory_samples": [[round(one.at_s, 1), round(one.memory_mb, 2)] for one in self.samples],
        }

    def wrong(self, values: Mapping[str, Any]) -> str | None:
        """What must not be, in words."""
        names = ("lost_frames", "repeated_frames", "sessions_left_open", "streams_left_open")
        found = [f"{name} {values[name]}" for name in names if values[name]]
        return f"the run is over, but: {', '.join(found)}" if found else None


async def run(plan: Plan, viewer: Any) -> tuple[list[Seen], Churned]:
    """The whole run; UserError where the server has no `/metrics` to read."""
    chance, churned = random.Random(plan.seed), Churned()
    before = await asyncio.to_thread(_sample, plan, time.monotonic())
    began_s = time.monotonic()
    watching = asyncio.create_task(_watch_memory(plan, began_s, churned))
    seen: list[Seen] = []
    tasks: set[asyncio.Task[None]] = set()
    while time.monotonic() < began_s + plan.seconds:
        if len(tasks) < plan.most:
            seen.append(Seen())
            one = _visit(plan, chance, len(seen))
            churned.fates[one.fate] += 1
            tasks.add(task := asyncio.create_task(visit(one, viewer, seen[-1])))
            task.add_done_callback(tasks.discard)
        else:
            churned.not_sent += 1
        left_s = began_s + plan.seconds - time.monotonic()
        await asyncio.sleep(max(0.0, min(chance.expovariate(plan.per_second), left_s)))
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=plan.patience_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await _forgotten(plan, began_s, before, churned)
    return seen, churned


def _visit(plan: Plan, chance: random.Random, number: int) -> Visit:
    """A viewer by chance: how long it watches, what it asks for, how it ends."""
    seconds = chance.uniform(0.2, 1.0) * plan.longest_s
    switches, at_s = [], chance.uniform(0.5, 3.0)
    while at_s < seconds:
        more = {"transition": chance.choice(TRANSITIONS), "apply_at": plan.apply_at}
        switches.append(Switch(at_s, chance.choice(plan.prompts), more))
        at_s += chance.uniform(0.5, 5.0)
    return Visit(
        url=plan.url,
        token=plan.token,
        start={
            **plan.start,
            "prompt": chance.choice(plan.prompts),
            "seed": plan.seed + number,
            "max_seconds": round(seconds, 3),
        },
        switches=switches,
        fate=chance.choice(FATES),
        breaks_at_s=chance.uniform(0.05, 0.9) * seconds,
    )


# The server's side.


async def _watch_memory(plan: Plan, began_s: float, churned: Churned) -> None:
    while True:
        with suppress(OSError, Failure):  # busy or away just now: one sample less, and the viewers tell
            churned.samples.append(await asyncio.to_thread(_sample, plan, began_s))
        await asyncio.sleep(max(LEAST_SAMPLE_S, plan.seconds / SAMPLES))


async def _forgotten(plan: Plan, began_s: float, before: Sample, churned: Churned) -> None:
    """Until the server has given up those who are gone; what is left then is left."""
    until_s = time.monotonic() + FORGET_S
    while True:
        now = await asyncio.to_thread(_sample, plan, began_s)
        churned.sessions_left = max(0, now.sessions - before.sessions)
        churned.streams_left = max(0, now.streams - before.streams)
        if not (churned.sessions_left or churned.streams_left) or time.monotonic() > until_s:
            churned.samples.append(now)
            return
        await asyncio.sleep(0.5)


def _sample(plan: Plan, began_s: float) -> Sample:
    """Read `/metrics`; UserError if it may not be, Failure if it says too little."""
    site = re.sub(r"^ws", "http", plan.url).rstrip("/").removesuffix("/v1/realtime/video")
    headers = {} if plan.token is None else {"Authorization": f"Bearer {plan.token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{site}/metrics", headers=headers), timeout=30) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise UserError(f"{site}/metrics answers {error.code}: --churn needs it; is --token right?") from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise Failure(f"no server answers at {site}: {error}") from error
    states = re.findall(r'^streamgen_sessions\{state="(\w+)"\} (\S+)$', text, re.MULTILINE)
    gauges = dict(re.findall(r"^(streamgen_\w+) (\S+)$", text, re.MULTILINE))
    if "streamgen_resident_memory_bytes" not in gauges:
        raise Failure(f"{site}/metrics is not of a streamgen server")
    return Sample(
        at_s=time.monotonic() - began_s,
        memory_mb=float(gauges["streamgen_resident_memory_bytes"]) / 1e6,
        sessions=sum(int(float(count)) for state, count in states if state not in OVER),
        streams=int(float(gauges["streamgen_streams"])),
    )


def slope_mb_per_hour(samples: list[Sample]) -> float | None:
    """Of a straight line through the memory after the run has settled (least squares); None for too few samples."""
    rest = samples[int(len(samples) * SETTLED) :]
    if len(rest) < 3:
        return None
    middle_s = sum(one.at_s for one in rest) / len(rest)
    middle_mb = sum(one.memory_mb for one in rest) / len(rest)
    spread = sum((one.at_s - middle_s) ** 2 for one in rest)
    if spread == 0:
        return None
    per_s = sum((one.at_s - middle_s) * (one.memory_mb - middle_mb) for one in rest) / spread
    return round(per_s * 3600, 3)
