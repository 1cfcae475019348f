"""`streamgen replay`: run a recording, from whatever implementation, through this one; say how far results differ."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from streamgen import __version__
from streamgen.errors import UserError
from streamgen.pipeline import DTYPES
from streamgen.pipeline import _device as open_device
from streamgen.transformer import CausalWanModel
from streamgen.weights import Unfilled, load_tensors, load_weights
from streamgen_infer import machine
from streamgen_infer.models.recording import CACHE_OF, Recording, play, read_recording
from streamgen_infer.report import check_report, percentiles, write_report
from streamgen_infer.sinks import check_place

CLOCK_TOLERANCE = 1e-3
"""Timesteps further from 1000 sigma than this were rounded by whoever recorded; the user is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """As given on the command line."""

    weights: Path
    recording: Path
    atol: float
    dtype: str
    device: str
    threads: int | None
    json: Path | None
    overwrite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Largest absolute differences of one block."""

    block: int
    latents: float
    flows: list[float] | None
    """One for each pass, the commit's last; None when the recording has no flows. They tell in which pass a difference
    began; latents alone are judged, for a network answers rounding with more of it."""
    ms: float


def run(options: Options) -> int:
    """The command; returns the exit code: 0 if every block's latents are within --atol."""
    _check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started_s = time.perf_counter()
    recording, ignored = read_recording(options.recording)
    _notes(recording, ignored)
    model = load(options, recording)
    load_s = time.perf_counter() - started_s
    found = []
    print(f"block   latents{'       flows' if recording.flows is not None else ''}   (largest absolute difference)")
    for difference in compare(model, recording):
        found.append(difference)
        flows = "" if difference.flows is None else f"{max(difference.flows, key=_nan_last):12.3e}"
        missed = "" if difference.latents <= options.atol else "   beyond --atol"
        print(f"{difference.block:5d} {difference.latents:9.3e}{flows}{missed}", flush=True)
    largest = max((one.latents for one in found), key=_nan_last)
    beyond = [one.block for one in found if not one.latents <= options.atol]
    verdict = f"block {beyond[0]} is the first of {len(beyond)} beyond" if beyond else f"all {len(found)} blocks within"
    print(f"largest {largest:.3e}: {verdict} --atol {options.atol:g}")
    if options.json is not None:
        write_report(options.json, _values(options, recording, found, largest, load_s))
    return 1 if beyond else 0


def _check(options: Options) -> None:
    if not 0 <= options.atol < float("inf"):
        raise UserError(f"--atol is {options.atol}; it must be a number of at least 0")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} does not exist; there are: {', '.join(DTYPES)}")
    if options.threads is not None and not 1 <= options.threads <= 1024:
        raise UserError(f"--threads is {options.threads}; it must be 1 to 1024")
    if options.json is not None:
        check_place(options.json, "--json")
        check_report(options.json, "--json", overwrite=options.overwrite)


def _notes(recording: Recording, ignored: list[str]) -> None:
    """What the user should know of the file, on stderr."""
    if ignored:
        print(f"streamgen: the recording's config also says {', '.join(ignored)}; not known here", file=sys.stderr)
    off = (recording.timesteps - 1000 * recording.sigmas).abs().max().item()
    if off > CLOCK_TOLERANCE:
        print(
            f"streamgen: the recording's timesteps are up to {off:.3g} from 1000 sigma; the network gets them as such",
            file=sys.stderr,
        )


def load(options: Options, recording: Recording) -> CausalWanModel:
    """The network of the recording's config with the weights; UserError lists tensors that do not fit."""
    device = open_device(options.device)
    tensors = load_tensors(options.weights)
    with Unfilled():
        model = CausalWanModel(recording.config.transformer())
    load_weights(model, tensors, where=str(options.weights), dtype=DTYPES[options.dtype], device=device)
    for parameter in model.parameters():  # a mapped file is not aligned, which sums in another order: 7e-6 on latents
        parameter.data = parameter.data.clone()
    return model.eval().requires_grad_(False)


def compare(model: CausalWanModel, recording: Recording) -> Iterator[Difference]:
    """Each block's differences, as it is made."""
    assert recording.latents is not None  # every recording that is read has them
    started_s = time.perf_counter()
    for block, (latents, flows) in enumerate(play(model, recording)):
        now_s = time.perf_counter()
        wanted = None if recording.flows is None else recording.flows[block]
        yield Difference(
            block=block,
            latents=float((latents - recording.latents[block]).abs().max()),
            flows=None if wanted is None else (flows - wanted).abs().flatten(1).amax(1).tolist(),
            ms=1000 * (now_s - started_s),
        )
        started_s = time.perf_counter()


def _nan_last(value: float) -> float:
    """Sorts what is not a number above every number: it must not pass for small."""
    return math.inf if math.isnan(value) else value


def _values(
    options: Options, recording: Recording, found: list[Difference], largest: float, load_s: float
) -> dict[str, Any]:
    times = [one.ms for one in found]
    return {
        "command": "replay",
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ok": largest <= options.atol,
        "atol": options.atol,
        "largest": _plain(largest),
        "blocks": [
            {
                "block": one.block,
                "latents": _plain(one.latents),
                "flows": None if one.flows is None else [_plain(flow) for flow in one.flows],
                "ms": round(one.ms, 3),
            }
            for one in found
        ],
        "recording": str(options.recording),
        "weights": str(options.weights),
        "frames": recording.blocks * recording.config.frames,
        "load_s": round(load_s, 4),
        "block_ms": {**percentiles(times, (50, 95, 99)), "max": round(max(times), 3)},
        "peak_rss_mb": machine.peak_rss_mb(),
        "steps": len(recording.sigmas),
        "schedule": "serial",
        "cache": CACHE_OF[recording.config.rope],
        "device": options.device,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
    }


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
