"""`streamgen load`: many viewers of one server, arriving at random (open loop), each playing a timeline of prompts.

Latency of a frame: its deadline on the server's clock, moved to this clock by the acceptance of the session, against
its arrival here. TTFF: `session.start` sent to the first frame. Control latency: prompt sent to the first frame that
shows it. Jitter: |time between the first frames of two blocks - the block's media time|.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.errors import Failure
from streamgen_infer.report import check_report, percentiles, write_report
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
    timeout_s: float = 300.0
    seed: int = 0
    format: str = "jpeg"
    token: str | None = None
    json: Path | None = None
    overwrite: bool = False


@dataclass(slots=True)
class Seen:
    """What one viewer saw."""

    ttff_s: float | None = None
    frames: int = 0
    late_frames: int = 0
    dropped_frames: int = 0
    late_blocks: int = 0
    blocks: int = 0
    latency_s: list[float] = field(default_factory=list)
    jitter_s: list[float] = field(default_factory=list)
    control_s: list[float] = field(default_factory=list)
    refused_prompts: int = 0
    resumes: int = 0
    refused: str | None = None
    failed: str | None = None


def run(options: Options) -> int:
    """The command; exit code 0, also when the server refused some: the report says how many."""
    timeline = check(options)
    try:
        from streamgen_infer.client import Viewer
    except ModuleNotFoundError as error:
        raise UserError(f"load needs {error.name}, which is not installed: pip install 'streamgen[serve]'") from None
    started_s = time.monotonic()
    seen = asyncio.run(_arrivals(options, timeline, Viewer))
    values = report(options, seen, time.monotonic() - started_s)
    if options.json is not None:
        write_report(options.json, values)
    else:
        import json

        print(json.dumps(values, indent=2))
    if all(one.failed for one in seen):
        raise Failure(f"no viewer saw anything: {seen[0].failed}")
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
    ):
        if not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low} to {high}")
    if options.format not in p.FORMATS:
        raise UserError(f"--format {options.format!r} does not exist; there are: {', '.join(p.FORMATS)}")
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
                tasks.append(asyncio.create_task(_visit(options, timeline, viewer, number, seen[-1])))
                await asyncio.sleep(chance.expovariate(options.per_second) if number + 1 < options.sessions else 0)
            await asyncio.gather(*tasks)
    except TimeoutError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def _visit(
    options: Options, timeline: tuple[tuple[float, str], ...], viewer: Any, number: int, seen: Seen
) -> None:
    asked_s = time.monotonic()
    start = {"prompt": timeline[0][1], "seed": options.seed + number, "format": options.format}
    try:
        async with viewer(options.url, token=options.token, max_seconds=options.seconds, **start) as watching:
            await _watch(watching, timeline[1:], asked_s, seen)
            seen.resumes = watching.resumed
    except p.Refusal as refusal:
        seen.refused = refusal.code
    except Exception as error:  # noqa: BLE001 (counted and told in the report: other viewers go on)
        seen.failed = f"{type(error).__name__}: {error}"


async def _watch(watching: Any, switches: tuple[tuple[float, str], ...], asked_s: float, seen: Seen) -> None:
    waiting, told = list(switches), dict[int, float]()
    block, block_at_s, block_media_s = (-1, -1), 0.0, 0.0
    async for frame in watching.frames():
        header = frame.header
        if header.kind != p.MEDIA:
            continue
        if seen.ttff_s is None:
            seen.ttff_s = frame.at_s - asked_s
        late_s = frame.at_s - (watching.accepted_at_s + header.deadline_s)
        seen.frames += 1
        seen.dropped_frames += header.dropped
        seen.late_frames += late_s > 0
        seen.latency_s.append(late_s)
        if (header.epoch, header.block) != block:
            if seen.blocks:
                seen.jitter_s.append(abs(frame.at_s - block_at_s - (header.media_s - block_media_s)))
            block, block_at_s, block_media_s = (header.epoch, header.block), frame.at_s, header.media_s
            seen.blocks += 1
            seen.late_blocks += late_s > 0
        for version in [version for version in told if header.prompt_version >= version]:
            seen.control_s.append(frame.at_s - told.pop(version))
        if waiting and header.media_s >= waiting[0][0]:
            sent_s = time.monotonic()
            try:
                answer = await watching.prompt(waiting.pop(0)[1])
                told[answer.prompt_version] = sent_s
            except p.Refusal:  # most likely the stream has ended: all its frames are made
                seen.refused_prompts += 1


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
        "dropped_frames": sum(one.dropped_frames for one in served),
        "deadline_misses": misses,
        "miss_rate": misses / blocks if blocks else None,
        "worst_session_miss_rate": max((one.late_blocks / one.blocks for one in served), default=None),
        "ttff_s": _spread([one.ttff_s for one in served if one.ttff_s is not None]),
        "lateness_s": _spread([value for one in served for value in one.latency_s]),
        "jitter_s": _spread([value for one in served for value in one.jitter_s]),
        "control_latency_s": _spread([value for one in served for value in one.control_s]),
    }


def _spread(values: list[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    return {**percentiles(values, (50, 95, 99)), "max": percentiles(values, (100,))["p100"]}
