"""StreamPipeline: a model folder in, an endless stream of frames out.

pipe = StreamPipeline.from_pretrained("sprites")
for block in pipe.stream("a red star spinning over a snow background", seed=7):
    show(block.frames)
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamgen.cache import CacheSpec, KVCache
from streamgen.codec import SpritesCodec, SpritesCodecConfig
from streamgen.errors import UserError
from streamgen.flow import Prediction, step_sigmas
from streamgen.geometry import VideoGeometry
from streamgen.resources import model_path
from streamgen.rollout import SAMPLERS, Cancelled, Sampling, StreamState, rollout_block
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.timeline import Cue, PromptTimeline
from streamgen.transformer import CausalWanModel, TextContext, TransformerConfig
from streamgen.weights import (
    Unfilled,
    build_config,
    fingerprint,
    load_component,
    load_tree,
    load_weights,
    read_json,
    save_component,
    save_tree,
    user_errors,
    write_json,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_STEPS = 1000
STATE_FORMAT = 1
STATE_MARK = "streamgen-stream"


# part of a model folder -> class name in model_index.json -> (class, its config)
PARTS: dict[str, dict[str, tuple[Callable[..., Any], type]]] = {
    "transformer": {"CausalWanModel": (CausalWanModel, TransformerConfig)},
    "codec": {"SpritesCodec": (SpritesCodec, SpritesCodecConfig)},
    "text": {"SpritesTextEncoder": (SpritesTextEncoder, SpritesTextConfig)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """scheduler/scheduler_config.json: how the model was trained to be streamed."""

    trained_steps: tuple[int, ...]
    """Step counts the model was trained for; the first is the default."""
    window_frames: int
    sink_frames: int = 0
    shift: float = 5.0
    prediction: Prediction = "flow"
    visibility: tuple[str, ...] = ("clean",)
    sampler: str = "renoise"
    context_noise: float = 0.0
    protect_sink: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained_steps", tuple(self.trained_steps))  # JSON has lists only
        object.__setattr__(self, "visibility", tuple(self.visibility))
        if not self.trained_steps or min(self.trained_steps) < 1:
            raise ValueError(f"trained_steps={self.trained_steps}: must be one or more counts of at least 1")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r}: must be one of {', '.join(SAMPLERS)}")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise={self.context_noise}: must be in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTiming:
    """Wall milliseconds of one block."""

    text_ms: float
    recache_ms: float
    denoise_ms: list[float]
    """One entry per step."""
    decode_ms: float
    commit_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One finished block."""

    index: int
    frames: np.ndarray
    """uint8 [frames, H, W, 3], RGB."""
    prompt: str
    prompt_version: int
    timing: BlockTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReceipt:
    """A prompt was received: its version, and the block (and media time) that will first show it."""

    version: int
    block: int
    seconds: float


class StreamPipeline:
    """A loaded model: transformer, codec, text encoder, geometry and how it was trained to be streamed."""

    def __init__(
        self,
        *,
        transformer: CausalWanModel,
        codec: Any,
        text: Any,
        geometry: VideoGeometry,
        scheduler: SchedulerConfig,
        folder: Path | None = None,
    ) -> None:
        self.transformer, self.codec, self.text = transformer.eval(), codec.eval(), text.eval()
        self.geometry, self.scheduler, self.folder = geometry, scheduler, folder
        self.dtype = transformer.patch_embedding.weight.dtype
        self.device = transformer.patch_embedding.weight.device
        self._check()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
    ) -> StreamPipeline:
        """Load a shipped model by name or a model folder. dtype "auto" takes what runs faster here (`probe_dtype`)."""
        if threads is not None:
            if not 1 <= threads <= 1024:
                raise UserError(f"threads is {threads}; it must be 1 to 1024")
            torch.set_num_threads(threads)
        where = _device(device)
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"unknown dtype {dtype!r}; there are: auto, {', '.join(DTYPES)}")
        cast = DTYPES[probe_dtype(where.type) if dtype == "auto" else dtype]
        folder = model_path(name_or_path)
        index = read_json(folder / "model_index.json")
        geometry = build_config(VideoGeometry, index.get("geometry", {}), f"{folder} geometry")
        scheduler_file = folder / "scheduler" / "scheduler_config.json"
        scheduler = build_config(SchedulerConfig, read_json(scheduler_file), str(scheduler_file))
        parts = {
            name: _load_part(folder / name, index.get(name), known, where, None if name == "text" else cast)
            for name, known in PARTS.items()
        }
        with user_errors(str(folder)):
            return cls(**parts, geometry=geometry, scheduler=scheduler, folder=folder)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model folder (all but README.md, the card)."""
        index: dict[str, Any] = {"_class_name": "StreamPipeline"}
        for name in PARTS:
            part = getattr(self, name)
            config = asdict(part.config)
            index[name] = [type(part).__module__, type(part).__name__]
            save_component(folder / name, {"_class_name": type(part).__name__, **config}, part.state_dict())
        write_json(folder / "scheduler" / "scheduler_config.json", asdict(self.scheduler))
        write_json(folder / "model_index.json", {**index, "geometry": asdict(self.geometry)})

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model; a stream's saved state carries it."""
        if self.folder is None:
            raise UserError("this pipeline was built in memory; save_pretrained() and load it to save streams")
        return fingerprint(self.folder)

    def stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        cache: str = "relative",
        max_blocks: int | None = None,
        first_steps: int | None = None,
    ) -> Stream:
        """An endless stream, or one of `max_blocks` blocks. `first_steps`: those of block 0, on which all build."""
        if not 0 <= seed < 2**64:
            raise UserError(f"seed is {seed}; it must be 0 to 2**64 - 1")
        with user_errors("stream"):
            kv_cache = self.new_cache(cache)
        state = StreamState(
            geometry=self.geometry,
            cache=kv_cache,
            seeds=(seed,),
            timeline=PromptTimeline(prompt),
        )
        steps = self.scheduler.trained_steps[0] if steps is None else steps
        stream = Stream(self, state, steps, first_steps, max_blocks)
        stream._check_prompt(prompt)
        return stream

    def resume(self, state: Mapping[str, Any] | str | Path, *, max_blocks: int | None = None) -> Stream:
        """Continue a stream from `Stream.state_dict()` or a file of `Stream.save_state`, bit for bit."""
        saved = load_tree(Path(state), STATE_MARK) if isinstance(state, str | Path) else state
        if saved.get("format") != STATE_FORMAT:
            raise UserError(f"the state has format {saved.get('format')!r}; this version reads format {STATE_FORMAT}")
        if saved["model"] != self.fingerprint:
            raise UserError(
                f"the state belongs to another model (fingerprint {saved['model'][:12]}, this one is "
                f"{self.fingerprint[:12]}); load the model that made it"
            )
        if saved["dtype"] != self._dtype_name:
            raise UserError(
                f"the state was made with dtype {saved['dtype']}, this model is loaded as {self._dtype_name}; "
                f"load it with dtype {saved['dtype']}"
            )
        with user_errors("the saved state"):
            cache = self.new_cache(saved["cache"]["spec"]["policy"])
            cache.load_state_dict(saved["cache"])
        recent = saved.get("recent")
        stream_state = StreamState(
            geometry=self.geometry,
            cache=cache,
            seeds=tuple(saved["seeds"]),
            timeline=PromptTimeline.from_state(saved["timeline"]),
            codec={name: t.to(self.device) for name, t in saved["codec"].items()} if "codec" in saved else None,
            position=saved["position"],
            begun=saved["begun"],
            recent={} if recent is None else dict(zip(cache.frames, recent.to(self.device).unbind(1), strict=True)),
        )
        return Stream(self, stream_state, saved["steps"], saved["first_steps"], max_blocks)

    @property
    def _dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def sampling(self, steps: int) -> Sampling:
        """How the model's card says to sample in so many steps."""
        s = self.scheduler
        return Sampling(
            sigmas=step_sigmas(steps, s.shift),
            prediction=s.prediction,
            sampler=s.sampler,
            context_noise=s.context_noise,
            protect_sink=s.protect_sink,
        )

    def new_cache(self, policy: str, batch: int = 1) -> KVCache:
        """An empty cache of the model's window for `batch` streams that advance together."""
        config = self.transformer.config
        spec = CacheSpec(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            grid_height=self.geometry.grid_height,
            grid_width=self.geometry.grid_width,
            window_frames=self.scheduler.window_frames,
            sink_frames=self.scheduler.sink_frames,
            rope_theta=config.rope_theta,
            policy=policy,
        )
        spec.check_block(self.geometry.block_frames)
        return KVCache(spec, batch=batch, dtype=self.dtype, device=self.device)

    def _check(self) -> None:
        """The parts fit each other, or ValueError says which do not."""
        g, t, c = self.geometry, self.transformer.config, self.codec
        for what, one, other in (
            ("transformer in_channels", t.in_channels, g.latent_channels),
            ("transformer out_channels", t.out_channels, g.latent_channels),
            ("transformer patch", t.patch, g.patch),
            ("transformer text_len", t.text_len, self.text.text_len),
            ("transformer text_dim", t.text_dim, self.text.text_dim),
            ("codec latent_channels", c.latent_channels, g.latent_channels),
            ("codec spatial_stride", c.spatial_stride, g.spatial_stride),
            ("codec temporal_stride", c.temporal_stride, g.temporal_stride),
            ("codec first_latent_frames", c.first_latent_frames, g.first_latent_frames),
        ):
            if one != other:
                raise ValueError(f"{what} is {one}, the rest of the model has {other}")
        if t.prediction != self.scheduler.prediction:
            raise ValueError(f"the transformer predicts {t.prediction}, the scheduler says {self.scheduler.prediction}")


class Stream(Iterator[Block]):
    """One viewer's video. Iterate for blocks; `prompt` and `cancel` may be called from any thread meanwhile."""

    def __init__(
        self,
        pipe: StreamPipeline,
        state: StreamState,
        steps: int,
        first_steps: int | None,
        max_blocks: int | None,
    ) -> None:
        self.pipe, self.state = pipe, state
        self.steps, self.first_steps, self.max_blocks = steps, first_steps, max_blocks
        self.warnings: list[str] = []
        self._texts = _Texts(pipe)
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        if max_blocks is not None and max_blocks < 1:
            raise UserError(f"max_blocks is {max_blocks}; it must be at least 1")
        for count in {steps, steps if first_steps is None else first_steps}:
            self._check_steps(count)
        self._sampling = {count: pipe.sampling(count) for count in {steps, first_steps or steps}}

    @property
    def timeline(self) -> PromptTimeline:
        assert self.state.timeline is not None  # the pipeline makes every state with one
        return self.state.timeline

    def __next__(self) -> Block:
        state = self.state
        if self._cancelled.is_set() or (self.max_blocks is not None and state.position >= self.max_blocks):
            raise StopIteration
        with self._lock:  # from here on the block's prompt is fixed
            state.begun = True
            cue = self.timeline.at(state.position)
        clock = _Clock(self.pipe.device)
        text = self._texts.context(self.timeline, cue)
        text_ms = clock.lap()
        laps: dict[str, list[float]] = {"enter": [], "denoise": [], "commit": [], "decode": []}
        decoded: list[tuple[np.ndarray, Any]] = []

        def decode(latents: Tensor) -> None:
            with torch.no_grad():
                video, codec_state = self.pipe.codec.decode_stream(latents, state.codec)
                decoded.append((to_uint8(video)[0], codec_state))
            laps["decode"].append(clock.lap())

        index = state.position
        try:
            rollout_block(
                self.pipe.transformer,
                state,
                text,
                self._sampling[(self.first_steps or self.steps) if index == 0 else self.steps],
                transition=cue.transition,
                cancelled=self._cancelled.is_set,
                mark=lambda stage: laps[stage].append(clock.lap()),
                emit=decode,
            )
        except Cancelled:
            raise StopIteration from None
        frames, state.codec = decoded[0]
        timing = BlockTiming(
            text_ms=text_ms,
            recache_ms=laps["enter"][0],
            denoise_ms=laps["denoise"],
            decode_ms=laps["decode"][0],
            commit_ms=laps["commit"][0],
            total_ms=clock.total(),
        )
        return Block(
            index=index,
            frames=frames,
            prompt=cue.prompt,
            prompt_version=cue.version,
            timing=timing,
        )

    def prompt(
        self,
        text: str,
        transition: str = "recache",
        *,
        at_block: int | None = None,
        at_seconds: float | None = None,
        blend_blocks: int = 4,
    ) -> PromptReceipt:
        """Change the prompt, by default at the next block that has not begun."""
        geometry = self.pipe.geometry
        if at_block is not None and at_seconds is not None:
            raise UserError("give at_block or at_seconds, not both")
        self._check_prompt(text)
        if at_seconds is not None:
            with user_errors("at_seconds"):
                at_block = geometry.block_at_seconds(at_seconds)
        with self._lock:
            earliest = self.state.position + int(self.state.begun)
            block = earliest if at_block is None else at_block
            if self.max_blocks is not None and block >= self.max_blocks:
                raise UserError(f"a prompt for block {block} is past the end: the stream has {self.max_blocks} blocks")
            version = self.timeline.add(text, block, transition, blend_blocks=blend_blocks, earliest=earliest)
        seconds = geometry.block_pixel_start(block) / geometry.fps
        return PromptReceipt(version=version, block=block, seconds=seconds)

    def cancel(self) -> None:
        """End the iteration before its next pass. The state stays at the last whole block, for saving or resuming."""
        self._cancelled.set()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the video depends on: JSON values and tensors. Call it between blocks."""
        state = self.state
        saved: dict[str, Any] = {
            "format": STATE_FORMAT,
            "model": self.pipe.fingerprint,
            "dtype": self.pipe._dtype_name,
            "geometry": asdict(self.pipe.geometry),
            "steps": self.steps,
            "first_steps": self.first_steps,
            "seeds": list(state.seeds),
            "position": state.position,
            "begun": state.begun,
            "timeline": self.timeline.state_dict(),
            "cache": state.cache.state_dict(),
        }
        if state.recent:
            saved["recent"] = torch.stack(list(state.recent.values()), dim=1)
        if state.codec is not None:
            saved["codec"] = {name: t.clone() for name, t in state.codec.items()}
        return saved

    def save_state(self, path: str | Path) -> None:
        """Write `state_dict` to one file, whole or not at all."""
        save_tree(self.state_dict(), Path(path), STATE_MARK)

    def _check_steps(self, steps: int) -> None:
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(f"steps is {steps}; it must be 1 to {MAX_STEPS}")
        trained = self.pipe.scheduler.trained_steps
        if steps not in trained:
            self._warn(f"the model was trained for {_either(trained)} steps, not {steps}")

    def _check_prompt(self, prompt: str) -> None:
        for warning in self.pipe.text.tokenize(prompt).warnings:
            self._warn(warning)

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        warnings.warn(message, UserWarning, stacklevel=4)


class _Texts:
    """Text keys and values: each version is encoded once, each mixture's keys made once; what is past is dropped."""

    def __init__(self, pipe: StreamPipeline) -> None:
        self._pipe = pipe
        self._rows: dict[int, Tensor] = {}  # version -> [1, L, D] float32
        self._mix: tuple[tuple[int, float], ...] = ()
        self._context: TextContext | None = None

    @torch.no_grad()
    def context(self, timeline: PromptTimeline, cue: Cue) -> TextContext:
        if self._context is None or cue.mix != self._mix:
            old = self._rows
            self._rows = {
                version: old[version]
                if version in old
                else self._pipe.text.encode([timeline.prompts[version].prompt]).float()
                for version, _ in cue.mix
            }
            mixed = torch.stack([share * self._rows[version] for version, share in cue.mix]).sum(0)
            rows = mixed[:, None].to(self._pipe.device, self._pipe.dtype)
            self._context = self._pipe.transformer.encode_text(rows)
            self._mix = cue.mix
        return self._context


class _Clock:
    """Wall time between calls, after the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return 1000 * elapsed

    def total(self) -> float:
        return 1000 * (self._last - self._start)


def to_uint8(video_BTCHW: Tensor) -> np.ndarray:
    """Video in [-1, 1] -> uint8 [B, T, H, W, 3]."""
    scaled = ((video_BTCHW.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return scaled.permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()


@cache
def probe_dtype(device_type: str = "cpu") -> str:
    """The dtype to run in: "bf16" where its matrix products win by half (AMX, a GPU), else "fp32". Measured once."""
    if device_type != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    seconds = {}
    for name, dtype in DTYPES.items():
        a, b = torch.ones(192, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return "bf16" if seconds["bf16"] * 1.5 < seconds["fp32"] else "fp32"


def _load_part(
    folder: Path,
    entry: object,
    known: Mapping[str, tuple[Callable[..., Any], type]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Any:
    """One part from its folder; `entry` is its [module, class] in model_index.json."""
    name = entry[-1] if isinstance(entry, list) and entry else None
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{folder}: model_index.json names the class {name!r}; known: {', '.join(known)}")
    make, config_class = known[name]
    config, tensors = load_component(folder)
    with Unfilled(), user_errors(str(folder)):
        module = make(build_config(config_class, config, str(folder / "config.json")))
    load_weights(module, tensors, where=str(folder), dtype=dtype, device=device)
    return module.requires_grad_(False)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is not available here: {reason}") from error
    return device


def _either(counts: tuple[int, ...]) -> str:
    return " or ".join(map(str, counts))
