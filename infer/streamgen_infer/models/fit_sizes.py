"""The sizes of a model that is not loaded: from its folder, a foreign checkpoint, a preset or a config by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamgen.checkpoints.codecs import MEAN_2_2, STD_2_2, open_codec
from streamgen.checkpoints.detect import open_checkpoint
from streamgen.checkpoints.loading import choose_preset, foreign_parts, open_transformer
from streamgen.checkpoints.locate import Parts
from streamgen.checkpoints.presets import BASE, Preset, load_preset, preset_names
from streamgen.checkpoints.tensors import open_safetensors
from streamgen.codecs.taehv import TaehvCodec, taehv_config
from streamgen.codecs.wan import WanCodec, WanCodecConfig
from streamgen.costs import parameters
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import PARTS, SchedulerConfig
from streamgen.resources import configs_dir, model_path
from streamgen.transformer_config import TransformerConfig
from streamgen.umt5 import UMT5TextConfig
from streamgen.weights import WEIGHTS_FILE, build_config, read_json

UMT5_ITEM = 2
"""Bytes per weight of the published text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """All that memory depends on."""

    name: str
    transformer: TransformerConfig
    geometry: VideoGeometry
    scheduler: SchedulerConfig
    parameters: int
    """Of the transformer."""
    text_bytes: int
    """Weights of the text encoder, which keeps its own dtype."""
    text_offloads: bool
    """It is needed only when a prompt is new, and can leave the device or memory meanwhile."""
    codec_class: type[Any]
    codec_config: Any
    notes: tuple[str, ...] = ()
    """What was assumed."""


def read_sizes(model: str) -> ModelSizes:
    """The sizes of what `--model` names, weights unread. UserError for what is nothing of the kind."""
    foreign = foreign_parts(model)
    if foreign is not None:
        return _foreign(model, foreign)
    if not Path(model).exists():
        if model in preset_names():
            preset = load_preset(model)
            return _named(model, _model_config(preset.sizes[0]), preset)
        if model in _config_names():
            config = _model_config(model)
            preset = load_preset(BASE.get(config.out_channels, "wan"))
            return _named(model, config, preset, (f"window and blocks of preset {preset.name}",))
    try:
        folder = model_path(model)
    except UserError as error:
        raise UserError(f"{error}; or the name of a preset or config: {', '.join(_published())}") from error
    return _folder(model, folder)


def _folder(name: str, folder: Path) -> ModelSizes:
    """A model folder of this project."""
    index = read_json(folder / "model_index.json")
    configs: dict[str, Any] = {}
    classes: dict[str, Any] = {}
    for part, known in PARTS.items():
        entry = index.get(part)
        chosen = entry[-1] if isinstance(entry, list) and entry else None
        if chosen not in known:
            raise UserError(f"{folder}: model_index.json names the class {chosen!r}; known: {', '.join(known)}")
        classes[part], config_class = known[chosen]
        file = folder / part / "config.json"
        configs[part] = build_config(config_class, read_json(file), str(file))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    umt5 = isinstance(configs["text"], UMT5TextConfig)
    text = folder / "text" / (configs["text"].weights if umt5 else WEIGHTS_FILE)
    text_bytes = (open_checkpoint(text).choose()[1].tensors if umt5 else open_safetensors(text)).nbytes
    return ModelSizes(
        name=name,
        transformer=configs["transformer"],
        geometry=build_config(VideoGeometry, index.get("geometry", {}), f"{folder} geometry"),
        scheduler=build_config(SchedulerConfig, read_json(scheduler), str(scheduler)),
        parameters=parameters(configs["transformer"]),
        text_bytes=text_bytes,
        text_offloads=umt5,
        codec_class=classes["codec"],
        codec_config=configs["codec"],
    )


def _foreign(name: str, parts: Parts) -> ModelSizes:
    """A checkpoint of somebody else; what it lacks is taken as published, and said."""
    if parts.transformer is None:
        raise UserError(f"{parts.root} holds no transformer")
    weights = open_transformer(parts.transformer)
    preset, notes = choose_preset(None, weights)
    sizes = _named(name, weights.config, preset, tuple(notes))
    values: dict[str, Any] = {}
    if parts.vae is not None:
        values["codec_config"] = open_codec(parts.vae)[0]
    elif parts.small_decoder is not None:
        shapes = open_checkpoint(parts.small_decoder).choose()[1].tensors.shapes
        values |= {"codec_class": TaehvCodec, "codec_config": taehv_config(shapes, str(parts.small_decoder))}
    if parts.text is not None:
        values["text_bytes"] = open_checkpoint(parts.text).choose()[1].tensors.nbytes
    missing = tuple(f"without {what}: counted as published" for what in parts.missing())
    return replace(sizes, **values, notes=(*sizes.notes, *missing))


def _named(name: str, config: TransformerConfig, preset: Preset, notes: tuple[str, ...] = ()) -> ModelSizes:
    """A published model: Wan's VAE and text encoder beside this transformer."""
    return ModelSizes(
        name=name,
        transformer=config,
        geometry=preset.geometry(config),
        scheduler=preset.scheduler_config(),
        parameters=parameters(config),
        text_bytes=UMT5_ITEM * umt5_parameters(UMT5TextConfig(weights="")),
        text_offloads=True,
        codec_class=WanCodec,
        codec_config=_published_codec(config.out_channels),
        notes=notes,
    )


def _published_codec(channels: int) -> WanCodecConfig:
    if channels != 48:
        return WanCodecConfig()
    return WanCodecConfig(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        latents_mean=MEAN_2_2,
        latents_std=STD_2_2,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def umt5_parameters(config: UMT5TextConfig) -> int:
    """Weights of the encoder: no biases, gated feed-forward, a table of positions in every layer."""
    inner = config.num_heads * config.head_dim
    layer = 4 * config.text_dim * inner + 3 * config.text_dim * config.ffn_dim + 2 * config.text_dim
    layer += config.num_buckets * config.num_heads
    return config.vocab_size * config.text_dim + config.num_layers * layer + config.text_dim


def _config_names() -> list[str]:
    return sorted(path.stem for path in (configs_dir() / "model").glob("wan*.yaml"))


def _published() -> list[str]:
    return list(dict.fromkeys((*_config_names(), *preset_names())))


def _model_config(name: str) -> TransformerConfig:
    from omegaconf import OmegaConf

    path = configs_dir() / "model" / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict), path
    return build_config(TransformerConfig, {str(key): value for key, value in values.items()}, str(path))
