"""Blocks of a model of random weights on a device, in one of several settings, with the device time of every stage.

For `cuda`. Times of a GPU are those between events on its stream, those of a CPU are the clock's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamgen.cache import CacheSpec, KVCache, QuantisedKVCache
from streamgen.capture import Recorder
from streamgen.clocks import Clock, Laps
from streamgen.codecs.taehv import TaehvCodec, TaehvConfig
from streamgen.flow import step_sigmas
from streamgen.frames import Coming, FrameMaker
from streamgen.geometry import VideoGeometry
from streamgen.ops import Ops
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import Unfilled
from streamgen_infer.bench.cases import SHIFT, STEPS, read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to stream."""

    name: str
    window_frames: int
    sink_frames: int
    policy: str = "window"
    cache_dtype: str | None = None
    weights_dtype: Literal["fp8"] | None = None
    """Of the products, weights and inputs (`streamgen.quantised_linear`); in the model once, they stay so."""
    target_ms: float | None = None
    """Per block; what was aimed at on an H200."""


SETTINGS = (
    Setting(name="window 21", window_frames=21, sink_frames=0, target_ms=300),
    Setting(name="window 12", window_frames=12, sink_frames=3, target_ms=210),
    Setting(name="window 12, relative positions", window_frames=12, sink_frames=3, policy="relative", target_ms=210),
    Setting(name="window 21, fp8 cache", window_frames=21, sink_frames=0, cache_dtype="fp8"),
    Setting(name="window 12, fp8 cache", window_frames=12, sink_frames=3, cache_dtype="fp8"),
    Setting(  # last of all: there is no way back to the weights as they were
        name="window 12, fp8 weights",
        window_frames=12,
        sink_frames=3,
        weights_dtype="fp8",
        target_ms=140,
    ),
    Setting(
        name="window 12, fp8 weights and cache",
        window_frames=12,
        sink_frames=3,
        cache_dtype="fp8",
        weights_dtype="fp8",
        target_ms=140,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured, and where."""

    config: TransformerConfig
    codec: TaehvConfig
    geometry: VideoGeometry
    settings: tuple[Setting, ...]
    device: torch.device
    dtype: torch.dtype
    steps: int = STEPS
    recorder: Recorder | None = None
    """Of `streamgen.capture`; CUDA graphs by default."""


def wan(device: torch.device) -> Bench:
    """Wan 1.3B at 480 x 832, and `taew2_1`'s sizes."""
    return Bench(
        config=read_config(TransformerConfig, "model/wan_1_3b.yaml"),
        codec=TaehvConfig(),
        geometry=VideoGeometry(height=480, width=832, latent_channels=16, first_latent_frames=1),
        settings=SETTINGS,
        device=device,
        dtype=torch.bfloat16,
    )


# Blocks.


@dataclass(slots=True)
class Blocks:
    """A stream of a setting, made block by block, with the device time of every stage."""

    bench: Bench
    setting: Setting
    model: CausalWanModel
    codec: TaehvCodec
    clock: Clock
    state: StreamState = field(init=False)
    text: TextContext = field(init=False)
    frames: np.ndarray | None = None
    """Of the last block."""

    _maker: FrameMaker = field(init=False)

    def __post_init__(self) -> None:
        self._maker = FrameMaker(self.bench.device)
        self.state = StreamState(
            geometry=self.bench.geometry, cache=new_cache(self.bench, self.setting), seeds=(0,), ops=self.model.ops
        )
        self.text = random_text(self.bench, self.model)

    @torch.no_grad()
    def make(self, steps: int | None = None) -> dict[str, Any]:
        """The next block -> milliseconds: whole, of each stage, and of the host until all was launched."""
        coming: list[Coming] = []
        began = time.perf_counter()
        laps = Laps(self.bench.device)

        def decode(latents: Tensor) -> None:
            coming.append(self._decode(latents))
            laps.mark("decode")

        rollout_block(
            self.model,
            self.state,
            self.text,
            Sampling(sigmas=step_sigmas(steps or self.bench.steps, SHIFT)),
            mark=laps.mark,
            emit=decode,
        )
        launched_ms = 1000 * (time.perf_counter() - began)
        self.frames = coming[0].wait()
        stages, wall_ms = laps.read()
        return {
            "block_ms": wall_ms,
            "device_ms": sum(map(sum, stages.values())),
            "launched_ms": launched_ms,
            "denoise_ms": stages["denoise"],
            "decode_ms": coming[0].decode_ms(),
            "commit_ms": sum(stages["commit"]),
        }

    @torch.no_grad()
    def first_frame_ms(self) -> float:
        """From a prompt's embeddings to the first block's frames on the host: a new stream of a warm process."""
        self.clock.wait()
        began = time.perf_counter()
        self.text = random_text(self.bench, self.model)
        done_s: list[float] = []

        def decode(latents: Tensor) -> None:
            self.frames = self._decode(latents).wait()
            done_s.append(time.perf_counter())

        sampling = Sampling(sigmas=step_sigmas(self.bench.steps, SHIFT))
        rollout_block(self.model, self.state, self.text, sampling, emit=decode)
        self.clock.wait()
        return 1000 * (done_s[0] - began)

    def _decode(self, latents: Tensor) -> Coming:
        coming = self._maker.begin(self.codec, latents, self.state.codec)
        self.state.codec = coming.codec
        return coming


def new_cache(bench: Bench, setting: Setting) -> KVCache:
    """Empty, of the setting's window."""
    spec = CacheSpec.of(
        bench.config,
        bench.geometry,
        window_frames=setting.window_frames,
        sink_frames=setting.sink_frames,
        policy=setting.policy,
    )
    if setting.cache_dtype is None:
        return KVCache(spec, dtype=bench.dtype, device=bench.device)
    return QuantisedKVCache(spec, storage=setting.cache_dtype, dtype=bench.dtype, device=bench.device)


def random_text(bench: Bench, model: CausalWanModel) -> TextContext:
    rows = torch.randn(1, 1, bench.config.text_len, bench.config.text_dim).to(bench.device, bench.dtype)
    return model.encode_text(rows)


def random_model(bench: Bench, table: Ops, attention: str) -> CausalWanModel:
    """Weights small enough that activations stay finite."""
    with torch.device(bench.device), Unfilled():
        model = CausalWanModel(bench.config, ops=table, attention_backend=attention)
    model = model.to(bench.dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith((".norm_q.weight", ".norm_k.weight", ".norm3.weight")):
            parameter.fill_(1)
        else:
            parameter.uniform_(-0.02, 0.02)
    return model


def random_codec(bench: Bench) -> TaehvCodec:
    codec = TaehvCodec(bench.codec).to(bench.device, bench.dtype).eval().requires_grad_(False)
    return codec.to(memory_format=torch.channels_last) if bench.device.type == "cuda" else codec  # type: ignore[call-overload]
