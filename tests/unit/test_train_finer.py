"""Finer patches from coarser ones: what the three tensors become, and that training can start from such a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.transformer import CausalWanModel
from streamgen_train.finer import finer_patches
from streamgen_train.loop import train
from streamgen_train.objectives import ar
from tests.tiny_sprites import TRANSFORMER, ar_values, build_ar, save_codec, spread, train_config

COARSE = dataclasses.replace(TRANSFORMER, place_grid=(2, 2))
FINE = dataclasses.replace(TRANSFORMER, patch=(1, 1, 1), place_grid=(4, 4))


def coarse() -> CausalWanModel:
    torch.manual_seed(0)
    model = CausalWanModel(COARSE)
    spread(model)
    return model


def test_fine_weights_fit_and_the_rest_is_kept() -> None:
    held = coarse().state_dict()
    fine = finer_patches(held, FINE.patch, FINE.place_grid)
    model = CausalWanModel(FINE)
    model.load_state_dict(fine)
    changed = {name for name in held if held[name].shape != fine[name].shape}
    assert changed == {"patch_embedding.weight", "head.head.weight", "head.head.bias", "place_embedding"}
    assert all(fine[name] is held[name] for name in held.keys() - changed)


def test_tokens_of_a_flat_picture_have_the_size_that_they_had() -> None:
    """On latents that do not change over a patch, the fine embedding is the coarse one over two."""
    held = coarse().state_dict()
    fine = finer_patches(held, FINE.patch, FINE.place_grid)["patch_embedding.weight"][..., 0, 0, 0]
    assert torch.allclose(fine, held["patch_embedding.weight"].sum((2, 3, 4)) / 2)


def test_the_head_s_parts_are_averaged_channel_by_channel() -> None:
    held = coarse().state_dict()
    fine = finer_patches(held, FINE.patch, FINE.place_grid)
    parts = held["head.head.bias"].view(4, 4)  # (patch row, patch column), channel
    assert torch.allclose(fine["head.head.bias"], parts.mean(0))


def test_the_same_patch_changes_nothing_and_others_are_refused() -> None:
    held = coarse().state_dict()
    assert finer_patches(held, COARSE.patch, COARSE.place_grid) is held
    with pytest.raises(ValueError, match=r"\[1, 2, 2\] are no multiple of \[1, 3, 3\]"):
        finer_patches(held, (1, 3, 3), None)


def test_a_run_of_finer_patches_starts_from_a_coarser_one(tmp_path: Path) -> None:
    codec = save_codec(tmp_path / "codec")
    train(build_ar(codec, model=COARSE), train_config(max_steps=1), tmp_path / "coarse")
    geometry = VideoGeometry(height=32, width=32, latent_channels=4, block_frames=2, patch=(1, 1, 1))
    values = ar_values(codec, model=FINE, geometry=geometry, init_from=str(tmp_path / "coarse"))
    result = train(ar.build(ar.Config(**values)), train_config(max_steps=1), tmp_path / "fine")
    assert result.step == 1
    wrong = dataclasses.replace(FINE, patch=(1, 4, 4), place_grid=None)
    objective = ar.build(ar.Config(**(values | {"model": wrong})))
    with pytest.raises(UserError, match="cannot start this model: patches of"):
        objective.prepare(torch.device("cpu"), torch.float32)
