"""StreamPipeline: a model folder in, an endless stream of frames out.

pipe = StreamPipeline.from_pretrained("sprites")
for block in pipe.stream("a red star spinning over a snow background", seed=7):
    show(block.frames)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamgen.adapters import Adapters
from streamgen.attention_choice import attention_for, check_attention, streamed_shape
from streamgen.cache import CacheSpec, KVCache, QuantisedKVCache
from streamgen.cache import policy as cache_policy
from streamgen.capture import Captures
from streamgen.card import SchedulerConfig
from streamgen.codec import SpritesCodec, SpritesCodecConfig
from streamgen.codecs.taehv import TaehvCodec, TaehvConfig
from streamgen.codecs.wan import WanCodec, WanCodecConfig
from streamgen.embedded_text import EmbeddedText, EmbeddedTextConfig
from streamgen.errors import UserError
from streamgen.frames import FrameMaker
from streamgen.geometry import VideoGeometry
from streamgen.images import image_geometry, image_latents
from streamgen.kernel_choice import float8_product, ops_for
from streamgen.ops import Ops
from streamgen.quantised_linear import WEIGHTS_DTYPES, quantise_weights
from streamgen.resources import model_path
from streamgen.rollout import Sampling, StreamState
from streamgen.stream import STATE_MARK, Block, Stream
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.timeline import PromptTimeline
from streamgen.transfers import use_device
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.transformer_config import TransformerConfig
from streamgen.umt5 import UMT5TextConfig, UMT5TextEncoder
from streamgen.weights import (
    Unfilled,
    build_config,
    fingerprint,
    fingerprint_files,
    load_component,
    load_tree,
    load_weights,
    read_json,
    save_component,
    user_errors,
    write_json,
)

__all__ = ["DTYPES", "STATE_MARK", "Block", "SchedulerConfig", "Stream", "StreamPipeline", "probe_dtype"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# part of a model folder -> class name in model_index.json -> (class, its config)
PARTS: dict[str, dict[str, tuple[Callable[..., Any], type]]] = {
    "transformer": {"CausalWanModel": (CausalWanModel, TransformerConfig)},
    "codec": {
        "SpritesCodec": (SpritesCodec, SpritesCodecConfig),
        "WanCodec": (WanCodec, WanCodecConfig),
        "TaehvCodec": (TaehvCodec, TaehvConfig),
    },
    "text": {
        "SpritesTextEncoder": (SpritesTextEncoder, SpritesTextConfig),
        "UMT5TextEncoder": (UMT5TextEncoder, UMT5TextConfig),
        "EmbeddedText": (EmbeddedText, EmbeddedTextConfig),
    },
}


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
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.transformer, self.codec, self.text = transformer.eval(), codec.eval(), text.eval()
        self.geometry, self.scheduler, self.folder = geometry, scheduler, folder
        self._files = files  # of a checkpoint that is no model folder: others may lie beside it
        self.loras: dict[str, float] = {}
        """Adapters of streams that choose none of their own: name -> strength."""
        self.weights_dtype: str | None = None
        """A name of `quantised_linear.WEIGHTS_DTYPES`, or None: all of them in `dtype`."""
        self.dtype = transformer.patch_embedding.weight.dtype
        self.device = transformer.patch_embedding.weight.device
        self.frames = FrameMaker(self.device)
        """The way of its latents to the host."""
        self._check()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        ops: str = "auto",
        attention: str = "auto",
        weights_dtype: str | None = None,
    ) -> StreamPipeline:
        """Load a shipped model by name, a model folder, or a Wan checkpoint, file or folder, as it is.

        dtype "auto" takes what runs faster here (`probe_dtype`). ops: reference or triton; "auto" takes the kernels on
        a GPU, once they have proven right there (`streamgen.kernel_choice`). attention: a name of
        `streamgen.attention.BACKENDS`; "auto" takes the fastest right one (`streamgen.attention_choice`).
        weights_dtype: int8 and fp8 keep the transformer's in one byte (`streamgen.quantised_linear`), fp8 is for GPUs.
        """
        if threads is not None:
            if not 1 <= threads <= 1024:
                raise UserError(f"threads is {threads}; it must be 1 to 1024")
            torch.set_num_threads(threads)
        where = _device(device)
        use_device(where)
        table = ops_for(ops, where)
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"unknown dtype {dtype!r}; there are: auto, {', '.join(DTYPES)}")
        if weights_dtype not in (None, *WEIGHTS_DTYPES):
            raise UserError(f"unknown weights_dtype {weights_dtype!r}; there are: {', '.join(WEIGHTS_DTYPES)}")
        cast = DTYPES[probe_dtype(where.type) if dtype == "auto" else dtype]
        check_attention(attention, where, cast)
        from streamgen.checkpoints.loading import foreign_parts, pipeline_parts  # it knows this module

        foreign = foreign_parts(name_or_path)
        if foreign is not None:
            with user_errors(str(name_or_path)):
                pipe = cls(**pipeline_parts(foreign, where, cast), folder=foreign.folder)
                return pipe._ready(table, attention, weights_dtype)
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
            pipe = cls(**parts, geometry=geometry, scheduler=scheduler, folder=folder)
        return pipe._ready(table, attention, weights_dtype)

    def _ready(self, table: Ops, attention: str, weights_dtype: str | None) -> StreamPipeline:
        """Itself, with these operations (on a GPU recorded: `streamgen.capture`), its weights as they will be kept."""
        self.transformer.ops = table
        shape = streamed_shape(self.transformer.config, self.geometry, self.scheduler.window_frames, self.dtype)
        self.transformer.attention_backend = attention_for(
            attention, self.device, shape, kernels=table.backend == "triton"
        )
        if table.places_keys and self.device.type == "cuda":
            self.transformer.captures = Captures()
        if weights_dtype is not None:
            product = float8_product(table, self.device) if weights_dtype == "fp8" else None
            quantise_weights(self.transformer, weights_dtype, product)
            self.weights_dtype = weights_dtype
        return self

    def save_pretrained(self, folder: Path) -> None:
        """Write the model folder (all but README.md, the card)."""
        if self.weights_dtype is not None:
            raise UserError(f"the weights are kept as {self.weights_dtype}; load the model without it to save it")
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
        if self._files is not None:
            return fingerprint_files(self._files)
        if self.folder is None:
            raise UserError("this pipeline was built in memory; save_pretrained() and load it to save streams")
        return fingerprint(self.folder)

    @cached_property
    def adapters(self) -> Adapters:
        """The LoRA files that this pipeline knows, and those that are merged now."""
        return Adapters(self.transformer)

    def load_lora(self, path: str | Path, strength: float = 1.0, name: str | None = None) -> str:
        """Load a LoRA file -> its name (by default the file's), merged with this strength beside those that are.

        Streams take it over at their next block; strength 0 loads it for `Stream.use_loras` to switch to.
        UserError where it is no LoRA or belongs to another model.
        """
        name = self.adapters.load(Path(path), name)
        self.use_loras({**self.loras, name: strength})
        return name

    def use_loras(self, strengths: Mapping[str, float]) -> None:
        """Merge these loaded adapters (name -> strength), no others; {} gives the loaded weights back, to the bit.

        Streams without adapters of their own go on with them as after a cut: what their caches hold stays.
        """
        self.adapters.use(strengths)
        self.loras = dict(self.adapters.active)

    def stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        cache: str | None = None,
        max_blocks: int | None = None,
        first_steps: int | None = None,
        visibility: str = "clean",
        cache_dtype: str | None = None,
        image: Any = None,
    ) -> Stream:
        """An endless stream, or one of `max_blocks` blocks. `first_steps`: those of block 0, on which all build.

        visibility: what a block sees of earlier ones while it is made: clean, same_level or joint
        (`streamgen.pipelined`); a warning where the model was not trained for it.

        cache_dtype: int8 or fp8 halve the cache's memory and cost a little of the picture and of the time
        (`streamgen.cache.quantised`).

        image: what the video begins with: a file, a PIL image or an array uint8 [h, w, 3] (`streamgen.images`).

        What is not given is as the model's card says: steps, first_steps, and cache (`SchedulerConfig.positions`).
        """
        if not 0 <= seed < 2**64:
            raise UserError(f"seed is {seed}; it must be 0 to 2**64 - 1")
        with user_errors("stream"):
            kv_cache = self.new_cache(self.scheduler.positions if cache is None else cache, stored_as=cache_dtype)
        state = StreamState(
            geometry=self.geometry if image is None else image_geometry(self.geometry, self.scheduler.image),
            cache=kv_cache,
            seeds=(seed,),
            timeline=PromptTimeline(prompt),
            ops=self.transformer.ops,
        )
        if image is not None:
            if visibility != "clean":
                raise UserError(f"visibility {visibility}: a stream from an image is made block after block (clean)")
            state.given = image_latents(self.codec, self.geometry, image, self.device)
        steps = self.scheduler.trained_steps[0] if steps is None else steps
        first_steps = self.scheduler.first_steps if first_steps is None else first_steps
        with user_errors("stream"):
            stream = self._stream_class(visibility)(self, state, steps, first_steps, max_blocks)
        stream.check_prompt(prompt)
        return stream

    def _stream_class(self, visibility: str) -> type[Stream]:
        from streamgen.pipelined import BY_VISIBILITY  # it knows this module

        with user_errors("stream"):
            self.scheduler.check_visibility(visibility)
        if visibility not in BY_VISIBILITY:
            raise UserError(
                f"visibility {visibility!r} is not run on one device; there are: {', '.join(BY_VISIBILITY)}"
            )
        return BY_VISIBILITY[visibility]

    def resume(self, state: Mapping[str, Any] | str | Path, *, max_blocks: int | None = None) -> Stream:
        """Continue a stream from `Stream.state_dict()` or a file of `Stream.save_state`, bit for bit."""
        saved = load_tree(Path(state), STATE_MARK) if isinstance(state, str | Path) else state
        return self._stream_class(saved.get("visibility", "clean")).from_state(self, saved, max_blocks)

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def sampling(self, steps: int) -> Sampling:
        """How the model's card says to sample in so many steps."""
        s = self.scheduler
        return Sampling(
            sigmas=s.sigmas(steps),
            prediction=s.prediction,
            sampler=s.sampler,
            context_noise=s.context_noise,
            commits=s.commits,
            protect_sink=s.protect_sink,
            guidance=s.guidance,
        )

    def encode_text(self, rows_BLD: Tensor) -> TextContext:
        """Rows of the text encoder, one prompt for each stream -> what passes need; with guidance, below them as many
        of the negative prompt.
        """
        if self.scheduler.guidance != 1:
            negative_BLD = self.text.encode([self.scheduler.negative_prompt]).to(rows_BLD).expand_as(rows_BLD)
            rows_BLD = torch.cat([rows_BLD, negative_BLD])
        return self.transformer.encode_text(rows_BLD[:, None].to(self.device, self.dtype))

    def new_cache(self, policy: str, batch: int = 1, stored_as: str | None = None) -> KVCache:
        """An empty cache of the model's window for `batch` streams that advance together; two rows each with guidance.

        stored_as: a name of `streamgen.cache.STORAGES`; the model's own dtype by default.
        """
        spec = CacheSpec.of(
            self.transformer.config,
            self.geometry,
            window_frames=self.scheduler.window_frames,
            sink_frames=self.scheduler.sink_frames,
            policy=policy,
        )
        spec.check_block(self.geometry.block_frames)
        batch *= 1 if self.scheduler.guidance == 1 else 2
        if stored_as is not None:
            if cache_policy(policy).committed is not None:
                raise ValueError(f"cache dtype {stored_as}: the averages of {policy} need the model's own dtype")
            return QuantisedKVCache(spec, storage=stored_as, batch=batch, dtype=self.dtype, device=self.device)
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
        if t.place_grid not in (None, (g.grid_height, g.grid_width)):
            raise ValueError(
                f"transformer place_grid is {t.place_grid}, the token grid is {g.grid_height, g.grid_width}"
            )
        if t.prediction != self.scheduler.prediction:
            raise ValueError(f"the transformer predicts {t.prediction}, the scheduler says {self.scheduler.prediction}")


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
    loader = getattr(make, "from_folder", None)  # parts that load their weights themselves, when they need them
    if loader is not None:
        return loader(folder, build_config(config_class, read_json(folder / "config.json"), str(folder)), device=device)
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
