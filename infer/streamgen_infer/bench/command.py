"""`streamgen bench`: the time of one block, beside the time of its bare products and attention in the same run."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from streamgen import __version__
from streamgen.errors import UserError
from streamgen.pipeline import DTYPES
from streamgen_infer import machine
from streamgen_infer.bench import live, suites
from streamgen_infer.bench.cases import CASES
from streamgen_infer.bench.measure import measure
from streamgen_infer.bench.show import check_picture, print_results, write_picture
from streamgen_infer.interrupts import INTERRUPTED, Interrupts
from streamgen_infer.report import check_report, environment, write_report
from streamgen_infer.sinks import check_place

DEFAULT_BLOCKS = {"sprites": 20, "mid": 3, "wan_1_3b": 2}
LARGE = ("wan_1_3b", *live.SUITES, *suites.SUITES)


def run(
    interrupts: Interrupts,
    *,
    suite: str,
    dtype: str,
    threads: int,
    blocks: int | None,
    seconds: float,
    json: Path | None,
    png: Path | None,
    overwrite: bool,
    overload: float | None = None,
) -> int:
    """The command; returns the exit code."""
    dtypes = _choice("--dtype", dtype, tuple(DTYPES))
    if suite in live.SUITES:
        if png is not None:
            raise UserError(f"--png draws the stages of a block; --suite {suite} has none: leave it out")
        return live.run(
            interrupts,
            suite=suite,
            dtype=dtype,
            threads=threads,
            seconds=seconds,
            overload=overload,
            json=json,
            overwrite=overwrite,
        )
    if overload is not None:
        raise UserError(f"--overload is of --suite viewers; the suite is {suite}")
    chosen = _choice("--suite", suite, (*CASES, *live.SUITES, *suites.SUITES))
    for name, value, most in (("--threads", threads, 1024), ("--blocks", blocks, 100_000)):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{name} is {value}; it must be 1 to {most}")
    if json is not None:
        check_place(json, "--json")
        check_report(json, "--json", overwrite=overwrite)
    if png is not None:
        check_picture(png, overwrite)
    torch.set_num_threads(threads)
    results: list[dict[str, Any]] = []
    with interrupts.deferred() as stop:
        for name in chosen:
            for kind in dtypes:
                if stop.requested:
                    break
                print(f"measuring {name} in {kind} ...", file=sys.stderr, flush=True)
                result = measure(CASES[name](DTYPES[kind]), blocks or DEFAULT_BLOCKS[name], stop)
                if result is not None:
                    results.append({"suite": name, "dtype": kind, "threads": threads, **result})
        print_results(results)
        if json is not None:
            values = {
                "command": "bench",
                "version": __version__,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "environment": environment(),
                "load": os.getloadavg()[0],
                "interrupted": stop.requested,
                "results": results,
            }
            write_report(json, values)
        if png is not None and results:
            write_picture(png, results, machine.cpu_name())
    return INTERRUPTED if stop.requested else 0


def _choice(option: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if value != "all" and value not in known:
        raise UserError(f"{option} {value!r} does not exist; there are: {', '.join(known)}, all")
    return tuple(name for name in known if name not in LARGE) if value == "all" else (value,)
