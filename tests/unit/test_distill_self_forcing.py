"""Self-forcing end to end on a tiny world: who learns when, from what, and that streams survive a restart."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgen import flow
from streamgen.batch import generate
from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen.rope import rope_table
from streamgen.visibility import block_causal_mask
from streamgen_distill import long, self_forcing
from streamgen_distill.dmd import dmd_loss
from streamgen_distill.self_forcing import CRITIC, STUDENT, SelfForcing
from streamgen_train import checkpoint
from streamgen_train.config import from_dict
from streamgen_train.loop import Trainer, train
from streamgen_train.objectives import bidirectional
from streamgen_train.objectives.bidirectional import whole_clip_x0
from tests.runs import assert_equal_states, curve, turn
from tests.tiny_sprites import TRANSFORMER, ar_values, build_ar, save_codec, spread, train_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A codec, an autoregressive run (the student's start) and a bidirectional one (the teacher)."""
    root = tmp_path_factory.mktemp("runs")
    codec = save_codec(root / "codec")
    train(build_ar(codec), train_config(max_steps=1), root / "ar")
    torch.manual_seed(2)
    teacher = bidirectional.build(bidirectional.Config(**ar_values(codec)))
    spread(*teacher.modules().values())
    train(teacher, train_config(max_steps=1), root / "bidirectional")
    return {"codec": codec, "ar": root / "ar", "bidirectional": root / "bidirectional"}


def values(runs: dict[str, Path], **changes: Any) -> dict[str, Any]:
    own = {
        "init_from": str(runs["ar"]),
        "teacher_from": str(runs["bidirectional"]),
        "rollout_clips": 2,
        "rollout_blocks": (3, 4),
        "score_blocks": 3,
        "critic_ratio": 2,
        "guidance": 2.0,
        "attention_backend": "math",
        "validation_seconds": 3.0,
    }
    table = ar_values(runs["codec"], **(own | changes))
    return table


def build(runs: dict[str, Path], **changes: Any) -> SelfForcing:
    torch.manual_seed(0)
    return self_forcing.build(self_forcing.Config(**values(runs, **changes)))


def build_long(runs: dict[str, Path], **changes: Any) -> long.LongTuning:
    torch.manual_seed(0)
    own = {"chunk_blocks": 1, "stream_blocks": 6}
    return long.build(long.Config(**values(runs, **(own | changes))))


def weights(objective: SelfForcing) -> dict[str, list[Tensor]]:
    return {name: [p.detach().clone() for p in module.parameters()] for name, module in objective.modules().items()}


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("objective_loss", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("score_layout", ["bidirectional", "causal"])
def test_each_player_changes_its_own_modules_at_its_turns(
    runs: dict[str, Path], objective_loss: str, score_layout: str
) -> None:
    teacher = runs["bidirectional" if score_layout == "bidirectional" else "ar"]
    objective = build(runs, objective_loss=objective_loss, score_layout=score_layout, teacher_from=str(teacher))
    trainer = Trainer(objective, train_config(), None, None)
    assert objective.teacher is not None
    frozen = [p.clone() for p in objective.teacher.parameters()]
    for step in range(3):
        before = weights(objective)
        numbers = trainer.train_step()
        after = weights(objective)
        assert same(before["text"], after["text"])
        assert not same(before["critic"], after["critic"])
        assert same(before["transformer"], after["transformer"]) == (step % 2 == 1)
        assert ("student/loss" in numbers) == (step % 2 == 0)
        if objective_loss == "gan":
            assert not same(before["discriminator"], after["discriminator"])
    assert same(frozen, list(objective.teacher.parameters()))


def test_student_loss_is_dmd_of_its_rollout_against_guided_teacher_and_critic(runs: dict[str, Path]) -> None:
    objective = build(runs, rollout_blocks=(3, 3))
    objective.prepare(CPU, torch.float32)
    spread(objective.critic)
    now = turn(0, 3, STUDENT)
    streams = objective.batch(now)
    torch.manual_seed(7)
    loss, _ = objective.loss(streams, now, None)

    clip, ids = objective.make(streams, grad=True)
    torch.manual_seed(7)
    u = torch.rand(2, 1)
    sigma = flow.shift_sigma(u, 5.0).clamp(0.02, 0.98).expand(-1, clip.shape[1])
    x_t = flow.add_noise(clip.detach(), torch.randn_like(clip), sigma)
    real_net = {"transformer": objective.teacher, "text": objective.text}
    fake_net = {"transformer": objective.critic, "text": objective.text}
    with torch.no_grad():
        cond = whole_clip_x0(real_net, x_t, sigma, ids)  # type: ignore[arg-type]
        uncond = whole_clip_x0(real_net, x_t, sigma, torch.full_like(ids, -1))  # type: ignore[arg-type]
        fake = whole_clip_x0(fake_net, x_t, sigma, ids)
    want = dmd_loss(clip, uncond + 2.0 * (cond - uncond), fake, scored_BF=torch.ones(clip.shape[:2]))
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    got = torch.autograd.grad(loss, list(objective.model.blocks.parameters()))
    expected = torch.autograd.grad(want.float(), list(objective.model.blocks.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-7, rtol=1e-3)


def test_on_data_the_student_denoises_clips_in_one_pass_over_noisy_context(runs: dict[str, Path]) -> None:
    objective = build(runs, student_input="data", single_share=0.0, gap_share=0.0, train_steps=(2,))
    trainer = Trainer(objective, train_config(), None, None)
    assert math.isfinite(trainer.train_step()["student/loss"])
    now = turn(0, 3, STUDENT)
    streams = objective.batch(now)
    torch.manual_seed(7)
    clip, _ = objective.make(streams, grad=True)
    given = streams.given
    assert given is not None
    torch.manual_seed(7)
    sigma = objective.per_frame(torch.tensor(streams.plan.sampling.sigmas)[torch.randint(2, given.scored_BG.shape)])
    x_t = flow.add_noise(given.x0_BFCHW, torch.randn_like(given.x0_BFCHW), sigma)
    sizes = [2] * given.ids_BGL.shape[1]
    mask = block_causal_mask(sizes, 4, window_frames=8, sink_frames=2)
    rope = rope_table(range(sum(sizes)), 2, 2, TRANSFORMER.head_dim)
    text = objective.model.encode_text(objective.text.encode_ids(given.ids_BGL))
    out = objective.model(x_t, flow.timestep_of(sigma), text, rope=rope, mask=mask)
    assert torch.allclose(clip, flow.to_x0(out, x_t, sigma, "flow"), atol=1e-5)


def test_microbatches_share_the_plan_and_nothing_else(runs: dict[str, Path]) -> None:
    objective = build(runs, train_steps=(4, 2, 1), switch_share=1.0)
    objective.prepare(CPU, torch.float32)
    for seed in range(4):
        first, second = turn(0, seed, STUDENT), turn(0, seed, STUDENT)
        second.rng.manual_seed(99 + seed)
        one, two = objective.batch(first), objective.batch(second)
        assert one.plan == two.plan and one.transitions == two.transitions
        assert one.seeds != two.seeds


def test_a_switch_gives_later_blocks_the_new_prompt_and_a_recache(runs: dict[str, Path]) -> None:
    objective = build(runs, switch_share=1.0, rollout_blocks=(4, 4))
    objective.prepare(CPU, torch.float32)
    streams = objective.batch(turn(0, 1, STUDENT))
    ((at, transition),) = streams.transitions.items()
    assert transition == "recache" and 1 <= at < 4
    rows = streams.ids_BGL
    assert all(torch.equal(rows[:, block], rows[:, 0 if block < at else -1]) for block in range(4))
    assert not torch.equal(rows[:, 0], rows[:, -1])
    assert torch.equal(objective.text.ids(streams.captions), rows[:, -1].cpu())


def test_reward_weighs_clips(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = build(runs, reward="checker", reward_beta=2.0, rollout_blocks=(3, 3))
    objective.prepare(CPU, torch.float32)
    spread(objective.critic)
    now = turn(0, 3, STUDENT)
    streams = objective.batch(now)
    found = []
    for reward in (torch.zeros(2), torch.ones(2)):
        monkeypatch.setattr(SelfForcing, "reward", lambda self, clip, texts, reward=reward: reward)
        torch.manual_seed(7)
        found.append(float(objective.loss(streams, now, None)[0].detach()))
    assert found[1] == pytest.approx(found[0] * 7.389, rel=1e-3)


def test_export_streams_with_renoising_and_lists_its_step_counts(runs: dict[str, Path], tmp_path: Path) -> None:
    objective = build(runs, train_steps=(4, 2))
    objective.prepare(CPU, torch.float32)
    objective.export(copy.deepcopy(objective.modules()), tmp_path / "model")
    pipe = StreamPipeline.from_pretrained(tmp_path / "model", dtype="fp32")
    assert pipe.scheduler.trained_steps == (4, 2) and pipe.scheduler.sampler == "renoise"
    assert not (tmp_path / "model" / "critic").exists()
    found = objective.validate(0, objective.modules())
    assert set(found) >= {"obeys_first", "obeys_last", "presence_last"}


def test_a_student_may_be_streamed_without_commit_passes(runs: dict[str, Path], tmp_path: Path) -> None:
    """Trained on the keys and values of noised blocks, at the level of its last step."""
    own = {"train_steps": (2,), "context_noise": 5 / 6, "commits": False}
    objective = build(runs, **own)
    train(objective, train_config(max_steps=2), tmp_path / "run")
    objective.export(copy.deepcopy(objective.modules()), tmp_path / "model")
    pipe = StreamPipeline.from_pretrained(tmp_path / "model", dtype="fp32")
    assert not pipe.sampling(2).commits and pipe.sampling(2).context_noise == 5 / 6
    assert all(plan.commits for plan in objective.plans), "a graded pass leaves nothing in the cache"
    made = generate(pipe, ["a red star"], [1], 5)
    blocks = list(pipe.stream("a red star", seed=1, max_blocks=5))
    assert np.array_equal(made[0].numpy(), np.concatenate([block.frames for block in blocks]))


@pytest.mark.parametrize(("cache", "noise"), [("relative", 0.0), ("window", 0.1), ("ema_sink", 0.0)])
def test_the_card_names_the_cache_of_the_rollouts(
    cache: str, noise: float, runs: dict[str, Path], tmp_path: Path
) -> None:
    """So the exported student streams on what it was trained on, and so do its samples."""
    objective = build(runs, cache=cache, context_noise=noise)
    objective.prepare(CPU, torch.float32)
    objective.export(copy.deepcopy(objective.modules()), tmp_path / "model")
    pipe = StreamPipeline.from_pretrained(tmp_path / "model", dtype="fp32")
    assert (pipe.scheduler.positions, pipe.scheduler.context_noise) == (cache, noise)
    assert pipe.stream("a red star").cache_policy == cache == objective.new_state((1,)).cache.spec.policy
    made = generate(pipe, ["a red star"], [1], 5)
    assert torch.equal(made, generate(pipe, ["a red star"], [1], 5, cache=cache))
    assert cache == "relative" or not torch.equal(made, generate(pipe, ["a red star"], [1], 5, cache="relative"))


def test_a_student_of_rolling_windows_may_be_streamed_by_them(runs: dict[str, Path]) -> None:
    own = {"rolling_steps": 3, "sink_frames": 2, "train_steps": (4,)}
    card = build(runs, rolling_share=0.5, **own).scheduler()
    assert (card.visibility, card.joint_blocks, card.trained_steps) == (("clean", "joint"), 3, (4, 3))
    assert build(runs, rolling_share=1.0, **own).scheduler().visibility == ("joint",)
    assert build(runs, **own).scheduler().visibility == ("clean",)


def test_a_gradient_through_an_averaging_sink_is_that_of_constants(runs: dict[str, Path]) -> None:
    """Rollouts beyond the window fold what leaves into the sink; checkpointed or not, the gradient is the same."""
    found = []
    for checkpointed in (False, True):
        objective = build(runs, cache="ema_sink", rollout_blocks=(7, 7), checkpoint_activations=checkpointed)
        objective.prepare(CPU, torch.float32)
        now = turn(0, player=STUDENT)
        torch.manual_seed(7)
        objective.loss(objective.batch(now), now, None)[0].backward()
        found.append([p.grad for p in objective.model.blocks.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [self_forcing, long])
def test_a_run_s_resolved_config_builds_it_again(runs: dict[str, Path], kind: Any) -> None:
    """What `streamgen convert` does with the config.yaml of a run."""
    config = kind.Config(**values(runs, train_steps=(4, 2), sample_steps=0))
    assert config.sample_steps == 4
    again = from_dict(kind.Config, dataclasses.asdict(config), "objective")
    assert again == config


def test_resumed_equals_uninterrupted(runs: dict[str, Path], tmp_path: Path) -> None:
    train(build(runs), train_config(max_steps=4), tmp_path / "whole")
    train(build(runs), train_config(max_steps=3), tmp_path / "parts")
    train(build(runs), train_config(max_steps=4), tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert_equal_states(checkpoint.load_modules(tmp_path / "whole"), checkpoint.load_modules(tmp_path / "parts"))


# -- streams that live on ---------------------------------------------------------------------


def test_long_streams_go_on_over_turns_and_start_anew(runs: dict[str, Path]) -> None:
    objective = build_long(runs, switch_share=0.0)
    trainer = Trainer(objective, train_config(), None, None)
    positions = []
    for _ in range(5):
        trainer.train_step()
        positions.append(objective.streams[0].state.position)
    # 3 blocks to begin with, then 1 a turn; two turns at even steps (student, critic), one at odd ones; at 6 anew
    assert positions == [4, 5, 3, 4, 6]
    assert len(objective.streams[0].tail) == 3


def test_only_new_frames_are_scored(runs: dict[str, Path]) -> None:
    objective = build_long(runs, switch_share=0.0, chunk_blocks=2, stream_blocks=9)
    objective.prepare(CPU, torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []
    original = objective.student_loss

    def watch(streams: Any, clip: Tensor, ids: Tensor, scored: Tensor) -> Any:
        seen.append((clip, scored))
        return original(streams, clip, ids, scored)

    objective.student_loss = watch  # type: ignore[method-assign]
    for step in range(2):
        now = turn(step, step, STUDENT)
        objective.loss(objective.batch(now), now, None)
    (first, all_new), (second, last_new) = seen
    assert all_new.all() and first.shape[1] == 6
    assert last_new[0].tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(second[:, :2], first[:, 4:].detach()) and second.requires_grad


def test_long_streams_switch_once_with_a_recache(runs: dict[str, Path]) -> None:
    objective = build_long(runs, switch_share=1.0)
    objective.prepare(CPU, torch.float32)
    switches = []
    for step in range(4):
        now = turn(step, 5, CRITIC)
        streams = objective.batch(now)
        start = objective.streams[0].state.position
        switches += [start + at for at in streams.transitions]
        living = objective.streams[0]
        blocks = range(start + streams.plan.blocks - streams.ids_BGL.shape[1], start + streams.plan.blocks)
        want = torch.stack([objective.text.ids(living.prompts(block)) for block in blocks], 1)
        assert torch.equal(streams.ids_BGL.cpu(), want)
        objective.loss(streams, now, None)
    assert switches == [objective.streams[0].switch_block]


def test_long_streams_resume_exactly(runs: dict[str, Path], tmp_path: Path) -> None:
    train(build_long(runs), train_config(max_steps=5), tmp_path / "whole")
    train(build_long(runs), train_config(max_steps=3), tmp_path / "parts")
    train(build_long(runs), train_config(max_steps=5), tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert_equal_states(checkpoint.load_modules(tmp_path / "whole"), checkpoint.load_modules(tmp_path / "parts"))


# -- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_frames": 3, "sink_frames": 2}, "window"),
        ({"rollout_blocks": (4, 3)}, "rollout_blocks"),
        ({"train_steps": ()}, "train_steps"),
        ({"critic_ratio": 0}, "critic_ratio"),
        ({"rolling_share": 0.5, "rolling_steps": 4}, "raise it, or lower rolling_steps"),
        ({"init_from": None}, "init_from is null"),
        ({"gan_layers": (7,)}, "has layers 0 to 1"),
        ({"cache": "ring"}, "allowed: window, relative"),
        ({"commits": False}, "at level 0.625 and context_noise is 0; they must be equal"),
        ({"commits": False, "context_noise": 0.625, "train_steps": (4, 2)}, "the last of 2 steps is at level 0.8333"),
    ],
)
def test_impossible_configs_are_refused(runs: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(runs, **changes)


def test_teachers_of_another_stage_or_shape_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    (runs["ar"] / "config.yaml").write_text("objective:\n  name: ar\n")
    try:
        with pytest.raises(UserError, match="objective 'ar'; a bidirectional score needs one of bidirectional"):
            build(runs, teacher_from=str(runs["ar"])).prepare(CPU, torch.float32)
    finally:
        (runs["ar"] / "config.yaml").unlink()
    wider = dataclasses.replace(TRANSFORMER, dim=32)
    with pytest.raises(UserError, match="was made by another model"):
        build(runs, model=wider).prepare(CPU, torch.float32)
    with pytest.raises(UserError, match="no checkpoint"):
        build(runs, teacher_from=str(tmp_path)).prepare(CPU, torch.float32)
