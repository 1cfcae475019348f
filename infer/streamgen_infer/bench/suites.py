"""Suites of `streamgen bench` that do not time blocks: what each is, what it prints, and the JSON that all share.

kernels   every Triton kernel on one layer of Wan 1.3B, checked and then timed, beside the device's own roof (a GPU)
wan_14b   blocks of Wan 14B with few of its layers, and what all of them come to (`wan_14b`)
train     steps of the autoregressive objective on the shipped size: tokens and arithmetic per second, MFU
server    a frame server on this machine and viewers of it (`server`)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.report import check_report, environment, write_report
from streamgen_infer.sinks import check_place

MAX_VIEWERS = 1000
HandOver = Callable[[list[str]], int]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments, as typed."""

    suite: str
    dtype: str
    threads: int
    blocks: int | None
    seconds: float
    viewers: int
    device: str
    json: Path | None
    png: Path | None
    overwrite: bool


def run(interrupts: Interrupts, hand_over: Mapping[str, HandOver], options: Options) -> int:
    """The command for these suites; returns the exit code."""
    check(options)
    results: list[Result] = []
    with interrupts.deferred() as stop:
        print(f"measuring {options.suite} ...", file=sys.stderr, flush=True)
        found = _train(options, hand_over) if options.suite == "train" else _SUITES[options.suite](options, stop)
        if found is None:
            return INTERRUPTED
        results.append({"suite": options.suite, "threads": options.threads, **found})
        if options.json is not None:
            write_report(options.json, _values(results, interrupted=stop.requested))
        if found.get("failed"):
            raise Failure(f"not right here, and so not timed: {', '.join(row['name'] for row in found['failed'])}")
    return INTERRUPTED if stop.requested else 0


def check(options: Options) -> None:
    """UserError for everything that can be refused before anything is loaded."""
    if options.png is not None:
        raise UserError(f"--png draws the stages of a block; --suite {options.suite} has none: leave it out")
    if options.suite != "kernels" and options.device != "cpu":
        raise UserError(f"--suite {options.suite} is measured on the CPU; leave --device out")
    for name, value, low, high in (
        ("--threads", options.threads, 1, 1024),
        ("--blocks", options.blocks, 1, 100_000),
        ("--seconds", options.seconds, 5, 86_400),
        ("--viewers", options.viewers, 1, MAX_VIEWERS),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value:g}; it must be {low} to {high}")
    if options.dtype not in ("all", "fp32", "bf16"):
        raise UserError(f"--dtype {options.dtype!r} does not exist; there are: fp32, bf16, all")
    if options.json is not None:
        check_place(options.json, "--json")
        check_report(options.json, "--json", overwrite=options.overwrite)


def _values(results: Sequence[Result], *, interrupted: bool) -> dict[str, Any]:
    return {
        "command": "bench",
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "load": os.getloadavg()[0],
        "interrupted": interrupted,
        "results": list(results),
    }


def _kernels(options: Options, stop: Stop) -> Result | None:
    """A number of a kernel that is not right is never given: its row says how it is wrong."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "--suite kernels times kernels on a CUDA device, and there is none; streamgen doctor --kernels checks them "
            "on the CPU, by Triton's interpreter"
        )
    from streamgen_infer.kernels_check import Row, measure_kernels, usable_device

    device = usable_device("cuda" if options.device == "cpu" else options.device)
    speeds, failed = [], []
    print(
        f"{torch.cuda.get_device_name(device)}\n{'kernel':<34} {'dtype':<9} {'ms':>9} {'rate':>16} {'of its roof':>12}"
    )
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for found in measure_kernels(device, kinds.get(options.dtype, torch.bfloat16)):
        if stop.requested:
            break
        if isinstance(found, Row):
            failed.append(asdict(found))
            print(f"{found.name:<34} {found.dtype:<9} {found.found}")
            continue
        speeds.append({**asdict(found), "share_of_roof": found.share})
        rate = f"{found.rate / 1e12:.3g} T{found.unit}"
        print(f"{found.name:<34} {found.dtype:<9} {found.ms:>9.4f} {rate:>16} {found.share:>11.1%}")
    values = {"device": torch.cuda.get_device_name(device), "kernels": speeds, "failed": failed}
    return values if speeds or failed else None


def _train(options: Options, hand_over: Mapping[str, HandOver]) -> Result | None:
    from streamgen_infer.bench.train import train

    return train(options, hand_over["train"])


def _server(options: Options, stop: Stop) -> Result | None:
    from streamgen_infer.bench.server import server

    return server(options, stop)


def _wan_14b(options: Options, stop: Stop) -> Result | None:
    from streamgen_infer.bench.wan_14b import wan_14b

    return wan_14b(options, stop)


_SUITES: dict[str, Callable[[Options, Stop], Result | None]] = {
    "kernels": _kernels,
    "server": _server,
    "wan_14b": _wan_14b,
}
SUITES = (*_SUITES, "train")
