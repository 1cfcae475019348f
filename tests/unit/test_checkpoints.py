"""Checkpoints in every wrapping load to identical tensors; damaged and foreign files are refused, nothing is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from streamgen.checkpoints.detect import open_checkpoint
from streamgen.checkpoints.loading import load_transformer, open_transformer
from streamgen.checkpoints.names import to_diffusers, to_original, unwrapped
from streamgen.checkpoints.sizes import expected_shapes, settings_beside
from streamgen.checkpoints.tensors import in_memory, open_safetensors, save_safetensors, shards
from streamgen.errors import UserError
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import INDEX_FILE, WEIGHTS_FILE, load_component, write_component
from tests.tiny_wan import config, state, transformer

SIZES = config()
FSDP = "_fsdp_wrapped_module."
CHECKPOINTED = "_checkpoint_wrapped_module."
COMPILED = "_orig_mod."


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return state(transformer())


def settings(folder: Path) -> None:
    """What the sizes of the fixtures need: their head width is not Wan's."""
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 12}))


def diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {to_diffusers(name): tensor for name, tensor in tensors.items()}
    assert None not in found
    return {str(name): tensor for name, tensor in found.items()}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def residues(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FSDP, activation checkpointing and torch.compile leave names, at several depths."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        inner = f"blocks.{parts[1]}.{FSDP}{CHECKPOINTED}" + ".".join(parts[2:]) if parts[0] == "blocks" else name
        found[f"model.{FSDP}{COMPILED}{inner}"] = tensor
    return found


def safetensors(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def pt(tree: Any, folder: Path) -> Path:
    torch.save(tree, folder / "weights.pt")
    return folder / "weights.pt"


def old_pt(tree: Any, folder: Path) -> Path:
    torch.save(tree, folder / "weights.pt", _use_new_zipfile_serialization=False)
    return folder / "weights.pt"


def sharded(tensors: dict[str, Tensor], folder: Path) -> Path:
    write_component(folder, {"num_heads": 2, "text_len": 12}, in_memory(tensors), most_bytes=400_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder / INDEX_FILE


OTHER = "another network, which must not be taken"
WRAPPINGS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "original safetensors": safetensors,
    "diffusers safetensors": lambda t, f: safetensors(diffusers_names(t), f),
    "sharded": sharded,
    "sharded diffusers": lambda t, f: sharded(diffusers_names(t), f),
    "model. safetensors": lambda t, f: safetensors(prefixed(t, "model."), f),
    "comfy": lambda t, f: safetensors(prefixed(t, "model.diffusion_model."), f),
    "flat generator safetensors": lambda t, f: safetensors(prefixed(t, "generator.model."), f),
    "bare pt": pt,
    "old pt": old_pt,
    "module. pt": lambda t, f: pt(prefixed(t, "module."), f),
    "generator": lambda t, f: pt({"generator": prefixed(t, "model.")}, f),
    "generator and critic": lambda t, f: pt({"critic": broken(t), "generator": prefixed(t, "model."), "step": 7}, f),
    "average and last": lambda t, f: pt({"generator": broken(t), "generator_ema": residues(t)}, f),
    "residues": lambda t, f: pt({"generator": residues(t)}, f),
    "state_dict": lambda t, f: pt({"state_dict": prefixed(t, "model."), "optimizer": {"lr": 0.1}}, f),
    "diffusers in a wrapper": lambda t, f: pt({"generator": prefixed(diffusers_names(t), "model.")}, f),
}


def broken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor + 1 for name, tensor in tensors.items()}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_loads_to_identical_tensors(wrapping: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    settings(tmp_path)
    path = WRAPPINGS[wrapping](tensors, tmp_path)
    model = load_transformer(open_transformer(path))
    assert model.config == SIZES
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_set_is_chosen_by_name(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    settings(tmp_path)
    path = pt({"critic": broken(tensors), "generator": prefixed(tensors, "model.")}, tmp_path)
    assert torch.equal(
        open_transformer(path, network="critic").tensors["head.head.bias"], tensors["head.head.bias"] + 1
    )
    with pytest.raises(UserError, match="has no 'generator_ema'; it holds 'critic', 'generator'"):
        open_transformer(path, network="generator_ema")
    only = pt({"critic": broken(tensors)}, tmp_path)
    with pytest.raises(UserError, match="holds 'critic' and no generator"):
        open_transformer(only)


def test_names_go_both_ways() -> None:
    for name in expected_shapes(SIZES):
        theirs = to_diffusers(name)
        assert theirs is not None and to_original(theirs) == name
    for foreign in ("blocks.0.self_attn.q.lora", "blocks.0.conv.weight", "vae.weight", "patch_embedding.scale"):
        assert to_diffusers(foreign) is None and to_original(foreign) is None


def test_names_equal_diffusers_own_map(tensors: dict[str, Tensor]) -> None:
    """diffusers has a converter for single files, written by others."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    theirs = utils.convert_wan_transformer_to_diffusers(dict(tensors))
    ours = diffusers_names(tensors)
    assert theirs.keys() == ours.keys() and all(theirs[name] is ours[name] for name in ours)


@pytest.mark.parametrize(
    ("name", "network", "inner"),
    [
        ("generator.model._fsdp_wrapped_module.blocks.3._orig_mod.ffn.0.bias", "generator", "blocks.3.ffn.0.bias"),
        ("generator_ema._fsdp_wrapped_module.model.head.head.weight", "generator_ema", "head.head.weight"),
        ("module.model.patch_embedding.weight", "", "patch_embedding.weight"),
        ("critic.generator.weight", "critic", "generator.weight"),
        ("model", "", "model"),
    ],
)
def test_wrappers_come_off(name: str, network: str, inner: str) -> None:
    assert unwrapped(name) == (network, inner)


def test_two_tensors_with_one_name_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = safetensors({**tensors, "model.head.head.bias": tensors["head.head.bias"].clone()}, tmp_path)
    with pytest.raises(UserError, match=r"are both head\.head\.bias"):
        open_checkpoint(path)


# Sizes.


@pytest.mark.parametrize(
    "sizes",
    [
        config(6, num_layers=3, ffn_dim=40, freq_dim=32),
        config(qk_norm=False, cross_attn_norm=False),
        config(num_heads=4, eps=1e-5),
        config(pooled_text=True),
        config(patch=(1, 1, 1)),
    ],
)
def test_sizes_come_from_shapes(sizes: TransformerConfig, tmp_path: Path) -> None:
    changes = {name: getattr(sizes, name) for name in sizes.__slots__}
    channels = changes.pop("in_channels")
    changes.pop("out_channels")
    path = safetensors(state(transformer(channels, **changes)), tmp_path)
    beside = {"num_attention_heads": sizes.num_heads, "text_len": sizes.text_len, "eps": sizes.eps}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    assert open_transformer(path).config == sizes


def test_without_a_config_heads_are_128_wide(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    found = open_transformer(safetensors(tensors, tmp_path)).config
    assert (found.num_heads, found.text_len) == (2, 512)
    assert settings_beside(tmp_path / "weights.safetensors") is None
    narrow = safetensors(state(transformer(dim=96)), tmp_path)
    with pytest.raises(UserError, match=r"a width of 96 is no multiple .* put a config\.json with num_heads beside it"):
        open_transformer(narrow)


# Reading and writing.


def test_a_file_is_read_and_written_to_the_bit(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8)
    source = {f"t{i}": torch.arange(6).view(2, 3).to(kind) for i, kind in enumerate(kinds)}
    source |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "flag": torch.tensor([True, False])}
    source["turned"] = torch.randn(4, 5).T
    source["large"] = torch.randn(700, 500)  # above what gets pages of its own
    save_safetensors(tmp_path / "a", in_memory(source))
    from safetensors.torch import load_file

    for found in (open_safetensors(tmp_path / "a"), load_file(tmp_path / "a")):
        assert set(found) == set(source)
        for name, tensor in source.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_shards_keep_order_and_limit(tmp_path: Path) -> None:
    source = in_memory({f"t{i}": torch.full((10,), float(i)) for i in range(7)})
    groups = list(shards(source, 90))
    assert [list(group) for group in groups] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"], ["t6"]]
    assert [list(group) for group in shards(source, 1)] == [[f"t{i}"] for i in range(7)]
    write_component(tmp_path, {"a": 1}, source, most_bytes=90)
    config_found, found = load_component(tmp_path)
    assert config_found == {"a": 1} and list(found) == list(source)
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_one_tensor_at_a_time(tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is loaded, never more than one tensor is alive."""
    import weakref

    from streamgen.checkpoints import tensors as module

    alive: list[Any] = []
    read = module._read

    def counted(*arguments: Any) -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = read(*arguments)
        alive.append(weakref.ref(tensor))
        return tensor

    settings(tmp_path)
    path = sharded(tensors, tmp_path)
    monkeypatch.setattr(module, "_read", counted)
    model = load_transformer(open_transformer(path), dtype=torch.bfloat16)
    assert len(alive) == len(tensors)
    assert all(torch.equal(model.state_dict()[name], tensor.bfloat16()) for name, tensor in tensors.items())


# Refusals.


class Bomb:
    """A pickle that runs a command when it is read without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("save", [pt, old_pt, lambda tree, folder: _plain_pickle(tree, folder)])
def test_a_bomb_is_refused_and_does_not_go_off(save: Any, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    settings(tmp_path)
    path = save({"generator": prefixed(tensors, "model."), "extra": Bomb(tmp_path / "mark")}, tmp_path)
    with pytest.raises(UserError, match=r"asks to run code while it is read .*system.* --trust-pickle"):
        open_transformer(path)
    assert not (tmp_path / "mark").exists()
    if save is not pt:
        return
    assert torch.equal(open_transformer(path, trust_pickle=True).tensors["head.head.bias"], tensors["head.head.bias"])
    assert (tmp_path / "mark").exists()  # the user was told


def _plain_pickle(tree: Any, folder: Path) -> Path:
    (folder / "weights.pt").write_bytes(pickle.dumps({"extra": tree["extra"]}, protocol=2))
    return folder / "weights.pt"


@pytest.mark.parametrize("save", [safetensors, pt, old_pt])
def test_truncated_files_are_refused(save: Any, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(tensors, tmp_path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"weights.* (truncated|is no checkpoint|asks to run)"):
            open_transformer(path)


def test_renamed_tensors_are_listed_with_the_nearest_name(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    settings(tmp_path)
    renamed = {name.replace("ffn.2", "ffn.three"): tensor for name, tensor in tensors.items()}
    with pytest.raises(
        UserError,
        match=r"4 of \d+ tensors are missing: blocks\.\*\.ffn\.2\.weight x2, .*; 4 tensors belong to another model: "
        r"blocks\.\*\.ffn\.three\..* \(nearest known to 'blocks\.0\.ffn\.three\.bias': blocks\.0\.ffn\.2\.bias\)",
    ):
        open_transformer(safetensors(renamed, tmp_path))


def test_a_wrong_shape_names_both(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    settings(tmp_path)
    wrong = {**tensors, "blocks.1.self_attn.k.weight": torch.zeros(256, 255)}
    with pytest.raises(UserError, match=r"blocks\.1\.self_attn\.k\.weight is \[256, 255\], .* \[256, 256\]"):
        open_transformer(safetensors(wrong, tmp_path))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("img_emb.proj.0.weight", "CLIP image encoder .img_emb"),
        ("blocks.0.cross_attn.k_img.weight", "CLIP image encoder .*first block"),
        ("vace_blocks.0.before_proj.weight", "control branch"),
        ("blocks.0.self_attn.q.scale_weight", "quantised weights"),
    ],
)
def test_models_that_are_not_served_are_refused_with_words(
    extra: str, message: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_transformer(safetensors({**tensors, extra: torch.zeros(1)}, tmp_path))


def test_image_channels_are_refused(tmp_path: Path) -> None:
    model = transformer()
    model.patch_embedding = nn.Conv3d(9, 256, (1, 2, 2), (1, 2, 2))
    with pytest.raises(UserError, match="takes 9 channels and makes 4: it wants an image"):
        settings(tmp_path)
        open_transformer(safetensors(state(model), tmp_path))


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its tensors \(weight\) belong to no model"):
        open_transformer(safetensors({"weight": torch.zeros(1)}, tmp_path))
    with pytest.raises(UserError, match="holds a text encoder, no transformer"):
        name = "encoder.block.0.layer.0.SelfAttention.q.weight"
        open_transformer(safetensors({name: torch.zeros(1)}, tmp_path))
    with pytest.raises(UserError, match="holds a list; a checkpoint is a mapping"):
        open_transformer(pt([torch.zeros(1)], tmp_path))
    with pytest.raises(UserError, match="holds no tensors; its keys are step"):
        open_transformer(pt({"step": 3}, tmp_path))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="no checkpoint file: known are"):
        open_transformer(tmp_path / "weights.gguf")


def test_an_index_cannot_reach_out_of_its_folder(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    index = sharded(tensors, tmp_path)
    values = json.loads(index.read_text())
    values["weight_map"]["head.head.bias"] = "../secret.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="files of an index lie beside it"):
        open_transformer(index)
    values["weight_map"]["head.head.bias"] = "absent.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"absent\.safetensors is missing"):
        open_transformer(index)
    index.write_text("{}")
    with pytest.raises(UserError, match="no index of safetensors files"):
        open_transformer(index)


def test_loading_a_model_brings_neither_diffusers_nor_transformers(run_python: Any) -> None:
    program = """
import sys
from streamgen.checkpoints import convert, loading
from streamgen.pipeline import StreamPipeline
StreamPipeline.from_pretrained("sprites", dtype="fp32")
print(*[name for name in ("diffusers", "transformers", "huggingface_hub", "ftfy") if name in sys.modules])
"""
    done = run_python("-c", program)
    assert (done.returncode, done.stdout.split()) == (0, []), done


def test_weights_of_a_model_folder_are_original(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """A transformer folder of this project is itself a checkpoint."""
    from dataclasses import asdict

    write_component(tmp_path, asdict(SIZES), in_memory(tensors))
    assert open_transformer(tmp_path / WEIGHTS_FILE).config == SIZES
