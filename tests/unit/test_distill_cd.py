"""Causal consistency distillation against its definition written out, and where gradients go."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen.flow import step_sigmas
from streamgen.visibility import Visibility
from streamgen_distill import cd
from streamgen_distill.cd import ConsistencyObjective
from streamgen_train.checkpoint import load_modules
from streamgen_train.clips import Kind
from streamgen_train.loop import Trainer, train
from streamgen_train.objectives import ar
from streamgen_train.objectives.views import joint_view
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


def build(codec: Path, teacher: Path, **changes: Any) -> ConsistencyObjective:
    """A model that answers with x0, as the shipped one: at sigma 0 it is not the identity by itself."""
    torch.manual_seed(1)
    values = ar_values(codec, teacher_from=str(teacher), **{"sample_steps": 4, **changes})
    return cd.build(cd.Config(**values | {"model": dataclasses.replace(values["model"], prediction="x0")}))


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


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["single", "story", "gap"])
def test_loss_equals_the_definition_written_out(
    codec: Path, teacher: Path, kind: Kind, guidance: float, segments: int
) -> None:
    """The student's one Euler step to the segment's end lands where the teacher's step and the average's then do.

    (`predict_x0` itself is held against streaming in test_train_ar.)
    """
    objective, ema = three_models(codec, teacher, grid_steps=4, guidance=guidance, segments=segments)
    batch = objective.make_batch(kind, 3, rng())
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, turn(), ema)

    torch.manual_seed(5)
    index = torch.randint(4, batch.scored_BG.shape)
    eps = torch.randn_like(batch.x0_BFCHW)
    grid = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0])  # u = 1, 3/4, 1/2, 1/4 warped by 5, then clean
    assert torch.allclose(objective.grid, grid)
    ends = {1: [4, 4, 4, 4], 2: [2, 2, 4, 4]}[segments]
    levels = (index, index + 1, torch.tensor(ends)[index])
    sigma, following, end = (grid[i].repeat_interleave(2, 1) for i in levels)
    assert objective.teacher is not None
    with torch.no_grad():
        x_t = (1 - at(sigma)) * batch.x0_BFCHW + at(sigma) * eps
        cond = objective.predict_x0(objective.teacher, batch, x_t, sigma)
        nothing = torch.full_like(batch.ids_BGL, -1)
        uncond = objective.predict_x0(objective.teacher, batch, x_t, sigma, nothing)
        velocity = (x_t - (uncond + guidance * (cond - uncond))) / at(sigma)
        x_next = x_t + at(following - sigma) * velocity
        velocity = (x_next - objective.predict_x0(ema, batch, x_next, following)) / at(following)
        x_end = torch.where(at(following == end), x_next, x_next + at(end - following) * velocity)
        target = (x_end - at(end / sigma) * x_t) / at(1 - end / sigma)
        student = objective.predict_x0(objective.modules(), batch, x_t, sigma)
        error = (student - target).square().mean((2, 3, 4))
    scored = batch.scored_BG.repeat_interleave(2, 1)
    assert float(loss.detach()) == pytest.approx(float((error * scored).mean()), rel=1e-4)
    assert float(metrics[f"cd_{kind}"]) == pytest.approx(float(error.mean()), rel=1e-4)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("visibility", ["same_level", "latest", "joint"])
def test_loss_under_other_visibilities(codec: Path, teacher: Path, visibility: Visibility, segments: int) -> None:
    """All of a clip's blocks move together: teacher, average and student see the others at the levels they are at.

    (`predict_x0` under each visibility is held against streaming in test_train_visibility.py.)
    """
    changes = {"clip_blocks": 5, "visibility": {visibility: 1.0}, "joint_blocks": 2}
    objective, ema = three_models(codec, teacher, grid_steps=4, guidance=2.0, segments=segments, **changes)
    batch = objective.make_batch("story", 3, rng())
    batch.view = joint_view(5, 2, [1, 3, 5]) if visibility == "joint" else objective.view(visibility)
    torch.manual_seed(5)
    loss, metrics = objective.loss(batch, turn(), ema)

    torch.manual_seed(5)
    index = objective.grid_index(batch)
    eps = torch.randn_like(batch.x0_BFCHW)
    ends = {1: [4, 4, 4, 4], 2: [2, 2, 4, 4]}[segments]
    levels = (index, index + 1, torch.tensor(ends)[index])
    sigma, following, end = (objective.grid[i].repeat_interleave(2, 1) for i in levels)
    assert objective.teacher is not None
    with torch.no_grad():
        x_t = (1 - at(sigma)) * batch.x0_BFCHW + at(sigma) * eps
        x_next = x_t + at(following - sigma) * (x_t - objective.teacher_x0(batch, x_t, sigma)) / at(sigma)
        velocity = (x_next - objective.predict_x0(ema, batch, x_next, following)) / at(following)
        x_end = torch.where(at(following == end), x_next, x_next + at(end - following) * velocity)
        target = (x_end - at(end / sigma) * x_t) / at(1 - end / sigma)
        error = (objective.predict_x0(objective.modules(), batch, x_t, sigma) - target).square().mean((2, 3, 4))
    assert float(loss.detach()) == pytest.approx(float(error.mean()), rel=1e-4)
    assert metrics.keys() == {f"cd_{visibility}"}


def test_places_on_the_grid_of_each_visibility(codec: Path, teacher: Path) -> None:
    objective = build(codec, teacher, grid_steps=12, clip_blocks=5, joint_blocks=2)
    objective.prepare(CPU, torch.float32)
    batch = objective.make_batch("story", 1, rng())
    found = {}
    for visibility in ("clean", "latest", "same_level", "lagged"):
        batch.view, batch.scored_BG = objective.view(visibility), torch.ones(500, 5)
        found[visibility] = objective.grid_index(batch)
        assert found[visibility].unique().tolist() == list(range(12))
        equal = (found[visibility] == found[visibility][:, :1]).all(1)
        assert equal.all() if visibility in ("same_level", "lagged") else not equal.all()
    batch.view = joint_view(5, 2, [1, 3, 5])
    joint = objective.grid_index(batch)
    assert (joint // 6 == torch.tensor([0, 1, 0, 1, 0])).all()  # the newest block of a window is in its first step
    assert (joint % 6 == joint[:, :1] % 6).all() and joint[:, 0].unique().tolist() == list(range(6))


def test_a_student_sees_only_what_its_teacher_was_trained_to_see(codec: Path, tmp_path: Path) -> None:
    def trained(name: str, **changes: Any) -> Path:
        config = ar.Config(**ar_values(codec, clip_blocks=5, **changes))
        settings = {"objective": {"name": name, **dataclasses.asdict(config)}}
        train(ar.build(config), train_config(max_steps=1), tmp_path / f"{name}{len(changes)}", resolved=settings)
        return tmp_path / f"{name}{len(changes)}"

    shares = {"visibility": {"clean": 0.5, "joint": 0.5}, "joint_blocks": 2}
    teacher = trained("ar", **shares)

    def prepare(teacher: Path, **changes: Any) -> None:
        torch.manual_seed(1)
        values = ar_values(codec, clip_blocks=5, teacher_from=str(teacher), **changes)
        cd.build(cd.Config(**values)).prepare(CPU, torch.float32)

    prepare(teacher)
    prepare(teacher, **shares)
    with pytest.raises(UserError, match="trained for the visibility clean, joint, and not for same_level"):
        prepare(teacher, visibility={"clean": 0.5, "same_level": 0.5})
    with pytest.raises(UserError, match="has joint_blocks 2, its student 3"):
        prepare(teacher, **shares | {"joint_blocks": 3})
    checkpoint = next((teacher / "checkpoints").glob("step_*"))
    with pytest.raises(UserError, match="not for same_level"):
        prepare(checkpoint, visibility={"same_level": 1.0})
    loose = tmp_path / "loose" / "of" / "its" / "run"
    shutil.copytree(checkpoint, loose)
    prepare(loose, visibility={"same_level": 1.0})  # nothing says what it was trained for
    with pytest.raises(UserError, match="is a bidirectional run; this student needs an autoregressive teacher"):
        prepare(trained("bidirectional"))


def test_a_teacher_of_another_shape_is_refused(codec: Path, teacher: Path) -> None:
    model = dataclasses.replace(ar_values(codec)["model"], in_channels=8, out_channels=8)
    values = ar_values(codec, teacher_from=str(teacher), model=model)
    with pytest.raises(UserError, match=r"of another shape: transformer\.head\.head"):
        cd.build(cd.Config(**values)).prepare(CPU, torch.float32)


def test_the_last_step_of_the_grid_learns_the_teachers_x0(codec: Path, teacher: Path) -> None:
    """Whatever the average says there: at sigma 0 it must be the identity."""
    objective, ema = three_models(codec, teacher, grid_steps=2)
    batch = objective.make_batch("single", 1, rng())

    def drawn(seed: int) -> int:
        torch.manual_seed(seed)
        return int(torch.randint(2, (1, 1)))

    seed = next(seed for seed in range(50) if drawn(seed) == 1)
    torch.manual_seed(seed)
    loss, _ = objective.loss(batch, turn(), ema)
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
    assert float(objective.loss(batch, turn(), ema)[0].detach()) == float(loss.detach())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gradients_go_through_the_student_alone(codec: Path, teacher: Path, guidance: float) -> None:
    objective, ema = three_models(codec, teacher, guidance=guidance)
    for module in ema.values():
        module.requires_grad_(True)  # would take a gradient if it were offered one
    objective.loss(objective.make_batch("story", 2, rng()), turn(), ema)[0].backward()
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
    """Re-noising works with every step count whose levels are on the grid; segments with their own count alone."""
    card = build(codec, teacher).scheduler()
    assert (card.trained_steps, card.sampler, card.window_frames, card.sink_frames) == ((4, 2, 1), "renoise", 8, 2)
    assert build(codec, teacher, grid_steps=6).scheduler().trained_steps == (2, 1)
    assert build(codec, teacher, grid_steps=6, trained_steps=(3, 1)).scheduler().trained_steps == (3, 1)
    card = build(codec, teacher, grid_steps=6, segments=2).scheduler()
    assert (card.trained_steps, card.sampler) == ((2,), "euler")
    assert build(codec, teacher, segments=4, trained_steps=(4,)).scheduler().trained_steps == (4,)


def test_segments_end_at_the_noise_levels_of_the_sampler(codec: Path, teacher: Path) -> None:
    objective = build(codec, teacher, grid_steps=12, segments=3)
    ends = objective.grid[objective.segment_end(torch.arange(12))].unique().flip(0)
    card = objective.scheduler()
    sampled = torch.tensor([*step_sigmas(card.trained_steps[0], card.shift), 0.0])
    torch.testing.assert_close(ends, sampled[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_steps": 1}, "grid_steps is 1; it must be at least 2"),
        ({"grid_steps": 6, "segments": 4}, r"segments is 4; it must divide grid_steps \(6\)"),
        ({"segments": 0}, "segments is 0"),
        ({"segments": 2, "grid_shift": 3.0}, "they must be equal"),
        ({"grid_shift": 8.0}, "grid_shift is 8.0 and sample_shift 5.0"),
        ({"segments": 4, "trained_steps": (4, 2, 1)}, "it is not told where its segment ends. Set segments=1"),
        ({"trained_steps": (4, 5)}, r"trained_steps has 5; each count must divide grid_steps \(48\)"),
        ({"trained_steps": ()}, "it must hold one or more counts"),
        ({"trained_steps": (4, 0)}, "counts of at least 1"),
        ({"visibility": {"joint": 1.0}, "joint_blocks": 3, "grid_steps": 4}, "it must divide grid_steps"),
        ({"visibility": {"joint": 1.0}, "joint_blocks": 3, "segments": 4}, "segments is 4 and joint_blocks 3"),
    ],
)
def test_grids_that_do_not_work_are_refused(codec: Path, teacher: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(codec, teacher, **changes)
