"""LoRA (arXiv 2106.09685) by peft: modules whose weights W stay, and learn W + alpha / rank B A in two thin matrices.

Checkpoints hold the matrices; the frozen weights are written once for a run, beside its checkpoints, and every
checkpoint names them by a sum of their bits. Whoever asks for weights (`load_modules`) gets them merged: peft is needed
where LoRA is trained and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen.parallel.tensors import whole
from streamgen_train.config import LoraConfig, nearest
from streamgen_train.objective import Modules

BLOCKS, ADAPTER = "blocks", "default"  # where targets are looked for; peft's name of the only adapter
BASE_LAYER = ".base_layer."


def adapt(modules: Modules, configs: Mapping[str, LoraConfig], seed: int) -> None:
    """Put adapters on the named modules, in place; everything else of those modules is frozen from now on."""
    for key, config in configs.items():
        if key not in modules:
            raise UserError(
                f"train.lora names the module {key!r}{nearest(key, modules)} Modules that train: {', '.join(modules)}"
            )
        _inject(modules[key], config, find_targets(modules[key], key, config), seed)


def settings_of(configs: Mapping[str, LoraConfig]) -> dict[str, dict[str, Any]]:
    """As a checkpoint keeps them."""
    return {
        key: {"rank": c.rank, "alpha": c.alpha, "targets": None if c.targets is None else list(c.targets)}
        for key, c in configs.items()
    }


def find_targets(module: nn.Module, key: str, config: LoraConfig) -> list[str]:
    """Full names of the Linear layers inside blocks that the targets name: all by default, else those whose name
    within the block is a target, begins with it or ends with it (`self_attn`, `ffn.0`, `q`).
    """
    within = {
        f"{BLOCKS}.{name}": name.partition(".")[2]
        for name, part in getattr(module, BLOCKS, nn.Module()).named_modules()
        if isinstance(part, nn.Linear)
    }
    if not within:
        raise UserError(f"train.lora.{key}: this module has no Linear layers in blocks")
    if config.targets is None:
        return list(within)
    allowed = dict.fromkeys(within.values())
    for target in config.targets:
        if not any(_names(target, name) for name in allowed):
            raise UserError(
                f"train.lora.{key}.targets has {target!r}{nearest(target, allowed)} "
                f"Layers in a block: {', '.join(allowed)}"
            )
    return [full for full, name in within.items() if any(_names(target, name) for target in config.targets)]


def _names(target: str, name: str) -> bool:
    return f"{name}.".startswith(f"{target}.") or f".{name}".endswith(f".{target}")


def _inject(module: nn.Module, config: LoraConfig, targets: list[str], seed: int) -> None:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"train.lora needs the package peft ({error}): pip install 'streamgen[train]'") from error
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": targets}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), module, adapter_name=ADAPTER)


def frozen(modules: Modules, keys: Collection[str]) -> dict[str, nn.Parameter]:
    """`module.parameter` -> weights that adapted modules keep."""
    return {f"{k}.{n}": p for k in keys for n, p in modules[k].named_parameters() if not p.requires_grad}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A sum of names, shapes and bits; every process must ask when tensors are in shards."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        bits = whole(tensor.detach()).cpu().contiguous()
        digest.update(f"{name} {tuple(bits.shape)} {bits.dtype};".encode())
        digest.update(bits.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state_dict with adapters as one without: W + scale B A in fp32, under the names of the module itself."""
    found = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        stem = name.removesuffix(f"{BASE_LAYER}weight")
        if stem != name:
            down, up = (tensors[f"{stem}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            tensor = tensor.float() + scale * (up @ down)
        found[name.replace(BASE_LAYER, ".")] = tensor.float() if tensor.is_floating_point() else tensor
    return found
