"""What the stages of a block do and how fast, beside this machine's roofs: arithmetic, bytes, host, memory.

Arithmetic and bytes are counted from shapes: products, attention and convolutions, each operand read once and each
result written once. That is the least that can be moved; norms and copies between them come on top, so a stage that
moves more stands further below its roof. Rates of stages and roofs are per second of processor time, over all
threads, so that waiting for other programs on the machine does not count.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamgen.costs import pass_shapes
from streamgen.linear import linear
from streamgen_infer import machine
from streamgen_infer.bench.bound import Shape, decode_shapes, moved_values, shapes_of
from streamgen_infer.report import percentiles

if TYPE_CHECKING:
    from streamgen_infer.bench.cases import Case

ROOF_ROWS, ROOF_WIDTH, ROOF_COPY_BYTES = 192, 1024, 1 << 26
HOST_BLOCKS, STEADY_BLOCKS = 3, 3


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage cannot avoid."""

    flops: int
    bytes: int


def work_of(shapes: Sequence[Shape], dtype: torch.dtype) -> Work:
    """The sum over shapes."""
    return Work(sum(shape.flops for shape in shapes), dtype.itemsize * sum(moved_values(shape) for shape in shapes))


def stage_work(case: Case) -> dict[str, Work]:
    """Of each stage of a block: text (a new prompt), denoise (one step), commit, decode, encode."""
    geometry, dtype = case.geometry, case.dtype
    tokens, visible = geometry.tokens(geometry.block_frames), geometry.tokens(case.window_frames)
    one_pass = work_of(pass_shapes(case.transformer.config, tokens, visible), dtype)
    works = {
        "text": work_of(shapes_of(case.transformer, case.encode_text), dtype),
        "denoise": one_pass,
        "commit": one_pass,
    }
    if case.codec is not None:
        video = video_of(case)
        works["decode"] = work_of(decode_shapes(case.codec, latents_of(case)), dtype)
        works["encode"] = work_of(shapes_of(case.codec, lambda: case.codec.encode_stream(video, None)), dtype)
    return works


def latents_of(case: Case) -> Tensor:
    """Zeros of a block's shape."""
    g = case.geometry
    return torch.zeros(1, g.block_frames, g.latent_channels, g.latent_height, g.latent_width)


def video_of(case: Case) -> Tensor:
    """Zeros of a block's frames [1, T, 3, H, W], as encoders take them."""
    g = case.geometry
    return torch.zeros(1, g.block_pixel_frames(1), 3, g.height, g.width)


class Roofs:
    """FLOP/s of a large matrix product in the model's library, and bytes/s of a copy.

    Sampled between blocks, so that both see the same machine; medians, as of the stages.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._x, self._w = (torch.randn(rows, ROOF_WIDTH).to(dtype) for rows in (ROOF_ROWS, ROOF_WIDTH))
        self._source = torch.ones(ROOF_COPY_BYTES // 4)
        self._target = torch.empty_like(self._source)
        self._product_ms: list[float] = []
        self._copy_ms: list[float] = []
        self._product()

    def _product(self) -> Tensor:
        return linear(self._x, self._w, None)

    def sample(self) -> None:
        """Measure both once more."""
        self._product_ms.append(cpu_ms_of(self._product, 1))
        self._copy_ms.append(cpu_ms_of(lambda: self._target.copy_(self._source), 1))

    def values(self) -> dict[str, float]:
        """{"flops_per_s", "bytes_per_s"}; bytes are those read and those written."""
        return {
            "flops_per_s": 2e3 * ROOF_ROWS * ROOF_WIDTH**2 / statistics.median(self._product_ms),
            "bytes_per_s": 2e3 * self._source.nbytes / statistics.median(self._copy_ms),
        }


def timed_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    with torch.no_grad():
        call()
    return 1000 * (time.perf_counter() - start)


def cpu_now_ms() -> float:
    """Milliseconds that this process has computed, over its threads: waiting for other programs does not count."""
    return 1000 * time.process_time()


def cpu_ms_of(call: Callable[[], object], times: int = 5) -> float:
    """Milliseconds of processor time of one call, the median of some."""
    took_ms = []
    with torch.no_grad():
        for _ in range(times):
            start_ms = cpu_now_ms()
            call()
            took_ms.append(cpu_now_ms() - start_ms)
    return statistics.median(took_ms)


def stage_figures(
    works: Mapping[str, Work], cpu_ms: Mapping[str, float], roof: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Per stage: FLOP/s, bytes/s and the share of what its roof allows at its ratio of arithmetic to bytes.

    A share above 1 is possible where operands stay in the processor's caches: the copy is one of main memory.
    """
    found = {}
    for name, work in works.items():
        seconds = cpu_ms[name] / 1000
        least_s = max(work.flops / roof["flops_per_s"], work.bytes / roof["bytes_per_s"])
        found[name] = {
            "cpu_ms": cpu_ms[name],
            "flops": work.flops,
            "bytes": work.bytes,
            "flops_per_s": work.flops / seconds,
            "bytes_per_s": work.bytes / seconds,
            "flops_per_byte": work.flops / work.bytes,
            "share_of_roof": least_s / seconds,
        }
    return found


def host_share(block: Callable[[], object]) -> float:
    """Share of a block's time outside of every torch operation: Python, between one operation and the next.

    From blocks run under torch's profiler, whose own cost falls mostly between operations: an upper bound.
    Median of a few blocks.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else a profiler says on stderr that it started and ended
    from torch.profiler import ProfilerActivity, profile

    shares = []
    for _ in range(HOST_BLOCKS):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            block()
            wall_us = 1e6 * (time.perf_counter() - start)
        inside_us = sum(
            event.time_range.elapsed_us()
            for event in profiler.events() or []
            if event.cpu_parent is None and event.device_type.name == "CPU"
        )
        shares.append(max(0.0, 1 - inside_us / wall_us))
    return statistics.median(shares)


def steady_state(block: Callable[[], object], device: torch.device) -> dict[str, int]:
    """What is left over after some blocks with a full cache: zeros, unless something grows.

    tensors and bytes: alive in Python, each storage once. On a GPU also the calls for memory that its allocator could
    not serve from what it held.
    """
    before, mallocs = _alive(), _device_mallocs(device)
    for _ in range(STEADY_BLOCKS):
        block()
    after = _alive()
    grown = {"blocks": STEADY_BLOCKS, "tensors": after[0] - before[0], "bytes": after[1] - before[1]}
    if mallocs is not None:
        grown["device_mallocs"] = (_device_mallocs(device) or 0) - mallocs
    return grown


def _alive() -> tuple[int, int]:
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter) and not found.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


def _device_mallocs(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.memory_stats(device)["num_device_alloc"])


def block_figures(
    case: Case, works: Mapping[str, Work], block_ms: Sequence[float], steps: int, cache_bytes: int
) -> dict[str, Any]:
    """Rates, percentiles and memory of whole blocks."""
    middle_s = statistics.median(block_ms) / 1000
    parts = [works["denoise"]] * steps + [works["commit"]] + ([works["decode"]] if "decode" in works else [])
    flops, moved = sum(part.flops for part in parts), sum(part.bytes for part in parts)
    geometry = case.geometry
    return {
        "percentiles_ms": percentiles(block_ms, (50, 95, 99)),
        "tokens_per_s": geometry.tokens(geometry.block_frames) / middle_s,
        "flops_per_block": flops,
        "flops_per_s": flops / middle_s,
        "bytes_per_block": moved,
        "cache_bytes": cache_bytes,
        "weight_bytes": sum(p.nbytes for p in case.transformer.parameters()),
        "peak_rss_mb": machine.peak_rss_mb(),
    }


def with_one_step(case: Case) -> Any:
    """The case's sampling with its first step alone."""
    return dataclasses.replace(case.sampling, sigmas=case.sampling.sigmas[:1])
