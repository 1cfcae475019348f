"""LoRA in every public spelling is merged exactly: W + strength alpha / rank B A."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from streamgen.checkpoints.loading import load_transformer, open_transformer
from streamgen.checkpoints.names import to_diffusers
from streamgen.errors import UserError
from tests.tiny_wan import state, transformer

LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0", "head.head")
RANK = 3
Pairs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return state(transformer())


@pytest.fixture(scope="module")
def pairs(tensors: dict[str, Tensor]) -> Pairs:
    """Layer -> (down [r, in], up [out, r])."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in LAYERS:
        rows, columns = tensors[f"{layer}.weight"].shape
        down = torch.randn(RANK, columns, generator=generator)
        found[layer] = (down, torch.randn(rows, RANK, generator=generator))
    return found


@pytest.fixture
def base(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "weights.safetensors")
    return tmp_path / "base" / "weights.safetensors"


def theirs(layer: str) -> str:
    return str(to_diffusers(f"{layer}.weight")).removesuffix(".weight")


def peft(pairs: Pairs, folder: Path) -> tuple[Path, float]:
    tree = {}
    for layer, (down, up) in pairs.items():
        tree[f"base_model.model.{layer}.lora_A.weight"] = down
        tree[f"base_model.model.{layer}.lora_B.weight"] = up
    save_file(tree, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 12}))
    return folder / "adapter_model.safetensors", 12 / RANK


def longlive(pairs: Pairs, folder: Path) -> tuple[Path, float]:
    """A .pt with `generator_lora` and a critic's, peft's names with the model's own prefix and the adapter's name."""
    tree: dict[str, dict[str, Tensor]] = {"generator_lora": {}, "critic_lora": {}}
    for layer, (down, up) in pairs.items():
        name = f"base_model.model.model.{layer}"
        tree["generator_lora"] |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
        tree["critic_lora"] |= {f"{name}.lora_A.default.weight": -down, f"{name}.lora_B.default.weight": up}
    torch.save(tree, folder / "lora.pt")
    return folder / "lora.pt", 1.0


def kohya(pairs: Pairs, folder: Path) -> tuple[Path, float]:
    tree = {}
    for layer, (down, up) in pairs.items():
        name = "lora_unet_" + layer.replace(".", "_")
        tree |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    save_file(tree, folder / "kohya.safetensors")
    return folder / "kohya.safetensors", 1.5 / RANK


def kohya_diffusers(pairs: Pairs, folder: Path) -> tuple[Path, float]:
    tree = {}
    for layer, (down, up) in pairs.items():
        name = "lora_unet_" + theirs(layer).replace(".", "_")
        tree |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(tree, folder / "kohya2.safetensors")
    return folder / "kohya2.safetensors", 1.0


def diffusers(pairs: Pairs, folder: Path) -> tuple[Path, float]:
    tree = {}
    for layer, (down, up) in pairs.items():
        tree |= {
            f"transformer.{theirs(layer)}.lora_A.weight": down,
            f"transformer.{theirs(layer)}.lora_B.weight": up,
        }
    save_file(tree, folder / "diffusers.safetensors")
    return folder / "diffusers.safetensors", 1.0


def comfy(pairs: Pairs, folder: Path) -> tuple[Path, float]:
    tree = {}
    for layer, (down, up) in pairs.items():
        tree |= {f"diffusion_model.{layer}.lora_down.weight": down, f"diffusion_model.{layer}.lora_up.weight": up}
    save_file(tree, folder / "comfy.safetensors")
    return folder / "comfy.safetensors", 1.0


SPELLINGS: list[Callable[[Pairs, Path], tuple[Path, float]]] = [
    peft,
    longlive,
    kohya,
    kohya_diffusers,
    diffusers,
    comfy,
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_it_is_merged_exactly(
    spelling: Callable[[Pairs, Path], tuple[Path, float]],
    strength: float,
    pairs: Pairs,
    base: Path,
    tensors: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    path, scale = spelling(pairs, tmp_path)
    weights = open_transformer(base, loras=[(path, strength)])
    assert weights.loras == 1
    found = load_transformer(weights).state_dict()
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        wanted = tensor
        if layer in pairs and name.endswith(".weight"):
            down, up = pairs[layer]
            wanted = tensor + strength * scale * (up @ down)
            assert (wanted - tensor).abs().max() > 0.1
        assert torch.allclose(found[name], wanted, atol=1e-6), name


def test_several_add_up_and_the_dtype_stays(pairs: Pairs, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "base.safetensors")
    path, _ = comfy(pairs, tmp_path)
    weights = open_transformer(tmp_path / "base.safetensors", loras=[(path, 1.0), (path, -1.0)])
    found = weights.tensors["head.head.weight"]
    assert found.dtype == torch.bfloat16
    assert (found.float() - tensors["head.head.weight"]).abs().max() < 0.1


def test_whole_differences(base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """ComfyUI's .diff and .diff_b, beside ordinary pairs."""
    tree = {
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.zeros(1, 256),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.zeros(48, 1),
        "diffusion_model.blocks.0.norm3.diff": torch.full((256,), 0.5),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.full((48,), 0.25),
    }
    save_file(tree, tmp_path / "diff.safetensors")
    found = open_transformer(base, loras=[(tmp_path / "diff.safetensors", 2.0)]).tensors
    assert torch.allclose(found["blocks.0.norm3.weight"], tensors["blocks.0.norm3.weight"] + 1.0)
    assert torch.allclose(found["blocks.0.ffn.0.bias"], tensors["blocks.0.ffn.0.bias"] + 0.5)
    assert torch.equal(found["blocks.0.ffn.0.weight"], tensors["blocks.0.ffn.0.weight"])


def test_what_does_not_fit_is_named(base: Path, pairs: Pairs, tmp_path: Path) -> None:
    path, _ = comfy(pairs, tmp_path)
    with pytest.raises(UserError, match="holds a transformer, no LoRA"):
        open_transformer(base, loras=[(base, 1.0)])
    with pytest.raises(UserError, match="holds a lora, no transformer"):
        open_transformer(path)
    down, up = pairs["head.head"]
    wide = {"blocks.0.ffn.0.lora_down.weight": torch.zeros(2, 255), "blocks.0.ffn.0.lora_up.weight": torch.zeros(48, 2)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0 is \[48, 256\], its LoRA is \[48, 2\] x \[2, 255\]"):
        open_transformer(base, loras=[(tmp_path / "wide.safetensors", 1.0)])
    save_file({"head.head.lora_down.weight": down}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"head\.head has one of its two matrices only"):
        open_transformer(base, loras=[(tmp_path / "half.safetensors", 1.0)])
    dora = {"head.head.dora_scale": torch.ones(64, 1), "head.head.lora_down.weight": down.clone()}
    save_file({**dora, "head.head.lora_up.weight": up.clone()}, tmp_path / "dora.safetensors")
    with pytest.raises(UserError, match=r"is a DoRA \(head\.head\.dora_scale\), which is not merged here"):
        open_transformer(base, loras=[(tmp_path / "dora.safetensors", 1.0)])
    foreign = {"blocks.7.ffn.0.lora_down.weight": down.clone(), "blocks.7.ffn.0.lora_up.weight": up.clone()}
    save_file(
        {**foreign, "head.head.lora_down.weight": down, "head.head.lora_up.weight": up}, tmp_path / "f.safetensors"
    )
    with pytest.raises(UserError, match=r"2 tensors belong to another model: blocks\.\*\.ffn\.0\.lora"):
        open_transformer(base, loras=[(tmp_path / "f.safetensors", 1.0)])
