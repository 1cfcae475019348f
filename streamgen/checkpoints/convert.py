"""From checkpoint files to files: a model folder of this project, Wan's own layout, or diffusers'.

Tensors go through one by one: beside what is written there is one of them in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamgen.checkpoints.codecs import write_codec
from streamgen.checkpoints.detect import open_checkpoint
from streamgen.checkpoints.loading import (
    Weights,
    choose_preset,
    complete,
    open_text,
    open_transformer,
    preferred_network,
)
from streamgen.checkpoints.locate import OUR_CLASS, Parts, is_ours, locate
from streamgen.checkpoints.names import to_diffusers
from streamgen.checkpoints.presets import Preset
from streamgen.checkpoints.sizes import diffusers_settings, original_settings
from streamgen.checkpoints.tensors import LazyTensors, open_safetensors, save_safetensors
from streamgen.checkpoints.text_names import text_tensors
from streamgen.embedded_text import EmbeddedText, EmbeddedTextConfig
from streamgen.errors import UserError
from streamgen.transformer import CausalWanModel
from streamgen.umt5 import UMT5TextEncoder, settings_of
from streamgen.weights import WEIGHTS_FILE, load_component, replacing, write_component, write_json

LAYOUTS = ("model", "original", "diffusers")
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to convert, and how."""

    source: Path
    target: Path
    to: str = "model"
    """A name of LAYOUTS."""
    preset: str | None = None
    base: Path | None = None
    """A folder with the VAE, the text encoder and the tokenizer, where the source has none."""
    loras: tuple[tuple[Path, float], ...] = ()
    network: str | None = None
    dtype: str = "keep"
    embeddings: Path | None = None
    """A file of prompts encoded beforehand, in place of the text encoder."""
    height: int | None = None
    width: int | None = None
    trust_pickle: bool = False


def convert(plan: Plan) -> list[str]:
    """Write what the plan says, whole or not at all -> lines to tell the user."""
    if plan.to not in LAYOUTS:
        raise UserError(f"--to {plan.to!r}: must be one of {', '.join(LAYOUTS)}")
    if plan.dtype not in DTYPES:
        raise UserError(f"--dtype {plan.dtype!r}: must be one of {', '.join(DTYPES)}")
    if plan.target.exists() and (not plan.target.is_dir() or any(plan.target.iterdir())):
        raise UserError(f"{plan.target} exists and is not empty; name a new one, or remove it first")
    if plan.to != "model":
        return _write_layout(plan, _opened(plan, _parts(plan)))
    parts = _parts(plan)
    weights = _opened(plan, parts)
    if plan.base is not None:
        parts = parts.filled(locate(plan.base, trust_pickle=plan.trust_pickle))
    if plan.embeddings is not None:
        parts = replace(parts, text=plan.embeddings, tokenizer=plan.embeddings)
    return _write_model(plan, complete(parts), weights)


def _parts(plan: Plan) -> Parts:
    if plan.source.is_dir() and is_ours(plan.source):  # back to a public layout
        if plan.to == "model":
            raise UserError(f"{plan.source} is a model folder already; --to original | diffusers writes others")
        return locate(_component_file(plan.source / "transformer"))
    parts = locate(plan.source, trust_pickle=plan.trust_pickle)
    if parts.transformer is None:
        raise UserError(f"{plan.source} holds no transformer; name its file or the folder that has it")
    return parts


def _component_file(folder: Path) -> Path:
    values, _ = load_component(folder)
    if values.get("_class_name") != CausalWanModel.__name__ or values.get("place_grid") is not None:
        raise UserError(f"{folder}: this model is not built as Wan's are, so that others cannot read it")
    index = folder / f"{WEIGHTS_FILE}.index.json"
    return index if index.is_file() else folder / WEIGHTS_FILE


def _opened(plan: Plan, parts: Parts) -> Weights:
    """The transformer: the set that was asked for, else the one that the preset's authors run."""
    assert parts.transformer is not None
    network = plan.network or preferred_network(parts.transformer, plan.preset)
    loras = plan.loras
    weights = open_transformer(parts.transformer, network=network, loras=loras, trust_pickle=plan.trust_pickle)
    preset, _ = choose_preset(plan.preset, weights)
    if plan.network is None and network is None:
        network = preferred_network(parts.transformer, preset.name)
    if not loras and preset.lora and parts.loras:
        loras = tuple((path, 1.0) for path in parts.loras)
    if network != weights.network or loras != plan.loras:
        weights = open_transformer(parts.transformer, network=network, loras=loras, trust_pickle=plan.trust_pickle)
    return replace(weights, tensors=weights.tensors.cast(DTYPES[plan.dtype]))


# The public layouts: a transformer alone.


def _write_layout(plan: Plan, weights: Weights) -> list[str]:
    if weights.config.prediction != "flow" or weights.config.pooled_text:
        raise UserError(f"{plan.source}: this model is not built as Wan's are, others cannot read it")
    if plan.to == "original":
        tensors, settings = weights.tensors, original_settings(weights.config)
    else:
        tensors, settings = diffusers_tensors(weights.tensors), diffusers_settings(weights.config)
    if plan.target.suffix == ".safetensors":
        with replacing(plan.target) as temporary:
            save_safetensors(temporary, tensors)
    else:
        with _whole_folder(plan.target) as folder:
            write_component(folder, settings, tensors)
    return [_summary(plan, weights)]


def diffusers_tensors(tensors: LazyTensors) -> LazyTensors:
    """Original names -> diffusers'."""
    return LazyTensors({to_diffusers(name) or name: entry for name, entry in tensors.entries.items()})


def _summary(plan: Plan, weights: Weights) -> str:
    size = sum(entry.nbytes for entry in weights.tensors.entries.values()) / 1e9
    taken = f" ({weights.network})" if weights.network else ""
    added = f", {weights.loras} LoRA merged" if weights.loras else ""
    return f"{plan.target}: {plan.to} from {weights.path}{taken}, {weights.layout} names{added}, {size:.2f} GB"


# A model folder.


def _write_model(plan: Plan, parts: Parts, weights: Weights) -> list[str]:
    assert parts.text is not None and parts.tokenizer is not None
    codec_file = parts.vae or parts.small_decoder
    assert codec_file is not None
    preset, notes = choose_preset(plan.preset, weights)
    if plan.embeddings is not None:
        _check_negative(plan.embeddings, preset)
    geometry = preset.geometry(weights.config, height=plan.height, width=plan.width)
    with _whole_folder(plan.target) as folder:
        codec = write_codec(codec_file, folder / "codec", geometry, trust_pickle=plan.trust_pickle)
        text_class = _write_text(plan, parts, weights.config.text_len, folder / "text")
        write_component(
            folder / "transformer",
            {"_class_name": CausalWanModel.__name__, **asdict(weights.config)},
            weights.tensors,
        )
        scheduler = {"_preset": preset.name, **asdict(preset.scheduler_config())}
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        index: dict[str, Any] = {
            "_class_name": OUR_CLASS,
            "transformer": [CausalWanModel.__module__, CausalWanModel.__name__],
            "codec": codec,
            "text": [text_class.__module__, text_class.__name__],
            "geometry": asdict(geometry),
        }
        write_json(folder / "model_index.json", index)
        (folder / "README.md").write_text(_card(preset.about, weights, notes))
    return [*notes, _summary(plan, weights)]


def _check_negative(embeddings: Path, preset: Preset) -> None:
    """Guidance asks for the negative prompt in every stream."""
    card = preset.scheduler_config()
    if card.guidance == 1 or not card.negative_prompt:
        return
    sizes = _sizes_of(embeddings)
    prompts = EmbeddedText(EmbeddedTextConfig(file=str(embeddings), text_len=sizes[0], text_dim=sizes[1])).prompts
    if card.negative_prompt not in prompts:
        raise UserError(
            f"preset {preset.name} has a guidance of {card.guidance:g}, and {embeddings} no row for its negative "
            f"prompt {card.negative_prompt[:16]!r}... (configs/preset/{preset.name}.yaml): encode that as well"
        )


def _sizes_of(embeddings: Path) -> tuple[int, int]:
    """(rows, width) of each prompt in a file."""
    shape = open_safetensors(embeddings).shapes.get("embeddings")
    if shape is None or len(shape) != 3:
        raise UserError(f"{embeddings} has no embeddings [prompts, rows, width]")
    return shape[1], shape[2]


def _write_text(plan: Plan, parts: Parts, text_len: int, folder: Path) -> type:
    """The text part of a model folder: safetensors by transformers' names, and the tokenizer."""
    assert parts.text is not None and parts.tokenizer is not None
    folder.mkdir(parents=True)
    if plan.embeddings is not None:
        name = f"prompts{plan.embeddings.suffix}"
        shutil.copyfile(plan.embeddings, folder / name)
        rows, width = _sizes_of(plan.embeddings)
        config = EmbeddedTextConfig(file=name, text_len=rows, text_dim=width)
        write_json(folder / "config.json", {"_class_name": EmbeddedText.__name__, **asdict(config)})
        return EmbeddedText
    settings = open_text(parts.text, parts.tokenizer, text_len=text_len, trust_pickle=plan.trust_pickle)
    network = open_checkpoint(parts.text, trust_pickle=plan.trust_pickle).choose()[1]
    text_config = settings_of(replace(settings, weights=WEIGHTS_FILE, tokenizer="tokenizer"))
    write_component(folder, text_config, text_tensors(network, str(parts.text)), most_bytes=2**62)
    shutil.copytree(parts.tokenizer, folder / "tokenizer", ignore=_only_tokenizer)
    return UMT5TextEncoder


def _only_tokenizer(folder: str, names: list[str]) -> list[str]:
    """What of a folder is no part of a tokenizer (a tokenizer may lie beside weights)."""
    keep = (".json", ".model", ".txt")
    return [name for name in names if not name.endswith(keep) or name == "model_index.json" or ".index." in name]


def _card(about: str, weights: Weights, notes: Sequence[str]) -> str:
    lines = [
        f"# {about}",
        "",
        f"Converted by `streamgen convert` from `{weights.path.name}`"
        + (f", weights `{weights.network}`" if weights.network else "")
        + f", {weights.layout} names"
        + (f", {weights.loras} LoRA merged." if weights.loras else "."),
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the target's place if the body succeeds and goes away if it does not."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rmdir()  # empty: that was checked
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
