"""From checkpoint files to modules: the transformer alone, or a whole pipeline without a model folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamgen.checkpoints.detect import TRANSFORMER, Checkpoint, open_checkpoint, original_names
from streamgen.checkpoints.locate import MODEL_INDEX, Parts, is_ours, locate, weight_files
from streamgen.checkpoints.lora import merged, open_lora
from streamgen.checkpoints.presets import Preset, guess_preset, load_preset, pairing_warnings
from streamgen.checkpoints.sizes import check_transformer, config_of, settings_beside
from streamgen.checkpoints.tensors import LazyTensors
from streamgen.checkpoints.text_names import text_sizes, text_tensors
from streamgen.errors import UserError
from streamgen.resources import shipped_models
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig
from streamgen.umt5 import TOKENIZER_FILES, UMT5TextConfig, UMT5TextEncoder, weights_files
from streamgen.weights import CONFIG_FILE, Unfilled, load_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A transformer's weights, checked, by original names, LoRA merged; nothing is read yet."""

    path: Path
    network: str
    """The set of the file that was taken: "" for a file with one network."""
    held: tuple[str, ...]
    """All sets in the file."""
    layout: str
    config: TransformerConfig
    tensors: LazyTensors
    loras: int = 0


def open_transformer(
    checkpoint: Checkpoint | Path,
    *,
    network: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    trust_pickle: bool = False,
) -> Weights:
    """A transformer's weights from a file in any layout and wrapping. UserError lists what does not fit.

    network: which set of a training checkpoint; loras: (file, strength), merged in this order.
    """
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(checkpoint, trust_pickle=trust_pickle)
    where = str(checkpoint.path)
    if checkpoint.kind != TRANSFORMER:
        raise UserError(f"{where} holds a {checkpoint.kind}, no transformer")
    name, found = checkpoint.choose(network)
    tensors = original_names(found, where)
    config = config_of(tensors.shapes, where, settings=settings_beside(checkpoint.path))
    check_transformer(config, tensors.shapes, where)
    for path, strength in loras:
        tensors = merged(tensors, open_lora(path, tensors.shapes, trust_pickle=trust_pickle), strength)
    return Weights(
        path=checkpoint.path,
        network=name,
        held=tuple(checkpoint.networks),
        layout=found.layout,
        config=config,
        tensors=tensors,
        loras=len(loras),
    )


def load_transformer(
    weights: Weights, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> CausalWanModel:
    """The model with these weights, each read and put in its place on `device` as `dtype` before the next one."""
    with Unfilled():
        model = CausalWanModel(weights.config)
    load_weights(model, weights.tensors, where=str(weights.path), dtype=dtype, device=device)
    return model.eval().requires_grad_(False)


def open_text(path: Path, tokenizer: Path, *, text_len: int, trust_pickle: bool = False) -> UMT5TextConfig:
    """The config of a text encoder's file, with absolute paths. UserError where the file is no UMT5 encoder."""
    network = open_checkpoint(path, trust_pickle=trust_pickle).choose()[1]
    sizes = text_sizes(text_tensors(network, str(path)), str(path))
    return UMT5TextConfig(weights=str(path.resolve()), tokenizer=str(tokenizer.resolve()), text_len=text_len, **sizes)


def choose_preset(name: str | None, weights: Weights) -> tuple[Preset, list[str]]:
    """(preset, what to tell the user about it)."""
    if name is not None:
        preset, notes = load_preset(name), []
    else:
        preset, why = guess_preset(weights.path, weights.network, weights.config)
        notes = [f"preset {preset.name} ({preset.about}): {why}; another one: streamgen convert --preset NAME"]
    notes += pairing_warnings(preset, weights.config, weights.network, weights.held, weights.loras)
    return preset, notes


def preferred_network(checkpoint: Checkpoint, preset: str | None) -> str | None:
    """The set of weights that the preset's authors run, if the file has it."""
    wanted = load_preset(preset).weights if preset else None
    return wanted if wanted in checkpoint.networks else None


def foreign_parts(name_or_path: str | Path) -> Parts | None:
    """The parts of a checkpoint that is no model folder of this project; None for one that is, or for a name."""
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in shipped_models():
        return None
    if not path.exists() or (path.is_dir() and (is_ours(path) or not _promising(path))):
        return None
    return locate(path)


def _promising(folder: Path) -> bool:
    return (folder / MODEL_INDEX).is_file() or next(weight_files(folder), None) is not None


def complete(parts: Parts) -> Parts:
    """The same; UserError in one line when a stream needs more than is there."""
    missing = parts.missing()
    if missing:
        raise UserError(
            f"{parts.root} lacks {' and '.join(missing)}; `streamgen convert {parts.root} DST --base FOLDER` takes "
            "them from a Wan folder (streamgen pull fetches one)"
        )
    return parts


def pipeline_parts(parts: Parts, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `StreamPipeline` is made of, straight from a checkpoint's files. Warns of what is assumed and unusual."""
    from streamgen.checkpoints.codecs import load_codec_file

    parts = complete(parts)
    codec = parts.vae or parts.small_decoder
    assert parts.transformer is not None and codec is not None
    assert parts.text is not None and parts.tokenizer is not None
    first = open_transformer(parts.transformer)
    preset, _ = choose_preset(None, first)
    network = preferred_network(parts.transformer, preset.name)
    loras = [(path, 1.0) for path in parts.loras] if preset.lora else []
    weights = open_transformer(parts.transformer, network=network, loras=loras) if network or loras else first
    for note in choose_preset(None, replace(weights, network=weights.network or first.network))[1]:
        warnings.warn(note, UserWarning, stacklevel=4)
    geometry = preset.geometry(weights.config)
    text = open_text(parts.text, parts.tokenizer, text_len=weights.config.text_len)
    return {
        "transformer": load_transformer(weights, device=device, dtype=dtype),
        "codec": load_codec_file(codec, device=device, dtype=dtype),
        "text": UMT5TextEncoder(text, parts.text.parent, device=device),
        "geometry": geometry,
        "scheduler": preset.scheduler_config(),
        "files": _named_files(
            [parts.transformer.path, codec, parts.text, *(path for path, _ in loras)], parts.tokenizer
        ),
    }


def _named_files(weights: Sequence[Path], tokenizer: Path) -> dict[str, Path]:
    """What a model was loaded from, for its identity, by names that say which part a file is and not where it lies."""
    found = {f"tokenizer/{name}": tokenizer / name for name in TOKENIZER_FILES}
    for number, path in enumerate(weights):
        found |= {f"{number}/{file.name}": file for file in (*weights_files(path), path.parent / CONFIG_FILE)}
    return {name: file for name, file in found.items() if file.is_file()}
