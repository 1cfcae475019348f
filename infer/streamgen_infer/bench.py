"""`streamgen bench`: the time of one block, beside the time of its bare products and attention in the same run.

Blocks are timed with a full cache, each followed by the bound of the same shapes, so that both see the same machine;
medians of both. `bench_stages` says what the stages do and how fast. `sprites` is the shipped model with its codec,
`mid` a transformer of random weights, 768 wide; `wan_1_3b` has the sizes of Wan 1.3B on a small picture, takes
minutes, and is measured only when it is named.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from streamgen import __version__
from streamgen.cache import CacheSpec, KVCache
from streamgen.codec import SpritesCodec, SpritesCodecConfig
from streamgen.costs import parameters, pass_shapes
from streamgen.errors import UserError
from streamgen.flow import step_sigmas
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import DTYPES, SchedulerConfig, StreamPipeline
from streamgen.pixels import to_uint8
from streamgen.resources import configs_dir, shipped_models
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel, TextContext, TransformerConfig
from streamgen.weights import Unfilled, build_config
from streamgen_infer import bench_live, bench_more, machine
from streamgen_infer.bench_show import check_picture, print_results, write_picture
from streamgen_infer.bench_stages import (
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
from streamgen_infer.bound import Bound, decode_shapes
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.report import check_report, write_report
from streamgen_infer.sinks import check_place

DEFAULT_BLOCKS = {"sprites": 20, "mid": 3, "wan_1_3b": 2}
LARGE = ("wan_1_3b", *bench_live.SUITES, *bench_more.SUITES)
STEPS, SHIFT = 4, 5.0
PROMPT = "a large red star spinning over a snow background"


@dataclass(slots=True, kw_only=True)
class Case:
    """What is measured: a transformer, and a codec where there is one."""

    transformer: CausalWanModel
    codec: Any
    """None: latents are not decoded."""
    encode_text: Callable[[], TextContext]
    geometry: VideoGeometry
    window_frames: int
    sink_frames: int
    sampling: Sampling
    weights: str
    """Where the weights come from."""

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.patch_embedding.weight.dtype


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
    if suite in bench_live.SUITES:
        if png is not None:
            raise UserError(f"--png draws the stages of a block; --suite {suite} has none: leave it out")
        return bench_live.run(
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
    suites = _choice("--suite", suite, (*CASES, *bench_live.SUITES, *bench_more.SUITES))
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
        for name in suites:
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


def environment() -> dict[str, Any]:
    return {
        "cpu": machine.cpu_name(),
        "cpu_flags": machine.cpu_flags(),
        "cores": machine.usable_cores(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


# Cases.


def sprites(dtype: torch.dtype) -> Case:
    """The shipped model, or its configs with random weights while there is none."""
    shipped = "sprites" in shipped_models()
    pipe = StreamPipeline.from_pretrained("sprites", dtype=_name(dtype)) if shipped else _random_sprites(dtype)
    scheduler = pipe.scheduler

    def encode_text() -> TextContext:
        rows = pipe.text.encode([PROMPT])
        return pipe.transformer.encode_text(rows[:, None].to(dtype))

    return Case(
        transformer=pipe.transformer,
        codec=pipe.codec,
        encode_text=encode_text,
        geometry=pipe.geometry,
        window_frames=scheduler.window_frames,
        sink_frames=scheduler.sink_frames,
        sampling=pipe.sampling(scheduler.trained_steps[0]),
        weights="shipped" if shipped else "random (none shipped)",
    )


def mid(dtype: torch.dtype) -> Case:
    """768 wide, 12 layers, 208 tokens a frame, 3 frames a block, window 12 with sink 3; random weights, no codec."""
    config = TransformerConfig(
        dim=768, ffn_dim=3072, num_heads=12, num_layers=12, in_channels=16, out_channels=16, text_dim=512, text_len=64
    )
    transformer = _ready(CausalWanModel(config), dtype)
    text_BGLD = torch.randn(1, 1, config.text_len, config.text_dim).to(dtype)
    return Case(
        transformer=transformer,
        codec=None,
        encode_text=lambda: transformer.encode_text(text_BGLD),
        geometry=VideoGeometry(height=208, width=256, latent_channels=16),
        window_frames=12,
        sink_frames=3,
        sampling=Sampling(sigmas=step_sigmas(STEPS, SHIFT)),
        weights="random",
    )


def wan_1_3b(dtype: torch.dtype) -> Case:
    """Wan 1.3B in full, random weights, on 208 x 128 pixels (104 tokens a frame in place of 1560); no codec."""
    config = read_config(TransformerConfig, "model/wan_1_3b.yaml")
    wanted, memory = 2 * parameters(config) * dtype.itemsize, machine.memory_mb()  # the bound has as many weights
    if memory is not None and wanted > memory[1] * 1e6:
        raise UserError(
            f"the suite wan_1_3b takes {wanted / 1e9:.1f} GB in {_name(dtype)}, {memory[1] / 1e3:.1f} GB are free; "
            "free memory, or take --dtype bf16"
        )
    with Unfilled():
        transformer = CausalWanModel(config).to(dtype).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.uniform_(-0.02, 0.02)
    text_BGLD = torch.randn(1, 1, config.text_len, config.text_dim).to(dtype)
    return Case(
        transformer=transformer,
        codec=None,
        encode_text=lambda: transformer.encode_text(text_BGLD),
        geometry=VideoGeometry(height=128, width=208, latent_channels=16, first_latent_frames=1),
        window_frames=12,
        sink_frames=3,
        sampling=Sampling(sigmas=step_sigmas(STEPS, SHIFT)),
        weights="random",
    )


CASES: dict[str, Callable[[torch.dtype], Case]] = {"sprites": sprites, "mid": mid, "wan_1_3b": wan_1_3b}


def _random_sprites(dtype: torch.dtype) -> StreamPipeline:
    transformer = read_config(TransformerConfig, "model/sprites.yaml")
    return StreamPipeline(
        transformer=_ready(CausalWanModel(transformer), dtype),
        codec=_ready(SpritesCodec(read_config(SpritesCodecConfig, "codec/sprites.yaml")), dtype),
        text=_ready(SpritesTextEncoder(read_config(SpritesTextConfig, "text/sprites.yaml")), torch.float32),
        geometry=read_config(VideoGeometry, "data/sprites.yaml"),
        scheduler=SchedulerConfig(
            trained_steps=(STEPS,), window_frames=12, sink_frames=3, shift=SHIFT, prediction=transformer.prediction
        ),
    )


def read_config(cls: Callable[..., Any], file: str) -> Any:
    """A config of the shipped ones, e.g. model/wan_1_3b.yaml."""
    path = configs_dir() / file
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict), path
    return build_config(cls, {str(key): value for key, value in values.items()}, str(path))


def _ready(module: Any, dtype: torch.dtype) -> Any:
    return module.eval().requires_grad_(False).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


# Measurement.


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
        config, geometry = case.transformer.config, case.geometry
        spec = CacheSpec(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            grid_height=geometry.grid_height,
            grid_width=geometry.grid_width,
            window_frames=case.window_frames,
            sink_frames=case.sink_frames,
            rope_theta=config.rope_theta,
        )
        self.case = case
        self.state = StreamState(geometry=geometry, cache=KVCache(spec, dtype=case.dtype), seeds=(0,))
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
