"""LoRA (arXiv 2106.09685) of a transformer, merged where a weight is read: W + strength alpha / rank B A, in float32.

Read are peft's names (`base_model.model.PATH.lora_A.weight`), those of diffusers and ComfyUI (`PATH.lora_down.weight`,
with `.diff` and `.diff_b` for whole differences) and kohya's (`lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`), in
original or diffusers' layer names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from streamgen.checkpoints.detect import LORA, open_checkpoint
from streamgen.checkpoints.names import module_to_original, to_diffusers
from streamgen.checkpoints.tensors import Entry, LazyTensors
from streamgen.errors import UserError
from streamgen.weights import check_tensors

KOHYA = ("lora_unet_", "lora_transformer_")
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
PEFT_SETTINGS = "adapter_config.json"


@dataclass(slots=True)
class Pair:
    """What a LoRA says of one layer: down [r, in], up [out, r], and differences of weight and bias."""

    parts: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA file by the original names of the layers it changes."""

    path: Path
    pairs: dict[str, Pair]
    alpha: float | None
    """For all layers, where the file has none of its own (peft's settings); None: alpha = rank."""


def open_lora(path: Path, layers: Mapping[str, tuple[int, ...]], *, trust_pickle: bool = False) -> Lora:
    """Read a LoRA for a transformer with these original tensors (name -> shape). UserError where it does not fit."""
    checkpoint = open_checkpoint(path, trust_pickle=trust_pickle)
    if checkpoint.kind != LORA:
        raise UserError(f"{path} holds a {checkpoint.kind}, no LoRA")
    network = checkpoint.choose()[1]
    kohya = _kohya_table(layers)
    pairs: dict[str, Pair] = {}
    unknown = {}
    for name, entry in network.tensors.entries.items():
        layer, role = _parse(name, kohya)
        if role is None or f"{layer}.weight" not in layers:
            unknown[name] = entry.shape
        else:
            pairs.setdefault(layer, Pair()).parts[role] = entry
    if dora := next((name for name in unknown if name.endswith((".dora_scale", ".lora_magnitude_vector"))), None):
        raise UserError(f"{path} is a DoRA ({dora}), which is not merged here; take a plain LoRA")
    if unknown:
        check_tensors({}, unknown, str(path)) if not pairs else _refuse(path, unknown, layers)
    for layer, pair in pairs.items():
        _check_pair(layer, pair, layers, path)
    return Lora(path=path, pairs=pairs, alpha=_peft_alpha(path))


def _refuse(path: Path, unknown: Mapping[str, tuple[int, ...]], layers: Mapping[str, tuple[int, ...]]) -> None:
    check_tensors(layers, {**layers, **unknown}, str(path))


def _kohya_table(layers: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Layer names with underscores for dots, in either layout -> the original name."""
    table = {}
    for name in layers:
        if name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            theirs = (to_diffusers(name) or name).removesuffix(".weight")
            table[stem.replace(".", "_")] = table[theirs.replace(".", "_")] = stem
    return table


def _parse(name: str, kohya: Mapping[str, str]) -> tuple[str, str | None]:
    """(the layer's original name, what the tensor is for it)."""
    found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.weight", name)
    if found:
        stem, role = found[1], ROLES[found[2]]
    else:
        stem, _, leaf = name.rpartition(".")
        role = {"alpha": "alpha", "diff": "weight", "diff_b": "bias"}.get(leaf, "")
        if not role:
            return name, None
    for prefix in KOHYA:
        if stem.startswith(prefix):
            return kohya.get(stem.removeprefix(prefix), stem), role
    return module_to_original(stem) or stem, role


def _check_pair(layer: str, pair: Pair, layers: Mapping[str, tuple[int, ...]], path: Path) -> None:
    shape = layers[f"{layer}.weight"]
    down, up = pair.parts.get("down"), pair.parts.get("up")
    if (down is None) != (up is None):
        raise UserError(f"{path}: {layer} has one of its two matrices only")
    if down is None or up is None:
        return
    if len(shape) != 2 or down.shape != (up.shape[-1], shape[1]) or up.shape != (shape[0], down.shape[0]):
        raise UserError(
            f"{path}: {layer} is {list(shape)}, its LoRA is {list(up.shape)} x {list(down.shape)}; "
            "it was made for another model"
        )


def _peft_alpha(path: Path) -> float | None:
    file = path.parent / PEFT_SETTINGS
    if not file.is_file():
        return None
    try:
        return float(json.loads(file.read_text())["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} has no lora_alpha ({type(error).__name__}: {error})") from error


def merged(tensors: LazyTensors, lora: Lora, strength: float = 1.0) -> LazyTensors:
    """The transformer's tensors with a LoRA in them; each is computed when it is read, in its own dtype."""
    entries = dict(tensors.entries)
    for layer, pair in lora.pairs.items():
        for leaf in ("weight", "bias"):
            name = f"{layer}.{leaf}"
            if name in entries and changes(pair, leaf):
                old = entries[name]
                entries[name] = Entry(old.shape, old.dtype, partial(_merge, old, pair, leaf, lora.alpha, strength))
    return LazyTensors(entries)


def changes(pair: Pair, leaf: str) -> bool:
    """Does the LoRA change the layer's weight, or its bias (`leaf`)?"""
    return leaf in pair.parts or (leaf == "weight" and "up" in pair.parts)


def _merge(old: Entry, pair: Pair, leaf: str, alpha: float | None, strength: float) -> Tensor:
    return added(old.read().float(), pair, leaf, alpha, strength).to(old.dtype)


def added(weight: Tensor, pair: Pair, leaf: str, alpha: float | None, strength: float) -> Tensor:
    """A layer's weight or bias (`leaf`), float32, with what the LoRA adds to it; computed where the weight is."""
    if leaf == "weight" and "up" in pair.parts:
        down, up = (pair.parts[part].read().to(weight) for part in ("down", "up"))
        rank = down.shape[0]
        if "alpha" in pair.parts:
            alpha = float(pair.parts["alpha"].read())
        weight = weight + strength * (rank if alpha is None else alpha) / rank * (up @ down)
    if leaf in pair.parts:
        weight = weight + strength * pair.parts[leaf].read().to(weight)
    return weight
