"""ODE-pair regression: the teacher's paths written out, the loss, pairs on disk, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgen import flow
from streamgen.errors import UserError
from streamgen.weights import load_tree
from streamgen_distill import ode
from streamgen_distill.ode import OdeObjective, PairBatch, make_pairs, shard_name
from streamgen_train.checkpoint import load_modules
from streamgen_train.config import from_dict
from streamgen_train.loop import train
from streamgen_train.objectives.video import Batch
from tests.runs import losses, turn
from tests.tiny_sprites import ar_values, build_ar, save_codec, spread, train_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def teacher(codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train(build_ar(codec), train_config(max_steps=2), folder)
    return folder


def values(codec: Path, teacher: Path, **changes: Any) -> dict[str, Any]:
    defaults = {"teacher_from": str(teacher), "ode_steps": 4, "trained_steps": (2, 1), "sample_steps": 2}
    return ar_values(codec, **{**defaults, **changes})


def build(codec: Path, teacher: Path, **changes: Any) -> OdeObjective:
    torch.manual_seed(1)
    objective = ode.build(ode.Config(**values(codec, teacher, **changes)))
    objective.prepare(CPU, torch.float32)
    return objective


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_equal(one: PairBatch, other: PairBatch, atol: float = 0.0) -> None:
    assert one.kind == other.kind and one.view == other.view
    for name in ode.TENSORS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=atol)


@torch.no_grad()
def paths_written_out(objective: OdeObjective, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the layout of teacher forcing: all blocks at once, clean half before noisy half."""
    grid = [1.0, 0.9375, 5 / 6, 0.625, 0.0]  # u = 1, 3/4, 1/2, 1/4 warped by 5, then clean
    x, states = noise, []
    for sigma, following in pairwise(grid):
        states.append(x)
        velocity = (x - objective.teacher_x0(batch, x, torch.full(x.shape[:2], sigma))) / sigma
        x = x + (following - sigma) * velocity
    return torch.stack(states, 1), x


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["single", "story", "gap"])
@pytest.mark.parametrize("changes", [{}, {"window_frames": 5, "sink_frames": 1}], ids=["all", "evicting"])
def test_paths_equal_teacher_forcing_written_out(
    codec: Path, teacher: Path, kind: Any, guidance: float, changes: dict[str, Any]
) -> None:
    objective = build(codec, teacher, guidance=guidance, **changes)
    assert objective.teacher is not None
    spread(*objective.teacher.values())
    batch = objective.make_batch(kind, 3, rng())
    noise = torch.randn_like(batch.x0_BFCHW)
    states, final = objective.solve(batch, noise)
    all_states, wanted = paths_written_out(objective, batch, noise)
    torch.testing.assert_close(final, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, all_states[:, [0, 2]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.levels_K, torch.tensor([1.0, 5 / 6]))
    assert not final.requires_grad


def test_stored_levels_are_those_of_every_step_count(codec: Path, teacher: Path) -> None:
    objective = build(codec, teacher, ode_steps=48, trained_steps=(4, 2, 1))
    assert objective.config.stored_indices == (0, 12, 24, 36)
    assert tuple(objective.levels_K.tolist()) == pytest.approx(flow.step_sigmas(4, 5.0))
    objective = build(codec, teacher, ode_steps=12, trained_steps=(4, 3))
    levels = {*flow.step_sigmas(4, 5.0), *flow.step_sigmas(3, 5.0)}
    assert objective.levels_K.tolist() == pytest.approx(sorted(levels, reverse=True))
    card = objective.scheduler()
    assert (card.trained_steps, card.sampler, card.shift, card.visibility) == ((4, 3), "renoise", 5.0, ("clean",))


@pytest.mark.parametrize("kind", ["single", "story", "gap"])
def test_loss_written_out(codec: Path, teacher: Path, kind: Any) -> None:
    """Each block at one of the stored levels of its path, on the clean blocks of the data; target: the path's end."""
    objective = build(codec, teacher, single_share=float(kind == "single"), gap_share=float(kind == "gap"))
    spread(*objective.modules().values())
    batch = objective.batch(turn())
    assert batch.kind == kind
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, turn(), None)
    assert metrics.keys() == {f"ode_{kind}"}

    torch.manual_seed(5)
    index_BG = torch.randint(2, batch.scored_BG.shape)
    x_t, sigma = torch.zeros_like(batch.x0_BFCHW), torch.zeros(batch.x0_BFCHW.shape[:2])
    for row, frame in np.ndindex(*sigma.shape):
        index = int(index_BG[row, frame // 2])
        x_t[row, frame] = batch.states_BKFCHW[row, index, frame]
        sigma[row, frame] = (1.0, 5 / 6)[index]
    x0 = objective.predict_x0(objective.modules(), batch, x_t, sigma).detach()
    total = 0.0
    for row, frame in np.ndindex(*sigma.shape):
        if kind != "gap" or frame // 2 != 1:
            total += float((x0[row, frame] - batch.final_BFCHW[row, frame]).square().mean())
    assert float(loss.detach()) == pytest.approx(total / sigma.numel(), rel=1e-4)


def test_gradients_go_through_the_student_alone(codec: Path, teacher: Path) -> None:
    objective = build(codec, teacher, guidance=2.0, single_share=0.0)
    objective.loss(objective.batch(turn()), turn(), None)[0].backward()
    assert objective.teacher is not None and objective.codec is not None
    for module in (*objective.teacher.values(), objective.codec):
        assert all(parameter.grad is None for parameter in module.parameters())
    for module in objective.modules().values():
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_student_starts_as_its_teacher_and_leaves_it(codec: Path, teacher: Path, tmp_path: Path) -> None:
    objective = build(codec, teacher)
    averaged = load_modules(teacher)
    for name, module in objective.modules().items():
        assert all(torch.equal(tensor, averaged[name][key]) for key, tensor in module.state_dict().items())
    train(objective, train_config(max_steps=2), tmp_path)
    assert objective.teacher is not None
    for name, module in objective.teacher.items():
        assert all(torch.equal(tensor, averaged[name][key]) for key, tensor in module.state_dict().items())
    assert not torch.equal(objective.model.head.head.weight, averaged["transformer"]["head.head.weight"])


# Pairs on disk.


def cached(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"pairs": "cached", "pairs_from": str(folder), "pairs_count": 3, **changes}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("pairs_*.safetensors")}


def test_cached_pairs_are_the_online_ones_in_half_precision(codec: Path, teacher: Path, tmp_path: Path) -> None:
    objective = build(codec, teacher, **cached(tmp_path, single_share=0.3))
    online = build(codec, teacher, single_share=0.3)
    for shard in range(3):
        read = objective.read(tmp_path / shard_name(shard))
        generator = rng(ode.step_seed(0, shard, 0))
        made = online.batch(ode.Turn(0, generator, generator))
        assert_equal(read, made, atol=5e-3)
    drawn = [objective.batch(turn(0, seed)) for seed in range(12)]
    found = {batch.final_BFCHW.sum().item() for batch in drawn}
    assert len(found) == 3  # every shard is used
    assert_equal(objective.batch(turn(0, 7)), drawn[7])


def test_pairs_are_a_function_of_settings_and_index(codec: Path, teacher: Path, tmp_path: Path) -> None:
    build(codec, teacher, **cached(tmp_path / "one"))
    torch.manual_seed(99)
    build(codec, teacher, **cached(tmp_path / "two"))
    assert shards(tmp_path / "one") == shards(tmp_path / "two") and len(shards(tmp_path / "one")) == 3
    other = build(codec, teacher, **cached(tmp_path / "other", pairs_seed=1))
    assert not set(shards(tmp_path / "one").values()) & set(shards(tmp_path / "other").values())
    assert make_pairs(other, tmp_path / "other", 3) == 0


def test_making_pairs_goes_on_where_it_stopped(
    codec: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(codec, teacher, **cached(tmp_path / "whole", pairs_count=4))
    solve, calls = OdeObjective.solve, []

    def interrupted(self: OdeObjective, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, batch, noise)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OdeObjective, "solve", interrupted)
        build(codec, teacher, **cached(tmp_path / "cut", pairs_count=4))
    left = shards(tmp_path / "cut")
    assert len(left) == 2
    objective = build(codec, teacher, **cached(tmp_path / "cut", pairs_count=2))
    assert shards(tmp_path / "cut") == left  # enough for two
    (tmp_path / "cut" / shard_name(0)).unlink()
    assert make_pairs(objective, tmp_path / "cut", 4) == 3
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_runs_on_cached_pairs_resume_exactly_and_learn(codec: Path, teacher: Path, tmp_path: Path) -> None:
    options = cached(tmp_path / "pairs", pairs_count=4, single_share=0.0)
    train(build(codec, teacher, **options), train_config(max_steps=6), tmp_path / "whole")
    train(build(codec, teacher, **options), train_config(max_steps=3), tmp_path / "cut")
    train(build(codec, teacher, **options), train_config(max_steps=6), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    objective = build(codec, teacher, **options)
    spread(*objective.modules().values())  # far from its teacher
    train(objective, train_config(max_steps=60), tmp_path / "learns")
    means = losses(tmp_path / "learns")
    assert np.mean(means[-10:]) < 0.5 * np.mean(means[:10])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_shift": 8.0}, r"sample_shift 5\.0 \(now 8\.0\)"),  # pairs of another shift teach other levels
        ({"ode_steps": 8, "guidance": 2.0}, r"ode_steps 4 \(now 8\), guidance 1\.0 \(now 2\.0\)"),
        ({"trained_steps": (4, 2, 1)}, r"trained_steps \[2, 1\] \(now \[4, 2, 1\]\)"),
        ({"sink_frames": 0}, r"sink_frames 2 \(now 0\)"),
    ],
)
def test_pairs_of_other_settings_are_refused(
    codec: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    build(codec, teacher, **cached(tmp_path, pairs_count=1))
    before = shards(tmp_path)
    with pytest.raises(UserError, match=f"were made with {message}: set objective.pairs_from"):
        build(codec, teacher, **cached(tmp_path, **changes))
    assert shards(tmp_path) == before


def test_pairs_of_another_teacher_or_of_nobody_are_refused(codec: Path, teacher: Path, tmp_path: Path) -> None:
    build(codec, teacher, **cached(tmp_path / "pairs", pairs_count=1))
    train(build_ar(codec, seed=5), train_config(max_steps=1), tmp_path / "another")
    with pytest.raises(UserError, match="were made with teacher"):
        build(codec, tmp_path / "another", **cached(tmp_path / "pairs"))
    settings = tmp_path / "pairs" / ode.SETTINGS_FILE
    assert json.loads(settings.read_text())["sample_shift"] == 5.0
    settings.unlink()
    with pytest.raises(UserError, match=r"holds pairs but no pairs\.json"):
        build(codec, teacher, **cached(tmp_path / "pairs"))


def test_a_broken_shard_is_named(codec: Path, teacher: Path, tmp_path: Path) -> None:
    objective = build(codec, teacher, **cached(tmp_path, pairs_count=1))
    path = tmp_path / shard_name(0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="pairs_000000"):
        objective.batch(turn())


# What does not go together.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained_steps": (3,)}, "ode_steps is 4; every count of trained_steps"),
        ({"trained_steps": ()}, "one or more counts"),
        ({"visibility": {"clean": 0.5, "same_level": 0.5}}, "visibility must be clean alone"),
        ({"pairs": "cached"}, "pairs=cached needs pairs_from=FOLDER"),
        ({"pairs_from": "x"}, "pairs=online takes none"),
        ({"pairs": "cached", "pairs_from": "x", "pairs_count": 0}, "pairs_count is 0"),
        ({"window_frames": 3}, "window_frames=3: must be at least 4"),
    ],
)
def test_configs_that_do_not_work_are_refused(
    codec: Path, teacher: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"objective: .*{message}"):
        from_dict(ode.Config, values(codec, teacher, **changes), "objective")


@pytest.mark.parametrize("single_share", [0.0, 1.0])
def test_costs_count_the_latents_on_disk(codec: Path, teacher: Path, tmp_path: Path, single_share: float) -> None:
    assert build(codec, teacher).costs() == {}
    options = cached(tmp_path, single_share=single_share, single_clips=8)  # as many blocks as two clips of four
    promised = build(codec, teacher, **options).costs()["latents of the pairs on disk, at most (MB)"]
    held = [load_tree(path, ode.MARK) for path in tmp_path.glob("pairs_*.safetensors")]
    sizes = [value.nbytes for tree in held for name, value in tree.items() if "CHW" in name]
    assert len(sizes) == 9 and sum(sizes) / 1e6 == pytest.approx(promised)
