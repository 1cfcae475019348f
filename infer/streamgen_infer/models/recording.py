"""A rollout in a neutral file: every input and every output, so that another implementation can be checked against it.

One safetensors file beside one of weights under Wan's original names:
    noise [blocks, steps, B, F, C, H, W]    step 0 starts a block, step s > 0 re-noises before call s
    text [1, L, D]                          embeddings, zero rows for padding, not masked
    timesteps, sigmas [steps]
    latents [blocks, B, F, C, H, W]         the finished blocks
    flows [blocks, steps + 1, B, F, C, H, W]  optional: what the network answered, the commit pass last
Its metadata holds `config`, JSON of `RecordedConfig`. Letters: B batch, F frames of a block, C channels,
H W latent grid, L text tokens, D text width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamgen.cache import CacheSpec, KVCache
from streamgen.errors import UserError
from streamgen.flow import Prediction
from streamgen.geometry import VideoGeometry
from streamgen.rollout import Sampling, StreamState, rollout_block
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import build_config, replacing, user_errors

CACHE_OF = {"absolute": "window", "relative": "relative"}
"""The contract's word for the position rule -> our cache policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedConfig:
    """Sizes and rules of a recorded rollout. The fields with defaults say how a model differs from Wan's."""

    dim: int
    heads: int
    layers: int
    ffn: int
    text_dim: int
    text_len: int
    freq_dim: int
    channels: int
    height: int
    """Rows of the latent grid, before patching."""
    width: int
    frames: int
    """Latent frames per block."""
    window: int
    """Latent frames in all: sink and the block in progress included."""
    sink: int
    shift: float
    rope: Literal["absolute", "relative"]
    patch: tuple[int, int, int] = (1, 2, 2)
    prediction: Prediction = "flow"
    sampler: str = "renoise"
    pooled_text: bool = False
    place_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))  # JSON has lists only
        if self.rope not in CACHE_OF:
            raise ValueError(f"rope={self.rope!r}: must be one of {', '.join(CACHE_OF)}")
        self.transformer(), self.geometry(), self.cache_spec()  # each checks its own sizes

    def to_json(self) -> str:
        """What the contract lists, and of the other fields those that say something."""
        values = asdict(self)
        return json.dumps({f.name: values[f.name] for f in fields(self) if f.default != values[f.name]})

    def transformer(self) -> TransformerConfig:
        return TransformerConfig(
            dim=self.dim,
            ffn_dim=self.ffn,
            num_heads=self.heads,
            num_layers=self.layers,
            in_channels=self.channels,
            out_channels=self.channels,
            text_dim=self.text_dim,
            text_len=self.text_len,
            freq_dim=self.freq_dim,
            patch=self.patch,
            prediction=self.prediction,
            pooled_text=self.pooled_text,
            place_grid=self.place_grid,
        )

    def geometry(self) -> VideoGeometry:
        """Of the latents alone: a pixel is a latent."""
        return VideoGeometry(
            height=self.height,
            width=self.width,
            latent_channels=self.channels,
            spatial_stride=1,
            temporal_stride=1,
            first_latent_frames=1,
            patch=self.patch,
            block_frames=self.frames,
        )

    def cache_spec(self) -> CacheSpec:
        transformer, geometry = self.transformer(), self.geometry()
        spec = CacheSpec.of(
            transformer,
            geometry,
            window_frames=self.window,
            sink_frames=self.sink,
            policy=CACHE_OF[self.rope],
        )
        spec.check_block(self.frames)
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A file's content: tensors as the module's docstring says, in float32, sigmas in float64.

    Without latents it is what a rollout starts from (`fill`).
    """

    config: RecordedConfig
    noise: Tensor
    text_1LD: Tensor
    timesteps: Tensor
    sigmas: Tensor
    latents: Tensor | None = None
    flows: Tensor | None = None

    def __post_init__(self) -> None:
        c = self.config
        if self.noise.ndim != 7 or 0 in self.noise.shape:
            raise ValueError(f"noise is {list(self.noise.shape)}: must be [blocks, steps, B, F, C, H, W]")
        blocks, steps, batch = self.noise.shape[:3]
        cell = (batch, c.frames, c.channels, c.height, c.width)
        shapes = {
            "noise": (blocks, steps, *cell),
            "text": (1, c.text_len, c.text_dim),
            "timesteps": (steps,),
            "sigmas": (steps,),
            "latents": (blocks, *cell),
            "flows": (blocks, steps + 1, *cell),
        }
        found = {**{name: getattr(self, name) for name in shapes if name != "text"}, "text": self.text_1LD}
        for name, shape in shapes.items():
            if found[name] is not None and tuple(found[name].shape) != shape:
                raise ValueError(f"{name} is {list(found[name].shape)}, the config and noise say {list(shape)}")
        levels = self.sigmas.tolist()
        if levels != sorted(set(levels), reverse=True) or not 0 < levels[-1] <= levels[0] <= 1:
            raise ValueError(f"sigmas={[round(level, 6) for level in levels]}: must fall, within (0, 1]")

    @property
    def blocks(self) -> int:
        return self.noise.shape[0]

    @property
    def batch(self) -> int:
        return self.noise.shape[2]

    def sampling(self) -> Sampling:
        return Sampling(
            sigmas=tuple(self.sigmas.tolist()), prediction=self.config.prediction, sampler=self.config.sampler
        )


def write_recording(path: Path, recording: Recording) -> None:
    """One file, whole or not at all."""
    names = ("noise", "timesteps", "sigmas", "latents", "flows")
    tensors = {name: getattr(recording, name) for name in names} | {"text": recording.text_1LD}
    with replacing(path) as temporary:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None},
            temporary,
            {"config": recording.config.to_json()},
        )


def read_recording(path: Path) -> tuple[Recording, list[str]]:
    """(recording, keys of its config that say nothing to this program); UserError in one line for what is wrong."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing, truncated or not a safetensors file: {error}") from error
    missing = [name for name in ("noise", "text", "timesteps", "sigmas", "latents") if name not in tensors]
    if missing:
        held = ", ".join(list(tensors)[:5]) or "nothing"
        raise UserError(f"{path} is no recording: it holds no {', '.join(missing)}; it begins with: {held}")
    config, ignored = read_config(metadata.get("config"), f"{path} metadata 'config'")
    with user_errors(str(path)):
        recording = Recording(
            config=config,
            noise=tensors["noise"].float(),
            text_1LD=_padded(tensors["text"].float(), config.text_len),
            timesteps=tensors["timesteps"].float(),
            sigmas=tensors["sigmas"].double(),
            latents=tensors["latents"].float(),
            flows=tensors["flows"].float() if "flows" in tensors else None,
        )
    return recording, ignored


def read_config(text: str | None, where: str) -> tuple[RecordedConfig, list[str]]:
    """(config, keys left out because they are unknown) of a JSON object."""
    try:
        values = json.loads(text or "")
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        needed = [f.name for f in fields(RecordedConfig) if f.default is MISSING]
        raise UserError(f"{where} must be a JSON object with {', '.join(needed)}")
    known = {f.name for f in fields(RecordedConfig)}
    config = build_config(RecordedConfig, {name: values[name] for name in values if name in known}, where)
    return config, [name for name in values if name not in known]


def _padded(text_1LD: Tensor, text_len: int) -> Tensor:
    """Rows that a recording leaves out are padding: zeros."""
    missing = text_len - text_1LD.shape[1] if text_1LD.ndim == 3 else 0
    return torch.nn.functional.pad(text_1LD, (0, 0, 0, missing)) if missing > 0 else text_1LD


# Running.


@torch.no_grad()
def text_of(model: CausalWanModel, text_1LD: Tensor, batch: int) -> TextContext:
    """What the network needs of one text that all rows of a batch share."""
    weight = model.patch_embedding.weight
    return model.encode_text(text_1LD.to(weight.device, weight.dtype).expand(batch, -1, -1)[:, None])


def new_state(config: RecordedConfig, model: CausalWanModel, seeds: tuple[int, ...]) -> StreamState:
    """A stream at its start, one row for each seed."""
    weight = model.patch_embedding.weight
    cache = KVCache(config.cache_spec(), batch=len(seeds), dtype=weight.dtype, device=weight.device)
    return StreamState(geometry=config.geometry(), cache=cache, seeds=seeds)


def play(model: CausalWanModel, recording: Recording) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the recorded inputs through `model` -> of each block its latents [B, F, C, H, W] and flows [steps + 1, ...].

    The timesteps are the file's own, also where they are not 1000 sigma: they are an input like the noise. The network
    gets them in float32, as everywhere; in float64 the latents of a tiny model differ by 1e-5.
    """
    state = new_state(recording.config, model, seeds=(0,) * recording.batch)
    device = model.patch_embedding.weight.device
    state.noise_source = lambda block, step: recording.noise[block, step].to(device)
    text = text_of(model, recording.text_1LD, recording.batch)
    clock = recording.timesteps.tolist()
    answers: list[Tensor] = []

    def set_timestep(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_t, timestep, *rest = inputs
        if len(answers) < len(clock):
            timestep = torch.full_like(timestep, clock[len(answers)])
        return (x_t, timestep, *rest)

    hooks = [
        model.register_forward_pre_hook(set_timestep),
        model.register_forward_hook(lambda module, inputs, answer: answers.append(answer)),
    ]
    try:
        for _ in range(recording.blocks):
            with torch.no_grad():
                latents = rollout_block(model, state, text, recording.sampling())
            assert len(answers) == len(clock) + 1, "a block is one pass per step and the commit pass"
            yield latents.cpu(), torch.stack(answers).float().cpu()
            answers.clear()
    finally:
        for hook in hooks:
            hook.remove()


def fill(model: CausalWanModel, inputs: Recording, *, flows: bool) -> Recording:
    """The recording of what `model` makes of the inputs."""
    made = list(play(model, inputs))
    return replace(
        inputs,
        latents=torch.stack([latents for latents, _ in made]),
        flows=torch.stack([answers for _, answers in made]) if flows else None,
    )
