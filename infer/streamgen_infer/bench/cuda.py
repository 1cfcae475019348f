"""`streamgen bench --suite wan_1_3b --device cuda`: blocks of Wan 1.3B at 480 x 832 on a GPU, in one run of minutes.

First every kernel is compared with its reference here; what failed is named, its number is not given, and where one of
the table failed, blocks run by plain torch and the table says so. Then each kernel beside its own roof, the attention
backends beside each other, and then whole blocks: 4 steps and the commit of 3 latent frames with a full window, decoded
to 12 frames by a codec of TAEHV's size, as bytes on the host. Weights are random; text comes as embeddings.
Device times are those between events on the stream; the same code times a CPU by the clock, for tests.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from streamgen import __version__
from streamgen.attention import attend
from streamgen.attention_choice import usable
from streamgen.capture import Captures
from streamgen.clocks import Clock, clock_of
from streamgen.codecs.taehv import TaehvCodec
from streamgen.costs import pass_shapes
from streamgen.errors import UserError
from streamgen.kernel_choice import NOT_IN_THE_TABLE, float8_product
from streamgen.ops import select
from streamgen.quantised_linear import quantise_weights
from streamgen.transformer import CausalWanModel
from streamgen_infer.bench.bound import Bound
from streamgen_infer.bench.cuda_blocks import Bench, Blocks, Setting, random_codec, random_model, wan
from streamgen_infer.bench.cuda_show import lines
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.kernels_check import Row, Speed, check_kernels, device_ms, measure_kernels
from streamgen_infer.report import check_report, environment, percentiles, write_report
from streamgen_infer.sinks import check_place

SUITE = "wan_1_3b"
DEFAULT_BLOCKS = 8
LONGEST_S = 420.0
"""After this no further setting is begun, so that the command stays under 8 minutes."""


def run(
    interrupts: Interrupts,
    *,
    suite: str,
    device: str,
    dtype: str,
    blocks: int | None,
    json: Path | None,
    png: Path | None,
    overwrite: bool,
) -> int:
    """The command; returns the exit code."""
    where = _cuda(device)
    if suite != SUITE:
        raise UserError(f"--device {device} measures {SUITE}, not {suite}: add --suite {SUITE}, or leave --device out")
    if dtype not in ("all", "bf16"):
        raise UserError(f"--dtype {dtype}: with --device {device} blocks are measured in bf16")
    if png is not None:
        raise UserError(f"--png draws the stages of a CPU's blocks; leave it out with --device {device}")
    if blocks is not None and not 2 <= blocks <= 1000:
        raise UserError(f"--blocks is {blocks}; with --device {device} it must be 2 to 1000")
    if json is not None:
        check_place(json, "--json")
        check_report(json, "--json", overwrite=overwrite)
    torch.cuda.set_device(where)
    with interrupts.deferred() as stop:
        values = measure(wan(where), blocks or DEFAULT_BLOCKS, stop)
        for line in lines(values):
            print(line, flush=True)
        if json is not None:
            write_report(json, values)
    if stop.requested:
        return INTERRUPTED
    return 0 if values["results"] and not values["failed_checks"] else 1


def _cuda(name: str) -> torch.device:
    """UserError, in one line, where there is no such GPU."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device; there are: cpu, cuda, cuda:N") from error
    if device.type != "cuda":
        raise UserError(f"--device {name!r}: blocks are measured on cpu or on cuda")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is no CUDA device here; --suite {SUITE} alone measures on the CPU")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0)


# Measurement.


def measure(bench: Bench, blocks: int, stop: Stop) -> dict[str, Any]:
    """Everything, in the order of the module's docstring -> values for JSON."""
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    on_gpu = bench.device.type == "cuda"
    say(f"comparing every kernel with its reference on {device_name(bench.device)} ...")
    rows = list(check_kernels(bench.device))
    failed = [row for row in rows if not row.ok]
    for row in failed:
        say(f"WRONG: {row.name} in {row.dtype}: {row.found}")
    table = select("reference" if any(_in_table(row) for row in failed) else "triton")
    speeds: list[Row | Speed] = []
    attention: dict[str, float] = {}
    if on_gpu and not stop.requested:
        say("each kernel beside its roof ...")
        speeds = list(measure_kernels(bench.device, bench.dtype))
        failed += [row for row in speeds if isinstance(row, Row)]
        if any(_in_table(row) for row in failed):
            table = select("reference")
        say("attention ...")
        attention = attention_ms(bench, {row.name for row in failed})
    backend = min(attention, key=lambda name: attention[name], default="auto")
    say(f"{bench.config.num_layers} layers of random weights; {table.backend} operations, attention by {backend} ...")
    model, codec = random_model(bench, table, backend), random_codec(bench)
    results = []
    for setting in bench.settings:
        late = time.perf_counter() - began > LONGEST_S
        if stop.requested or late:
            say(f"{setting.name} is left out" + (": it is late" if late else ""))
            continue
        say(f"{setting.name}: filling its window, then {blocks} blocks ...")
        result = measure_setting(bench, setting, model, codec, blocks)
        results.append({"suite": SUITE, "setting": setting.name, "ops": table.backend, "attention": backend, **result})
        say(f"{setting.name}: {result['block_ms']:.1f} ms per block")
    return {
        "command": "bench",
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**environment(), **device_environment(bench.device)},
        "interrupted": stop.requested,
        "checks": [asdict(row) for row in rows],
        "failed_checks": [f"{row.name} in {row.dtype}: {row.found}" for row in failed],
        "kernels": [{**asdict(one), "share_of_roof": one.share} for one in speeds if isinstance(one, Speed)],
        "attention_ms": attention,
        "results": results,
        "took_s": round(time.perf_counter() - began, 1),
    }


def _in_table(row: Row) -> bool:
    return not row.name.startswith(("attention ", *NOT_IN_THE_TABLE))


def attention_ms(bench: Bench, wrong: set[str]) -> dict[str, float]:
    """Milliseconds of one layer's self-attention over the longest window, by each backend that is here and right."""
    config, g = bench.config, bench.geometry
    queries, keys = g.tokens(g.block_frames), g.tokens(max(one.window_frames for one in bench.settings))
    q, k, v = (
        torch.randn(1, config.num_heads, n, config.head_dim, device=bench.device, dtype=bench.dtype)
        for n in (queries, keys, keys)
    )
    return {
        name: device_ms(lambda name=name: attend(q, k, v, None, name), bench.device)  # type: ignore[misc]
        for name in usable(bench.device, bench.dtype)
        if f"attention {name}" not in wrong
    }


def measure_setting(
    bench: Bench, setting: Setting, model: CausalWanModel, codec: TaehvCodec, blocks: int
) -> dict[str, Any]:
    """Medians over `blocks` blocks with a full window, after the window was filled and the passes recorded."""
    if setting.weights_dtype is not None:
        quantise_weights(model, setting.weights_dtype, float8_product(model.ops, bench.device))
    clock, on_gpu = clock_of(bench.device), bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    records = model.ops.places_keys and (on_gpu or bench.recorder is not None)
    model.captures = Captures(bench.recorder) if records else None
    stream = Blocks(bench, setting, model, codec, clock)
    while len(stream.state.cache.frames) < setting.window_frames:
        stream.make(steps=1)
    for _ in range(2):  # tables and recordings of the full window
        stream.make()
    allocations = device_allocations(bench.device)
    made = [stream.make() for _ in range(blocks)]
    grown = None if allocations is None else (device_allocations(bench.device) or 0) - allocations
    assert stream.frames is not None
    block_ms = statistics.median(one["block_ms"] for one in made)
    cache_bytes = stream.state.cache.nbytes()
    ttff_ms = statistics.median(Blocks(bench, setting, model, codec, clock).first_frame_ms() for _ in range(3))
    bound = bound_ms(bench, setting, clock)
    return {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **asdict(setting),
        "block_ms": block_ms,
        "fps": 1000 * len(stream.frames) / block_ms,
        "frames_per_block": len(stream.frames),
        "percentiles_ms": percentiles([one["block_ms"] for one in made], (50, 95, 99)),
        "ttff_s": ttff_ms / 1000,
        "device_ms": statistics.median(one["device_ms"] for one in made),
        "launched_ms": statistics.median(one["launched_ms"] for one in made),
        "denoise_ms": [statistics.median(step) for step in zip(*(one["denoise_ms"] for one in made), strict=True)],
        "decode_ms": statistics.median(one["decode_ms"] for one in made),
        "commit_ms": statistics.median(one["commit_ms"] for one in made),
        "bound_ms": bound,
        "ratio_to_bound": block_ms / bound,
        "replays": 0 if model.captures is None else model.captures.replays,
        "recording_problem": "" if model.captures is None else model.captures.problem,
        "device_mallocs": grown,
        "cache_bytes": cache_bytes,
        "peak_device_bytes": torch.cuda.max_memory_allocated(bench.device) if on_gpu else None,
        "blocks": blocks,
        "steps": bench.steps,
    }


def bound_ms(bench: Bench, setting: Setting, clock: Clock) -> float:
    """The bare products and attention of a block's passes, in the model's dtype; decoding is not in it."""
    tokens, visible = (bench.geometry.tokens(frames) for frames in (bench.geometry.block_frames, setting.window_frames))
    with torch.device(bench.device):
        bound = Bound(pass_shapes(bench.config, tokens, visible), bench.dtype)
    bound.run()
    times = []
    for _ in range(3):
        start = clock.mark()
        bound.run()
        end = clock.mark()
        clock.wait()
        times.append(clock.ms(start, end))
    return (bench.steps + 1) * statistics.median(times)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, by Triton's interpreter"


def device_environment(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "cpu"}
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }


def device_allocations(device: torch.device) -> int | None:
    """Calls for memory that the allocator could not serve from what it held."""
    return int(torch.cuda.memory_stats(device)["num_device_alloc"]) if device.type == "cuda" else None
