"""Autoregressive flow matching: its loss against the rollout written out, its prompts, golden losses, exact resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgen import flow
from streamgen.cache import CacheSpec, KVCache
from streamgen.errors import UserError
from streamgen_train import checkpoint
from streamgen_train.clips import Kind, make_clips
from streamgen_train.loop import train
from streamgen_train.objectives.ar import ArObjective
from streamgen_train.objectives.video import Batch, drop_words, recached
from tests.runs import assert_equal_states, assert_golden, curve, losses, turn
from tests.tiny_sprites import GEOMETRY, build_ar, save_codec, train_config

KINDS: tuple[Kind, ...] = ("single", "story", "gap")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec"))


def prepared(codec: Path, **changes: Any) -> ArObjective:
    objective = build_ar(codec, **changes)
    objective.prepare(torch.device("cpu"), torch.float32)
    return objective


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def streamed_x0(objective: ArObjective, batch: Batch, x_t: Tensor, sigma_BG: Tensor) -> Tensor:
    """x0 of every noisy block, made as a stream makes it: alone, after the clean blocks before it were committed."""
    config, model = objective.config, objective.model
    spec = CacheSpec(
        num_layers=config.model.num_layers,
        num_heads=config.model.num_heads,
        head_dim=config.model.head_dim,
        grid_height=GEOMETRY.grid_height,
        grid_width=GEOMETRY.grid_width,
        window_frames=config.window_frames,
        sink_frames=config.sink_frames,
        policy="window",
    )
    cache, made = KVCache(spec, batch=len(x_t)), []
    for b in range(sigma_BG.shape[1]):
        frames = slice(GEOMETRY.block_start(b), GEOMETRY.block_start(b) + GEOMETRY.block_size(b))
        noisy_text = model.encode_text(objective.text.encode_ids(batch.ids_BGL[:, b : b + 1]))
        clean_text = model.encode_text(objective.text.encode_ids(batch.clean_ids_BGL[:, b : b + 1]))
        block, sigma = cache.begin(frames.start, GEOMETRY.block_size(b)), sigma_BG[:, b : b + 1]
        out = model(x_t[:, frames], 1000 * sigma, noisy_text, cache=block)
        made.append(flow.to_x0(out, x_t[:, frames], sigma, config.model.prediction))
        model(batch.x0_BFCHW[:, frames], torch.zeros_like(sigma), clean_text, cache=block)
        cache.commit(block)
    return torch.cat(made, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_frames": 6},  # the second block is evicted from the fourth one's context
        {"window_frames": 5, "sink_frames": 1, "attention_backend": "math"},
    ],
)
def test_loss_equals_the_stream_written_out(codec: Path, kind: Kind, changes: dict) -> None:
    """Teacher forcing trains what streaming computes: own noise, own prompt, clean past, within window and sink."""
    objective = prepared(codec, **changes)
    batch = objective.make_batch(kind, 3, rng())
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, turn(), None)
    assert loss.requires_grad

    torch.manual_seed(5)
    sigma_BG = objective.draw_sigma(batch.scored_BG)
    eps = torch.randn_like(batch.x0_BFCHW)
    sigma_BF = sigma_BG.repeat_interleave(2, 1)
    level = sigma_BF[..., None, None, None]
    x_t = (1 - level) * batch.x0_BFCHW + level * eps
    x0 = streamed_x0(objective, batch, x_t, sigma_BG)
    trained = objective.predict_x0(objective.modules(), batch, x_t, sigma_BF)
    torch.testing.assert_close(trained, x0, rtol=1e-4, atol=1e-5)
    total, count = 0.0, 0
    for row in range(3):
        for block in range(sigma_BG.shape[1]):
            for frame in (2 * block, 2 * block + 1):
                count += 1
                if kind == "gap" and block == 1:
                    continue
                error = float((x0[row, frame] - batch.x0_BFCHW[row, frame]).square().mean())
                total += error / max(float(sigma_BG[row, block]), 0.3) ** 2
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)
    assert metrics.keys() == {f"mse_{kind}", "mse_first"}


def test_prediction_of_x0_trains_the_same_rollout(codec: Path) -> None:
    """With an embedding of places, as the shipped model has."""
    model = dataclasses.replace(build_ar(codec).config.model, prediction="x0", place_grid=(2, 2))
    objective = prepared(codec, model=model)
    batch = objective.make_batch("story", 2, rng())
    x_t, sigma_BG = torch.randn_like(batch.x0_BFCHW), torch.rand(2, 4)
    trained = objective.predict_x0(objective.modules(), batch, x_t, sigma_BG.repeat_interleave(2, 1))
    torch.testing.assert_close(trained, streamed_x0(objective, batch, x_t, sigma_BG), rtol=1e-4, atol=1e-5)


def test_the_weighted_x0_loss_is_the_flow_loss_above_the_floor(codec: Path) -> None:
    objective = prepared(codec, shifts=(1e6,))  # sigma 1 everywhere
    batch = objective.make_batch("single", 4, rng())
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, turn(), None)
    assert float(loss.detach()) == pytest.approx(float(metrics["mse_single"]), rel=1e-3)


def test_noise_levels_are_drawn_for_each_block(codec: Path) -> None:
    """Uniform u, warped by one of the shifts: the median of u warped by 4 is 0.8."""
    like = torch.zeros(4000, 3)
    sigma = build_ar(codec, shifts=(4.0,)).draw_sigma(like)
    assert sigma.shape == like.shape and float(sigma.min()) >= 0 and float(sigma.max()) < 1
    assert torch.unique(sigma).numel() > 11_000
    assert float(sigma.median()) == pytest.approx(0.8, abs=0.01)
    u = torch.linspace(0, 1, 12_000)
    warped = 4 * u / (1 + 3 * u)
    torch.testing.assert_close(sigma.flatten().sort().values, warped, rtol=0, atol=0.03)
    mixed = build_ar(codec, shifts=(1.0, 1e9)).draw_sigma(like)
    assert float((mixed > 0.9999).float().mean()) == pytest.approx(0.5, abs=0.03)  # half are all noise
    assert float(mixed[mixed < 0.9999].mean()) == pytest.approx(0.5, abs=0.02)  # half are uniform


# Batches.


@pytest.mark.parametrize("kind", KINDS)
def test_batches(codec: Path, kind: Kind) -> None:
    objective = prepared(codec, text_drop=0.0, word_drop=0.0)
    batch = objective.make_batch(kind, 3, rng())
    blocks = 1 if kind == "single" else 4
    assert batch.kind == kind and batch.x0_BFCHW.shape == (3, 2 * blocks, 4, 4, 4)
    assert batch.ids_BGL.shape == batch.clean_ids_BGL.shape == (3, blocks, 8)
    assert batch.scored_BG.tolist() == [[1.0] if kind == "single" else [1.0, float(kind != "gap"), 1.0, 1.0]] * 3
    clips = make_clips(kind, 3, 4, GEOMETRY, rng(), 0.5)
    for row, captions in enumerate(clips.captions):
        assert torch.equal(batch.ids_BGL[row], objective.text.ids([caption.text for caption in captions]))


@torch.no_grad()
def test_the_first_latent_after_a_gap_has_seen_the_frames_before_it(codec: Path) -> None:
    """As in a stream, where the codec's state goes on; and nothing of the sink, which is long ago."""
    objective = prepared(codec)
    clips = make_clips("gap", 2, 4, GEOMETRY, rng(), 0.5)
    latents = objective.encode(clips)
    assert objective.codec is not None and latents.shape[1] == 8
    _, state = objective.codec.encode_stream(clips.video[:, 8:12], None)
    expected, _ = objective.codec.encode_stream(clips.video[:, 12:], state)
    torch.testing.assert_close(latents[:, 2:], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(latents[:, :2], objective.codec.encode(clips.video[:, :8]), rtol=0, atol=1e-5)


def test_kinds_come_in_their_shares(codec: Path) -> None:
    objective = prepared(codec, single_share=0.5, gap_share=0.25, single_until=3, clips=1, single_clips=1)
    assert {objective.batch(turn(step, step)).kind for step in range(3)} == {"single"}
    kinds = [objective.batch(turn(3, seed)).kind for seed in range(120)]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in KINDS}
    assert shares == pytest.approx({"single": 0.5, "story": 0.375, "gap": 0.125}, abs=0.1)


def test_recached_shows_the_past_under_the_last_prompt_and_leaves_the_sink() -> None:
    ids = torch.arange(16).view(2, 4, 2)
    assert torch.equal(recached(ids, 0.0, rng()), ids)
    after = recached(ids, 1.0, rng())
    assert torch.equal(after[:, 0], ids[:, 0])
    assert all(torch.equal(after[:, block], ids[:, -1]) for block in (1, 2, 3))
    many = torch.arange(3).view(1, 3, 1).repeat(1000, 1, 1)
    moved = recached(many, 0.3, rng())[:, 1, 0] == 2
    assert float(moved.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(recached(many[:, :1], 1.0, rng()), many[:, :1])


def test_dropped_words() -> None:
    ids = torch.arange(8).repeat(2000, 3, 1)
    ids[:, :, 6:] = -1
    assert torch.equal(drop_words(ids, 0.0, 0.0, rng()), ids)
    assert (drop_words(ids, 1.0, 0.0, rng()) == -1).all()
    out = drop_words(ids, 0.2, 0.3, rng())
    assert ((out == ids) | (out == -1)).all() and (out[:, :, 6:] == -1).all()
    assert (out == out[:, :1]).all()  # a clip leaves the same places out in all its blocks
    left = (out[:, 0, :6] >= 0).sum(1)
    empty, whole = float((left == 0).float().mean()), float((left == 6).float().mean())
    assert empty == pytest.approx(0.2, abs=0.03)
    assert whole == pytest.approx(0.5 + 0.3 * 0.7**6, abs=0.04)
    thinned = out[(left > 0) & (left < 6), 0, :6]
    kept = float((thinned >= 0).float().mean())
    assert kept == pytest.approx((0.7 - 0.7**6) / (1 - 0.7**6 - 0.3**6), abs=0.04)


def test_dropped_prompts_are_dropped_in_the_past_too(codec: Path) -> None:
    batch = prepared(codec, text_drop=1.0).make_batch("story", 3, rng())
    assert (batch.ids_BGL == -1).all() and (batch.clean_ids_BGL == -1).all()


# Runs.


def test_golden_losses(codec: Path, tmp_path: Path) -> None:
    train(build_ar(codec), train_config(), tmp_path)
    assert_golden("ar", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(codec: Path, tmp_path: Path, precision: str) -> None:
    """Other initial weights show that all of them come from the file."""
    train(build_ar(codec), train_config(max_steps=6, precision=precision), tmp_path / "whole")
    train(build_ar(codec), train_config(max_steps=3, precision=precision), tmp_path / "cut")
    result = train(build_ar(codec, seed=9), train_config(max_steps=6, precision=precision), tmp_path / "cut")
    assert result.step == 6 and curve(tmp_path / "cut") == curve(tmp_path / "whole")
    cut, whole = (checkpoint.load(checkpoint.find(tmp_path / run)) for run in ("cut", "whole"))
    assert_equal_states(cut, whole)


def test_it_learns(codec: Path, tmp_path: Path) -> None:
    config = train_config(max_steps=60)
    train(build_ar(codec, single_share=1.0, single_clips=8), config, tmp_path)
    means = losses(tmp_path)
    assert np.mean(means[-10:]) < 0.8 * np.mean(means[:10])


def test_the_codec_is_frozen_and_both_parts_learn(codec: Path) -> None:
    objective = prepared(codec)
    loss, _ = objective.loss(objective.make_batch("story", 2, rng()), turn(), None)
    loss.backward()
    assert objective.codec is not None and all(p.grad is None for p in objective.codec.parameters())
    assert all(p.grad is not None for module in objective.modules().values() for p in module.parameters())


def test_validation_and_pictures(codec: Path) -> None:
    objective = prepared(codec)
    with torch.no_grad():
        scores = objective.validate(0, objective.modules())
        assert scores == objective.validate(7, objective.modules())
    assert set(scores) == {f"{k}_{s}" for k in ("single", "story") for s in (1.0, 0.95, 0.85, 0.6)} | {"variance"}
    picture = objective.sample(0, objective.modules())["samples"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 0


def test_weights_of_another_run_are_taken_over(codec: Path, tmp_path: Path) -> None:
    train(build_ar(codec), train_config(max_steps=2), tmp_path)
    objective = prepared(codec, seed=4, init_from=str(tmp_path))
    averaged = checkpoint.load_modules(tmp_path)
    for name, module in objective.modules().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, averaged[name][key])
    with pytest.raises(UserError, match="no checkpoint"):
        prepared(codec, init_from=str(tmp_path / "nothing"))
