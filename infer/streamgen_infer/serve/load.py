"""`streamgen load`: many viewers of one server, arriving at random (open loop), each playing a timeline of prompts.

With `--churn` they come and go for a while instead, see churn.py. What one viewer does and how it is measured is in
load_viewer.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.errors import Failure
from streamgen_infer.report import check_report, percentiles, write_report
from streamgen_infer.serve import churn
from streamgen_infer.serve.load_viewer import Seen, Switch, Visit, visit
from streamgen_infer.sinks import check_place
from streamgen_infer.stream_options import parse_switches

DEFAULT_TIMELINE = (
    (0.0, "a red star spinning over a snow background"),
    (5.0, "two blue rings rising over a grass background"),
)
MAX_SESSIONS = 10_000
MAX_RUN_S = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments, as typed."""

    url: str
    timeline: Path | None = None
    sessions: int = 8
    per_second: float = 0.5
    seconds: float = 10.0
    churn_s: float | None = None
    apply_at: str = "next_block"
    wait_s: float = 0.0
    timeout_s: float = 300.0
    seed: int = 0
    format: str = "jpeg"
    token: str | None = None
    json: Path | None = None
    overwrite: bool = False


def run(options: Options) -> int:
    """The command; exit code 0, also when the server refused some: the report says how many."""
    timeline = check(options)
    try:
        from streamgen_infer.client import Viewer
    except ModuleNotFoundError as error:
        raise UserError(f"load needs {error.name}, which is not installed: pip install 'streamgen[serve]'") from None
    started_s = time.monotonic()
    churned = None
    if options.churn_s is None:
        seen = asyncio.run(_arrivals(options, timeline, Viewer))
    else:
        plan = churn.Plan(
            url=options.url,
            token=options.token,
            seconds=options.churn_s,
            per_second=options.per_second,
            most=options.sessions,
            longest_s=options.seconds,
            patience_s=options.timeout_s,
            seed=options.seed,
            start=_start(options),
            prompts=tuple(prompt for _, prompt in timeline),
            apply_at=options.apply_at,
        )
        seen, churned = asyncio.run(churn.run(plan, Viewer))
    values = report(options, seen, time.monotonic() - started_s)
    if churned is not None:
        values |= churned.values()
    if options.json is not None:
        write_report(options.json, values)
    else:
        import json

        print(json.dumps(values, indent=2))
    if all(one.failed for one in seen):
        raise Failure(f"no viewer saw anything: {seen[0].failed if seen else 'none came'}")
    if churned is not None and (wrong := churned.wrong(values)):
        raise Failure(wrong)
    return 0


def check(options: Options) -> tuple[tuple[float, str], ...]:
    """The prompts over time; UserError for what can be refused before anything is sent."""
    if not options.url.startswith(("ws://", "wss://", "http://", "https://")):
        raise UserError(f"{options.url!r} is no address of a server; as ws://127.0.0.1:8765")
    for name, value, low, high in (
        ("--sessions", options.sessions, 1, MAX_SESSIONS),
        ("--per-second", options.per_second, 1e-3, 1e3),
        ("--seconds", options.seconds, 0.1, MAX_RUN_S),
        ("--timeout", options.timeout_s, 1, MAX_RUN_S),
        ("--churn", options.churn_s, 1, MAX_RUN_S),
        ("--wait", options.wait_s, 0, p.MAX_WAIT_SECONDS),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low} to {high}")
    if options.format not in p.FORMATS:
        raise UserError(f"--format {options.format!r} does not exist; there are: {', '.join(p.FORMATS)}")
    if options.apply_at not in ("next_block", "playhead"):
        raise UserError(f"--apply-at {options.apply_at!r} does not exist; there are: next_block, playhead")
    if options.json is not None:
        check_place(options.json, "--json")
        check_report(options.json, "--json", overwrite=options.overwrite)
    if options.timeline is None:
        return DEFAULT_TIMELINE
    try:
        lines = options.timeline.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--timeline {options.timeline} is not readable: {error}") from error
    lines = [line for line in (line.strip() for line in lines) if line and not line.startswith("#")]
    first, *rest = lines or [""]
    at, equals, prompt = first.partition("=")
    if not equals or at.strip() not in ("0", "0.0") or not prompt.strip():
        raise UserError(f"--timeline {options.timeline}: the first line must be 0=PROMPT")
    return ((0.0, prompt.strip()), *parse_switches(tuple(rest), float("inf")))


async def _arrivals(options: Options, timeline: tuple[tuple[float, str], ...], viewer: Any) -> list[Seen]:
    """Exponential gaps, drawn once: the arrivals do not wait for a server that is slow."""
    chance = random.Random(options.seed)
    seen: list[Seen] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(options.timeout_s):
            for number in range(options.sessions):
                seen.append(Seen())
                tasks.append(asyncio.create_task(visit(_plan(options, timeline, number), viewer, seen[-1])))
                await asyncio.sleep(chance.expovariate(options.per_second) if number + 1 < options.sessions else 0)
            await asyncio.gather(*tasks)
    except TimeoutError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen


def _start(options: Options) -> dict[str, Any]:
    waiting = {"wait_seconds": options.wait_s} if options.wait_s else {}
    return {"format": options.format, **waiting}


def _plan(options: Options, timeline: tuple[tuple[float, str], ...], number: int) -> Visit:
    start = {"prompt": timeline[0][1], "seed": options.seed + number, "max_seconds": options.seconds}
    more = {"apply_at": options.apply_at}
    return Visit(
        url=options.url,
        token=options.token,
        start={**_start(options), **start},
        switches=[Switch(at_s, prompt, more) for at_s, prompt in timeline[1:]],
    )


def report(options: Options, seen: list[Seen], wall_s: float) -> dict[str, Any]:
    """What all viewers saw together."""
    served = [one for one in seen if one.frames]
    blocks = sum(one.blocks for one in served)
    refused: dict[str, int] = {}
    for one in seen:
        if one.refused is not None:
            refused[one.refused] = refused.get(one.refused, 0) + 1
    misses = sum(one.late_blocks for one in served)
    return {
        "command": "load",
        "version": __version__,
        "url": options.url,
        "sessions": len(seen),
        "served": len(served),
        "refused": refused,
        "failed": sorted({one.failed for one in seen if one.failed}),
        "refused_prompts": sum(one.refused_prompts for one in seen),
        "resumes": sum(one.resumes for one in seen),
        "wall_s": round(wall_s, 3),
        "frames": sum(one.frames for one in served),
        "blocks": blocks,
        "fps": round(sum(one.frames for one in served) / wall_s, 3),
        "queued": sum(one.queued for one in seen),
        "dropped_frames": sum(one.dropped_frames for one in served),
        "lost_frames": sum(one.lost_frames for one in served),
        "repeated_frames": sum(one.repeated_frames for one in served),
        "deadline_misses": misses,
        "miss_rate": misses / blocks if blocks else None,
        "worst_session_miss_rate": max((one.late_blocks / one.blocks for one in served), default=None),
        "ttff_s": _spread([one.ttff_s for one in served if one.ttff_s is not None]),
        "lateness_s": _spread([value for one in served for value in one.latency_s]),
        "jitter_s": _spread([value for one in served for value in one.jitter_s]),
        "control_latency_s": _spread([value for one in served for value in one.control_s]),
        "prompt_to_screen_s": _spread([value for one in served for value in one.screen_s]),
        "prompt_to_screen_media_s": _spread([value for one in served for value in one.screen_media_s]),
    }


def _spread(values: list[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    return {**percentiles(values, (50, 95, 99)), "max": percentiles(values, (100,))["p100"]}
