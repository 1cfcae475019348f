"""The times of a case: blocks with a full cache, each followed by the bound of the same shapes, so that both see the
same machine; medians of both. `stages` says what the stages do and how fast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamgen.cache import CacheSpec, KVCache
from streamgen.costs import pass_shapes
from streamgen.pixels import to_uint8
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen_infer.bench.bound import Bound, decode_shapes
from streamgen_infer.bench.cases import Case
from streamgen_infer.bench.stages import (
    Roofs,
    block_figures,
    cpu_ms_of,
    cpu_now_ms,
    host_share,
    latents_of,
    stage_figures,
    stage_work,
    steady_state,
    timed_ms,
    video_of,
    with_one_step,
)
from streamgen_infer.interrupts import Stop


def measure(case: Case, blocks: int, stop: Stop) -> dict[str, Any] | None:
    """Medians over `blocks` blocks with a full cache; None if a stop came before the first of them."""
    rolling = _Rolling(case)
    one_step = with_one_step(case)
    while rolling.state.cache.fill()[0] < case.window_frames and not stop.requested:
        rolling.block(one_step)
    rolling.block(one_step)  # the first with a full cache still makes its tables
    bound = _BlockBound(case)
    bound.run()
    roofs = Roofs(case.dtype)
    text_ms = statistics.median(timed_ms(case.encode_text) for _ in range(5))
    made: list[dict[str, Any]] = []
    bounds: list[float] = []
    cpu_ms: list[tuple[float, float]] = []
    while len(made) < blocks and not stop.requested:
        start = cpu_now_ms()
        made.append(rolling.block())
        between = cpu_now_ms()
        bounds.append(timed_ms(bound.run))
        cpu_ms.append((between - start, cpu_now_ms() - between))
        roofs.sample()
    if not made:
        return None
    times_ms = [one["block_ms"] for one in made]
    block_ms, bound_ms = statistics.median(times_ms), statistics.median(bounds)
    geometry, steps = case.geometry, len(case.sampling.sigmas)
    denoise_ms = [_median(step) for step in zip(*(one["denoise_ms"] for one in made), strict=True)]
    stages_cpu_ms = {name: _median([one["cpu_ms"][name] for one in made]) for name in made[0]["cpu_ms"]}
    stages_cpu_ms["text"] = cpu_ms_of(case.encode_text)
    works, roof = stage_work(case), roofs.values()
    if case.codec is not None:
        video = video_of(case).to(case.dtype)
        stages_cpu_ms["encode"] = cpu_ms_of(lambda: case.codec.encode_stream(video, None))
    return {
        "block_ms": block_ms,
        "bound_ms": bound_ms,
        "ratio_to_bound": block_ms / bound_ms,
        "block_cpu_ms": _median([block for block, _ in cpu_ms]),
        "bound_cpu_ms": _median([alone for _, alone in cpu_ms]),
        "cpu_ratio_to_bound": _median([block / alone for block, alone in cpu_ms]),
        "text_ms": text_ms,
        "denoise_ms": denoise_ms,
        "commit_ms": _median([one["commit_ms"] for one in made]),
        "decode_ms": _median([one["decode_ms"] for one in made]),
        "real_time": None if case.codec is None else 1000 * geometry.block_pixel_frames(1) / geometry.fps / block_ms,
        **block_figures(case, works, times_ms, steps, rolling.state.cache.nbytes()),
        "host_share": host_share(rolling.block),
        "steady_state": steady_state(rolling.block, case.transformer.patch_embedding.weight.device),
        "roofs": roof,
        "stages": stage_figures(works, stages_cpu_ms, roof),
        "blocks": len(made),
        "steps": steps,
        "codec_included": case.codec is not None,
        "tokens_per_block": geometry.tokens(geometry.block_frames),
        "visible_tokens": geometry.tokens(case.window_frames),
        "parameters": sum(parameter.numel() for parameter in case.transformer.parameters()),
        "weights": case.weights,
    }


class _Rolling:
    """A stream of the case that is advanced block by block, with the time of every stage."""

    def __init__(self, case: Case) -> None:
        spec = CacheSpec.of(
            case.transformer.config,
            case.geometry,
            window_frames=case.window_frames,
            sink_frames=case.sink_frames,
        )
        self.case = case
        self.state = StreamState(geometry=case.geometry, cache=KVCache(spec, dtype=case.dtype), seeds=(0,))
        self.text = case.encode_text()

    @torch.no_grad()
    def block(self, sampling: Sampling | None = None) -> dict[str, Any]:
        laps: dict[str, list[float]] = {"enter": [], "denoise": [], "commit": [], "decode": []}
        cpu_laps: dict[str, list[float]] = {stage: [] for stage in laps}
        start = last = time.perf_counter()
        cpu_last_ms = cpu_now_ms()

        def mark(stage: str) -> None:
            nonlocal last, cpu_last_ms
            now, cpu_ms = time.perf_counter(), cpu_now_ms()
            laps[stage].append(1000 * (now - last))
            cpu_laps[stage].append(cpu_ms - cpu_last_ms)
            last, cpu_last_ms = now, cpu_ms

        def decode(latents: Tensor) -> None:
            if self.case.codec is not None:
                video, self.state.codec = self.case.codec.decode_stream(latents, self.state.codec)
                to_uint8(video)
            mark("decode")

        case = self.case
        rollout_block(case.transformer, self.state, self.text, sampling or case.sampling, mark=mark, emit=decode)
        return {
            "block_ms": 1000 * (time.perf_counter() - start),
            "denoise_ms": laps["denoise"],
            "commit_ms": laps["commit"][0],
            "decode_ms": laps["decode"][0],
            "cpu_ms": {stage: statistics.fmean(cpu_laps[stage]) for stage in ("denoise", "commit", "decode")},
        }


class _BlockBound:
    """The bound of one block: every step, the commit pass and the decoding."""

    def __init__(self, case: Case) -> None:
        geometry = case.geometry
        tokens, visible = geometry.tokens(geometry.block_frames), geometry.tokens(case.window_frames)
        self.passes = len(case.sampling.sigmas) + 1
        self.forward = Bound(pass_shapes(case.transformer.config, tokens, visible), case.dtype)
        self.decode = Bound([], case.dtype)
        if case.codec is not None:
            self.decode = Bound(decode_shapes(case.codec, latents_of(case)), case.dtype)

    def run(self) -> None:
        for _ in range(self.passes):
            self.forward.run()
        self.decode.run()


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
