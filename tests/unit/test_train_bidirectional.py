"""The bidirectional teacher: its loss written out, what its clips hold, and the way from and to causal models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamgen.errors import UserError
from streamgen.rope import rope_table
from streamgen_train.checkpoint import load_modules
from streamgen_train.loop import train
from streamgen_train.objectives import bidirectional
from streamgen_train.objectives.bidirectional import BidirectionalObjective, sample_clips
from tests.runs import losses, turn
from tests.tiny_sprites import GEOMETRY, ar_values, build_ar, save_codec, spread, train_config


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec"))


def build(codec: Path, seed: int = 0, **changes: Any) -> BidirectionalObjective:
    torch.manual_seed(seed)
    objective = bidirectional.build(bidirectional.Config(**ar_values(codec, **changes)))
    spread(*objective.modules().values())
    objective.prepare(torch.device("cpu"), torch.float32)
    return objective


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["single", "story", "gap"])
def test_loss_written_out(codec: Path, kind: Any) -> None:
    """One noise level per clip, the whole clip in one forward without a mask, each block under its own prompt."""
    objective = build(codec)
    batch = objective.make_batch(kind, 3, rng())
    blocks = {"single": 1, "story": 4, "gap": 3}[kind]
    assert batch.x0_BFCHW.shape[1] == 2 * blocks and batch.scored_BG.tolist() == [[1.0] * blocks] * 3
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, turn(), None)
    assert metrics.keys() == {f"mse_{kind}", "mse_first"}

    torch.manual_seed(5)
    sigma_B1 = objective.draw_sigma(batch.scored_BG[:, :1])
    eps = torch.randn_like(batch.x0_BFCHW)
    model, total = objective.model, 0.0
    for row in range(3):
        sigma, x0 = float(sigma_B1[row]), batch.x0_BFCHW[row : row + 1]
        x_t = (1 - sigma) * x0 + sigma * eps[row]
        text = model.encode_text(objective.text.encode_ids(batch.ids_BGL[row : row + 1]))
        table = rope_table(range(2 * blocks), GEOMETRY.grid_height, GEOMETRY.grid_width, 12)
        flow = model(x_t, torch.full((1, 1), 1000 * sigma), text, rope=table)
        total += float((x_t - sigma * flow - x0).detach().square().mean()) / max(sigma, 0.3) ** 2
    assert float(loss.detach()) == pytest.approx(total / 3, rel=1e-4)


def test_every_frame_sees_every_frame_and_every_prompt_counts(codec: Path) -> None:
    objective = build(codec)
    batch = objective.make_batch("story", 2, rng())
    x_t, sigma_BF = torch.randn_like(batch.x0_BFCHW).requires_grad_(True), torch.rand(2, 8)
    x0 = objective.predict_x0(objective.modules(), batch, x_t, sigma_BF)
    x0[:, 0].square().sum().backward()
    assert x_t.grad is not None and (x_t.grad.flatten(2).abs().sum((0, 2)) > 0).all()
    for block in range(4):
        ids = batch.ids_BGL.clone()
        ids[:, block] = -1
        changed = (objective.predict_x0(objective.modules(), batch, x_t, sigma_BF, ids) - x0).abs() > 1e-6
        assert changed.flatten(2).any(2).all()


def test_a_share_of_clips_has_a_level_for_each_block(codec: Path) -> None:
    objective = build(codec, own_level_share=0.25)
    batch = objective.make_batch("story", 2, rng())
    batch.scored_BG = torch.ones(1000, 4)
    sigma_BG = objective.levels(batch)
    one = (sigma_BG == sigma_BG[:, :1]).all(1)
    assert float(one.float().mean()) == pytest.approx(0.75, abs=0.05)
    assert all(len(set(row)) == 4 for row in sigma_BG[~one].tolist())
    assert torch.unique(sigma_BG[one]).numel() > 700
    batch.scored_BG = torch.ones(1000, 4)
    assert (build(codec).levels(batch).diff(dim=1) == 0).all()


@torch.no_grad()
def test_clips_of_the_kind_gap_come_from_the_middle_of_a_stream(codec: Path) -> None:
    """Their first latent frame has seen what was before it; scores of a long stream's window rely on that."""
    cut, whole = build(codec).make_batch("gap", 3, rng()), build_ar(codec)
    whole.prepare(torch.device("cpu"), torch.float32)
    full = whole.make_batch("gap", 3, rng())
    assert torch.equal(cut.x0_BFCHW, full.x0_BFCHW[:, 2:]) and torch.equal(cut.ids_BGL, full.ids_BGL[:, 1:])


@torch.no_grad()
def test_clips_are_sampled_by_euler_steps(codec: Path) -> None:
    objective = build(codec)
    batch = objective.make_batch("story", 2, rng())
    x = noise = torch.randn_like(batch.x0_BFCHW)
    for sigma, following in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.0)):
        level = torch.full((2, 8), sigma)
        x0 = objective.predict_x0(objective.modules(), batch, x, level)
        x = x + (following - sigma) * (x - x0) / sigma
    made = sample_clips(objective.modules(), noise, batch.ids_BGL, (1.0, 0.7, 0.2))
    torch.testing.assert_close(made, x, rtol=0, atol=1e-5)


def test_it_starts_from_a_causal_run_and_a_causal_run_from_it(codec: Path, tmp_path: Path) -> None:
    train(build_ar(codec), train_config(max_steps=2), tmp_path / "ar")
    objective = build(codec, seed=3, init_from=str(tmp_path / "ar"))
    averaged = load_modules(tmp_path / "ar")
    for name, module in objective.modules().items():
        assert all(torch.equal(tensor, averaged[name][key]) for key, tensor in module.state_dict().items())
    train(objective, train_config(max_steps=2), tmp_path / "two ways")
    back = build_ar(codec, seed=4, init_from=str(tmp_path / "two ways"))
    back.prepare(torch.device("cpu"), torch.float32)
    weight = load_modules(tmp_path / "two ways")["transformer"]["head.head.weight"]
    assert torch.equal(back.model.head.head.weight, weight)


def test_runs_learn_and_resume(codec: Path, tmp_path: Path) -> None:
    options = {"own_level_share": 0.5, "single_share": 0.3}
    train(build(codec, **options), train_config(max_steps=8), tmp_path / "whole")
    train(build(codec, **options), train_config(max_steps=4), tmp_path / "cut")
    train(build(codec, **options), train_config(max_steps=8), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    train(build(codec, single_share=1.0, single_clips=8), train_config(max_steps=60), tmp_path / "learns")
    means = losses(tmp_path / "learns")
    assert np.mean(means[-10:]) < 0.8 * np.mean(means[:10])


@torch.no_grad()
def test_validation_and_pictures(codec: Path) -> None:
    objective = build(codec)
    scores = objective.validate(0, objective.modules())
    assert scores == objective.validate(7, objective.modules())
    assert set(scores) == {f"{k}_{s}" for k in ("single", "story") for s in (1.0, 0.95, 0.85, 0.6)} | {"variance"}
    picture = objective.sample(0, objective.modules())["samples"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 0


def test_it_is_no_stream(codec: Path, tmp_path: Path) -> None:
    objective = build(codec)
    with pytest.raises(UserError, match="cannot be streamed"):
        objective.export(objective.modules(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"own_level_share is 1\.5"):
        build(codec, own_level_share=1.5)
    with pytest.raises(ValueError, match="clip_blocks is 1"):
        build(codec, clip_blocks=1)
