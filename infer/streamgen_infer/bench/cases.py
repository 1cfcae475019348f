"""What `streamgen bench` times block by block: a transformer with geometry and steps, and a codec where there is one.

`sprites` is the shipped model with its codec, `mid` a transformer of random weights, 768 wide; `wan_1_3b` has the sizes
of Wan 1.3B on a small picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf

from streamgen.codec import SpritesCodec, SpritesCodecConfig
from streamgen.costs import parameters
from streamgen.errors import UserError
from streamgen.flow import step_sigmas
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import DTYPES, SchedulerConfig, StreamPipeline
from streamgen.resources import configs_dir, shipped_models
from streamgen.rollout import Sampling
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import Unfilled, build_config
from streamgen_infer import machine

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
    transformer = random_transformer(config, dtype)
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


def random_transformer(config: TransformerConfig, dtype: torch.dtype) -> CausalWanModel:
    with Unfilled():
        model = CausalWanModel(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    return model


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
