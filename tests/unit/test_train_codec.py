"""The codec's objective: the loss is the streamed reconstruction's, crops have edges, latents can be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgen.codec import load_codec
from streamgen.errors import UserError
from streamgen.worlds import sprites
from streamgen_train import checkpoint
from streamgen_train.loop import train
from streamgen_train.objectives import codec as objectives
from streamgen_train.objectives.codec import CodecObjective, psnr_db
from tests.runs import assert_equal_states, losses, turn
from tests.tiny_sprites import CODEC, save_codec, train_config


def build(seed: int = 0, **changes: Any) -> CodecObjective:
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "codec": CODEC,
        "clips": 4,
        "pca_clips": 12,
        "validation_clips": 2,
        "side": 32,
        "crop": 16,
    }
    return objectives.build(objectives.Config(**(values | changes)))


def prepared(**changes: Any) -> CodecObjective:
    objective = build(**changes)
    objective.prepare(torch.device("cpu"), torch.float32)
    return objective


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scramble(objective: CodecObjective) -> None:
    for parameter in objective.codec.parameters():
        torch.nn.init.normal_(parameter, std=0.03)


@torch.no_grad()
def test_loss_is_the_error_of_the_streamed_reconstruction() -> None:
    """Frame group by frame group through encode_stream and decode_stream, as a viewer gets it."""
    objective = prepared(latent_noise=0.0, clip_frames=16)
    scramble(objective)
    video = objective.batch(turn())
    loss, metrics = objective.loss(video, turn(), None)
    encoded = decoded = None
    frames = []
    for piece in video.split(4, 1):
        latents, encoded = objective.codec.encode_stream(piece, encoded)
        made, decoded = objective.codec.decode_stream(latents, decoded)
        frames.append(made)
    error = (torch.cat(frames, 1) - video).square().mean()
    assert float(torch.cat(frames, 1).abs().max()) < 1  # decode clamps, the loss does not: here it makes no difference
    assert float(loss) == pytest.approx(10 * float(error), rel=1e-5)
    assert float(metrics["psnr_db"]) == pytest.approx(float(psnr_db(error)), rel=1e-5)


@torch.no_grad()
def test_noise_on_the_latents_has_the_deviation_asked_for() -> None:
    quiet, noisy = prepared(latent_noise=0.0), prepared(latent_noise=0.5)
    video = quiet.batch(turn())
    seen: list[Tensor] = []
    noisy.codec.decode_in.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    noisy.loss(video, turn(), None)
    raw = noisy.codec.encode(video)
    assert float((seen[0].view_as(raw) - raw).std()) == pytest.approx(0.5, rel=0.1)
    assert float(quiet.loss(video, turn(), None)[0]) < float(noisy.loss(video, turn(), None)[0])


def test_psnr() -> None:
    assert float(psnr_db(torch.tensor(4.0))) == 0  # as large as the peak
    assert float(psnr_db(torch.tensor(4e-3))) == pytest.approx(30)


@torch.no_grad()
def test_training_starts_from_principal_components() -> None:
    first, again = prepared(), prepared(seed=3)
    assert torch.equal(first.codec.encode_linear.weight, again.codec.encode_linear.weight)
    assert first.validate(0, first.modules())["psnr_db"] > 16
    scramble(first)
    assert first.validate(0, first.modules())["psnr_db"] < 16


def edges(crop: Tensor) -> float:
    return float(crop.diff(dim=-1).abs().sum() + crop.diff(dim=-2).abs().sum())


def test_crops_are_on_the_grid_and_where_the_edges_are() -> None:
    objective = build(crop_candidates=400)  # sees every place
    video = sprites.render(sprites.sample_scenes(sprites.captions("train")[::600], rng()), 8, side=32)
    crops = objective._crop(video, rng())
    assert crops.shape == (len(video), 8, 3, 16, 16)
    places = [(y, x) for y in (0, 8, 16) for x in (0, 8, 16)]
    for whole, crop in zip(video, crops, strict=True):
        windows = [whole[..., y : y + 16, x : x + 16] for y, x in places]
        (index,) = [i for i, window in enumerate(windows) if torch.equal(window, crop)][:1]
        assert edges(windows[index][-1]) > 0.9 * max(edges(window[-1]) for window in windows)
    few = build(crop_candidates=1)._crop(video, rng())
    assert sum(map(edges, few[:, -1])) < sum(map(edges, crops[:, -1]))
    assert build(crop=32)._crop(video, rng()) is video


def test_batches_are_a_function_of_the_generator_and_never_held_out() -> None:
    objective = prepared()
    assert objective.batch(turn(0, 1)).shape == (4, 8, 3, 16, 16)
    assert torch.equal(objective.batch(turn(0, 1)), objective.batch(turn(9, 1)))
    assert not torch.equal(objective.batch(turn(0, 1)), objective.batch(turn(0, 2)))


def test_it_learns() -> None:
    objective = prepared()
    video = objective.batch(turn())
    optimizer = torch.optim.Adam(objective.codec.parameters(), 3e-3)
    curve = []
    for step in range(60):
        loss, _ = objective.loss(video, turn(step), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert curve[-1] < 0.5 * curve[0]


def test_resume_is_exact(tmp_path: Path) -> None:
    train(build(), train_config(max_steps=6), tmp_path / "whole")
    train(build(), train_config(max_steps=3), tmp_path / "cut")
    train(build(seed=5), train_config(max_steps=6), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    cut, whole = (checkpoint.load(checkpoint.find(tmp_path / run)) for run in ("cut", "whole"))
    assert_equal_states(cut, whole)


def test_a_decoder_can_learn_alone(tmp_path: Path) -> None:
    """The encoder's weights stay; in bf16 too, where only what is trained has a master copy."""
    folder = save_codec(tmp_path / "codec")
    before = load_codec(folder).state_dict()
    for precision in ("fp32", "bf16"):
        objective = build(train_encoder=False, init_from=str(folder))
        train(objective, train_config(max_steps=3, precision=precision), tmp_path / precision)
        after = objective.codec.state_dict()
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].to(tensor.dtype))}
        assert changed and all(name.startswith("decode_") for name in changed)
        assert {name for name in after if name.startswith("decode_")} == changed


def test_a_decoder_alone_needs_its_codec() -> None:
    with pytest.raises(UserError, match=r"needs objective\.init_from"):
        build(train_encoder=False)


def test_pictures() -> None:
    objective = prepared()
    with torch.no_grad():
        picture = objective.sample(0, objective.modules())["reconstruction"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 0
