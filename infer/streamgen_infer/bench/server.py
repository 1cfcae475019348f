"""`streamgen bench --suite server`: the frame server on this machine, with the shipped model, and viewers of it.

The server is a process of its own on a free port of localhost; the viewers are those of `streamgen load` and share the
machine with it: they arrive at random, two a second, and ask for another prompt after five seconds. Times are what a
viewer sees: from before the connection to the first frame, from a prompt sent to a screen that shows it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgen_infer.errors import Failure
from streamgen_infer.serve import load

if TYPE_CHECKING:
    from streamgen_infer.bench.suites import Options
    from streamgen_infer.interrupts import Stop

READY_S, STOP_S, NAP_S = 300.0, 60.0, 0.1
PER_SECOND = 2.0
TIMES = ("ttff_s", "prompt_to_screen_s", "control_latency_s", "jitter_s", "lateness_s")
NAMES = {"ttff_s": "connect_to_first_frame_ms", "control_latency_s": "prompt_to_frame_ms"}


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready."""

    process: subprocess.Popen[str]
    url: str
    ready_s: float
    """Seconds from its start until it served."""


def server(options: Options, stop: Stop, model: str = "sprites") -> dict[str, Any] | None:
    """What the viewers saw, and what the server says of its encoding; None if a stop came first."""
    with tempfile.TemporaryDirectory(prefix="streamgen-bench-") as folder:
        dtype = "auto" if options.dtype == "all" else options.dtype
        with serving(Path(folder), model, dtype, options.threads, options.viewers, stop) as running:
            if running is None:
                return None
            seen = _watched(running, options, Path(folder) / "load.json", stop)
            page = _read(f"{running.url}/metrics")
    found = {
        "dtype": dtype,
        "model": model,
        "viewers": options.viewers,
        "seconds": options.seconds,
        "server_ready_s": running.ready_s,
        **{name: seen[name] for name in ("served", "refused", "frames", "blocks", "fps", "miss_rate", "lost_frames")},
        **{NAMES.get(name, f"{name[:-2]}_ms"): _ms(seen[name]) for name in TIMES},
        "encode_ms": mean_ms(page, "streamgen_encode_seconds"),
    }
    for name, value in found.items():
        print(f"{name}: {_shown(value)}")
    return found


@contextmanager
def serving(folder: Path, model: str, dtype: str, threads: int, streams: int, stop: Stop) -> Iterator[Running | None]:
    """A server process that is ready, ended politely afterwards; None where a stop was asked for before."""
    words = [sys.executable, "-m", "streamgen", "serve", "--port", "0", "--model", model, "--dtype", dtype]
    words += ["--threads", str(threads), "--max-streams", str(streams), "--max-sessions", str(streams)]
    started_s = time.monotonic()
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())
        while url is not None and not stop.requested and process.poll() is None and not _is_ready(url[0]):
            if time.monotonic() - started_s > READY_S:
                raise Failure(f"the server was not ready after {READY_S:g} s")
            time.sleep(NAP_S)
        if process.poll() is not None or url is None:
            process.wait(STOP_S)
            said = (folder / "server.log").read_text().strip().splitlines()
            raise Failure(f"the server ended with exit code {process.returncode}: {said[-1] if said else 'no word'}")
        yield None if stop.requested else Running(process, url[0], time.monotonic() - started_s)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _watched(running: Running, options: Options, report: Path, stop: Stop) -> dict[str, Any]:
    """The report of `streamgen load`. A stop ends the server, and so every viewer's video."""
    asked = load.Options(
        url=running.url,
        sessions=options.viewers,
        per_second=PER_SECOND,
        seconds=options.seconds,
        timeout_s=2 * options.seconds + options.viewers / PER_SECOND + 60,
        json=report,
    )
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(load.run, asked)
        while not done.done():
            time.sleep(NAP_S)
            if stop.requested:
                running.process.terminate()
        done.result()
    values: dict[str, Any] = json.loads(report.read_text())
    return values


def _is_ready(url: str) -> bool:
    try:
        return bool(_read(f"{url}/readyz"))
    except (urllib.error.HTTPError, urllib.error.URLError, ConnectionError):
        return False


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def mean_ms(page: str, name: str) -> float | None:
    """Of a histogram in seconds on a /metrics page; None without an observation."""
    sums = {kind: re.search(rf"^{name}_{kind} (\S+)$", page, re.MULTILINE) for kind in ("sum", "count")}
    total, count = (0.0 if one is None else float(one[1]) for one in sums.values())
    return 1000 * total / count if count else None


def _ms(spread: dict[str, float | None] | None) -> dict[str, float | None] | None:
    return spread and {name: None if value is None else 1000 * value for name, value in spread.items()}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
