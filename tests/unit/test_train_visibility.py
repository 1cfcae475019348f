"""Visibilities in training against the stream that each stands for, written out with lists of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamgen import flow
from streamgen.cache import CacheSpec, KVCache
from streamgen.errors import UserError
from streamgen.pipeline import SchedulerConfig
from streamgen.rope import apply_rope, rope_table
from streamgen.visibility import Visibility
from streamgen_train.clips import Kind
from streamgen_train.config import from_dict
from streamgen_train.loop import train
from streamgen_train.objectives import ar, df
from streamgen_train.objectives.ar import ArObjective
from streamgen_train.objectives.video import Batch
from streamgen_train.objectives.views import View, draw_joint, joint_u, joint_view, whole_windows
from tests.runs import losses, turn
from tests.tiny_sprites import GEOMETRY, ar_values, save_codec, spread, train_config

OTHERS: tuple[Visibility, ...] = ("same_level", "latest", "lagged", "joint")
SIZE = GEOMETRY.block_size(0)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec"))


def build(codec: Path, module: Any = ar, **changes: Any) -> ArObjective:
    """Clips of five blocks in a window of three, of which one is the sink: windows of two, evictions, a lag of two."""
    values = {"clip_blocks": 5, "window_frames": 6, "sink_frames": 2, "joint_blocks": 2, **changes}
    torch.manual_seed(0)
    objective = module.build(module.Config(**ar_values(codec, **values)))
    spread(*objective.modules().values())
    objective.prepare(torch.device("cpu"), torch.float32)
    return objective


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Listed:
    """Keys and values frame by frame in a dictionary, and one pass that sees some of them."""

    def __init__(self, objective: ArObjective) -> None:
        self.objective, self.held = objective, {}

    def run(self, x: Tensor, sigma_BF: Tensor, ids: Tensor, own: Sequence[Any], context: Sequence[Any]) -> Tensor:
        """The model on frames `own`, which are (copy, frame), with `context` before its eyes -> x0."""
        config, model = self.objective.config, self.objective.model
        self.own, self.context = own, context
        frames = [frame for _, frame in own]
        self.table = rope_table(frames, GEOMETRY.grid_height, GEOMETRY.grid_width, config.model.head_dim)
        text = model.encode_text(self.objective.text.encode_ids(ids))
        out = model(x, 1000 * sigma_BF, text, cache=self)
        return flow.to_x0(out, x, sigma_BF, config.model.prediction)

    def rope(self) -> tuple[Tensor, Tensor]:
        return self.table

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, tokens = apply_rope(k, *self.table), GEOMETRY.tokens_per_frame
        for place, frame_k, frame_v in zip(self.own, k.split(tokens, 2), v.split(tokens, 2), strict=True):
            self.held[layer, place] = (frame_k, frame_v)
        seen = [self.held[layer, place] for place in (*self.context, *self.own)]
        return torch.cat([k for k, _ in seen], 2), torch.cat([v for _, v in seen], 2)


def frames_of(blocks: range) -> list[int]:
    return [frame for block in blocks for frame in range(block * SIZE, (block + 1) * SIZE)]


@torch.no_grad()
def streamed_x0(objective: ArObjective, batch: Batch, x_t: Tensor, sigma_BG: Tensor, units: list[range]) -> Tensor:
    """Unit after unit of blocks that are denoised together; then each of their blocks is committed."""
    config, stream, made = objective.config, Listed(objective), []
    for unit in units:

        def past(blocks: range) -> list[int]:
            held = frames_of(range(blocks.start))
            while len(held) + len(frames_of(blocks)) > config.window_frames:
                held.pop(config.sink_frames)
            return held

        def version(frame: int, first: int) -> str:
            if batch.view.visibility in ("same_level", "latest"):
                return "noisy"
            lag = config.lag_blocks if batch.view.visibility == "lagged" else 1
            return "clean" if frame // SIZE <= first - lag else "noisy"

        frames = frames_of(unit)
        context = [(version(frame, unit.start), frame) for frame in past(unit)]
        levels = sigma_BG[:, unit.start : unit.stop].repeat_interleave(SIZE, 1)
        ids = batch.ids_BGL[:, unit.start : unit.stop]
        made.append(stream.run(x_t[:, frames], levels, ids, [("noisy", frame) for frame in frames], context))
        for block in unit:
            frames = frames_of(range(block, block + 1))
            context = [("clean", frame) for frame in past(range(block, block + 1))]
            own = [("clean", frame) for frame in frames]
            x0, ids = batch.x0_BFCHW[:, frames], batch.clean_ids_BGL[:, block : block + 1]
            stream.run(x0, torch.zeros(x0.shape[:2]), ids, own, context)
    return torch.cat(made, 1)


def viewed(objective: ArObjective, visibility: Visibility, kind: Kind = "story") -> tuple[Batch, list[range]]:
    """A batch of one visibility, and its blocks as they are denoised together."""
    batch = objective.make_batch(kind, 2, rng())
    blocks = batch.scored_BG.shape[1]
    batch.view = joint_view(blocks, 2, [1, 3, 5]) if visibility == "joint" else objective.view(visibility)
    starts = batch.view.window_starts or tuple(range(blocks))
    return batch, [range(a, b) for a, b in zip(starts, (*starts[1:], blocks), strict=True)]


@pytest.mark.parametrize("backend", ["sdpa", "math", "spans"])
@pytest.mark.parametrize("visibility", ["clean", *OTHERS])
def test_a_batch_trains_the_stream_of_its_visibility(codec: Path, visibility: Visibility, backend: str) -> None:
    objective = build(codec, attention_backend=backend)
    batch, units = viewed(objective, visibility)
    torch.manual_seed(3)
    sigma_BG = objective.levels(batch)
    x_t = flow.add_noise(batch.x0_BFCHW, torch.randn_like(batch.x0_BFCHW), objective.per_frame(sigma_BG))
    wanted = streamed_x0(objective, batch, x_t, sigma_BG, units)
    found = objective.predict_x0(objective.modules(), batch, x_t, objective.per_frame(sigma_BG))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if visibility != "clean":  # and it is not teacher forcing by another name
        batch.view = View()
        other = objective.predict_x0(objective.modules(), batch, x_t, objective.per_frame(sigma_BG))
        assert float((other - wanted)[:, SIZE:].detach().abs().max()) > 1e-3


def test_spans_are_not_compiled_for_masks_that_are_drawn(codec: Path) -> None:
    """Each would be compiled anew, up to dynamo's limit, and then none."""
    objective = build(codec, attention_backend="spans", visibility={"clean": 0.5, "joint": 0.5})
    with pytest.raises(UserError, match="spans compiles anew for every mask, and the visibility joint draws many"):
        objective.compile(objective.modules())


def test_flex_trains_the_same(codec: Path) -> None:
    objective = build(codec)
    for visibility in ("clean", "latest", "joint"):
        batch, _ = viewed(objective, visibility)
        x_t, sigma_BF = torch.randn_like(batch.x0_BFCHW), torch.rand(batch.x0_BFCHW.shape[:2])
        found = []
        for backend in ("sdpa", "flex"):
            objective.config.attention_backend = objective.model.attention_backend = backend
            objective._tables.clear()
            with torch.no_grad():  # no backward on a CPU
                found.append(objective.predict_x0(objective.modules(), batch, x_t, sigma_BF))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_a_run_on_flex_is_refused_on_a_cpu(codec: Path) -> None:
    with pytest.raises(UserError, match="no backward on a CPU"):
        build(codec, attention_backend="flex")


@torch.no_grad()
def test_same_level_equals_one_cache_for_each_level(codec: Path) -> None:
    """What serving keeps: a row of keys and values for every step, filled by that step's own passes."""
    objective = build(codec)
    batch, _ = viewed(objective, "same_level")
    model, config = objective.model, objective.config
    for sigma in (1.0, 0.8, 0.3):
        spec = CacheSpec(
            num_layers=2,
            num_heads=2,
            head_dim=12,
            grid_height=GEOMETRY.grid_height,
            grid_width=GEOMETRY.grid_width,
            window_frames=config.window_frames,
            sink_frames=config.sink_frames,
            policy="window",
        )
        cache, made = KVCache(spec, batch=2), []
        x_t = flow.add_noise(batch.x0_BFCHW, torch.randn_like(batch.x0_BFCHW), sigma)
        for b in range(5):
            block = cache.begin(b * SIZE, SIZE)
            text = model.encode_text(objective.text.encode_ids(batch.ids_BGL[:, b : b + 1]))
            made.append(model(x_t[:, b * SIZE : (b + 1) * SIZE], torch.full((2, 1), 1000 * sigma), text, cache=block))
            cache.commit(block)
        wanted = flow.to_x0(torch.cat(made, 1), x_t, sigma, config.model.prediction)
        found = objective.predict_x0(objective.modules(), batch, x_t, torch.full((2, 10), sigma))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["story", "gap"])
@pytest.mark.parametrize("visibility", OTHERS)
def test_loss_written_out(codec: Path, visibility: Visibility, kind: Kind) -> None:
    objective = build(codec, visibility={visibility: 1.0})
    batch, units = viewed(objective, visibility, kind)
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, turn(), None)
    assert loss.requires_grad and metrics.keys() == {f"mse_{visibility}", "mse_first"}
    torch.manual_seed(5)
    sigma_BG = objective.levels(batch)
    eps = torch.randn_like(batch.x0_BFCHW)
    level = sigma_BG.repeat_interleave(SIZE, 1)[..., None, None, None]
    x0 = streamed_x0(objective, batch, (1 - level) * batch.x0_BFCHW + level * eps, sigma_BG, units)
    total = 0.0
    for row in range(2):
        for frame in range(10):
            if kind == "gap" and frame // SIZE == 1:
                continue
            error = float((x0[row, frame] - batch.x0_BFCHW[row, frame]).square().mean())
            total += error / max(float(sigma_BG[row, frame // SIZE]), 0.3) ** 2
    assert float(loss.detach()) == pytest.approx(total / 20, rel=1e-4)


# Noise levels.


def test_levels_of_each_visibility(codec: Path) -> None:
    objective = build(codec)
    like = {}
    for visibility in ("clean", *OTHERS):
        batch, _ = viewed(objective, visibility)
        batch.scored_BG = torch.ones(200, 5)
        like[visibility] = objective.levels(batch)
        assert like[visibility].shape == (200, 5) and float(like[visibility].min()) >= 0
    for visibility in ("same_level", "lagged"):
        assert torch.equal(like[visibility], like[visibility][:, :1].expand(-1, 5))
        assert torch.unique(like[visibility]).numel() > 190
    for visibility in ("clean", "latest"):
        assert torch.unique(like[visibility]).numel() > 990
    joint = like["joint"]  # windows of two: (0), (1, 2), (3, 4)
    assert (joint[:, 1] < joint[:, 2]).all() and torch.equal(joint[:, 1:3], joint[:, 3:])
    assert torch.equal(joint[:, 0], joint[:, 2])  # a first window of one: the block is at its first step
    half = 5 * 0.5 / (1 + 4 * 0.5)  # u = 1/2 warped by sample_shift 5
    assert (joint[:, 1] <= half).all() and (joint[:, 2] > half - 1e-6).all()
    u = joint / (5 - 4 * joint)
    torch.testing.assert_close(u[:, 1], u[:, 2] - 0.5, rtol=0, atol=1e-5)
    assert float(u[:, 2].mean()) == pytest.approx(0.75, abs=0.03)


def test_joint_windows_at_the_levels_of_the_sampler() -> None:
    view = joint_view(7, 3, [1, 4, 7])
    assert view.window_starts == (0, 1, 4) and view.steps == (0, 2, 1, 0, 2, 1, 0)
    sigma = flow.shift_sigma(joint_u(view, 3, torch.zeros(1, 1)), 5.0)
    oldest_last = torch.tensor(flow.step_sigmas(3, 5.0)).flip(0)
    torch.testing.assert_close(sigma[0, 1:4], oldest_last)
    torch.testing.assert_close(sigma[0, 4:], oldest_last)
    assert float(sigma[0, 0]) == 1.0
    assert joint_view(5, 3, [2, 5]).steps == (1, 0, 2, 1, 0)  # a stream's second window
    assert joint_view(5, 3, [3, 6]) == View("joint", (0, 3), (2, 1, 0, 2, 1))  # the clip ends in the last one
    assert whole_windows(7, 3) == view
    assert whole_windows(6, 3) == View("joint", (0, 3), (2, 1, 0, 2, 1, 0))


def test_drawn_windows_lie_everywhere_and_never_across_a_gap() -> None:
    drawn = {draw_joint(5, 3, False, rng(seed)) for seed in range(40)}
    assert {view.window_starts for view in drawn} == {(0, 1, 4), (0, 2), (0, 3)}
    assert {view.steps for view in drawn} == {(0, 2, 1, 0, 2), (1, 0, 2, 1, 0), (2, 1, 0, 2, 1)}
    drawn = {draw_joint(5, 3, True, rng(seed)) for seed in range(40)}
    assert {view.window_starts for view in drawn} == {(0, 1, 2), (0, 1, 3), (0, 1, 4)}
    assert all(view.steps[0] == 0 for view in drawn)


# Shares.


def test_visibilities_come_in_their_shares(codec: Path) -> None:
    shares: dict[Visibility, float] = {"clean": 0.4, "same_level": 0.3, "joint": 0.3}
    objective = build(codec, visibility=shares, clips=1, single_clips=1, single_share=0.2, gap_share=0.5)
    batches = [objective.batch(turn(0, seed)) for seed in range(200)]
    assert all(batch.view == View() for batch in batches if batch.kind == "single")
    longer = [batch.view.visibility for batch in batches if batch.kind != "single"]
    assert {name: longer.count(name) / len(longer) for name in shares} == pytest.approx(shares, abs=0.1)
    assert all(batch.view.window_starts[:2] == (0, 1) for batch in batches if batch.kind == "gap" and batch.view.steps)
    again = [objective.batch(turn(0, seed)).view for seed in range(20)]
    assert again == [batch.view for batch in batches[:20]]


def test_one_visibility_draws_nothing_so_old_runs_go_on_as_they_were(codec: Path) -> None:
    same = build(codec, visibility={"clean": 1.0, "joint": 0.0})
    before, after = rng(7), rng(7)
    super(ArObjective, same).batch(replace(turn(), rng=before))
    same.batch(replace(turn(), rng=after))
    assert torch.equal(before.get_state(), after.get_state())


def test_runs_of_all_visibilities_learn_and_resume(codec: Path, tmp_path: Path) -> None:
    shares: dict[Visibility, float] = {"clean": 0.2, "same_level": 0.2, "latest": 0.2, "lagged": 0.2, "joint": 0.2}
    options = {"visibility": shares, "single_share": 0.0, "clips": 2}
    train(build(codec, **options), train_config(max_steps=8), tmp_path / "whole")
    train(build(codec, **options), train_config(max_steps=4), tmp_path / "cut")
    train(build(codec, **options), train_config(max_steps=8), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@torch.no_grad()
def test_validation_of_each(codec: Path) -> None:
    objective = build(codec, visibility={"clean": 0.5, "same_level": 0.2, "joint": 0.3}, validation_clips=2)
    scores = objective.validate(0, objective.modules())
    sigmas = (1.0, 0.95, 0.85, 0.6)
    expected = {f"{name}_{s}" for name in ("single", "story", "same_level") for s in sigmas}
    assert set(scores) == expected | {"joint_1", "joint_0.833", "variance"}
    same = build(codec, validation_clips=2)
    plain = same.validate(0, same.modules())
    assert all(scores[name] == plain[name] for name in plain)  # the other numbers do not move


# Cards.


@pytest.mark.parametrize(
    ("shares", "card"),
    [
        ({"clean": 1.0}, ("clean",)),
        ({"joint": 0.5, "clean": 0.5}, ("clean", "joint")),
        ({"same_level": 1.0, "clean": 0.0}, ("same_level",)),
        ({"latest": 0.5, "lagged": 0.5}, ("clean", "same_level", "latest", "lagged")),
    ],
)
def test_the_card_lists_what_was_trained(codec: Path, shares: dict[Visibility, float], card: tuple[str, ...]) -> None:
    scheduler = build(codec, visibility=shares).scheduler()
    assert scheduler.visibility == card
    assert scheduler.joint_blocks == (2 if "joint" in card else 0)
    assert scheduler.lag_blocks == (2 if "lagged" in card else 0)


def test_cards_without_the_field_mean_clean_and_others_are_checked() -> None:
    assert SchedulerConfig(trained_steps=(4,), window_frames=12).visibility == ("clean",)
    for changes, message in (
        ({"visibility": ()}, "must be one or more of clean"),
        ({"visibility": ["clean", "noisy"]}, "must be one or more of clean, same_level"),
        ({"visibility": ["joint"]}, "joint with 0 blocks: must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            SchedulerConfig(trained_steps=(4,), window_frames=12, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visibility": {"clean": 0.5}}, "the shares clean 0.5; they must be 0 or more and add up to 1"),
        ({"visibility": {"clean": 1.5, "joint": -0.5}}, "must be 0 or more"),
        ({"visibility": {}}, "the shares nothing"),
        ({"visibility": {"joint": 1.0}, "joint_blocks": 4}, "joint_blocks is 4 and clip_blocks 4"),
        ({"visibility": {"joint": 1.0}, "joint_blocks": 1}, "needs at least 2"),
        ({"visibility": {"lagged": 1.0}, "lag_blocks": 1}, "lag_blocks is 1"),
        ({"visibility": {"joint": 1.0}, "window_frames": 7}, "window_frames=7: must be at least 8"),
        ({"window_frames": 3}, "window_frames=3: must be at least 4"),
        ({"attention_backend": "flash9"}, "no such attention backend"),
        ({"clip_blocks": 0}, "clip_blocks is 0"),
    ],
)
def test_what_does_not_go_together_is_refused(codec: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"objective: .*{message}"):
        from_dict(ar.Config, ar_values(codec, **changes), "objective")


def test_misspelt_visibilities_are_named(codec: Path) -> None:
    with pytest.raises(UserError, match=r"'same_levle' is not allowed; did you mean 'same_level'\?"):
        from_dict(ar.Config, ar_values(codec, visibility={"same_levle": 1.0}), "objective")


# Diffusion forcing.


def test_diffusion_forcing_is_the_visibility_latest(codec: Path) -> None:
    """Independent levels, noisy context, block-causal: its loss is written out above; a share may be clean."""
    objective = build(codec, df, single_share=0.0, clips=1)
    assert {objective.batch(turn(0, seed)).view for seed in range(5)} == {View("latest")}
    assert objective.scheduler().visibility == ("clean", "same_level", "latest")
    mixed = build(codec, df, single_share=0.0, clips=1, visibility={"latest": 0.5, "clean": 0.5})
    kinds = [mixed.batch(turn(0, seed)).view.visibility for seed in range(60)]
    assert kinds.count("latest") / 60 == pytest.approx(0.5, abs=0.15) and set(kinds) == {"latest", "clean"}
    with pytest.raises(ValueError, match="no share of latest"):
        build(codec, df, visibility={"clean": 1.0})


def test_diffusion_forcing_sees_noisy_blocks_before_and_nothing_after(codec: Path) -> None:
    objective = build(codec, df)
    batch, _ = viewed(objective, "latest")
    x_t, sigma_BF = torch.randn_like(batch.x0_BFCHW), torch.rand(2, 10)
    x_t.requires_grad_(True)
    objective.predict_x0(objective.modules(), batch, x_t, sigma_BF)[:, 4:6].square().sum().backward()
    assert x_t.grad is not None
    reached = x_t.grad.flatten(2).abs().sum((0, 2)) > 0
    assert reached.tolist() == [True] * 6 + [False] * 4
