"""The options of `streamgen stream`, and all that can be refused before the model is loaded. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from streamgen.errors import UserError
from streamgen_infer.live_view import one_line
from streamgen_infer.report import check_report
from streamgen_infer.sinks import Output, check_output, check_place

SCHEDULES = ("serial", "stream_batch", "step_chain", "layer_ring", "rolling", "interleaved")
CACHE_DTYPES = ("int8", "fp8")
WEIGHTS_DTYPES = ("int8", "fp8")
CACHES = ("relative", "window", "ema_sink")
SPLITS = ("step_chain", "layer_ring")
"""Those that can be spread over ranks."""
TRANSITIONS = ("cut", "recache", "blend", "scene")
DTYPES = ("auto", "fp32", "bf16")
OPS = ("auto", "reference", "triton")
ATTENTIONS = ("auto", "math", "sdpa", "cudnn", "flash3", "xformers", "triton")
MAX_SECONDS = 1e7
MAX_FPS = 240
MAX_STEPS = 1000
MAX_SCALE = 32
MAX_RANKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments, as typed."""

    prompt: str | None = None
    switch: tuple[str, ...] = ()
    image: Path | None = None
    lora: tuple[str, ...] = ()
    lora_at: tuple[str, ...] = ()
    seconds: str = "8"
    seed: int | None = None
    out: str | None = None
    model: str = "sprites"
    steps: int | None = None
    schedule: str | None = None
    force: bool = False
    ranks: int = 1
    cache: str | None = None
    cache_dtype: str | None = None
    weights_dtype: str | None = None
    transition: str = "recache"
    fps: float | None = None
    device: str = "cpu"
    dtype: str = "auto"
    ops: str = "auto"
    attention: str = "auto"
    threads: int | None = None
    scale: int = 1
    realtime: bool = False
    report: Path | None = None
    save_state: Path | None = None
    resume: Path | None = None
    overwrite: bool = False
    quiet: bool = False


class Adapter(NamedTuple):
    """A LoRA file and its strength."""

    path: Path
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options that make sense."""

    options: Options
    seconds: float
    """May be inf."""
    switches: tuple[tuple[float, str], ...]
    loras: tuple[Adapter, ...]
    loras_at: tuple[tuple[float, Adapter | None], ...]
    """None: no adapter from there on."""
    output: Output


def check(options: Options) -> Request:
    """UserError for everything that can be refused without the model."""
    if options.prompt is None and options.resume is None:
        raise UserError("name a prompt: streamgen stream 'a red star spinning over a snow background'")
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("the prompt is empty; describe a scene, e.g. 'a red star spinning over a snow background'")
    seconds = parse_seconds(options.seconds)
    for name, value, low, high in (
        ("--seed", options.seed, 0, 2**64 - 1),
        ("--steps", options.steps, 1, MAX_STEPS),
        ("--fps", options.fps, 1, MAX_FPS),
        ("--threads", options.threads, 1, 1024),
        ("--scale", options.scale, 1, MAX_SCALE),
        ("--ranks", options.ranks, 1, MAX_RANKS),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low} to {high}")
    check_choices(
        ("--schedule", options.schedule, SCHEDULES),
        ("--cache", options.cache, CACHES),
        ("--cache-dtype", options.cache_dtype, CACHE_DTYPES),
        ("--weights-dtype", options.weights_dtype, WEIGHTS_DTYPES),
        ("--transition", options.transition, TRANSITIONS),
        ("--dtype", options.dtype, DTYPES),
        ("--ops", options.ops, OPS),
        ("--attention", options.attention, ATTENTIONS),
    )
    if options.ranks > 1:
        for name, given in (("--cache-dtype", options.cache_dtype), ("--weights-dtype", options.weights_dtype)):
            if given is not None:
                raise UserError(f"{name} is for one rank; leave it or --ranks out")
        for name, chosen in (("--ops", options.ops), ("--attention", options.attention)):
            if chosen != "auto":
                raise UserError(f"{name} is for one rank; leave it or --ranks out")
        if options.schedule not in SPLITS:
            raise UserError(
                f"--ranks {options.ranks} needs a schedule that is spread: --schedule {' or '.join(SPLITS)}"
            )
        if options.save_state is not None or options.resume is not None:
            raise UserError("--save-state and --resume are for one rank; leave them or --ranks out")
    check_device(options.device)
    _check_one_device(options)
    switches = parse_switches(options.switch, seconds)
    loras_at = parse_loras_at(options.lora_at, seconds)
    output = check_output(options.out, fps=options.fps, overwrite=options.overwrite)
    _check_files(options, output)
    return Request(
        options=options,
        seconds=seconds,
        switches=switches,
        loras=tuple(map(parse_lora, options.lora)),
        loras_at=loras_at,
        output=output,
    )


def check_choices(*rows: tuple[str, str | None, tuple[str, ...]]) -> None:
    """Rows of (option, what was chosen, what there is): UserError for a choice that there is not."""
    for name, choice, known in rows:
        if choice is not None and choice not in known:
            raise UserError(f"{name} {choice!r} does not exist; there are: {', '.join(known)}")


def parse_seconds(text: str) -> float:
    """Seconds of video, or inf."""
    try:
        seconds = float(text)
    except ValueError:
        raise UserError(f"--seconds {text!r} is no number; give seconds of video, or inf") from None
    if math.isnan(seconds) or seconds <= 0:
        raise UserError(f"--seconds is {text}; it must be above 0")
    if MAX_SECONDS < seconds < math.inf:
        raise UserError(f"--seconds is {text}; at most {MAX_SECONDS:.0f} (116 days), or inf to run until Ctrl-C")
    return seconds


def _at_seconds(item: str) -> tuple[str, str, float]:
    """SECONDS=WHAT -> SECONDS and WHAT as they stand, and the time; nan if it is none."""
    when, equals, what = item.partition("=")
    try:
        return when, what, float(when) if equals else math.nan
    except ValueError:
        return when, what, math.nan


def parse_switches(items: tuple[str, ...], seconds: float) -> tuple[tuple[float, str], ...]:
    """SECONDS=PROMPT in the order of their time -> ((seconds, prompt), ...)."""
    found: list[tuple[float, str]] = []
    for item in items:
        when, prompt, at_s = _at_seconds(item)
        if not math.isfinite(at_s):
            raise UserError(f"--switch {one_line(item, 60)!r} is not SECONDS=PROMPT, e.g. '5=a blue ring rising'")
        if not prompt.strip():
            raise UserError(f"--switch {item!r}: the prompt after = is empty")
        if at_s <= 0:
            raise UserError(f"--switch at {when} s: it must be after 0 s, where PROMPT holds")
        if at_s >= seconds:
            raise UserError(f"--switch at {when} s is past the end of the video at {seconds:g} s")
        if found and at_s <= found[-1][0]:
            raise UserError(f"--switch at {when} s comes after the one at {found[-1][0]:g} s: order them by time")
        found.append((at_s, prompt))
    return tuple(found)


def parse_lora(item: str) -> Adapter:
    """FILE or FILE=STRENGTH; the file exists."""
    head, _, tail = item.rpartition("=")
    try:
        path, strength = (Path(head), float(tail)) if head else (Path(item), 1.0)
    except ValueError:
        path, strength = Path(item), 1.0
    if not path.is_file():
        raise UserError(f"--lora {one_line(item, 80)!r}: there is no file {path}; give FILE or FILE=STRENGTH")
    return Adapter(path, strength)


def parse_loras_at(items: tuple[str, ...], seconds: float) -> tuple[tuple[float, Adapter | None], ...]:
    """SECONDS=FILE, SECONDS=FILE=STRENGTH or SECONDS=none in the order of their time."""
    found: list[tuple[float, Adapter | None]] = []
    for item in items:
        when, what, at_s = _at_seconds(item)
        if not (what and math.isfinite(at_s)):
            raise UserError(f"--lora-at {one_line(item, 80)!r} is not SECONDS=FILE[=STRENGTH] or SECONDS=none")
        if not 0 <= at_s < seconds:
            raise UserError(
                f"--lora-at at {when} s: it must be from 0 s to before the end of the video at {seconds:g} s"
            )
        if found and at_s <= found[-1][0]:
            raise UserError(f"--lora-at at {when} s comes after the one at {found[-1][0]:g} s: order them by time")
        found.append((at_s, None if what == "none" else parse_lora(what)))
    return tuple(found)


def _check_one_device(options: Options) -> None:
    """What a stream over several ranks, or one that goes on, has no use for."""
    if options.image is not None and options.resume is not None:
        raise UserError("--image begins a new stream; leave it or --resume out")
    if options.image is not None and not options.image.is_file():
        raise UserError(f"--image {options.image}: there is no such file")
    asked = [
        name
        for name, given in (("--image", options.image), ("--lora", options.lora), ("--lora-at", options.lora_at))
        if given
    ]
    if options.ranks > 1 and asked:
        raise UserError(f"{' and '.join(asked)}: for one rank; leave --ranks out")


def check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device):
        raise UserError(f"--device {device!r} does not exist; there are: cpu, cuda, cuda:N, mps")


def _check_files(options: Options, output: Output) -> None:
    """The other files can be written, none of the user's is replaced unasked, and no two are the same."""
    if options.resume is not None and not options.resume.is_file():
        raise UserError(f"--resume {options.resume}: there is no such file")
    if options.report is not None:
        check_place(options.report, "--report")
        check_report(options.report, "--report", overwrite=options.overwrite)
    if options.save_state is not None:
        check_place(options.save_state, "--save-state")
        continues = options.resume is not None and options.resume.resolve() == options.save_state.resolve()
        if options.save_state.is_dir():
            raise UserError(f"--save-state {options.save_state} is a folder; give a file")
        if options.save_state.exists() and not continues and not options.overwrite:
            raise UserError(f"--save-state {options.save_state} exists; choose another name or add --overwrite")
    written = [p.resolve() for p in (output.path, options.report, options.save_state) if p is not None]
    if len(set(written)) < len(written):
        raise UserError("--out, --report and --save-state must be different files")
