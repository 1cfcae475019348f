"""Causal consistency distillation against its definition written out, and where gradients go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamgen_distill import cd
from streamgen_distill.cd import ConsistencyObjective
from streamgen_train.checkpoint import load_modules
from streamgen_train.clips import Kind
from streamgen_train.loop import Trainer, train
from tests.runs import losses
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


def build(codec: Path, teacher: Path, **changes: Any) -> ConsistencyObjective:
    torch.manual_seed(1)
    return cd.build(cd.Config(**ar_values(codec, teacher_from=str(teacher), **{"sample_steps": 4, **changes})))


def three_models(codec: Path, teacher: Path, **changes: Any) -> tuple[ConsistencyObjective, dict[str, nn.Module]]:
    """A student that has moved away from its teacher, and an average that is neither."""
    objective = build(codec, teacher, **changes)
    objective.prepare(CPU, torch.float32)
    ema = copy.deepcopy(objective.modules())
    spread(*ema.values())
    spread(*objective.modules().values())
    return objective, ema


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(level: Tensor) -> Tensor:
    """[B, F] -> [B, F, 1, 1, 1]."""
    return level[..., None, None, None]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["single", "story", "gap"])
def test_loss_equals_the_definition_written_out(codec: Path, teacher: Path, kind: Kind, guidance: float) -> None:
    """`predict_x0` itself is held against streaming in test_train_ar."""
    objective, ema = three_models(codec, teacher, grid_steps=4, grid_shift=5.0, guidance=guidance)
    batch = objective.make_batch(kind, 3, rng())
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, 0, ema)

    torch.manual_seed(5)
    index = torch.randint(4, batch.scored_BG.shape)
    eps = torch.randn_like(batch.x0_BFCHW)
    grid = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])  # u = 1, 3/4, 1/2, 1/4 warped by 5, then clean
    assert torch.allclose(objective.grid, grid)
    sigma, following = (grid[i].repeat_interleave(2, 1) for i in (index, index + 1))
    assert objective.teacher is not None
    with torch.no_grad():
        x_t = (1 - at(sigma)) * batch.x0_BFCHW + at(sigma) * eps
        cond = objective.predict_x0(objective.teacher, batch, x_t, sigma)
        nothing = torch.full_like(batch.ids_BGL, -1)
        uncond = objective.predict_x0(objective.teacher, batch, x_t, sigma, nothing)
        guided = uncond + guidance * (cond - uncond)
        velocity = (x_t - guided) / at(sigma)
        x_next = x_t - at(sigma - following) * velocity
        target = objective.predict_x0(ema, batch, x_next, following)
        target[following == 0] = guided[following == 0]
        student = objective.predict_x0(objective.modules(), batch, x_t, sigma)
        error = (student - target).square().mean((2, 3, 4))
    scored = batch.scored_BG.repeat_interleave(2, 1)
    assert float(loss.detach()) == pytest.approx(float((error * scored).mean()), rel=1e-4)
    assert float(metrics[f"cd_{kind}"]) == pytest.approx(float(error.mean()), rel=1e-4)


def test_the_last_step_of_the_grid_learns_the_teachers_x0(codec: Path, teacher: Path) -> None:
    """Whatever the average says there: at sigma 0 it must be the identity."""
    objective, ema = three_models(codec, teacher, grid_steps=2)
    batch = objective.make_batch("single", 1, rng())

    def drawn(seed: int) -> int:
        torch.manual_seed(seed)
        return int(torch.randint(2, (1, 1)))

    seed = next(seed for seed in range(50) if drawn(seed) == 1)
    torch.manual_seed(seed)
    loss, _ = objective.loss(batch, 0, ema)
    drawn(seed)
    eps, sigma = torch.randn_like(batch.x0_BFCHW), objective.grid[1].expand(1, 2)
    x_t = (1 - at(sigma)) * batch.x0_BFCHW + at(sigma) * eps
    assert objective.teacher is not None
    with torch.no_grad():
        target = objective.predict_x0(objective.teacher, batch, x_t, sigma)
        student = objective.predict_x0(objective.modules(), batch, x_t, sigma)
    assert float(loss.detach()) == pytest.approx(float((student - target).square().mean()), rel=1e-4)
    spread(*ema.values())
    torch.manual_seed(seed)
    assert float(objective.loss(batch, 0, ema)[0].detach()) == float(loss.detach())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gradients_go_through_the_student_alone(codec: Path, teacher: Path, guidance: float) -> None:
    objective, ema = three_models(codec, teacher, guidance=guidance)
    for module in ema.values():
        module.requires_grad_(True)  # would take a gradient if it were offered one
    objective.loss(objective.make_batch("story", 2, rng()), 0, ema)[0].backward()
    assert objective.teacher is not None and objective.codec is not None
    for module in (*ema.values(), *objective.teacher.values(), objective.codec):
        assert all(parameter.grad is None for parameter in module.parameters())
    for module in objective.modules().values():
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_student_starts_as_its_teacher(codec: Path, teacher: Path) -> None:
    objective = build(codec, teacher)
    objective.prepare(CPU, torch.float32)
    averaged = load_modules(teacher)
    assert objective.teacher is not None
    for name, module in objective.modules().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, averaged[name][key])
            assert torch.equal(objective.teacher[name].state_dict()[key], averaged[name][key])
            assert objective.teacher[name].state_dict()[key].data_ptr() != tensor.data_ptr()


def test_training_moves_the_student_and_not_the_teacher(codec: Path, teacher: Path, tmp_path: Path) -> None:
    objective = build(codec, teacher, grid_steps=8)
    train(objective, train_config(max_steps=4), tmp_path / "whole")
    averaged = load_modules(teacher)
    assert objective.teacher is not None
    for name, module in objective.teacher.items():
        assert all(torch.equal(tensor, averaged[name][key]) for key, tensor in module.state_dict().items())
    assert not torch.equal(objective.model.head.head.weight, averaged["transformer"]["head.head.weight"])

    train(build(codec, teacher, grid_steps=8), train_config(max_steps=2), tmp_path / "cut")
    train(build(codec, teacher, grid_steps=8), train_config(max_steps=4), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_student_teacher_and_average_are_all_compiled(
    codec: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: compiled.append(module))
    objective = build(codec, teacher)
    trainer = Trainer(objective, train_config(compile=True), None, None)
    assert objective.teacher is not None
    wanted = [objective.model, objective.teacher["transformer"], trainer.ema.modules["transformer"]]
    assert [id(module) for module in compiled] == [id(module) for module in wanted]


def test_its_card_says_how_it_streams(codec: Path, teacher: Path) -> None:
    card = build(codec, teacher).scheduler()
    assert (card.trained_steps, card.sampler, card.window_frames, card.sink_frames) == ((4,), "renoise", 8, 2)


def test_a_grid_of_one_step_is_refused(codec: Path, teacher: Path) -> None:
    with pytest.raises(ValueError, match="grid_steps is 1; it must be at least 2"):
        build(codec, teacher, grid_steps=1)


@pytest.mark.parametrize(("grid_steps", "segments"), [(8, 2), (6, 3), (4, 4), (4, 1)])
def test_the_target_of_a_segment_is_two_euler_steps_to_its_end(
    codec: Path, teacher: Path, grid_steps: int, segments: int
) -> None:
    """Teacher's step to the next level, the average's from there to the segment's end, seen as one step from here."""
    objective = build(codec, teacher, grid_steps=grid_steps, segments=segments)
    x_t, x0_teacher, x0_ema = torch.randn(3, 5, dtype=torch.float64, generator=rng()).unbind(0)
    for index in range(grid_steps):
        end = int(objective.segment_end(torch.tensor(index)))
        assert end == next(e for e in range(index + 1, grid_steps + 1) if e % (grid_steps // segments) == 0)
        sigma, following, last = (objective.grid[i].double() for i in (index, index + 1, end))
        x_next = x0_teacher + (x_t - x0_teacher) * following / sigma
        x_end = x_next if end == index + 1 else x0_ema + (x_next - x0_ema) * last / following
        share = objective.teacher_share(sigma, following, last)
        target = share * x0_teacher + (1 - share) * x0_ema
        assert torch.allclose(target + (x_t - target) * last / sigma, x_end, atol=1e-12)


def test_segments_choose_the_sampler_and_must_divide_the_grid(codec: Path, teacher: Path) -> None:
    assert build(codec, teacher, segments=4, grid_steps=8).scheduler().sampler == "euler"
    assert build(codec, teacher).scheduler().sampler == "renoise"
    with pytest.raises(ValueError, match="must divide grid_steps"):
        build(codec, teacher, segments=3, grid_steps=8)
