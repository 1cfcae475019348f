"""How each published model was made to be streamed: configs/preset/*.yaml.

Weights do not say what sampler they were trained for. A preset does, and ends in the model folder's
scheduler_config.json and geometry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamgen.card import SchedulerConfig
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.resources import configs_dir
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import build_config, nearest, user_errors

BASE = {16: "wan", 48: "wan2_2_5b"}
"""Latent channels -> the preset of weights that nothing else is known of."""
TRAINED = "self_forcing_dmd"
"""The preset of weights in a training wrapper (`generator`) that nothing else is known of."""
SPATIAL_STRIDE = {16: 8, 48: 16}
TEMPORAL_STRIDE = 4
SIZES = ("dim", "ffn_dim", "num_layers", "in_channels", "out_channels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published model."""

    name: str
    about: str
    sizes: tuple[str, ...]
    """The configs of configs/model that it was published in."""
    scheduler: Mapping[str, Any]
    """Fields of `SchedulerConfig`."""
    block_frames: int
    weights: str | None = None
    """The set of weights in its file that its authors run: generator or generator_ema."""
    lora: bool = False
    """Its weights are half of the model; the other half is a LoRA."""
    files: tuple[str, ...] = ()
    """What its authors call their files; a hint, and said to be one when it is followed."""
    height: int = 480
    width: int = 832
    fps: float = 16.0
    differs: tuple[str, ...] = field(default=())
    """What its published code does and this project does not."""

    def __post_init__(self) -> None:
        for name in ("sizes", "files", "differs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def scheduler_config(self) -> SchedulerConfig:
        return build_config(SchedulerConfig, self.scheduler, f"preset {self.name}")

    def geometry(
        self, config: TransformerConfig, *, height: int | None = None, width: int | None = None
    ) -> VideoGeometry:
        """The stream's shape for a model of this config, at another size of picture if wanted."""
        channels = config.out_channels
        with user_errors(f"preset {self.name}"):
            return VideoGeometry(
                height=self.height if height is None else height,
                width=self.width if width is None else width,
                latent_channels=channels,
                fps=self.fps,
                spatial_stride=SPATIAL_STRIDE.get(channels, SPATIAL_STRIDE[16]),
                temporal_stride=TEMPORAL_STRIDE,
                first_latent_frames=1,
                patch=config.patch,
                block_frames=self.block_frames,
            )


def preset_names() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """The preset of that name; UserError lists the names there are."""
    from omegaconf import OmegaConf

    if name not in preset_names():
        raise UserError(f"no preset {name!r}{nearest(name, preset_names())}; there are: {', '.join(preset_names())}")
    values = OmegaConf.to_container(OmegaConf.load(_folder() / f"{name}.yaml"), resolve=True)
    assert isinstance(values, dict)
    return build_config(Preset, {"name": name, **{str(key): value for key, value in values.items()}}, f"preset {name}")


def _folder() -> Path:
    return configs_dir() / "preset"


def guess_preset(path: Path, network: str, config: TransformerConfig) -> tuple[Preset, str]:
    """(preset, why) for weights whose preset nobody named: by the file's published name, else by what wraps them."""
    place = path.resolve().as_posix()
    for preset in map(load_preset, preset_names()):
        if any(place.endswith(f"/{file}") for file in preset.files):
            return preset, f"a file called {path.name} is published with it"
    if network and config.out_channels in BASE and BASE[config.out_channels] == "wan":
        return load_preset(TRAINED), f"the weights are called {network}, and nothing says which model they are"
    name = BASE.get(config.out_channels, "wan")
    return load_preset(name), "nothing says that these weights are a causal model"


def pairing_warnings(
    preset: Preset, config: TransformerConfig, network: str, held: tuple[str, ...], loras: int
) -> Iterator[str]:
    """What does not fit between a preset and the weights it is used with.

    network: the set that is used; held: all sets that the file holds; loras: how many are merged.
    """
    size = model_size(config)
    if size is None or size not in preset.sizes:
        said = f"width {config.dim}, {config.num_layers} layers" if size is None else size
        yield f"preset {preset.name} was published for {' and '.join(preset.sizes)}, these weights are {said}"
    if network and preset.weights and network != preset.weights:
        other = " (the file has them: --weights)" if preset.weights in held else ", which this file does not hold"
        yield f"preset {preset.name} is run with {preset.weights}{other}; these are {network}"
    if preset.lora and not loras:
        yield f"preset {preset.name} needs a LoRA beside its weights (--lora FILE)"
    yield from preset.differs


def model_size(config: TransformerConfig) -> str | None:
    """The name in configs/model of the Wan model of this size; None for another."""
    from omegaconf import OmegaConf

    for path in sorted((configs_dir() / "model").glob("wan*.yaml")):
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(values, dict)
        if all(getattr(config, key) == values[key] for key in SIZES):
            return path.stem
    return None
